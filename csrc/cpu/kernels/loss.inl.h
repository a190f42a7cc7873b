// Softmax of rows (a reduction along a vector) and of columns (vectors side by side), and the pieces of cross entropy.
// Bound: the exponential; a row or column is visited three times, mostly in the first-level cache.
#pragma once

#include "cpu/kernels/loss.h"
#include "cpu/kernels/math.inl.h"

namespace fastconv::cpu {
namespace {

inline float logarithm_of(float a) { return __builtin_logf(a); }
inline double logarithm_of(double a) { return __builtin_log(a); }

template <class V> V larger(V a, V b) { return a > b ? a : b; }

// Lanes [n, all) of a replaced.
template <class T, class V> V fill_tail(V a, int64_t n, T value) {
  for (int64_t i = n; i < Lanes<T>::kCount; ++i) a[i] = value;
  return a;
}

template <class T, class V> T sum_lanes(V a) {
  T sum = 0;
  for (int64_t i = 0; i < Lanes<T>::kCount; ++i) sum += a[i];
  return sum;
}

template <class T> T row_maximum(const T* x, int64_t n) {
  constexpr T kLowest = -static_cast<T>(__builtin_inff());
  auto best = set1(kLowest);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    auto a = load_lanes<tail.value>(x + i, lanes);
    if constexpr (tail.value) a = fill_tail(a, lanes, kLowest);
    best = larger(a, best);
  });
  T maximum = best[0];
  for (int64_t i = 1; i < Lanes<T>::kCount; ++i)
    if (best[i] > maximum) maximum = best[i];
  return maximum;
}

// y = exp(x - maximum) unless null; their sum.
template <class T> T row_exponentials(const T* x, T* y, int64_t n, T maximum) {
  typename Lanes<T>::V sum{};
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    auto e = exp_lanes(load_lanes<tail.value>(x + i, lanes) - set1(maximum));
    if (y) store_lanes<tail.value>(y + i, e, lanes);
    if constexpr (tail.value) e = fill_tail(e, lanes, T{0});
    sum = sum + e;
  });
  return sum_lanes<T>(sum);
}

template <class T> void row_sums(const T* x, int64_t n, T* maximum, T* sum) {
  *maximum = row_maximum(x, n);
  *sum = row_exponentials<T>(x, nullptr, n, *maximum);
}

template <class T> void softmax_row(const T* x, T* y, int64_t n, bool logarithm) {
  const T maximum = row_maximum(x, n);
  const T sum = row_exponentials<T>(x, logarithm ? nullptr : y, n, maximum);
  const T log_sum = logarithm ? logarithm_of(sum) : T{0};
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto value = logarithm ? load_lanes<tail.value>(x + i, lanes) - set1(maximum) - set1(log_sum)
                                 : load_lanes<tail.value>(y + i, lanes) / set1(sum);
    store_lanes<tail.value>(y + i, value, lanes);
  });
}

// softmax: dx = y (dy - sum of dy y); log softmax: dx = dy - exp(y) sum of dy
template <class T> void softmax_row_backward(const T* dy, const T* y, T* dx, int64_t n, bool logarithm) {
  typename Lanes<T>::V sum{};
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {  // lanes beyond the tail are loaded as zero
    const auto g = load_lanes<tail.value>(dy + i, lanes);
    sum = logarithm ? sum + g : fma(g, load_lanes<tail.value>(y + i, lanes), sum);
  });
  const auto total = set1(sum_lanes<T>(sum));
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto g = load_lanes<tail.value>(dy + i, lanes), p = load_lanes<tail.value>(y + i, lanes);
    store_lanes<tail.value>(dx + i, logarithm ? g - exp_lanes(p) * total : p * (g - total), lanes);
  });
}

template <class T> void softmax_columns(const T* x, T* y, int64_t n, int64_t step, int64_t columns, bool logarithm) {
  using V = typename Lanes<T>::V;
  for_lanes<T>(columns, [&](auto tail, int64_t c, int64_t lanes) {
    V maximum = set1(-static_cast<T>(__builtin_inff())), sum{};
    for (int64_t i = 0; i < n; ++i) maximum = larger(load_lanes<tail.value>(x + i * step + c, lanes), maximum);
    for (int64_t i = 0; i < n; ++i) {
      const V e = exp_lanes(load_lanes<tail.value>(x + i * step + c, lanes) - maximum);
      if (!logarithm) store_lanes<tail.value>(y + i * step + c, e, lanes);
      sum = sum + e;
    }
    if (logarithm)
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] = logarithm_of(sum[lane]);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * step + c;
      const V value = logarithm ? load_lanes<tail.value>(x + at, lanes) - maximum - sum
                                : load_lanes<tail.value>(y + at, lanes) / sum;
      store_lanes<tail.value>(y + at, value, lanes);
    }
  });
}

template <class T>
void softmax_columns_backward(const T* dy, const T* y, T* dx, int64_t n, int64_t step, int64_t columns,
                              bool logarithm) {
  using V = typename Lanes<T>::V;
  for_lanes<T>(columns, [&](auto tail, int64_t c, int64_t lanes) {
    V total{};
    for (int64_t i = 0; i < n; ++i) {
      const V g = load_lanes<tail.value>(dy + i * step + c, lanes);
      total = logarithm ? total + g : fma(g, load_lanes<tail.value>(y + i * step + c, lanes), total);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * step + c;
      const V g = load_lanes<tail.value>(dy + at, lanes), p = load_lanes<tail.value>(y + at, lanes);
      store_lanes<tail.value>(dx + at, logarithm ? g - exp_lanes(p) * total : p * (g - total), lanes);
    }
  });
}

// Finished in double, because the terms cancel where smoothed labels are met; p[target] - 1 is minus the sum of the
// others, because it cancels where the prediction is right.
template <class T>
void cross_entropy_row_backward(const T* x, T* dx, int64_t n, int64_t target, double hard, double smooth,
                                double all_weights, const T* weight) {
  row_exponentials(x, dx, n, row_maximum(x, n));
  const double own = dx[target];
  double others = 0;
  for (int64_t i = 0; i < target; ++i) others += dx[i];
  for (int64_t i = target + 1; i < n; ++i) others += dx[i];
  const double sum = others + own, spread = smooth * all_weights / sum, scale = hard / sum + spread;
  const double own_share = smooth * (weight ? weight[target] : T{1});
  for (int64_t i = 0; i < n; ++i) dx[i] = static_cast<T>(scale * dx[i] - smooth * (weight ? weight[i] : T{1}));
  dx[target] = static_cast<T>(spread * own - own_share - hard * (others / sum));
}

template <class T> constexpr LossKernels<T> loss_kernels() {
  return {softmax_row<T>, softmax_row_backward<T>,      softmax_columns<T>, softmax_columns_backward<T>,
          row_sums<T>,    cross_entropy_row_backward<T>};
}

}  // namespace
}  // namespace fastconv::cpu

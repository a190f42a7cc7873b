// Batch normalisation on blocks of rows. Bound: memory; the vectors over channels stay in the first-level cache, and
// sums are taken over four rows before they are added to a channel's, which hides the latency and halves the rounding
// error.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/lanes.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kSumRows = 4;

// Two passes over a block that stays in cache: no cancellation however large the mean is.
template <class T> void moments(const T* x, int64_t rows, int64_t channels, T* mean, T* squares) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  int64_t row = 0;
  for (; row + kSumRows <= rows; row += kSumRows) {
    const T* p = x + row * channels;
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const auto a = load_lanes<tail.value>(p + c, n), b = load_lanes<tail.value>(p + channels + c, n);
      const auto d = load_lanes<tail.value>(p + 2 * channels + c, n),
                 e = load_lanes<tail.value>(p + 3 * channels + c, n);
      store_lanes<tail.value>(mean + c, load_lanes<tail.value>(mean + c, n) + ((a + b) + (d + e)), n);
    });
  }
  for (; row < rows; ++row)
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      store_lanes<tail.value>(
          mean + c, load_lanes<tail.value>(mean + c, n) + load_lanes<tail.value>(x + row * channels + c, n), n);
    });
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<T>(rows);

  for (row = 0; row + kSumRows <= rows; row += kSumRows) {
    const T* p = x + row * channels;
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const auto m = load_lanes<tail.value>(mean + c, n);
      const auto a = load_lanes<tail.value>(p + c, n) - m, b = load_lanes<tail.value>(p + channels + c, n) - m;
      const auto d = load_lanes<tail.value>(p + 2 * channels + c, n) - m;
      const auto e = load_lanes<tail.value>(p + 3 * channels + c, n) - m;
      const auto sum = fma(a, a, b * b) + fma(d, d, e * e);
      store_lanes<tail.value>(squares + c, load_lanes<tail.value>(squares + c, n) + sum, n);
    });
  }
  for (; row < rows; ++row)
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const auto a = load_lanes<tail.value>(x + row * channels + c, n) - load_lanes<tail.value>(mean + c, n);
      store_lanes<tail.value>(squares + c, fma(a, a, load_lanes<tail.value>(squares + c, n)), n);
    });
}

// (x - mean) and z of one vector, and what the clamp does to values and gradients.
template <bool TAIL, class T> struct Normalized {
  typename Lanes<T>::V distance, z;
  Normalized(const BatchNormRows<T>& t, int64_t at, int64_t c, int64_t n) {
    distance = load_lanes<TAIL>(t.x + at, n) - load_lanes<TAIL>(t.mean + c, n);
    z = fma(distance, load_lanes<TAIL>(t.scale + c, n), load_lanes<TAIL>(t.bias + c, n));
    if (t.residual) z = z + load_lanes<TAIL>(t.residual + at, n);
  }
};

template <Clamp CLAMP, class T, class V> V clamp_value(V z) {
  if constexpr (CLAMP == Clamp::kReLU) return z <= V{} ? V{} : z;
  if constexpr (CLAMP == Clamp::kReLU6) return clamp(z, V{}, set1(T{6}));
  return z;
}

template <Clamp CLAMP, class T, class V> V clamp_gradient(V dy, V z) {
  if constexpr (CLAMP != Clamp::kNone) dy = z <= V{} ? V{} : dy;
  if constexpr (CLAMP == Clamp::kReLU6) dy = z >= set1(T{6}) ? V{} : dy;
  return dy;
}

template <Clamp CLAMP, class T> void normalize(const BatchNormRows<T>& t, T* y) {
  for (int64_t row = 0; row < t.rows; ++row)
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const int64_t at = row * t.channels + c;
      const Normalized<tail.value, T> a(t, at, c, n);
      store_lanes<tail.value>(y + at, clamp_value<CLAMP, T>(a.z), n);
    });
}

template <Clamp CLAMP, class T> void backward_sums(const BatchNormRows<T>& t, const T* dy, T* dz, T* sum, T* dot) {
  using V = typename Lanes<T>::V;
  for (int64_t c = 0; c < t.channels; ++c) sum[c] = dot[c] = 0;
  for (int64_t row = 0; row < t.rows; row += kSumRows) {
    const int64_t end = row + kSumRows < t.rows ? row + kSumRows : t.rows;
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      V s{}, d{};
      const auto step = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t at = i * t.channels + c;
        const Normalized<tail.value, T> a(t, at, c, n);
        const V g = clamp_gradient<CLAMP, T>(load_lanes<tail.value>(dy + at, n), a.z);
        if (dz) store_lanes<tail.value>(dz + at, g, n);
        s = s + g;
        d = fma(g, a.distance, d);
      };
      if (end - row == kSumRows) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kSumRows; ++i) step(row + i);
      } else {
        for (int64_t i = row; i < end; ++i) step(i);
      }
      store_lanes<tail.value>(sum + c, load_lanes<tail.value>(sum + c, n) + s, n);
      store_lanes<tail.value>(dot + c, load_lanes<tail.value>(dot + c, n) + d, n);
    });
  }
}

template <Clamp CLAMP, class T>
void backward_input(const BatchNormRows<T>& t, const T* dy, const T* a, const T* b, T* dx) {
  for (int64_t row = 0; row < t.rows; ++row)
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const int64_t at = row * t.channels + c;
      const Normalized<tail.value, T> x(t, at, c, n);
      const auto g = clamp_gradient<CLAMP, T>(load_lanes<tail.value>(dy + at, n), x.z);
      const auto centred = g - load_lanes<tail.value>(a + c, n) - x.distance * load_lanes<tail.value>(b + c, n);
      store_lanes<tail.value>(dx + at, centred * load_lanes<tail.value>(t.scale + c, n), n);
    });
}

template <Clamp CLAMP, class T> void backward_constant(const BatchNormRows<T>& t, const T* dy, T* dx, T* dz) {
  for (int64_t row = 0; row < t.rows; ++row)
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const int64_t at = row * t.channels + c;
      auto g = load_lanes<tail.value>(dy + at, n);
      if constexpr (CLAMP != Clamp::kNone) g = clamp_gradient<CLAMP, T>(g, Normalized<tail.value, T>(t, at, c, n).z);
      store_lanes<tail.value>(dx + at, g * load_lanes<tail.value>(t.scale + c, n), n);
      if (dz) store_lanes<tail.value>(dz + at, g, n);
    });
}

template <class T> constexpr BatchNormKernels<T> batch_norm_kernels() {
  return {
      moments<T>,
      {normalize<Clamp::kNone, T>, normalize<Clamp::kReLU, T>, normalize<Clamp::kReLU6, T>},
      {backward_sums<Clamp::kNone, T>, backward_sums<Clamp::kReLU, T>, backward_sums<Clamp::kReLU6, T>},
      {backward_input<Clamp::kNone, T>, backward_input<Clamp::kReLU, T>, backward_input<Clamp::kReLU6, T>},
      {backward_constant<Clamp::kNone, T>, backward_constant<Clamp::kReLU, T>, backward_constant<Clamp::kReLU6, T>},
  };
}

}  // namespace
}  // namespace fastconv::cpu

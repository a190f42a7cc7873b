// Batch normalisation on blocks of rows. Bound: memory; the vectors over channels stay in the first-level cache, and
// sums are taken over four rows before they are added to a channel's, which hides the latency and halves the rounding
// error; they fetch what comes next themselves (rows.inl.h).
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/elementwise.inl.h"
#include "cpu/kernels/pool2d.inl.h"
#include "cpu/kernels/rows.inl.h"

namespace fastconv::cpu {
namespace {

template <class T> void moments(const T* x, int64_t rows, int64_t channels, const T* near, T* mean, T* squares) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  Fetch<T> fetch{x + rows_ahead<T>(channels) * channels};
  int64_t row = 0;
  for (; row + kSumRows <= rows; row += kSumRows) {
    const T* p = x + row * channels;
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const auto m = load_lanes<tail.value>(near + c, n);
      const auto a = load_lanes<tail.value>(p + c, n) - m, b = load_lanes<tail.value>(p + channels + c, n) - m;
      const auto d = load_lanes<tail.value>(p + 2 * channels + c, n) - m;
      const auto e = load_lanes<tail.value>(p + 3 * channels + c, n) - m;
#pragma GCC unroll 4
      for (int i = 0; i < kSumRows; ++i) fetch(n);
      store_lanes<tail.value>(mean + c, load_lanes<tail.value>(mean + c, n) + ((a + b) + (d + e)), n);
      const auto sum = fma(a, a, b * b) + fma(d, d, e * e);
      store_lanes<tail.value>(squares + c, load_lanes<tail.value>(squares + c, n) + sum, n);
    });
  }
  for (; row < rows; ++row)
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const auto a = load_lanes<tail.value>(x + row * channels + c, n) - load_lanes<tail.value>(near + c, n);
      store_lanes<tail.value>(mean + c, load_lanes<tail.value>(mean + c, n) + a, n);
      store_lanes<tail.value>(squares + c, fma(a, a, load_lanes<tail.value>(squares + c, n)), n);
    });
  for (int64_t c = 0; c < channels; ++c) {
    const T distance = mean[c] / static_cast<T>(rows), left = squares[c] - mean[c] * distance;
    squares[c] = left < 0 ? T{0} : left;
    mean[c] = near[c] + distance;
  }
}

struct NoActivation {
  template <class T, class V> static V forward(V x, V) { return x; }
  template <class T, class V> static V backward(V dy, V, V) { return dy; }
};

// (x - mean) and z of one vector.
template <bool TAIL, class T> struct Normalized {
  typename Lanes<T>::V distance, z;
  Normalized(const BatchNormRows<T>& t, bool residual, int64_t at, int64_t c, int64_t n) {
    distance = load_lanes<TAIL>(t.x + at, n) - load_lanes<TAIL>(t.mean + c, n);
    z = fma(distance, load_lanes<TAIL>(t.scale + c, n), load_lanes<TAIL>(t.bias + c, n));
    if (residual) z = z + load_lanes<TAIL>(t.residual + at, n);
  }
};

// body(tail, offset in the block, channel, lanes) for every vector of the block.
template <class T, class Body>
__attribute__((always_inline)) inline void for_rows(const BatchNormRows<T>& t, Body&& body) {
  for (int64_t row = 0; row < t.rows; ++row)
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) { body(tail, row * t.channels + c, c, n); });
}

// Fetches the lines of x that the same vector of a later row will need.
template <class T> inline __attribute__((always_inline)) void prefetch_later(const T* p) {
  constexpr int64_t kBytes = 2048;
  prefetch(reinterpret_cast<const float*>(p + kBytes / static_cast<int64_t>(sizeof(T))));
}

template <class F, class T> void normalize(const BatchNormRows<T>& t, T* y) {
  using V = typename Lanes<T>::V;
  for_rows(t, [&](auto tail, int64_t at, int64_t c, int64_t n) {
    prefetch_later(t.x + at);
    const Normalized<tail.value, T> a(t, t.residual, at, c, n);
    put_lanes<tail.value>(t.streaming, y + at, F::template forward<T>(a.z, V{}), n);
  });
}

// RESIDUAL, STORE: whether there are a residual and a dz; a branch an element took a quarter of the time.
template <class F, bool RESIDUAL, bool STORE, class T>
void backward_sums_of(const BatchNormRows<T>& t, const T* dy, T* dz, T* sum, T* dot) {
  using V = typename Lanes<T>::V;
  for (int64_t c = 0; c < t.channels; ++c) sum[c] = dot[c] = 0;
  const int64_t ahead = rows_ahead<T>(t.channels) * t.channels;
  Fetch<T> fetch_x{t.x + ahead}, fetch_dy{dy + ahead}, fetch_residual{t.residual + ahead}, fetch_dz{dz + ahead};
  for (int64_t row = 0; row < t.rows; row += kSumRows) {
    const int64_t end = row + kSumRows < t.rows ? row + kSumRows : t.rows;
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      V s{}, d{};
      const auto step = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t at = i * t.channels + c;
        fetch_x(n);
        fetch_dy(n);
        if (RESIDUAL) fetch_residual(n);
        if (STORE) fetch_dz(n);
        const Normalized<tail.value, T> a(t, RESIDUAL, at, c, n);
        const V g = F::template backward<T>(load_lanes<tail.value>(dy + at, n), a.z, V{});
        if (STORE) store_lanes<tail.value>(dz + at, g, n);
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

template <class F, class T> void backward_sums(const BatchNormRows<T>& t, const T* dy, T* dz, T* sum, T* dot) {
  if (t.residual)
    dz ? backward_sums_of<F, true, true>(t, dy, dz, sum, dot) : backward_sums_of<F, true, false>(t, dy, dz, sum, dot);
  else
    dz ? backward_sums_of<F, false, true>(t, dy, dz, sum, dot) : backward_sums_of<F, false, false>(t, dy, dz, sum, dot);
}

template <class F, class T> void backward_input(const BatchNormRows<T>& t, const T* dy, const T* a, const T* b, T* dx) {
  using V = typename Lanes<T>::V;
  for_rows(t, [&](auto tail, int64_t at, int64_t c, int64_t n) {
    prefetch_later(t.x + at);
    prefetch_later(dy + at);
    const Normalized<tail.value, T> x(t, t.residual, at, c, n);
    const V g = F::template backward<T>(load_lanes<tail.value>(dy + at, n), x.z, V{});
    const V centred = g - load_lanes<tail.value>(a + c, n) - x.distance * load_lanes<tail.value>(b + c, n);
    put_lanes<tail.value>(t.streaming, dx + at, centred * load_lanes<tail.value>(t.scale + c, n), n);
  });
}

template <class F, class T> void backward_constant(const BatchNormRows<T>& t, const T* dy, T* dx, T* dz) {
  using V = typename Lanes<T>::V;
  for_rows(t, [&](auto tail, int64_t at, int64_t c, int64_t n) {
    const Normalized<tail.value, T> x(t, t.residual, at, c, n);
    const V g = F::template backward<T>(load_lanes<tail.value>(dy + at, n), x.z, V{});
    store_lanes<tail.value>(dx + at, g * load_lanes<tail.value>(t.scale + c, n), n);
    if (dz) store_lanes<tail.value>(dz + at, g, n);
  });
}

// x at the place of a window's maximum; each element fetches the one `ahead` of it into L2.
template <int R, int S, bool TAIL, class T>
__attribute__((always_inline)) inline typename Lanes<T>::V at_place(const PoolRow<T>& t, const PoolWindow& window,
                                                                    typename Lanes<T>::I place, int64_t c, int64_t n,
                                                                    int64_t ahead) {
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  const int64_t columns = S > 0 ? S : window.columns;
  typename Lanes<T>::V found{};
  for_window<R, S>(t, window, [&](int64_t r, int64_t s, int64_t at) {
    const I here = I{} + static_cast<Int>(r * columns + s);
    found = place == here ? load_lanes<TAIL>(t.x + at + c, n) : found;
    prefetch_l2(reinterpret_cast<const float*>(t.x + at + c + ahead));
  });
  return found;
}

template <class F, class T> void pooled_sums(const PoolRow<T>& t, const BatchNormRows<T>& a, T* sum, T* dot) {
  using V = typename Lanes<T>::V;
  constexpr int64_t kAhead = 64 * 1024 / static_cast<int64_t>(sizeof(T));
  const int64_t ahead = t.next_row > 0 ? (kAhead / t.next_row + 1) * t.next_row : 0;  // some bands
  for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
    const V mean = load_lanes<tail.value>(a.mean + c, n), scale = load_lanes<tail.value>(a.scale + c, n);
    const V bias = load_lanes<tail.value>(a.bias + c, n);
    V s = load_lanes<tail.value>(sum + c, n), d = load_lanes<tail.value>(dot + c, n);
    for_outputs(t, [&](auto size, int64_t q) {
      const int64_t at = q * t.pixel + c;
      const auto place = load_places<tail.value, T>(t.place + at, n);
      const V distance = at_place<size.rows, size.columns, tail.value>(t, t.windows[q], place, c, n, ahead) - mean;
      const V g = F::template backward<T>(load_lanes<tail.value>(t.y + at, n), fma(distance, scale, bias), V{});
      s = s + g;
      d = fma(g, distance, d);
    });
    store_lanes<tail.value>(sum + c, s, n);
    store_lanes<tail.value>(dot + c, d, n);
  });
}

template <class F, class T>
void pooled_input(const PoolRow<T>& t, const BatchNormRows<T>& a, const T* mean_dz, const T* slope) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  for_outputs(t, [&](auto size, int64_t q) {
    const PoolWindow& window = t.windows[q];
    const int64_t columns = size.columns > 0 ? size.columns : window.columns;
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const V mean = load_lanes<tail.value>(a.mean + c, n), scale = load_lanes<tail.value>(a.scale + c, n);
      const I place = load_places<tail.value, T>(t.place + q * t.pixel + c, n);
      const V highest = at_place<size.rows, size.columns, tail.value>(t, window, place, c, n, t.next_row) - mean;
      const V g = F::template backward<T>(load_lanes<tail.value>(t.y + q * t.pixel + c, n),
                                          fma(highest, scale, load_lanes<tail.value>(a.bias + c, n)), V{});
      for_window<size.rows, size.columns>(t, window, [&](int64_t r, int64_t s, int64_t at) {
        const I here = I{} + static_cast<Int>(r * columns + s);
        const V distance = load_lanes<tail.value>(t.x + at + c, n) - mean;
        const V centred = (place == here ? g : V{}) - load_lanes<tail.value>(mean_dz + c, n) -
                          distance * load_lanes<tail.value>(slope + c, n);
        put_lanes<tail.value>(t.streaming, t.dx + at + c, centred * scale, n);
      });
    });
  });
}

template <class T> constexpr BatchNormKernels<T> batch_norm_kernels() {
  return {
      moments<T>,
      {normalize<NoActivation, T>, normalize<ReLU, T>, normalize<ReLU6, T>, normalize<SiLU, T>, normalize<Sigmoid, T>,
       normalize<Tanh, T>, normalize<Hardswish, T>},
      {backward_sums<NoActivation, T>, backward_sums<ReLU, T>, backward_sums<ReLU6, T>, backward_sums<SiLU, T>,
       backward_sums<Sigmoid, T>, backward_sums<Tanh, T>, backward_sums<Hardswish, T>},
      {backward_input<NoActivation, T>, backward_input<ReLU, T>, backward_input<ReLU6, T>, backward_input<SiLU, T>,
       backward_input<Sigmoid, T>, backward_input<Tanh, T>, backward_input<Hardswish, T>},
      {backward_constant<NoActivation, T>, backward_constant<ReLU, T>, backward_constant<ReLU6, T>,
       backward_constant<SiLU, T>, backward_constant<Sigmoid, T>, backward_constant<Tanh, T>,
       backward_constant<Hardswish, T>},
      {pooled_sums<NoActivation, T>, pooled_sums<ReLU, T>, pooled_sums<ReLU6, T>, pooled_sums<SiLU, T>,
       pooled_sums<Sigmoid, T>, pooled_sums<Tanh, T>, pooled_sums<Hardswish, T>},
      {pooled_input<NoActivation, T>, pooled_input<ReLU, T>, pooled_input<ReLU6, T>, pooled_input<SiLU, T>,
       pooled_input<Sigmoid, T>, pooled_input<Tanh, T>, pooled_input<Hardswish, T>},
  };
}

}  // namespace
}  // namespace fastconv::cpu

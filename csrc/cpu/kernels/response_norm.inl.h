// Local response normalisation: Krizhevsky, Sutskever, Hinton 2012, section 3.3, with PyTorch's mean instead of a sum.
// Bound: the power, which for the usual 3/4 is three square roots and a division. A pixel's channels stay in L1 between
// the loops, each of which the compiler makes vectors of; what lies outside the channels is a margin of zeros.
#pragma once

#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/response_norm.h"

namespace fastconv::cpu {
namespace {

template <class T> void zero_margins(T* row, int64_t before, int64_t channels, int64_t after) {
  for (int64_t i = 0; i < before; ++i) row[i] = 0;
  for (int64_t i = 0; i < after; ++i) row[before + channels + i] = 0;
}

// sums[c] = row[c] + ... + row[c + window - 1]
template <class T> void window_sums(const T* __restrict row, int64_t channels, int64_t window, T* __restrict sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = row[c];
  for (int64_t j = 1; j < window; ++j)
    for (int64_t c = 0; c < channels; ++c) sums[c] += row[c + j];
}

// s of one pixel, in a.sums; squares is a.squares behind its margin.
template <class T> void denominators(const ResponseNormRows<T>& a, const T* __restrict x, T* __restrict squares) {
  for (int64_t c = 0; c < a.channels; ++c) squares[c] = x[c] * x[c];
  window_sums(a.squares, a.channels, a.before + 1 + a.after, a.sums);
  for (int64_t c = 0; c < a.channels; ++c) a.sums[c] = a.k + a.scale * a.sums[c];
}

template <class T> struct ThreeQuarters {
  T operator()(T s) const { return square_root(s) * square_root(square_root(s)); }
};
template <class T> struct AnyPower {
  T beta;
  T operator()(T s) const { return power(s, beta); }
};

template <class T, class Power> void normalise(const ResponseNormRows<T>& a, T* y_all, Power raise) {
  zero_margins(a.squares, a.before, a.channels, a.after);
  for (int64_t pixel = 0; pixel < a.pixels; ++pixel) {
    const T* __restrict x = a.x + pixel * a.channels;
    T* __restrict y = y_all + pixel * a.channels;
    const T* __restrict s = a.sums;
    denominators(a, x, a.squares + a.before);
    for (int64_t c = 0; c < a.channels; ++c) y[c] = x[c] / raise(s[c]);
  }
}

template <class T, class Power>
void normalise_backward(const ResponseNormRows<T>& a, const T* dy_all, T* dx_all, Power raise) {
  zero_margins(a.squares, a.before, a.channels, a.after);
  zero_margins(a.shares, a.after, a.channels, a.before);  // the windows that have a channel: theirs mirrored
  const T factor = 2 * a.scale * a.beta;
  for (int64_t pixel = 0; pixel < a.pixels; ++pixel) {
    const T* __restrict x = a.x + pixel * a.channels, * __restrict dy = dy_all + pixel * a.channels;
    T* __restrict dx = dx_all + pixel * a.channels;
    T* __restrict s = a.sums, * __restrict shares = a.shares + a.after;
    denominators(a, x, a.squares + a.before);
    for (int64_t c = 0; c < a.channels; ++c) {
      dx[c] = dy[c] / raise(s[c]);
      shares[c] = dx[c] * x[c] / s[c];
    }
    window_sums(a.shares, a.channels, a.before + 1 + a.after, a.sums);
    for (int64_t c = 0; c < a.channels; ++c) dx[c] -= factor * x[c] * s[c];
  }
}

template <class T> void response_norm(const ResponseNormRows<T>& a, T* y) {
  if (a.beta == T(0.75))
    normalise(a, y, ThreeQuarters<T>{});
  else
    normalise(a, y, AnyPower<T>{a.beta});
}

template <class T> void response_norm_backward(const ResponseNormRows<T>& a, const T* dy, T* dx) {
  if (a.beta == T(0.75))
    normalise_backward(a, dy, dx, ThreeQuarters<T>{});
  else
    normalise_backward(a, dy, dx, AnyPower<T>{a.beta});
}

template <class T> constexpr ResponseNormKernels<T> response_norm_kernels() {
  return {response_norm<T>, response_norm_backward<T>};
}

}  // namespace
}  // namespace fastconv::cpu

// Optimiser steps. Bound: memory; every array is read and written once.
#pragma once

#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/optimizer.h"

namespace fastconv::cpu {
namespace {

// d = scale g + weight_decay p; m = momentum m + (1 - dampening) d (d itself at first); p -= lr (nesterov ? d +
// momentum m : m)
template <class T> void sgd(T* p, const T* g, T* momentum, int64_t n, const SgdSettings<T>& s) {
  const auto lr = set1(-s.lr), decay = set1(s.weight_decay), keep = set1(s.momentum), add = set1(s.one_minus_dampening);
  const auto scale = set1(s.gradient_scale);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto value = load_lanes<tail.value>(p + i, lanes);
    auto d = fma(value, decay, load_lanes<tail.value>(g + i, lanes) * scale);
    if (momentum) {
      auto m = d;
      if (!s.first) m = fma(load_lanes<tail.value>(momentum + i, lanes), keep, d * add);
      store_lanes<tail.value>(momentum + i, m, lanes);
      d = s.nesterov ? fma(m, keep, d) : m;
    }
    store_lanes<tail.value>(p + i, fma(d, lr, value), lanes);
  });
}

// g *= scale; p *= 1 - lr weight_decay; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
// p -= step_size m / (sqrt(v) root_scale + eps). The compiler makes vectors of it.
template <class T>
void adamw(T* __restrict p, const T* __restrict g, T* __restrict mean, T* __restrict square, int64_t n,
           const AdamWSettings<T>& settings) {
  const AdamWSettings<T> s = settings;
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = g[i] * s.gradient_scale;
    const T m = mean[i] + s.one_minus_beta1 * (gradient - mean[i]);
    const T v = s.beta2 * square[i] + s.one_minus_beta2 * gradient * gradient;
    mean[i] = m;
    square[i] = v;
    p[i] = p[i] * s.keep - s.step_size * m / (square_root(v) * s.root_scale + s.eps);
  }
}

// In double, so that no float overflows and rounding does not grow with n; the order of the sum depends on n alone.
template <class T> double sum_of_squares(const T* a, int64_t n) {
  constexpr int64_t kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += static_cast<double>(a[i + j]) * static_cast<double>(a[i + j]);
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(a[i]) * static_cast<double>(a[i]);
  for (double sum : sums) total += sum;
  return total;
}

// average += share (value - average)
template <class T> void move_towards(T* __restrict average, const T* __restrict value, int64_t n, T share) {
  for (int64_t i = 0; i < n; ++i) average[i] += share * (value[i] - average[i]);
}

template <class T> constexpr OptimizerKernels<T> optimizer_kernels() {
  return {sgd<T>, adamw<T>, sum_of_squares<T>, move_towards<T>};
}

}  // namespace
}  // namespace fastconv::cpu

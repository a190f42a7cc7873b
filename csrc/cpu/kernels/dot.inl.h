// Products of few vectors with a matrix that is read where it lies, once for all ISAs.
#pragma once

#include "cpu/kernels/strip.inl.h"

namespace fastconv::cpu {
namespace {

// The sum of all lanes, by halves.
inline float sum_of(Vec a) {
  typedef int Index __attribute__((vector_size(sizeof(Vec))));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    Index other;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ half;
    a = add(a, __builtin_shuffle(a, other));
  }
  return a[0];
}

// Rows of x taken at once, and with R of them rows of the matrix: R*O sums, O of the matrix and 1 of x fill the
// registers.
constexpr int kDotRows = kRegisters / 4;
template <int R> constexpr int kDotOuts = (kRegisters - 1) / (R + 1) < 8 ? (kRegisters - 1) / (R + 1) : 8;

// dot_tile: y[R][O] = clamp(sum over i of x[r][i] * w[o][i] + bias + residual).
// Lanes are i, so that w needs no packing.
// Bound: memory for w while R is small, then FMA; R*O FMAs against R + O loads a step.
// Tails: the last lanes of x and w are loaded with a mask, zeros beyond.
template <int R, int O> void dot_tile(const DotTile& t, int64_t out) {
  Vec acc[R * O];
#pragma GCC unroll 32
  for (int i = 0; i < R * O; ++i) acc[i] = zero();
  const float* w = t.w + out * t.w_step;
  const auto add_lanes = [&](int64_t i, auto read) __attribute__((always_inline)) {
    Vec weights[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) weights[o] = read(w + o * t.w_step + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = read(t.x + r * t.x_step + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) acc[r * O + o] = fma(x, weights[o], acc[r * O + o]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= t.length; i += kLanes)
    add_lanes(i, [](const float* p) __attribute__((always_inline)) { return load(p); });
  if (i < t.length)
    add_lanes(i, [n = t.length - i](const float* p) __attribute__((always_inline)) { return load_first(p, n); });

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const int64_t at = r * t.y_step + out + o;
      float sum = sum_of(acc[r * O + o]);
      if (t.bias) sum += t.bias[out + o];
      if (t.residual) sum += t.residual[at];
      sum = sum < t.low ? t.low : sum;  // NaN stays
      t.y[at] = sum > t.high ? t.high : sum;
    }
}

template <int R = kDotRows> void dot(const DotTile& t) {
  if constexpr (R > 1)
    if (t.rows < R) return dot<R - 1>(t);
  int64_t out = 0;
  for (; out + kDotOuts<R> <= t.outs; out += kDotOuts<R>) dot_tile<R, kDotOuts<R>>(t, out);
  for (; out < t.outs; ++out) dot_tile<R, 1>(t, out);
}

}  // namespace
}  // namespace fastconv::cpu

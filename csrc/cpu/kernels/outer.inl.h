// Products of a thin matrix with one that is read where it lies, once for all ISAs.
#pragma once

#include "cpu/kernels/conv2d.inl.h"

namespace fastconv::cpu {
namespace {

constexpr int kOuterRows = 4;
constexpr int kOuterVectors = kTilePixels > 8 ? 4 : 2;

// outer_tile: y[R][V*lanes] (+)= sum over k of a[r][k] * b[k][V*lanes].
//   b  read where it lies, a vector of each row in turn: no packing, so b may be as large as memory
// Registers: R*V accumulators + V of b + 1 broadcast. Bound: FMA; R*V FMAs against R + V loads a step.
// Tails: the last lanes of b and y are read and written with a mask.
template <int R, int V, bool TAIL> void outer_tile(const OuterTile& t, const float* a, int64_t at, float* y) {
  const int64_t n = t.length - at;
  const auto read = [n](const float* p) __attribute__((always_inline)) {
    if constexpr (TAIL)
      return load_first(p, n);
    else
      return load(p);
  };
  Vec acc[R * V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r * V + v] = t.accumulate ? read(y + r * t.y_step + at + v * kLanes) : zero();
  for (int64_t k = 0; k < t.depth; ++k) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = read(t.b + k * t.b_step + at + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec factor = set1(a[r * t.a_row_step + k * t.a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r * V + v] = fma(factor, b[v], acc[r * V + v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = y + r * t.y_step + at + v * kLanes;
      if constexpr (TAIL)
        store_first(to, acc[r * V + v], n);
      else if (t.streaming)
        stream(to, acc[r * V + v]);
      else
        store(to, acc[r * V + v]);
    }
}

// R rows of y; meanwhile the part of b_next that belongs to them is fetched, in the order of memory.
template <int R> void outer_rows(const OuterTile& t, int64_t row) {
  constexpr int64_t kStep = kOuterVectors * kLanes, kLine = 16;
  const float* a = t.a + row * t.a_row_step;
  float* y = t.y + row * t.y_step;
  int64_t at = 0;
  for (; at + kStep <= t.length; at += kStep) {
    if (t.b_next && row == 0) {
      // All rows' columns [at, at + kStep) are t.depth * kStep floats: as many, but row after row.
      const int64_t first = at * t.depth, last = first + kStep * t.depth;
      for (int64_t i = first; i < last; i += kLine) prefetch_l2(t.b_next + i / t.length * t.b_step + i % t.length);
    }
    outer_tile<R, kOuterVectors, false>(t, a, at, y);
  }
  for (; at + kLanes <= t.length; at += kLanes) outer_tile<R, 1, false>(t, a, at, y);
  if (at < t.length) outer_tile<R, 1, true>(t, a, at, y);
}

void outer(const OuterTile& t) {
  int64_t row = 0;
  for (; row + kOuterRows <= t.rows; row += kOuterRows) outer_rows<kOuterRows>(t, row);
  switch (t.rows - row) {
    case 3: return outer_rows<3>(t, row);
    case 2: return outer_rows<2>(t, row);
    case 1: return outer_rows<1>(t, row);
    default: return;
  }
}

}  // namespace
}  // namespace fastconv::cpu

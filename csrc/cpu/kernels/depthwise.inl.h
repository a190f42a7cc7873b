// Depthwise convolution: one channel a group. A tile is one or two rows of P neighbouring outputs. Its channels are
// walked a vector at a time; the source pixels of a vector are loaded once and kept in registers for all outputs of the
// tile. Pixels lie a power of two apart in most networks, so their lines share a few sets of L1, and a store shares
// the low bits of its address with the loads around it: a tile therefore loads a line once, and stores when it has
// loaded all it needs of this vector.
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/lanes.h"

namespace fastconv::cpu {
namespace {

constexpr int kDepthwiseRows = 2;
constexpr bool kManyRegisters = kLanes == 16;
// With 32 registers 2 x 7 sums, a window of 9 to 15 pixels and a weight; with 16 registers 2 x 4 sums and one of 6.
// Sizes of images are often a multiple of 7.
constexpr int kWidePixels = kManyRegisters ? 7 : 4;
constexpr int kNarrowPixels = 4;
constexpr int kLineFloats = 16;  // of a cache line

// The pixels of one source row that a row of P outputs meets, STEP pixels apart, under S taps.
template <int S, int STEP, int P, bool TAIL> struct DepthwiseWindow {
  static constexpr int kCount = (P - 1) * STEP + S;
  Vec x[kCount];

  inline __attribute__((always_inline)) void read(const float* const* pixels, int64_t c, int64_t n) {
    asm("" : "+r"(pixels));  // one base register for all pointers
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) {
      x[i] = load_lanes<TAIL>(pixels[i] + c, n);
      if (kManyRegisters) keep(x[i]);
    }
  }
  inline __attribute__((always_inline)) Vec operator()(int p, int b) const { return x[p * STEP + b]; }
};

// Asks for the next part of a stream while this one is worked on: what a tile loads jumps from pixel to pixel, which
// the hardware does not foresee.
inline __attribute__((always_inline)) void prefetch_next(const float*& at, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLineFloats) prefetch_l2(at + i);
  at += floats;
}

// Outputs written around the caches. A line of several vectors waits here for its last one: with more lines begun than
// the machine can combine, each would go to memory in parts.
constexpr int kLineVectors = kLineFloats / kLanes;
template <int P> struct DepthwiseLines {
  float begun[kLineVectors][kDepthwiseRows][P][kLanes];
};

template <int P>
inline __attribute__((always_inline)) void stream_outputs(const Vec (&y)[kDepthwiseRows][P], const DepthwiseRows& t,
                                                          int64_t at, int vector, DepthwiseLines<P>& lines) {
  const bool last = kLineVectors == 1 || vector == kLineVectors - 1;
#pragma GCC unroll 2
  for (int r = 0; r < kDepthwiseRows; ++r) {
    if (r == t.rows) return;
    float* to = t.y + at + r * t.y_row;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p, to += t.y_pixel) {
      if (!last) {
        store(lines.begun[vector][r][p], y[r][p]);
        continue;
      }
#pragma GCC unroll 4
      for (int v = 0; v < kLineVectors - 1; ++v)
        stream(to - (kLineVectors - 1 - v) * kLanes, load(lines.begun[v][r][p]));
      stream(to, y[r][p]);
    }
  }
}

// Bound: FMA, P * S a kernel row and row of outputs, against (P - 1) * STEP + S pixels and S weights loaded.
template <int S, int STEP, int P, bool TAIL>
inline __attribute__((always_inline)) void depthwise_outputs(const DepthwiseRows& t, int64_t j, int64_t c, int64_t n,
                                                             const float* w, DepthwiseLines<P>& lines) {
  Vec sum[kDepthwiseRows][P];
#pragma GCC unroll 2
  for (int r = 0; r < kDepthwiseRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[r][p] = zero();
  for (int64_t i = 0; i < t.x_row_count; ++i) {
    if (!t.x_rows[i]) continue;
    DepthwiseWindow<S, STEP, P, TAIL> window;
    window.read(t.x_rows[i] + j * STEP, c, n);
#pragma GCC unroll 2
    for (int r = 0; r < kDepthwiseRows; ++r) {
      const int64_t a = i - r * t.row_step;
      if (a < 0 || a >= t.kernel_rows) continue;
#pragma GCC unroll 5
      for (int b = 0; b < S; ++b) {
        const Vec weight = load(w + (a * S + b) * kLanes);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[r][p] = fma(weight, window(p, b), sum[r][p]);
      }
    }
  }
  const Vec low = set1(t.low), high = set1(t.high);
  const bool plain = !t.bias && !t.residual;
  const int64_t at = j * t.y_pixel + c;
#pragma GCC unroll 2
  for (int r = 0; r < kDepthwiseRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      Vec& y = sum[r][p];
      if (!plain) {
        if (t.bias) y = add(y, load_lanes<TAIL>(t.bias + c, n));
        if (t.residual && r < t.rows) y = add(y, load_lanes<TAIL>(t.residual + at + r * t.y_row + p * t.y_pixel, n));
      }
      y = clamp(y, low, high);
    }
  if (!TAIL && t.streaming) return stream_outputs<P>(sum, t, at, c / kLanes % kLineVectors, lines);
#pragma GCC unroll 2
  for (int r = 0; r < kDepthwiseRows; ++r) {
    if (r == t.rows) return;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store_lanes<TAIL>(t.y + at + r * t.y_row + p * t.y_pixel, sum[r][p], n);
  }
}

// Weight gradient: dw[a][b] += sum over the tile of dy[j] x[a][j + b]; the sums stay in cache.
template <int S, int STEP, int P, bool TAIL>
inline __attribute__((always_inline)) void depthwise_outputs(const DepthwiseWeightRows& t, int64_t j, int64_t c,
                                                             int64_t n, float* dw, DepthwiseLines<P>&) {
  Vec dy[kDepthwiseRows][P];
#pragma GCC unroll 2
  for (int r = 0; r < kDepthwiseRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) dy[r][p] = load_lanes<TAIL>(t.dy + r * t.dy_row + (j + p) * t.dy_pixel + c, n);
  for (int64_t i = 0; i < t.x_row_count; ++i) {
    if (!t.x_rows[i]) continue;
    DepthwiseWindow<S, STEP, P, TAIL> window;
    window.read(t.x_rows[i] + j * STEP, c, n);
#pragma GCC unroll 2
    for (int r = 0; r < kDepthwiseRows; ++r) {
      const int64_t a = i - r * t.row_step;
      if (a < 0 || a >= t.kernel_rows) continue;
#pragma GCC unroll 5
      for (int b = 0; b < S; ++b) {
        float* const to = dw + (a * S + b) * kLanes;
        Vec sum = load(to);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum = fma(dy[r][p], window(p, b), sum);
        store(to, sum);
      }
    }
  }
}

// One tile under all channels.
template <int S, int STEP, int P, class Rows> void depthwise_tile(Rows& rows, int64_t j) {
  Rows t = rows;  // a copy that no store can change
  auto* w = t.w;
  DepthwiseLines<P> lines{};
  int64_t c = 0;
  for (; c + kLanes <= t.channels; c += kLanes, w += t.kernel_rows * S * kLanes) {
    depthwise_outputs<S, STEP, P, false>(t, j, c, kLanes, w, lines);
    for (auto& next : t.next) prefetch_next(next.at, P * next.floats);
  }
  if (c < t.channels) depthwise_outputs<S, STEP, P, true>(t, j, c, t.channels - c, w, lines);
  for (size_t i = 0; i < sizeof(t.next) / sizeof(t.next[0]); ++i) rows.next[i] = t.next[i];
}

// All outputs of the rows in tiles as wide as they fit.
template <int S, int STEP, class Rows> void depthwise_sweep(const Rows& rows) {
  Rows t = rows;
  const int64_t n = t.outputs;
  int64_t j = 0;
  if (n % kWidePixels % kNarrowPixels <= n % kNarrowPixels)
    for (; j + kWidePixels <= n; j += kWidePixels) depthwise_tile<S, STEP, kWidePixels>(t, j);
  for (; j + kNarrowPixels <= n; j += kNarrowPixels) depthwise_tile<S, STEP, kNarrowPixels>(t, j);
  for (; j < n; ++j) depthwise_tile<S, STEP, 1>(t, j);
}

template <class Rows> void depthwise_rows(const Rows& t) {
  using Sweep = void (*)(const Rows&);
  static constexpr Sweep kSweeps[kMaxDepthwiseStep][kMaxDepthwiseColumns] = {
      {depthwise_sweep<1, 1, Rows>, depthwise_sweep<2, 1, Rows>, depthwise_sweep<3, 1, Rows>,
       depthwise_sweep<4, 1, Rows>, depthwise_sweep<5, 1, Rows>},
      {depthwise_sweep<1, 2, Rows>, depthwise_sweep<2, 2, Rows>, depthwise_sweep<3, 2, Rows>,
       depthwise_sweep<4, 2, Rows>, depthwise_sweep<5, 2, Rows>},
  };
  kSweeps[t.step - 1][t.kernel_columns - 1](t);
}

}  // namespace
}  // namespace fastconv::cpu

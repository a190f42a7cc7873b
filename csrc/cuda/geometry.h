// Where everything lies: pure functions of a convolution on the device, compiled for the host too and tested there.
// Letters: x[N,C,H,W], w[K,C/G,R,S], y[N,K,P,Q]; activations are dense channels-last.
//
// Every direction is one form, the implicit convolution: a result pixel is a sum over taps of source pixels times
// kernel elements. Forward is one of it; an input gradient with strides is one for each phase of the input pixels.
#pragma once

#include <cstdint>

#include "cuda/scalar.h"

#if defined(__CUDACC__)
#define FC_INLINE __host__ __device__ __forceinline__
#else
#define FC_INLINE inline
#endif

namespace fastconv::cuda {

FC_INLINE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
FC_INLINE constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }
FC_INLINE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FC_INLINE constexpr int larger(int a, int b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// The implicit convolution.

// One axis. Result pixel i lies at result_first + i * result_step. Its tap a reads the source pixel
// source_first + i * source_step + a * tap_step, zero where that is outside, and multiplies it with the kernel element
// weight_first + a * weight_step. tap_step is positive: a TMA im2col offset is unsigned.
struct Axis {
  int results = 0, result_first = 0, result_step = 1;
  int source_first = 0, source_step = 1;
  int taps = 0, tap_step = 1;
  int weight_first = 0, weight_step = 1;
};

FC_INLINE Axis forward_axis(int outputs, int kernel, int stride, int pad, int dilation) {
  Axis a;
  a.results = outputs;
  a.source_first = -pad;
  a.source_step = stride;
  a.taps = kernel;
  a.tap_step = dilation;
  return a;
}

// The phases of an input gradient along one axis: the input pixels f, f + stride, ... for each f.
FC_INLINE int backward_phases(int inputs, int stride) { return smaller(inputs, stride); }

// dx[i] = sum over r of w[r] dy[(i + pad - r * dilation) / stride], where that divides. The r that divide for a phase
// are in arithmetic progression; they are walked from the last to the first, so that the source only moves forward. A
// phase that no r reaches has no taps: its pixels are zero, and somebody has to write that.
FC_INLINE Axis backward_axis(int inputs, int kernel, int stride, int pad, int dilation, int phase) {
  int a = stride, b = dilation;
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  const int period = stride / a;  // from one r that divides to the next
  Axis axis;
  axis.results = (inputs - phase + stride - 1) / stride;
  axis.result_first = phase;
  axis.result_step = stride;
  int first = 0;
  while (first < period && (phase + pad - first * dilation) % stride != 0) ++first;
  axis.taps = first < period && first < kernel ? (kernel - 1 - first) / period + 1 : 0;
  const int last = first + (axis.taps - 1) * period;
  axis.weight_first = last;
  axis.weight_step = -period;
  axis.tap_step = period * dilation / stride;
  axis.source_first = axis.taps > 0 ? (phase + pad - last * dilation) / stride : 0;
  return axis;
}

struct Pixel {
  int n, i, j;
};

// Pixel m of a grid of images of rows x columns.
FC_INLINE Pixel pixel_of(int m, int rows, int columns) {
  const int image = m / (rows * columns);
  const int rest = m - image * rows * columns;
  const int i = rest / columns;
  return {image, i, rest - i * columns};
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA im2col (CUDA driver API, cuTensorMapEncodeIm2col; PTX ISA, "im2col mode"). The box of one axis is the closed
// range lower ... size - 1 + upper of base pixels; a copy walks it with the element stride, left to right, top to
// bottom, image after image, and reads at base + offset. A base outside the box is an illegal instruction.

struct Corners {
  int lower, upper;
};

FC_INLINE Corners im2col_corners(const Axis& a, int source_size) {
  return {a.source_first, a.source_first + (a.results - 1) * a.source_step + 1 - source_size};
}

// What the instruction can express with two spatial axes.
FC_INLINE bool im2col_expressible(const Axis& a, int source_size) {
  const Corners c = im2col_corners(a, source_size);
  return c.lower >= -128 && c.lower <= 127 && c.upper >= -128 && c.upper <= 127 && a.source_step <= 8 &&
         (a.taps - 1) * a.tap_step <= 255;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory. Chunks are 16 bytes.

// The 128-byte swizzle of TMA and wgmma: bits 4-6 of a byte offset are xored with bits 7-9.
FC_INLINE constexpr uint32_t swizzle_128b(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Rows of 64 bytes (4 chunks), so that the same chunk of 8 consecutive rows lies in 8 different groups of banks.
FC_INLINE constexpr uint32_t swizzle_64b_rows(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments (PTX ISA, "Matrix fragments"): which element of a tile a register of a lane holds.

struct Element {
  int row, column;
};

// Accumulators of mma.m16n8 (i = 0..3).
FC_INLINE constexpr Element mma_accumulator(int lane, int i) {
  return {lane / 4 + (i / 2) * 8, (lane % 4) * 2 + i % 2};
}

// Accumulators of wgmma.m64nN: thread of the warpgroup (0..127), register i of N / 2.
FC_INLINE constexpr Element wgmma_accumulator(int thread, int i) {
  return {(thread / 32) * 16 + (thread % 32) / 4 + (i / 2 % 2) * 8, (i / 4) * 8 + (thread % 4) * 2 + i % 2};
}

// The row (of 16) and chunk (of 2) whose address a lane gives to ldmatrix.x4 for: the operand A of mma; two operands B
// beside each other; and the same from tiles that hold k in rows, with ldmatrix.x4.trans ("row" is k, "column" a chunk
// of 8 m or n).
FC_INLINE constexpr Element ldmatrix_a(int lane) { return {lane % 16, lane / 16}; }
FC_INLINE constexpr Element ldmatrix_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }
FC_INLINE constexpr Element ldmatrix_a_transposed(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }
FC_INLINE constexpr Element ldmatrix_b_transposed(int lane) { return {lane % 8 + lane / 8 % 2 * 8, lane / 16}; }

// wgmma's descriptor of a 128-byte swizzled operand (PTX ISA, "Matrix descriptor"). The operand is made of panels: rows
// of 128 bytes, eight of which repeat the swizzle. K-major: a row is an m (or n), its 128 bytes are k. MN-major: a row
// is a k, its 128 bytes are 64 m (or n), and the next 64 lie panel_bytes further; K-major operands do not use that
// number.
FC_INLINE constexpr uint64_t wgmma_descriptor(uint32_t address, bool k_major, uint32_t panel_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(k_major ? 1 : panel_bytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
// What 16 further k add to a descriptor: 32 bytes of each row, or 16 rows.
FC_INLINE constexpr uint64_t wgmma_k_step(bool k_major) { return k_major ? 32 >> 4 : 16 * 128 >> 4; }

// ---------------------------------------------------------------------------------------------------------------------
// Tiles and splits.

// The weight gradient sums over pixels; its sum is cut into `splits` slices of `steps` blocks of pixels each (the last
// may be shorter, none is empty), whose partial results are added in order.
struct SplitPlan {
  int splits, steps;
};

// A pure function of the shape and the number of multiprocessors, so that the bits of a result are those of the machine
// and not of the moment. Time is counted in steps: each round of blocks takes a slice's steps and about `overhead` more
// to fill the pipeline and to write and add its partial result.
FC_INLINE SplitPlan plan_split(int tiles, int total_steps, int multiprocessors, int overhead) {
  SplitPlan best = {1, larger(total_steps, 1)};
  int64_t best_cost = INT64_MAX;
  for (int want = 1; want <= smaller(larger(total_steps, 1), 128); ++want) {
    const int steps = divide_up(larger(total_steps, 1), want);
    const int splits = divide_up(larger(total_steps, 1), steps);
    const int64_t rounds = (static_cast<int64_t>(tiles) * splits + multiprocessors - 1) / multiprocessors;
    const int64_t cost = rounds * (steps + overhead) + splits / 4;
    if (cost < best_cost) {
      best_cost = cost;
      best = {splits, steps};
    }
  }
  return best;
}

struct TileShape {
  int m, n;
};

// An estimate, in cycles, of a persistent grid's time over the tiles of a product m x n with `steps` blocks of 64 k:
// each round takes as long as the slower of the tensor cores (2048 multiply-adds a cycle) and the fill of shared memory
// (about 27 bytes a cycle from L2), and a part of the epilogue that no other tile hides. Only the order of candidates
// matters.
FC_INLINE int64_t tile_cost(TileShape tile, int64_t m, int n, int steps, int multiprocessors) {
  const int64_t tiles = (m + tile.m - 1) / tile.m * divide_up(n, tile.n);
  const int64_t rounds = (tiles + multiprocessors - 1) / multiprocessors;
  const int64_t multiply = static_cast<int64_t>(tile.m) * tile.n * 64 / 2048;
  const int64_t fill = static_cast<int64_t>(tile.m + tile.n) * 128 / 27;
  const int64_t step = multiply > fill ? multiply : fill;
  return rounds * (steps * step + static_cast<int64_t>(tile.m) * tile.n / 16 + 600);
}

}  // namespace fastconv::cuda

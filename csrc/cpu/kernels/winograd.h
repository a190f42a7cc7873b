// The transforms of Winograd's minimal filtering F(4x4, 3x3), F(3x3, 3x3) and F(2x2, 5x5). The products between them
// are those of the direct engine (DirectTile, WeightTile) with one tap.
//
// A tile of 4 (or 3) outputs an axis, or of 2 under a kernel of five taps, is evaluated at six (five) points; a
// position is a pair of points, row * 6 + column. A 3-tile leaves out point 4. `position` is the distance in floats
// between neighbouring positions of an array.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"

namespace fastconv::cpu {

constexpr int64_t kPoints = 6;
constexpr int64_t kPositions = kPoints * kPoints;

// The extent of one tile: outputs an axis as transformed (4, 3 or 2).
struct WinogradTile {
  int64_t rows, columns;
};

// v[position][block][kBlock] = the window of x under one tile; zeros beyond the image and beyond `channels`. T: the
// type that x is stored in.
template <class T> struct WinogradInput {
  WinogradTile tile;
  const T* x;                    // first pixel of the window, which may lie outside the image
  int64_t row, pixel;            // strides of x, from one row (column) of the window to the next
  uint32_t rows_in, columns_in;  // bit i: row (column) i of the window lies inside the image
  int64_t next;                  // from this window to the one wanted next, for prefetching
  int64_t channels;
  float* v;
  int64_t block, position;
};

// d[position][width] = one tile of dy; zeros beyond `rows`, `columns` and `channels`.
struct WinogradGradient {
  WinogradTile tile;
  const float* dy;
  int64_t row, pixel;     // strides of dy
  int64_t rows, columns;  // of the tile that lie inside the image
  int64_t next;           // as in WinogradInput
  int64_t channels, width;
  float* d;
  int64_t position;
};

// y = clamp(the tile of m[position][width] + bias + residual).
template <class T> struct WinogradOutput {
  WinogradTile tile;
  const float* m;
  int64_t position;
  T* y;
  const T* residual;      // the same place, or null
  const float* bias;      // or null
  int64_t row, pixel;     // strides of y and residual
  int64_t rows, columns;  // to store
  int64_t channels;
  float low, high;
  bool streaming;  // non-temporal stores; y and pixel aligned to a vector; of float only
};

// The kernels that read or write arrays of the caller, for the type T that those are stored in.
template <class T> struct WinogradTransforms {
  void (*input)(const WinogradInput<T>&);
  void (*output)(const WinogradOutput<T>&);
  // As Conv2dKernels::pack_weights.
  void (*pack_weights)(const T* src, int64_t out_step, int64_t in_step, int64_t outs, int64_t ins, int64_t width,
                       float* dst);
};

struct WinogradKernels {
  WinogradTransforms<float> f32;
  WinogradTransforms<BFloat16> bf16;
  void (*gradient)(const WinogradGradient&);
  // Of kernels of 3x3 and of 5x5 taps, tap = row * 3 (5) + column; for i < floats, a multiple of the lanes:
  // u[position][i] = the kernel w[tap][i]
  void (*weights[2])(const float* w, int64_t tap, int64_t floats, float* u, int64_t position);
  // dw[tap][i] = the gradient of m[position][i]
  void (*weight_gradient[2])(const float* m, int64_t position, int64_t floats, float* dw, int64_t tap);

  template <class T> const WinogradTransforms<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return f32;
    else
      return bf16;
  }
};

}  // namespace fastconv::cpu

// The transforms of Winograd's minimal filtering F(4x4, 3x3), F(3x3, 3x3), F(2x2, 5x5), F(3x3, 4x4), F(5x5, 2x2),
// F(4x4, 2x2), and of F(3, 4), F(5, 2) and F(4, 2) along one axis. The products between them are those of the direct
// engine (DirectTile, WeightTile).
//
// An axis of a tile is evaluated at six points, under F(3, 3) and F(4, 2) at five, which leave out point 4, and under
// F(1, 1) at one; a position is a pair of points, row * 6 + column. `position` is the distance in floats between
// neighbouring positions of an array.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "cpu/kernels/conv2d.h"

namespace fastconv::cpu {

constexpr int64_t kPoints = 6;
constexpr int64_t kPositions = kPoints * kPoints;

// F(outputs, taps) of an axis.
enum class Filter { kF43, kF33, kF25, kF34, kF52, kF42, kF11 };
constexpr int64_t outputs_of(Filter f) {
  switch (f) {
    case Filter::kF52: return 5;
    case Filter::kF43:
    case Filter::kF42: return 4;
    case Filter::kF33:
    case Filter::kF34: return 3;
    case Filter::kF25: return 2;
    case Filter::kF11: break;
  }
  return 1;
}
constexpr int64_t points_of(Filter f) {
  return f == Filter::kF33 || f == Filter::kF42 ? kPoints - 1 : f == Filter::kF11 ? 1 : kPoints;
}

// Points of an axis that are wanted: bit i is point i.
constexpr uint32_t kAllPoints = (1u << kPoints) - 1;
struct WantedPoints {
  uint32_t rows = kAllPoints, columns = kAllPoints;
};

// The pairs there are: F(4, 3) and F(3, 3) with each of the two; so F(5, 2) and F(4, 2); F(2, 5) and F(3, 4) each with
// itself; F(1, 1) with F(3, 4), F(5, 2) and F(4, 2).
struct WinogradTile {
  Filter rows, columns;
};

// v[position][block][kBlock] = the window of x under one tile; zeros beyond the image and beyond `channels`. T: the
// type that x is stored in.
template <class T> struct WinogradInput {
  WinogradTile tile;
  WantedPoints points;           // infinity may not be wanted, the others of the tile are
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
  int64_t next;           // as in WinogradInput, of the residual
  const float* bias;      // or null
  int64_t row, pixel;     // strides of y and residual
  int64_t rows, columns;  // to store
  int64_t channels;
  float low, high;
  bool streaming;  // non-temporal stores; y and pixel aligned to a vector; of float only
};

// u[position][i] = the kernel of taps w[r * row + s * column + i], for i < floats, a multiple of the lanes.
struct WinogradWeights {
  const float* w;
  int64_t row, column;
  int64_t rows, columns;  // taps; of four and of two the last may be missing, and is then zero
  int64_t floats;
  float* u;
  int64_t position;
  WantedPoints points;
};

// dw[r * row + s * column + i] = the gradient of m[position][i], of the taps that are there.
struct WinogradWeightGradient {
  const float* m;
  int64_t position, floats;
  float* dw;
  int64_t row, column;
  int64_t rows, columns;  // as in WinogradWeights
  WantedPoints points;    // of m; others count as zero and are not read
};

// F(4, 3) along the rows of images of few channels; rows of the kernel and channels are summed as they are. A tile is
// kRowOutputs neighbouring outputs of a row, evaluated at the six points; v[row][tile][kPoints][kFewChannels].
constexpr int64_t kRowOutputs = 4, kRowTaps = 3;

// Outputs of neighbouring tiles, one vector of channels.
struct RowTiles : TileOutput {
  const float* v;  // of the first tile, under the first row of the kernel
  int64_t v_row;
  int64_t in_channels;
  const float* w;   // [kRowTaps][in_channels][kPoints][lanes]
  int64_t outputs;  // <= row_outputs
};

// The gradient of such weights: acc[r][channel][point][lane] += sum over tiles of v[tile at r][point][channel]
// dy[tile][point][lane].
struct RowGradient {
  const float* v;
  int64_t v_row;
  int64_t in_channels;
  const float* dy;  // one vector of channels
  int64_t dy_row, dy_pixel;
  int64_t rows, columns;  // outputs
  float* acc;
  const float* next;  // wanted next: kRowOutputs vectors of it are fetched into L2 for each tile
};

// The kernels that read or write arrays of the caller, for the type T that those are stored in.
template <class T> struct WinogradTransforms {
  void (*input)(const WinogradInput<T>&);
  void (*output)(const WinogradOutput<T>&);
  // As those of Conv2dKernels.
  void (*pack_weights)(const T* src, int64_t out_step, int64_t in_step, int64_t outs, int64_t ins, int64_t width,
                       float* dst);
  void (*pack_taps)(const T* src, int64_t out_step, int64_t in_step, int64_t taps, int64_t outs, int64_t ins,
                    int64_t width, const int64_t* places, float* dst);
};

struct WinogradKernels {
  WinogradTransforms<float> f32;
  WinogradTransforms<BFloat16> bf16;
  void (*gradient)(const WinogradGradient&);
  // Of kernels of 3x3, 5x5, 4x4, 1x4, 2x2 and 1x2 taps.
  void (*weights[6])(const WinogradWeights&);
  void (*weight_gradient[5])(const WinogradWeightGradient&);  // not of the last

  int64_t row_outputs;  // of the tiles whose sums fit the registers
  bool row_tiles_pay;   // against the sums of a plain convolution
  // v[tile][kPoints][kFewChannels] of a row of pixels x[pixel][channels], whose windows begin kRowOutputs pixels apart;
  // reads kFewChannels floats of each pixel.
  void (*row_input)(const float* x, int64_t channels, int64_t tiles, float* v);
  // u[r][channel][kPoints][lanes] = the rows of the kernel w[r][s][channel][lanes]
  void (*row_weights)(const float* w, int64_t channels, float* u);
  void (*row_tiles)(const RowTiles&);
  void (*row_gradient)(const RowGradient&);
  // dw[r][s][channel][lanes] = the gradient of m[r][channel][kPoints][lanes]
  void (*row_weight_gradient)(const float* m, int64_t channels, float* dw);

  template <class T> const WinogradTransforms<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return f32;
    else
      return bf16;
  }
};

}  // namespace fastconv::cpu

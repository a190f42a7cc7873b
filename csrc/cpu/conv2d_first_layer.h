// What the algorithms of first layers (C <= 4) share: how they cut images into chunks, pad rows, and order weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"

namespace fastconv::cpu::first_layer {

// Chunks wanted: enough for many cores, few enough that the partial sums of the weight gradient stay small.
constexpr int64_t kChunks = 64;

// Rows of outputs, or of inputs, of one image that a chunk works on.
struct Bands {
  int64_t images, rows, band;
  Bands(int64_t images, int64_t rows, int64_t least, int64_t most)
      : images(images), rows(rows), band(std::clamp(ceil_divide(images * rows, kChunks), least, most)) {}
  int64_t per_image() const { return ceil_divide(rows, band); }
  int64_t count() const { return images * per_image(); }
  int64_t image(int64_t i) const { return i / per_image(); }
  Range range(int64_t i) const {
    const int64_t begin = i % per_image() * band;
    return {begin, std::min(rows, begin + band)};
  }
};

// Rows of x with padding on both sides, as wide as `columns` outputs need: the run that output q reads under a kernel
// row begins at q * step.
class PaddedRows {
 public:
  PaddedRows(const Conv2dProblem& a, int64_t columns) : a_(a), pixels_((columns - 1) * a.stride_w + a.s) {}
  int64_t row_floats() const { return pixels_ * a_.c; }
  int64_t step() const { return a_.stride_w * a_.c; }
  int64_t output_row() const { return a_.stride_h * row_floats(); }
  int64_t tap_row() const { return a_.dilation_h * row_floats(); }
  int64_t rows(int64_t outputs) const { return (outputs - 1) * a_.stride_h + (a_.r - 1) * a_.dilation_h + 1; }

  // What the rows of outputs [p.begin, p.end) of image n read.
  void pack(const float* x, int64_t n, Range p, float* to) const {
    const int64_t first = p.begin * a_.stride_h - a_.pad_top;
    for (int64_t i = 0; i < rows(p.end - p.begin); ++i) pack_row(x, n, first + i, to + i * row_floats());
  }

  // Row `row` of image n, which may lie outside it.
  void pack_row(const float* x, int64_t n, int64_t row, float* to) const {
    if (row < 0 || row >= a_.h) {
      std::memset(to, 0, row_floats() * sizeof(float));
      return;
    }
    const int64_t begin = std::min(a_.pad_left, pixels_), end = std::clamp(a_.pad_left + a_.w, begin, pixels_);
    std::memset(to, 0, begin * a_.c * sizeof(float));
    std::memcpy(to + begin * a_.c, x + (n * a_.h + row) * a_.w * a_.c, (end - begin) * a_.c * sizeof(float));
    std::memset(to + end * a_.c, 0, (pixels_ - end) * a_.c * sizeof(float));
  }

 private:
  const Conv2dProblem& a_;
  int64_t pixels_;
};

// A panel of the weights, or of their gradient: [row][(column, channel)][width]. visit(offset in w, offset in panel)
template <class Visit>
void for_panel(const Conv2dProblem& a, const TensorView& w, int64_t first, int64_t channels, int64_t width,
               Visit&& visit) {
  for (int64_t o = 0; o < channels; ++o)
    for (int64_t r = 0; r < a.r; ++r)
      for (int64_t s = 0; s < a.s; ++s)
        for (int64_t c = 0; c < a.c; ++c)
          visit((first + o) * w.strides[0] + c * w.strides[1] + r * w.strides[2] + s * w.strides[3],
                ((r * a.s + s) * a.c + c) * width + o);
}

}  // namespace fastconv::cpu::first_layer

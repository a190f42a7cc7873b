// What the algorithms of first layers (C <= 4) share: how they cut images into chunks, pad rows, and order weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::first_layer {

// Chunks wanted: enough for many cores, few enough that the partial sums of the weight gradient stay small.
constexpr int64_t kChunks = 64;

// Output pixels between loads and stores of a weight gradient's sums, at least; dy of so many stays in L2.
constexpr int64_t kGradientPixels = 192;

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

// Some rows of one image, for one panel of channels of the weight gradient.
struct GradientRows {
  int64_t rows, after;  // how many, and how many of the chunk come before them
  const float* dy;
  int64_t dy_pixel;
  const float* next;  // dy wanted next: the share that this panel fetches of the following rows
};

// The sums of a weight gradient, panel_floats for each panel of `width` channels, whole vectors, over all rows of dy in
// at most `most_parts` parts, which are then added in order. A part cuts its rows into chunks: prepare(image, rows,
// scratch) makes of x what a chunk reads, scratch_floats(rows) of it at most; add(scratch, rows of it, sums) is called
// with sums that began as 0.
template <class ScratchFloats, class Prepare, class Add>
Buffer sum_gradient(const Conv2dProblem& a, const float* dy, int64_t width, int64_t panel_floats, int64_t most_parts,
                    ScratchFloats&& floats_of, Prepare&& prepare, Add&& add) {
  const auto& k = kernels().conv2d;
  const Bands bands(a.n, a.p, 1, 32);
  const int64_t panels = ceil_divide(a.k, width), part_floats = panels * panel_floats;
  const int64_t parts = std::min(bands.count(), most_parts);
  const int64_t step_rows = std::clamp<int64_t>(kGradientPixels / a.q, 1, bands.band);
  const int64_t x_floats = floats_of(bands.band);
  // Channels that do not fill a panel are copied to where zeros fill it.
  const int64_t scratch_floats = x_floats + (a.k % width == 0 ? 0 : step_rows * a.q * width);
  Buffer sums(parts * part_floats * sizeof(float));
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      parts,
      [&](int64_t i, int thread) {
        float* acc = sums.as<float>() + i * part_floats;
        std::memset(acc, 0, part_floats * sizeof(float));
        float* prepared = scratch.as<float>() + thread * scratch_floats;
        const Range mine = split(bands.count(), parts, i);
        for (int64_t band = mine.begin; band < mine.end; ++band) {
          const int64_t n = bands.image(band);
          const Range rows = bands.range(band);
          prepare(n, rows, prepared);
          for (int64_t p = rows.begin; p < rows.end; p += step_rows)
            for (int64_t panel = 0; panel < panels; ++panel) {
              const int64_t valid = std::min(width, a.k - panel * width);
              const float* first = dy + (n * a.p + p) * a.q * a.k;
              GradientRows part{std::min(step_rows, rows.end - p), p - rows.begin, first + panel * width, a.k, nullptr};
              part.next = first + part.rows * a.q * a.k + panel * part.rows * a.q * width;
              if (valid < width) {
                k.pack_slice(part.dy, a.k, part.rows * a.q, valid, width, prepared + x_floats);
                part.dy = prepared + x_floats;
                part.dy_pixel = width;
              }
              add(prepared, part, acc + panel * panel_floats);
            }
        }
      },
      threads);

  auto* total = sums.as<float>();
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t j = 0; j < part_floats; ++j) total[j] += total[part * part_floats + j];
  return sums;
}

}  // namespace fastconv::cpu::first_layer

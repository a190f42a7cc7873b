// Pooling problems: geometry and every check. An axis becomes a list of windows, so that max, average, adaptive and
// global pooling are one engine below.
#pragma once

#include <optional>
#include <vector>

#include "core/problem.h"

namespace fastconv {

// The part of a pooling window that lies inside the image, along one axis: elements begin + i * step, i < count.
struct AxisWindow {
  int64_t begin, count;
  int64_t extent;  // what an average divides by along this axis
};

struct PoolAxis {
  std::vector<AxisWindow> windows;  // one an output, in increasing order of begin
  int64_t step = 1;                 // the dilation
  // No element belongs to two windows, and windows have no holes.
  bool disjoint() const;
  // Each of `size` elements belongs to one window.
  bool tiles(int64_t size) const;
};

struct Pool2dProblem {
  DType dtype = DType::kFloat32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  PoolAxis rows, columns;
  std::optional<int64_t> divisor;  // of an average, instead of rows extent x columns extent

  int64_t p() const { return static_cast<int64_t>(rows.windows.size()); }
  int64_t q() const { return static_cast<int64_t>(columns.windows.size()); }
  Shape x_shape() const { return {n, c, h, w}; }
  Shape y_shape() const { return {n, c, p(), q()}; }
};

// Sizes as PyTorch: floor((size + 2 pad - window) / stride) + 1; in ceil_mode rounded up, but the last window must
// start inside the image or the padding before it. Padding of more than half the kernel is refused: a window without
// data.
Pool2dProblem make_max_pool2d(DType dtype, const Shape& x, Pair kernel, Pair stride, Pair padding, Pair dilation,
                              bool ceil_mode);
// The number of an element in its window is a byte.
void check_places(Pair kernel);
// The divisor counts padding (but not what ceil_mode adds beyond it) or elements of the image alone.
Pool2dProblem make_avg_pool2d(DType dtype, const Shape& x, Pair kernel, Pair stride, Pair padding, bool ceil_mode,
                              bool count_include_pad, std::optional<int64_t> divisor_override);
// Output i averages elements floor(i size / out) .. ceil((i + 1) size / out) - 1.

Pool2dProblem make_adaptive_avg_pool2d(DType dtype, const Shape& x, Pair output);

}  // namespace fastconv

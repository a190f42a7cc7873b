// The direct engine, which several algorithms set up in their own way.
#pragma once

#include "core/allocator.h"
#include "cpu/conv2d_band.h"
#include "cpu/parallel.h"

namespace fastconv::cpu::direct {

// Weights as the engine reads them: element (out o, in i, row tap r, column tap s) of group g is
// data[g * group + o * out + i * in + r * row + s * column].
struct WeightView {
  const float* data;
  int64_t group, out, in, row, column;
};

// Output channels in panels of tile_k; the last one is half as wide where that is enough.
struct Panels {
  int64_t outs, tile_k, lanes;
  int64_t count() const { return ceil_divide(outs, tile_k); }
  int64_t channels(int64_t i) const { return std::min(tile_k, outs - i * tile_k); }
  int64_t width(int64_t i) const { return channels(i) <= lanes ? lanes : tile_k; }
};

// An element of a kernel.
struct KernelTap {
  int64_t row, column;
};

// [group][panel][phase][channel block][tap of the phase][channel][width]
struct PackedPanels {
  PackedWeights weights;
  int64_t panel_floats;
  const float* panel(int64_t i) const { return weights.data() + i * panel_floats; }
};
// cache: may hold them, as the form of the implementation `name`; or null.
PackedPanels pack_weights(const WeightView&, int64_t groups, int64_t outs, int64_t ins,
                          const std::vector<std::vector<KernelTap>>& phases, WeightCache* cache, const char* name);

// y[n, rows, columns, outs] = clamp(sum over taps and channels of x * w + bias + residual). Outputs go to
// y[n][h][w][pixel] at the places that the axes name. For every group g the source's first channel is
// g * source.channels, and outputs begin at channel g * outs.
struct DirectProblem {
  int64_t images;
  SourceImage source;
  AxisTaps rows, columns;
  int64_t groups, outs;
  WeightView w;
  float* y;
  int64_t y_h, y_w, y_pixel;
  Epilogue epilogue;
  bool streaming = false;
  WeightCache* cache = nullptr;

  // Where output (row, column) of these axes, of image n, stands in y, its first channel.
  int64_t output_offset(const AxisTaps& rows, const AxisTaps& columns, int64_t n, int64_t row, int64_t column) const {
    return ((n * y_h + rows.out_first + row * rows.out_step) * y_w + columns.out_first + column * columns.out_step) *
           y_pixel;
  }
};
void run(const DirectProblem&);
// The phases of a strided input gradient, an axis a phase: all pairs of them in one pass over the source.
void run(const DirectProblem&, const std::vector<AxisTaps>& rows, const std::vector<AxisTaps>& columns);

// dw[g][out][in][taps] = sum over pixels of dy * x, written through the strides of dw.
struct WeightGradientProblem {
  int64_t images;
  SourceImage source;
  AxisTaps rows, columns;
  int64_t groups, outs;
  const float* dy;  // [n][rows.outputs][columns.outputs][groups * outs]
  WeightView dw;    // written
};
void run(const WeightGradientProblem&);

// dw of some channel blocks of one panel from total[block][tap][kBlock][width].
void write_gradient(const WeightGradientProblem&, const Panels&, int64_t g, int64_t panel, Range blocks,
                    const float* total);
// dw from sums[part][group][panel][channel block][tap][kBlock][width]: the parts added in order, which changes the
// first.
void write_gradient(const WeightGradientProblem&, float* sums, int64_t parts);

// A convolution and its gradients as these problems; an input gradient for one phase of the stride an axis.
DirectProblem forward_problem(const Conv2dProblem&, const ForwardArguments&);
DirectProblem backward_problem(const Conv2dProblem&, const BackwardInputArguments&, const AxisTaps& rows,
                               const AxisTaps& columns);
WeightGradientProblem weight_gradient_problem(const Conv2dProblem&, const BackwardWeightArguments&);

WeightView forward_weights(const Conv2dProblem&, const TensorView& w);   // out = K, in = C
WeightView backward_weights(const Conv2dProblem&, const TensorView& w);  // out = C, in = K

}  // namespace fastconv::cpu::direct

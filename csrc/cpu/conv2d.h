// The algorithms of convolution on the CPU.
#pragma once

#include "core/implementation.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/weight_cache.h"
#include "device/conv2d.h"

namespace fastconv::cpu {

using ConvForward = Implementation<Conv2dProblem, ForwardArguments>;
using ConvBackwardInput = Implementation<Conv2dProblem, BackwardInputArguments>;
using ConvBackwardWeight = Implementation<Conv2dProblem, BackwardWeightArguments>;

std::vector<std::string> conv2d_candidates(const Conv2dProblem&, Direction);  // all that accept, fastest first
void check_implementation(const std::string& name, Direction);                // throws unless there is one

// The algorithms, a file each.
namespace reference {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace reference

namespace direct {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace direct

namespace winograd {
const char* supports(const Conv2dProblem&);
const char* supports_backward_input(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace winograd

namespace pointwise {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace pointwise

namespace few_pixels {
const char* supports(const Conv2dProblem&);
const char* supports_backward(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace few_pixels

namespace winograd_rows {
const char* supports(const Conv2dProblem&);
const char* supports_forward(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace winograd_rows

namespace first_layer {
const char* supports(const Conv2dProblem&);
const char* supports_backward_input(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace first_layer

namespace grouped {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace grouped

namespace depthwise {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace depthwise

// What the fp32 algorithms share.

// Bias, residual and the bounds of an activation that is a clamp; the others are applied afterwards by conv2d_forward.
Epilogue make_epilogue(const ForwardArguments&);

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of so many floats do not fit L2: writing around the caches saves reading them first.
// Every store must then be a full, aligned vector.
inline bool worth_streaming(int64_t pixels, int64_t channels, int64_t least_floats = int64_t{1} << 19) {
  return channels % 16 == 0 && pixels * channels >= least_floats;
}

// Which source pixels an axis of outputs needs. Output j, at destination out_first + j * out_step, is the sum over taps
// of source pixel j * step + taps[i].offset times kernel element taps[i].index. The offsets are in arithmetic
// progression. Forward is one such axis; an input gradient with stride s is s of them, one a phase.
struct AxisTaps {
  struct Tap {
    int64_t offset, index;
  };
  int64_t outputs = 0, out_first = 0, out_step = 1;
  int64_t step = 1;
  std::vector<Tap> taps;
};
AxisTaps forward_axis(int64_t outputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation);
std::vector<AxisTaps> backward_axes(int64_t inputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation);

}  // namespace fastconv::cpu

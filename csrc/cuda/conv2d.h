// The implementations of convolution on CUDA devices, a file each: three ordered lists in conv2d.cpp, as on the CPU.
// Activations are dense channels-last, weights have any strides, all of problem.dtype; sums are taken in float (in
// double for float64). Work is enqueued on current_stream(); scratch memory comes from Buffer (core/allocator.h), which
// is device memory here and may be released as soon as the work that uses it is enqueued.
// No floating-point atomics: every run gives the same bits.
#pragma once

#include "core/allocator.h"
#include "cuda/device.h"
#include "device/conv2d.h"

namespace fastconv::cuda {

using ConvForward = Implementation<Conv2dProblem, ForwardArguments>;
using ConvBackwardInput = Implementation<Conv2dProblem, BackwardInputArguments>;
using ConvBackwardWeight = Implementation<Conv2dProblem, BackwardWeightArguments>;

// float32 convolutions may round their operands to tf32 (10 bits of fraction); off unless asked for.
void allow_tf32(bool);
bool tf32_allowed();

// w as a dense [k][r][s][c/g] array: its own memory where it lies so, else a copy.
const void* krsc_weights(const Conv2dProblem&, const TensorView& w, Buffer& copy);
// Where to write the dense [k][r][s][c/g] gradient: dw's own memory where it lies so, else `copy`, which store_krsc
// then brings to dw.
void* krsc_gradient(const Conv2dProblem&, const TensorView& dw, Buffer& copy);
void store_krsc(const TensorView& dw, const Buffer& copy);

// Every `supports` returns null to accept or why it declines; it may look at device_info().
// Hopper: TMA im2col and wgmma (conv2d_sm90.cu).
namespace sm90 {
const char* supports(const Conv2dProblem&);
const char* supports_backward_input(const Conv2dProblem&);
const char* supports_backward_weight(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace sm90

// mma.sync, Ampere and up (conv2d_sm80.cu).
namespace sm80 {
const char* supports(const Conv2dProblem&);
const char* supports_backward_input(const Conv2dProblem&);
const char* supports_backward_weight(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace sm80

namespace depthwise {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace depthwise

// The definition: one thread an output, any shape, never declines (conv2d_simt.cu).
namespace simt {
const char* supports(const Conv2dProblem&);
void forward(const Conv2dProblem&, const ForwardArguments&);
void backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
}  // namespace simt

}  // namespace fastconv::cuda

// y = x w^T + b: a 1x1 convolution over images of one pixel, run by the pointwise engine.
#pragma once

#include "core/problem.h"

namespace fastconv::FASTCONV_DEVICE {

// x[rows][in], w[out, in] with any strides, y[rows][out].
Conv2dProblem make_linear(DType, int64_t rows, int64_t in, const TensorView& w);
void linear(const Conv2dProblem&, const void* x, const TensorView& w, const void* bias, void* y);
void linear_backward_input(const Conv2dProblem&, const void* dy, const TensorView& w, void* dx);
void linear_backward_weight(const Conv2dProblem&, const void* dy, const void* x, const TensorView& dw);
void linear_backward_bias(const Conv2dProblem&, const void* dy, void* db);

}  // namespace fastconv::FASTCONV_DEVICE

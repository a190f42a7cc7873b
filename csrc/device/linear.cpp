#include "device/linear.h"

#include "core/check.h"
#include "device/conv2d.h"

namespace fastconv::FASTCONV_DEVICE {
namespace {

// w[out, in] as w[K, C, 1, 1]
TensorView as_kernel(TensorView w) {
  w.ndim = 4;
  w.sizes[2] = w.sizes[3] = 1;
  w.strides[2] = w.strides[3] = 1;
  return w;
}

}  // namespace

Conv2dProblem make_linear(DType dtype, int64_t rows, int64_t in, const TensorView& w) {
  check_float("input", dtype);
  check_dtype("weight", w, dtype);
  FC_CHECK(w.ndim == 2 && w.sizes[1] == in, "weight must have shape (out, ", in, "), got ", shape_string(w));
  return make_conv2d(dtype, {rows, in, 1, 1}, {w.sizes[0], in, 1, 1}, {1, 1}, std::array<int64_t, 4>{0, 0, 0, 0},
                     {1, 1}, 1);
}

void linear(const Conv2dProblem& a, const void* x, const TensorView& w, const void* bias, void* y) {
  conv2d_forward(a, {x, as_kernel(w), bias, nullptr, Activation::kNone, y});
}

void linear_backward_input(const Conv2dProblem& a, const void* dy, const TensorView& w, void* dx) {
  conv2d_backward_input(a, {dy, as_kernel(w), dx});
}

void linear_backward_weight(const Conv2dProblem& a, const void* dy, const void* x, const TensorView& dw) {
  conv2d_backward_weight(a, {dy, x, as_kernel(dw)});
}

void linear_backward_bias(const Conv2dProblem& a, const void* dy, void* db) { channel_sums(a.dtype, a.n, a.k, dy, db); }

}  // namespace fastconv::FASTCONV_DEVICE

// What numpy does for the tape on the CPU: arithmetic on arrays of any strides, casts, sums over dimensions.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace fastconv::cuda {

enum class Arithmetic : uint8_t { kAdd, kSubtract, kMultiply, kDivide };

// y = a op b, all of one floating type and one shape; operands that are repeated have strides of 0.
void arithmetic(Arithmetic, const TensorView& a, const TensorView& b, const TensorView& y);
void fill_view(const TensorView& y, double value);
void square_root(const TensorView& x, const TensorView& y);
// dst = src in dst's type, any strides, same shape. Numbers go through double.
void cast_view(const TensorView& src, const TensorView& dst);
// y, dense in row-major order of the dimensions that are not summed over. Sums in double.
void sum_over(const TensorView& x, const std::vector<bool>& over, void* y);

}  // namespace fastconv::cuda

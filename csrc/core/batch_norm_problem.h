// Batch normalisation over `rows` values of each of `channels` channels, and its checks.
#pragma once

#include "core/problem.h"

namespace fastconv {

struct BatchNormProblem {
  DType dtype = DType::kFloat32;
  Shape shape{};  // N, C, H, W
  double eps = 0;

  // Of weight, bias and statistics: 16-bit images have parameters of 32 bits.
  DType parameter_dtype() const { return itemsize(dtype) == 2 ? DType::kFloat32 : dtype; }
  int64_t channels() const { return shape[1]; }
  int64_t rows() const { return shape[0] * shape[2] * shape[3]; }
};

// ValueError for an eps that is negative or not a number, and in training for a single value a channel, which has no
// variance.
BatchNormProblem make_batch_norm(DType dtype, const Shape& x, double eps, bool training);

}  // namespace fastconv

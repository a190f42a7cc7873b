// Local response normalisation across channels, and its checks.
#pragma once

#include "core/problem.h"

namespace fastconv {

// y = x / (k + alpha / size * sum of x^2 over the window)^beta. The window of channel c is c - size / 2 to
// c + (size - 1) / 2, what lies outside the channels counting as 0.
struct ResponseNormProblem {
  DType dtype = DType::kFloat32;
  Shape shape{};  // N, C, H, W
  int64_t size = 1;
  double alpha = 0, beta = 0, k = 0;

  int64_t channels() const { return shape[1]; }
  int64_t pixels() const { return shape[0] * shape[2] * shape[3]; }
};

// ValueError for a size below 1.
ResponseNormProblem make_response_norm(DType dtype, const Shape& x, int64_t size, double alpha, double beta, double k);

}  // namespace fastconv

#include "core/response_norm_problem.h"

#include "core/check.h"

namespace fastconv {

ResponseNormProblem make_response_norm(DType dtype, const Shape& x, int64_t size, double alpha, double beta, double k) {
  check_float("input", dtype);
  FC_CHECK(size > 0, "size must be positive, got ", size);
  return {dtype, x, size, alpha, beta, k};
}

}  // namespace fastconv

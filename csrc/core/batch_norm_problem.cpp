#include "core/batch_norm_problem.h"

#include "core/check.h"

namespace fastconv {

BatchNormProblem make_batch_norm(DType dtype, const Shape& x, double eps, bool training) {
  check_float("input", dtype);
  BatchNormProblem problem{dtype, x, eps};
  FC_CHECK(eps >= 0, "eps must not be negative, got ", eps);
  FC_CHECK(!training || problem.rows() != 1, "training needs more than one value per channel, got an input of shape ",
           shape_string(x));
  return problem;
}

}  // namespace fastconv

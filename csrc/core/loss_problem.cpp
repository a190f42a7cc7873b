#include "core/loss_problem.h"

#include "core/check.h"

namespace fastconv {
namespace {

Reduction parse_reduction(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "sum") return Reduction::kSum;
  if (name == "mean") return Reduction::kMean;
  throw std::invalid_argument("reduction must be 'none', 'mean' or 'sum', got '" + name + "'");
}

}  // namespace

SoftmaxProblem make_softmax(const TensorView& v, int64_t dim) {
  check_float("input", v.dtype);
  FC_CHECK(dim >= -v.ndim && dim < v.ndim, "dim must be in [", -v.ndim, ", ", v.ndim, "), got ", dim);
  const int64_t d = dim < 0 ? dim + v.ndim : dim;
  const int64_t length = v.sizes[d], inner = length == 1 ? 1 : v.strides[d], total = v.numel();
  if (total == 0) return {v.dtype, 0, length, 1};
  return {v.dtype, total / (length * inner), length, inner};
}

CrossEntropyProblem make_cross_entropy(const TensorView& logits, const TensorView& target, const TensorView* weight,
                                       int64_t ignore_index, const std::string& reduction, double label_smoothing) {
  check_float("logits", logits.dtype);
  FC_CHECK(logits.ndim == 2, "logits must have shape (N, C), got ", shape_string(logits));
  const int64_t rows = logits.sizes[0], classes = logits.sizes[1];
  check_vector("target", target, DType::kInt64, rows);
  if (weight) check_vector("weight", *weight, logits.dtype, classes);
  FC_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be between 0 and 1, got ",
           label_smoothing);
  return {logits.dtype, rows, classes, ignore_index, parse_reduction(reduction), label_smoothing};
}

}  // namespace fastconv

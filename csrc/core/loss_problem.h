// Softmax and cross entropy: shapes, options and their checks.
#pragma once

#include <string>

#include "core/problem.h"

namespace fastconv {

// A dense array seen from one of its dimensions: [outer][length][inner] in memory.
struct SoftmaxProblem {
  DType dtype;
  int64_t outer, length, inner;
};
// v must be dense, in any order of dimensions.
SoftmaxProblem make_softmax(const TensorView& v, int64_t dim);
enum class Reduction : uint8_t { kNone, kSum, kMean };

struct CrossEntropyProblem {
  DType dtype;
  int64_t rows, classes;
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;
};

// Checks shapes and options. The targets lie on the device: its check_targets looks at them.
CrossEntropyProblem make_cross_entropy(const TensorView& logits, const TensorView& target, const TensorView* weight,
                                       int64_t ignore_index, const std::string& reduction, double label_smoothing);

}  // namespace fastconv

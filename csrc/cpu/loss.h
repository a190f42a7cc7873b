// Softmax along one dimension of a dense array, and cross entropy.
#pragma once

#include <string>

#include "core/problem.h"

namespace fastconv::cpu {

// A dense array seen from one of its dimensions: [outer][length][inner] in memory.
struct SoftmaxProblem {
  DType dtype;
  int64_t outer, length, inner;
};
// v must be dense, in any order of dimensions.
SoftmaxProblem make_softmax(const TensorView& v, int64_t dim);
void softmax(const SoftmaxProblem&, const void* x, void* y, bool logarithm);
// From the output y.
void softmax_backward(const SoftmaxProblem&, const void* dy, const void* y, void* dx, bool logarithm);

enum class Reduction : uint8_t { kNone, kSum, kMean };

struct CrossEntropyProblem {
  DType dtype;
  int64_t rows, classes;
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;
};

// Checks shapes, options and every target.
CrossEntropyProblem make_cross_entropy(const TensorView& logits, const TensorView& target, const TensorView* weight,
                                       int64_t ignore_index, const std::string& reduction, double label_smoothing);

// logits[rows][classes], weight[classes] or null, all dense. loss: one value, or [rows] without reduction.
void cross_entropy(const CrossEntropyProblem&, const void* logits, const int64_t* target, const void* weight,
                   void* loss);
// dloss: one value, or [rows] without reduction.
void cross_entropy_backward(const CrossEntropyProblem&, const void* dloss, const void* logits, const int64_t* target,
                            const void* weight, void* dlogits);

}  // namespace fastconv::cpu

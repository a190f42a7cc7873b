// Softmax along one dimension of a dense array, and cross entropy.
#pragma once

#include "core/loss_problem.h"

namespace fastconv::FASTCONV_DEVICE {

void softmax(const SoftmaxProblem&, const void* x, void* y, bool logarithm);
// From the output y.
void softmax_backward(const SoftmaxProblem&, const void* dy, const void* y, void* dx, bool logarithm);

// ValueError naming the first target that is neither a class nor ignored. target: [rows], any stride.
void check_targets(const CrossEntropyProblem&, const TensorView& target);
// logits[rows][classes], weight[classes] or null, all dense. loss: one value, or [rows] without reduction.
void cross_entropy(const CrossEntropyProblem&, const void* logits, const int64_t* target, const void* weight,
                   void* loss);
// dloss: one value, or [rows] without reduction.
void cross_entropy_backward(const CrossEntropyProblem&, const void* dloss, const void* logits, const int64_t* target,
                            const void* weight, void* dlogits);

}  // namespace fastconv::FASTCONV_DEVICE

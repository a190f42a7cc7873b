// Batch normalisation on the CPU: x, y, residual and their gradients are dense [rows][channels], the vectors dense
// [channels].
#pragma once

#include "core/allocator.h"
#include "core/batch_norm_problem.h"
#include "device/pool2d.h"

namespace fastconv::FASTCONV_DEVICE {

// Of a set of `count` values a channel: the mean, and the sum of squared distances from it, [channels] each.
struct Moments {
  int64_t count;
  const double* mean;
  const double* squares;
};

// mean and squares of x, each [channels].
void batch_norm_moments(const BatchNormProblem&, const void* x, double* mean, double* squares);
// mean, rstd = 1 / sqrt(variance + eps), and the variance with divisor count - 1 (0 for an empty batch).
void batch_norm_statistics(const BatchNormProblem&, const Moments&, void* mean, void* rstd, void* unbiased_variance);
// running = (1 - momentum) running + momentum batch
void update_running(DType, int64_t channels, const void* batch, double momentum, void* running);
// rstd = 1 / sqrt(variance + eps)
void reciprocal_std(DType, int64_t channels, const void* variance, double eps, void* rstd);

struct BatchNormArguments {
  const void* x;
  const void* mean;
  const void* rstd;
  const void* weight;    // or null: 1
  const void* bias;      // or null: 0
  const void* residual;  // or null
  Activation activation = Activation::kNone;
};

// y = activation((x - mean) rstd weight + bias + residual)
void batch_norm_forward(const BatchNormProblem&, const BatchNormArguments&, void* y);

struct BatchNormGradients {
  void* dx = nullptr;  // each may be null: not wanted
  void* dweight = nullptr;
  void* dbias = nullptr;
  void* dresidual = nullptr;
};

// The two halves of the backward pass in training, for a batch that is spread over several processes: the sums of one
// part, then its dx from the sums over all parts, which have `count` values a channel together.
// dz is the gradient in front of the activation; it is stored unless null.
// totals: the sum of dz of each channel, then the sum of the products dz (x - mean).
void batch_norm_backward_sums(const BatchNormProblem&, const BatchNormArguments&, const void* dy, void* dz,
                              double* totals);
void batch_norm_backward_input(const BatchNormProblem&, const BatchNormArguments&, const void* dy, const double* sum,
                               const double* products, int64_t count, void* dx);

// The whole backward pass. training: mean and rstd depend on x (Ioffe and Szegedy, arXiv 1502.03167, section 3);
// otherwise they are constants.
void batch_norm_backward(const BatchNormProblem&, const BatchNormArguments&, const void* dy, bool training,
                         const BatchNormGradients&);

// Followed by max pooling in the same pass: the normalised image is not written. y and places: those of max_pool2d. No
// residual.
void batch_norm_max_pool(const BatchNormProblem&, const BatchNormArguments&, const Pool2dProblem&, void* y,
                         uint8_t* places);
// Its backward pass in training, dy and places like y.
void batch_norm_max_pool_backward(const BatchNormProblem&, const BatchNormArguments&, const Pool2dProblem&,
                                  const void* dy, const uint8_t* places, const BatchNormGradients&);
// The same by two operations.
inline void backward_one_by_one(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool,
                                const void* dy, const uint8_t* places, const BatchNormGradients& out) {
  const Buffer dz(std::max<int64_t>(a.rows() * a.channels(), 1) * itemsize(a.dtype));
  max_pool2d_backward_places(pool, dy, places, dz.as<void>());
  batch_norm_backward(a, args, dz.as<void>(), true, out);
}

}  // namespace fastconv::FASTCONV_DEVICE

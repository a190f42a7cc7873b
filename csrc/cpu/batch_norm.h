// Batch normalisation on the CPU: x, y, residual and their gradients are dense [rows][channels], the vectors dense
// [channels].
#pragma once

#include "core/batch_norm_problem.h"

namespace fastconv::cpu {

// mean and rstd = 1 / sqrt(variance + eps) of the batch, and the variance with divisor rows - 1 (0 for an empty batch).
void batch_norm_statistics(const BatchNormProblem&, const void* x, void* mean, void* rstd, void* unbiased_variance);
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

// training: mean and rstd depend on x (Ioffe and Szegedy, arXiv 1502.03167, section 3); otherwise they are constants.
void batch_norm_backward(const BatchNormProblem&, const BatchNormArguments&, const void* dy, bool training,
                         const BatchNormGradients&);

}  // namespace fastconv::cpu

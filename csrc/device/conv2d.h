// Convolution. Activations are dense channels-last [n][h][w][c]; weights keep the caller's strides, because every
// algorithm repacks them anyway.
#pragma once

#include <string>

#include "core/implementation.h"
#include "core/problem.h"
#include "device/batch_norm.h"

namespace fastconv::FASTCONV_DEVICE {

class WeightCache;  // of the CPU alone: cpu/weight_cache.h

struct ForwardArguments {
  const void* x;
  TensorView w;
  const void* bias;      // [K] or null
  const void* residual;  // shaped like y, or null
  Activation activation;
  void* y;
  double* moments = nullptr;  // [2][K], of each channel of y the mean and the squared distances from it; or null
  // Of the CPU alone; null elsewhere.
  const void* scale = nullptr;   // [K]: w is to be multiplied by it
  WeightCache* cache = nullptr;  // of w times scale
};

// The moments of y, in a pass of their own.
inline void read_moments(const Conv2dProblem& problem, const ForwardArguments& args) {
  batch_norm_moments(make_batch_norm(problem.dtype, problem.y_shape(), 0, false), args.y, args.moments,
                     args.moments + problem.k);
}

struct BackwardInputArguments {
  const void* dy;
  TensorView w;
  void* dx;
};

struct BackwardWeightArguments {
  const void* dy;
  const void* x;
  TensorView dw;  // any strides
};

void conv2d_forward(const Conv2dProblem&, const ForwardArguments&);
void conv2d_backward_input(const Conv2dProblem&, const BackwardInputArguments&);
void conv2d_backward_weight(const Conv2dProblem&, const BackwardWeightArguments&);
// db[channels] = the sum of dy[rows][channels] over rows.
void channel_sums(DType, int64_t rows, int64_t channels, const void* dy, void* db);

Explanation explain_conv2d(const Conv2dProblem&, Direction);
// For this thread; "" lets the lists decide. For tests, experiments and tuning.
void set_conv2d_algorithm(const std::string& name);

// Strict precision refuses algorithms with a larger error than a plain sum has, as Winograd's.
void set_strict_precision(bool);
bool strict_precision();

}  // namespace fastconv::FASTCONV_DEVICE

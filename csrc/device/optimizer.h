// Optimiser steps over all parameters in one call.
#pragma once

#include <vector>

#include "core/dtype.h"

namespace fastconv::FASTCONV_DEVICE {

// One parameter with its gradient and state: dense arrays of n elements in the same order of memory.
struct Parameter {
  DType dtype;
  int64_t n;
  void* value;
  const void* gradient;
  void* state[2];
  double weight_decay;
};

struct SgdOptions {
  double lr, momentum, dampening, gradient_scale;
  bool nesterov, first;
  const double* scale_place = nullptr;  // of a CUDA device: where gradient_scale is found instead; see step_numbers.h
};
// PyTorch's SGD; state[0] is the momentum buffer, null without momentum.
void sgd_step(const std::vector<Parameter>&, const SgdOptions&);

struct AdamWOptions {
  int64_t step;  // from 1
  double lr, beta1, beta2, eps, gradient_scale;
  const double* scale_place = nullptr;  // as of SGD
};
// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2); state: first and second moment.
void adamw_step(const std::vector<Parameter>&, const AdamWOptions&);

// L2 norm of all gradients taken as one vector, in double.
double gradient_norm(const std::vector<Parameter>&);

// value += share (gradient - value), where "gradient" is any other array: a step of an exponential moving average.
void move_towards(const std::vector<Parameter>&, double share);

}  // namespace fastconv::FASTCONV_DEVICE

// Optimiser steps that every ISA provides: one pass over n elements of one parameter, in place, fp32 and fp64.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

template <class T> struct SgdSettings {
  T lr, momentum, one_minus_dampening, weight_decay, gradient_scale;
  bool nesterov, first;  // first: the momentum buffer starts as the gradient
};

template <class T> struct AdamWSettings {
  T one_minus_beta1, beta2, one_minus_beta2;
  T keep;        // 1 - lr weight_decay
  T step_size;   // lr / (1 - beta1^step)
  T root_scale;  // 1 / sqrt(1 - beta2^step)
  T eps, gradient_scale;
};

template <class T> struct OptimizerKernels {
  // momentum null: plain gradient descent
  void (*sgd)(T* p, const T* g, T* momentum, int64_t n, const SgdSettings<T>&);
  void (*adamw)(T* p, const T* g, T* mean, T* square, int64_t n, const AdamWSettings<T>&);
  double (*sum_of_squares)(const T* a, int64_t n);
  void (*move_towards)(T* average, const T* value, int64_t n, T share);
};

}  // namespace fastconv::cpu

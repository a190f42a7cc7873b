// Softmax kernels that every ISA provides, fp32 and fp64.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

template <class T> struct LossKernels {
  // One row of n contiguous elements, result in y. logarithm: log softmax.
  void (*softmax_row)(const T* x, T* y, int64_t n, bool logarithm);
  void (*softmax_row_backward)(const T* dy, const T* y, T* dx, int64_t n, bool logarithm);
  // `columns` softmaxes side by side, each over n elements at a distance of `step`.
  void (*softmax_columns)(const T* x, T* y, int64_t n, int64_t step, int64_t columns, bool logarithm);
  void (*softmax_columns_backward)(const T* dy, const T* y, T* dx, int64_t n, int64_t step, int64_t columns,
                                   bool logarithm);
  // maximum of a row and the sum of exp(x - maximum)
  void (*row_sums)(const T* x, int64_t n, T* maximum, T* sum);
  // With p the softmax of x: dx[c] = hard (p[c] - [c is target]) + smooth (all_weights p[c] - weight[c]).
  // weight null: 1
  void (*cross_entropy_row_backward)(const T* x, T* dx, int64_t n, int64_t target, double hard, double smooth,
                                     double all_weights, const T* weight);
};

}  // namespace fastconv::cpu

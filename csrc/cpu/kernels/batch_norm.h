// Batch normalisation kernels that every ISA provides: a block of rows [rows][channels], dense, fp32 and fp64.
#pragma once

#include <cstdint>

#include "cpu/kernels/pool2d.h"

namespace fastconv::cpu {

constexpr int kBatchNormActivations = 7;  // none and the others, in the order of core's Activation

// z = (x - mean) * scale + bias + residual, y = f(z), f the activation. Backward computes z again with the same
// operations, so that it sees the same side of every kink.
template <class T> struct BatchNormRows {
  const T* x;
  const T* residual;  // or null
  int64_t rows, channels;
  const T* mean;
  const T* scale;  // weight / sqrt(variance + eps)
  const T* bias;
  bool streaming;  // y or dx around the caches: whole vectors, aligned
};

template <class T> struct BatchNormKernels {
  // mean[c] and the sum of squared distances from it, of the block, from sums of distances from `near`: the nearer it
  // is to the mean, the less of the digits cancel.
  void (*moments)(const T* x, int64_t rows, int64_t channels, const T* near, T* mean, T* squares);
  void (*forward[kBatchNormActivations])(const BatchNormRows<T>&, T* y);
  // dz = dy f'(z). sum[c] = sum of dz, dot[c] = sum of dz (x - mean), over the block. dz, which may be dy, is stored
  // unless null.
  void (*backward_sums[kBatchNormActivations])(const BatchNormRows<T>&, const T* dy, T* dz, T* sum, T* dot);
  // dx = scale (dz - a[c] - (x - mean) b[c]); dx may be dy
  void (*backward_input[kBatchNormActivations])(const BatchNormRows<T>&, const T* dy, const T* a, const T* b, T* dx);
  // dx = scale dz; dz is stored unless null
  void (*backward_constant[kBatchNormActivations])(const BatchNormRows<T>&, const T* dy, T* dx, T* dz);
  // The same behind max pooling, for a row of windows without overlap: dy is that of the maxima, whose places are
  // given, and zero elsewhere in the windows. Of BatchNormRows only the vectors are read; sum and dot are added to.
  void (*pooled_sums[kBatchNormActivations])(const PoolRow<T>&, const BatchNormRows<T>&, T* sum, T* dot);
  void (*pooled_input[kBatchNormActivations])(const PoolRow<T>&, const BatchNormRows<T>&, const T* a, const T* b);
};

}  // namespace fastconv::cpu

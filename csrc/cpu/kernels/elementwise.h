// Elementwise kernels that every ISA provides, fp32 and fp64.
#pragma once

#include "core/elementwise.h"

namespace fastconv::cpu {

template <class T> struct ElementwiseKernels {
  // streaming: the result around the caches; it is aligned to a line.
  // y[i] = f(x[i]); y may be x
  void (*forward[kElementwiseFunctions])(const T* x, T* y, int64_t n, T parameter, bool streaming);
  // dx[i] = dy[i] f'(x[i])
  void (*backward[kElementwiseFunctions])(const T* dy, const T* x, T* dx, int64_t n, T parameter, bool streaming);
  void (*add)(const T* a, const T* b, T* y, int64_t n, bool streaming);  // y may be a
  void (*scale)(const T* x, T* y, int64_t n, T factor);                  // y[i] = factor x[i]
  // y[row][i] += bias[i]
  void (*add_bias)(T* y, int64_t rows, int64_t channels, const T* bias);
  // y[i] = x[i] * scale where random word (offset + i) >= threshold, else 0
  void (*dropout)(const T* x, T* y, int64_t n, uint64_t seed, uint64_t offset, uint32_t threshold, T scale);
};

}  // namespace fastconv::cpu

// Local response normalisation kernels that every ISA provides: pixels [pixels][channels], dense, fp32 and fp64.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

// s[c] = k + scale * sum of x[j]^2 over c - before <= j <= c + after within the channels, y = x / s^beta
template <class T> struct ResponseNormRows {
  const T* x;
  int64_t pixels, channels;
  int64_t before, after;  // less than channels
  T scale, beta, k;
  T *squares, *shares;  // scratch for before + channels + after elements each
  T* sums;              // and for channels elements
};

template <class T> struct ResponseNormKernels {
  void (*forward)(const ResponseNormRows<T>&, T* y);
  // dx = dy / s^beta - 2 scale beta x (sum of dy x / s^(beta + 1) over the channels whose window has this one)
  void (*backward)(const ResponseNormRows<T>&, const T* dy, T* dx);
};

}  // namespace fastconv::cpu

// Kernels on whole vectors of channels: a block of rows [rows][channels], dense, fp32 and fp64.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

template <class T> struct ChannelKernels {
  // y[row][c] = x[row][c] gate[c] + bias[c]; bias null: 0
  void (*gate)(const T* x, const T* gate, const T* bias, T* y, int64_t rows, int64_t channels);
  // dx[row][c] = dy[row][c] gate[c], unless dx is null; sum[c] = sum of dy x over the rows
  void (*gate_backward)(const T* dy, const T* x, const T* gate, T* dx, T* sum, int64_t rows, int64_t channels);
};

}  // namespace fastconv::cpu

// What happens to a sum before it is written: bias, residual, an activation that is a clamp, one rounding; and
// statistics of the written numbers for a batch norm that follows.
#pragma once

#include <cmath>

#include "cuda/machine.h"

namespace fastconv::cuda {

// Mean and sum of squared differences from it, of one channel over one slice of pixels. Slices are merged in order with
// Chan, Golub and LeVeque's formula (1979), which has no cancellation.
struct SliceStatistics {
  float mean, m2;
};

// moments[2][channels] of all `rows` pixels from those of slices of `pixels`, the last of which may have fewer.
void merge_statistics(int64_t rows, int64_t channels, const SliceStatistics* slices, int64_t pixels, double* moments);

struct Epilogue {
  const void* bias = nullptr;      // [channels]
  const void* residual = nullptr;  // shaped like the result
  float low = -INFINITY, high = INFINITY;
  SliceStatistics* statistics = nullptr;  // [slices][channels]
};

template <class T> FC_DEVICE float epilogue_value(const Epilogue& e, float sum, int channel, int64_t at) {
  using Storage = typename T::Storage;
  if (e.bias) sum += T::load(static_cast<const Storage*>(e.bias)[channel]);
  if (e.residual) sum += T::load(static_cast<const Storage*>(e.residual)[at]);
  // Comparisons that a NaN fails, so that it stays one.
  if (sum < e.low) sum = e.low;
  if (sum > e.high) sum = e.high;
  return sum;
}

}  // namespace fastconv::cuda

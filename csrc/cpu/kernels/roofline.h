// What the machine can do at most, measured with the same instructions that the kernels use.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

struct RooflineKernels {
  double (*fma_burst)(int64_t iterations);  // returns the floating-point operations done
  // dst[i] = src[i], written around the cache; 64-byte aligned, floats a multiple of 16
  void (*stream_copy)(const float* src, float* dst, int64_t floats);
};

}  // namespace fastconv::cpu

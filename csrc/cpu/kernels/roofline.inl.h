#pragma once

#include "cpu/kernels/roofline.h"

namespace fastconv::cpu {
namespace {

// Independent FMA chains that fill both FMA ports: the measured peak of the roofline.
double fma_burst(int64_t iterations) {
  constexpr int N = 12;
  Vec acc[N];
  for (int i = 0; i < N; ++i) acc[i] = set1(1.0f + i);
  const Vec a = set1(0.999999f), b = set1(1e-7f);
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) acc[i] = fma(acc[i], a, b);
  Vec sum = acc[0];
  for (int i = 1; i < N; ++i) sum = add(sum, acc[i]);
  float out[kLanes];
  store(out, sum);
  asm volatile("" : : "r"(out) : "memory");  // the result must count as used
  return 2.0 * N * kLanes * static_cast<double>(iterations);
}

void stream_copy(const float* src, float* dst, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) stream(dst + i, load(src + i));
}

constexpr RooflineKernels roofline_kernels() { return {fma_burst, stream_copy}; }

}  // namespace
}  // namespace fastconv::cpu

// bfloat16: the upper half of a float32. Kernels compute in float32; only their loads and stores convert.
#pragma once

#include <cstdint>

namespace fastconv {

struct BFloat16 {
  uint16_t bits;
};

namespace {  // kernels of every ISA include this: each its own copy

inline float to_float(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(float a) { return a; }

}  // namespace
}  // namespace fastconv

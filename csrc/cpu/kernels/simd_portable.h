// Any machine: vectors of four floats in the compiler's own extension (SSE2, NEON, or plain code).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"

#define FC_ISA_NAME "portable"

namespace fastconv::cpu {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef float UnalignedVec __attribute__((vector_size(16), aligned(4)));
constexpr int kLanes = 4;
constexpr int kTilePixels = 6;    // 6 x 2 accumulators + 2 weights + 1 broadcast = 15 of 16 registers
constexpr int kTileChannels = 4;  // weight gradient: 4 x 2 accumulators

inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec set1(float a) { return Vec{a, a, a, a}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline Vec load_first(const float* p, int64_t n) {
  Vec a = zero();
  for (int64_t i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
// The first lanes, the others zero and not read; none unless `inside`.
using Mask = int64_t;
inline Mask first(int64_t n) { return n; }
inline Mask lanes_if(bool inside, Mask lanes) { return inside ? lanes : 0; }
inline Vec load_lanes(Mask lanes, const float* p) { return load_first(p, lanes); }
// kLanes bytes as integers.
inline Vec load_bytes(const uint8_t* p) {
  typedef int32_t Integers __attribute__((vector_size(16)));
  return reinterpret_cast<Vec>(Integers{p[0], p[1], p[2], p[3]});
}
inline void store(float* p, Vec a) { *reinterpret_cast<UnalignedVec*>(p) = a; }
inline void store_first(float* p, Vec a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a[i];
}
inline void stream(float* p, Vec a) { store(p, a); }
// bfloat16: widened by a shift, rounded to nearest, ties to even; a NaN stays one.
inline Vec load_first(const BFloat16* p, int64_t n) {
  float a[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) a[i] = to_float(p[i]);
  return load(a);
}
inline Vec load(const BFloat16* p) { return load_first(p, kLanes); }
inline Vec load_lanes(Mask lanes, const BFloat16* p) { return load_first(p, lanes); }
inline void store_first(BFloat16* p, Vec a, int64_t n) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  const Bits bits = reinterpret_cast<Bits>(a), rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Bits kept = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;
  for (int64_t i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(kept[i] >> 16);
}
inline void store(BFloat16* p, Vec a) { store_first(p, a, kLanes); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// A comparison with NaN is false, so NaN passes through a clamp.
inline Vec clamp(Vec a, Vec low, Vec high) {
  a = a < low ? low : a;
  return a > high ? high : a;
}
// Lanes of 64 bits, and the products of their low halves.
typedef uint64_t Words __attribute__((vector_size(16)));
inline Words multiply_words(Words a, Words b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline void keep(Vec&) {}  // a hint that this compiler has no portable form for
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline __attribute__((always_inline)) void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace fastconv::cpu

// AVX2 with FMA: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"

#define FC_ISA_NAME "avx2"

namespace fastconv::cpu {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kTilePixels = 6;    // 6 x 2 accumulators + 2 weights + 1 broadcast = 15 of 16 registers
constexpr int kTileChannels = 4;  // weight gradient: 4 x 2 accumulators cover the FMA latency

inline __m256i first(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float a) { return _mm256_set1_ps(a); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
// Some lanes, the others zero and not read; none unless `inside`.
using Mask = __m256i;
inline Mask lanes_if(bool inside, Mask lanes) {
  return _mm256_and_si256(lanes, _mm256_set1_epi32(-static_cast<int>(inside)));
}
inline Vec load_lanes(Mask lanes, const float* p) { return _mm256_maskload_ps(p, lanes); }
// kLanes bytes as integers: GCC 12 takes the general conversion apart lane by lane.
inline Vec load_bytes(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store_first(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a); }  // p 32-byte aligned
// bfloat16: widened by a shift, rounded to nearest, ties to even; a NaN stays one.
inline Vec load(const BFloat16* p) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
inline Vec load_first(const BFloat16* p, int64_t n) {
  BFloat16 a[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) a[i] = p[i];
  return load(a);
}
inline Vec load_lanes(Mask lanes, const BFloat16* p) {
  const int count = __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  return count == kLanes ? load(p) : load_first(p, count);
}
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
inline void store_first(BFloat16* p, Vec a, int64_t n) {
  BFloat16 all[kLanes];
  store(all, a);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand is returned where one is NaN, so NaN passes through a clamp.
inline Vec clamp(Vec a, Vec low, Vec high) { return _mm256_min_ps(high, _mm256_max_ps(low, a)); }
// Lanes of 64 bits, and the products of their low halves.
typedef uint64_t Words __attribute__((vector_size(32)));
inline Words multiply_words(Words a, Words b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline void keep(Vec& a) { asm("" : "+x"(a)); }  // in a register, not as a memory operand
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
inline __attribute__((always_inline)) void prefetch_l2(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace fastconv::cpu

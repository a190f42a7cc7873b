// AVX-512: 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"

#define FC_ISA_NAME "avx512"

namespace fastconv::cpu {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kTilePixels = 14;   // 14 x 2 accumulators + 2 weights + 1 broadcast = 31 of 32 registers
constexpr int kTileChannels = 8;  // weight gradient: 8 x 2 accumulators cover the FMA latency

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
// Some lanes, the others zero and not read; none unless `inside`.
using Mask = __mmask16;
inline Mask lanes_if(bool inside, Mask lanes) { return static_cast<Mask>(lanes & -static_cast<int>(inside)); }
inline Vec load_lanes(Mask lanes, const float* p) { return _mm512_maskz_loadu_ps(lanes, p); }
// kLanes bytes as integers: GCC 12 takes the general conversion apart lane by lane.
inline Vec load_bytes(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store_first(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a); }  // p 64-byte aligned
// bfloat16 needs no extension: widened by a shift, rounded to nearest, ties to even; a NaN stays one.
inline Vec widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
inline __m256i narrow(Vec a) {
  const __m512i bits = _mm512_castps_si512(a),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_first(const BFloat16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec load_lanes(Mask lanes, const BFloat16* p) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store_first(BFloat16* p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand is returned where one is NaN, so NaN passes through a clamp.
inline Vec clamp(Vec a, Vec low, Vec high) { return _mm512_min_ps(high, _mm512_max_ps(low, a)); }
// a * 2^n for whole n, rounded once.
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// Lanes of 64 bits, and the products of their low halves.
typedef uint64_t Words __attribute__((vector_size(64)));
inline Words multiply_words(Words a, Words b) {
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline void keep(Vec& a) { asm("" : "+v"(a)); }  // in a register, not as a memory operand
// Always inlined: GCC takes a function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
inline __attribute__((always_inline)) void prefetch_l2(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace fastconv::cpu

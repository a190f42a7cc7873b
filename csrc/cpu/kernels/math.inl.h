// Exponential and its relatives on vectors: fp32 by polynomial, fp64 a lane at a time by the C library.
#pragma once

#include "cpu/kernels/lanes.h"

namespace fastconv::cpu {
namespace {

// Of single numbers, for loops that the compiler makes vectors of.
inline float square_root(float a) { return __builtin_sqrtf(a); }
inline double square_root(double a) { return __builtin_sqrt(a); }
inline float power(float a, float b) { return __builtin_powf(a, b); }
inline double power(double a, double b) { return __builtin_pow(a, b); }

inline IntVec bits(Vec a) { return reinterpret_cast<IntVec>(a); }
inline Vec as_float(IntVec a) { return reinterpret_cast<Vec>(a); }

// x = n log 2 + r with |r| <= log(2) / 2. log 2 is split so that n times its first part is exact (Cody and Waite).
struct Reduced {
  Vec r, n;
};
inline Reduced reduce(Vec x) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, set1(1.44269504088896341f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  return {r, n};
}

// exp(r) - 1 for |r| <= log(2) / 2. Coefficients: Cephes, single/expf.c (S. Moshier, netlib.org/cephes).
inline Vec expm1_core(Vec r) {
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return fma(p * r, r, r);
}

// a * 2^n for whole n, where the ISA has no instruction for it. In two steps, so that a result below 2^-126 is rounded
// once and one above 2^128 is infinite.
template <class V> inline V times_power_of_two(V a, V n) {
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
  return a * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
}

// At most 2 ulp. Results below 2^-126 are rounded once, those above 2^128 are infinite.
inline Vec exp_lanes(Vec x) {
  const Reduced a = reduce(clamp(x, set1(-104.0f), set1(89.0f)));
  return times_power_of_two(expm1_core(a.r) + set1(1.0f), a.n);
}

// exp(x) - 1 for x <= 0, accurate near 0.
inline Vec expm1_negative(Vec x) {
  const Reduced a = reduce(clamp(x, set1(-80.0f), set1(0.0f)));
  const Vec scale = times_power_of_two(set1(1.0f), a.n);
  return fma(expm1_core(a.r), scale, scale - set1(1.0f));
}

inline Vec absolute(Vec x) { return as_float(bits(x) & 0x7fffffff); }
inline Vec minus_absolute(Vec x) { return as_float(bits(x) | static_cast<int32_t>(0x80000000)); }
inline Vec with_sign_of(Vec magnitude, Vec sign) {
  return as_float(bits(magnitude) | (bits(sign) & static_cast<int32_t>(0x80000000)));
}

// tanh |x| = -t / (t + 2) with t = exp(-2 |x|) - 1
inline Vec tanh_lanes(Vec x) {
  const Vec t = expm1_negative(absolute(x) * set1(-2.0f));
  return with_sign_of(absolute(t / (t + set1(2.0f))), x);
}

// Twice the normal distribution function at -|x|: erfc(z) = exp(-z^2) t P(t) with z = |x| / sqrt 2 and t = 1 / (1 + z /
// 2). P: minimax fit of degree 9 to erfcx(z) / t for 0 <= z <= 10 (Remez-like reweighted least squares), relative error
// 2e-8. The exponential is taken in two parts, because rounding z^2 alone would cost z^2 units of precision.
inline Vec two_sided_tail(Vec x) {
  const Vec z = clamp(absolute(x) * set1(0.70710678118654752440f), set1(0.0f), set1(10.5f));  // there it is 0
  const Vec t = set1(1.0f) / fma(z, set1(0.5f), set1(1.0f));
  Vec p = set1(1.228501539e-02f);
  p = fma(p, t, set1(-1.232604345e-01f));
  p = fma(p, t, set1(4.289408384e-01f));
  p = fma(p, t, set1(-6.700375816e-01f));
  p = fma(p, t, set1(4.212855955e-01f));
  p = fma(p, t, set1(-9.832304458e-02f));
  p = fma(p, t, set1(2.255434965e-01f));
  p = fma(p, t, set1(2.386445302e-01f));
  p = fma(p, t, set1(2.828570673e-01f));
  p = fma(p, t, set1(2.820644977e-01f));
  const Vec square = z * z, rest = fma(z, z, -square);
  const Vec e = exp_lanes(-square);
  return p * t * (e - e * rest);
}

// The normal distribution function, accurate relative to itself on both sides.
inline Vec normal_distribution(Vec x) {
  const Vec half_tail = two_sided_tail(x) * set1(0.5f);
  return x > Vec{} ? set1(1.0f) - half_tail : half_tail;
}

inline DVec minus_absolute(DVec x) { return x > DVec{} ? -x : x; }
inline DVec exp_lanes(DVec x) {
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline DVec expm1_negative(DVec x) {
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = __builtin_expm1(x[i]);
  return x;
}
inline DVec tanh_lanes(DVec x) {
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
inline DVec normal_distribution(DVec x) {
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return x;
}

}  // namespace
}  // namespace fastconv::cpu

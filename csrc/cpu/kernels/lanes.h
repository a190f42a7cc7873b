// Vectors of float or double as wide as the ISA's own, so that a kernel is written once for both types. Arithmetic,
// comparison and selection (mask ? a : b) are the compiler's vector extension. Included after a simd_<isa>.h.
#pragma once

#include <cstdint>

namespace fastconv::cpu {
namespace {

constexpr int kVectorBytes = sizeof(Vec);

typedef double DVec __attribute__((vector_size(kVectorBytes)));
typedef double UnalignedDVec __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongVec __attribute__((vector_size(kVectorBytes)));

template <class T> struct Lanes;
template <> struct Lanes<float> {
  using V = Vec;
  using I = IntVec;  // what a comparison yields
  using Int = int32_t;
  static constexpr int64_t kCount = kVectorBytes / 4;
};
template <> struct Lanes<double> {
  using V = DVec;
  using I = LongVec;
  using Int = int64_t;
  static constexpr int64_t kCount = kVectorBytes / 8;
};

inline DVec set1(double a) { return DVec{} + a; }
inline DVec load(const double* p) { return *reinterpret_cast<const UnalignedDVec*>(p); }
inline DVec load_first(const double* p, int64_t n) {
  DVec a{};
  for (int64_t i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
inline void store(double* p, DVec a) { *reinterpret_cast<UnalignedDVec*>(p) = a; }
inline void store_first(double* p, DVec a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a[i];
}
inline DVec fma(DVec a, DVec b, DVec c) { return a * b + c; }
inline DVec clamp(DVec a, DVec low, DVec high) {
  a = a < low ? low : a;
  return a > high ? high : a;
}

// The lanes [0, n) of a vector in memory; all of them unless TAIL.
template <bool TAIL, class T> inline typename Lanes<T>::V load_lanes(const T* p, int64_t n) {
  if constexpr (TAIL)
    return load_first(p, n);
  else
    return load(p);
}
template <bool TAIL, class T, class V> inline void store_lanes(T* p, V a, int64_t n) {
  if constexpr (TAIL)
    store_first(p, a, n);
  else
    store(p, a);
}

// Around the caches where `streaming`: whole vectors, p aligned to one.
template <bool TAIL, class T, class V> inline void put_lanes(bool streaming, T* p, V a, int64_t n) {
  if (!TAIL && streaming)
    stream(reinterpret_cast<float*>(p), reinterpret_cast<Vec>(a));
  else
    store_lanes<TAIL>(p, a, n);
}

template <bool VALUE> struct Tail {
  static constexpr bool value = VALUE;
};

// body(Tail<false>, i, lanes) for every whole vector of [0, total), then body(Tail<true>, i, rest) for what is left.
template <class T, class Body> __attribute__((always_inline)) inline void for_lanes(int64_t total, Body&& body) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t i = 0;
  for (; i + kCount <= total; i += kCount) body(Tail<false>{}, i, kCount);
  if (i < total) body(Tail<true>{}, i, total - i);
}

}  // namespace
}  // namespace fastconv::cpu

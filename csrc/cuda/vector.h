// Sixteen bytes at a time, where the arrays allow it.
#pragma once

#include "cuda/launch.h"

namespace fastconv::cuda {

template <class T> struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T v[kCount];
};

// True if every pointer (null ones too) lies on a boundary of 16 bytes.
template <class... Pointers> bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The elements [i, i + kCount) of an array of n, as far as they exist.
template <class T> FC_INLINE Pack<T> load_pack(const T* x, int64_t i, int64_t n, bool whole) {
  Pack<T> pack;
  if (whole) {
    pack = *reinterpret_cast<const Pack<T>*>(x + i);
  } else {
    for (int j = 0; j < Pack<T>::kCount; ++j) pack.v[j] = i + j < n ? x[i + j] : T(0.0f);
  }
  return pack;
}

template <class T> FC_INLINE void store_pack(T* y, int64_t i, int64_t n, bool whole, const Pack<T>& pack) {
  if (whole) {
    *reinterpret_cast<Pack<T>*>(y + i) = pack;
  } else {
    for (int j = 0; j < Pack<T>::kCount; ++j)
      if (i + j < n) y[i + j] = pack.v[j];
  }
}

template <class T, class F> struct MapOne {
  int64_t n;
  bool aligned;
  const T* a;
  T* y;
  F f;
  FC_HOST_DEVICE void operator()(int64_t pack) const {
    constexpr int kCount = Pack<T>::kCount;
    const int64_t i = pack * kCount;
    const bool whole = aligned && i + kCount <= n;
    Pack<T> p = load_pack(a, i, n, whole);
    for (int j = 0; j < kCount; ++j) p.v[j] = T(f(static_cast<Acc<T>>(p.v[j])));
    store_pack(y, i, n, whole, p);
  }
};

template <class T, class F> struct MapTwo {
  int64_t n;
  bool aligned;
  const T *a, *b;
  T* y;
  F f;
  FC_HOST_DEVICE void operator()(int64_t pack) const {
    constexpr int kCount = Pack<T>::kCount;
    const int64_t i = pack * kCount;
    const bool whole = aligned && i + kCount <= n;
    Pack<T> p = load_pack(a, i, n, whole);
    const Pack<T> q = load_pack(b, i, n, whole);
    for (int j = 0; j < kCount; ++j) p.v[j] = T(f(static_cast<Acc<T>>(p.v[j]), static_cast<Acc<T>>(q.v[j])));
    store_pack(y, i, n, whole, p);
  }
};

// y[i] = f(a[i]), computed in Acc<T>; y may be a.
template <class T, class F> void map_one(int64_t n, const T* a, T* y, const F& f) {
  for_each(ceil_divide(n, Pack<T>::kCount), MapOne<T, F>{n, aligned(a, y), a, y, f});
}

// y[i] = f(a[i], b[i]), computed in Acc<T>; y may be a or b.
template <class T, class F> void map_two(int64_t n, const T* a, const T* b, T* y, const F& f) {
  for_each(ceil_divide(n, Pack<T>::kCount), MapTwo<T, F>{n, aligned(a, b, y), a, b, y, f});
}

}  // namespace fastconv::cuda

// The number types of the tensor cores: what lies in memory, and the way to float and back. Products are of these
// types, sums are float. T::Storage is an element in memory (scalar.h), T names what it is multiplied as.
#pragma once

#include "cuda/geometry.h"
#include "cuda/scalar.h"

namespace fastconv::cuda {

template <class Element16> struct HalfNumbers {
  using Storage = Element16;
  FC_INLINE static float load(Storage v) { return static_cast<float>(v); }
  FC_INLINE static Storage store(float v) { return Storage(v); }
};
using BFloat16Numbers = HalfNumbers<bfloat16_t>;
using Float16Numbers = HalfNumbers<half_t>;

// Float in memory; multiplied as TensorFloat-32, 10 bits after the point, rounded to nearest where an operand is taken.
struct TensorFloat32Numbers {
  using Storage = float;
  FC_INLINE static float load(Storage v) { return v; }
  FC_INLINE static Storage store(float v) { return v; }
#if defined(__CUDACC__)
  __device__ __forceinline__ static uint32_t round(uint32_t v) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(v)));
    return r;
  }
#else
  static uint32_t round(uint32_t v) {
    if ((v & 0x7F800000u) == 0x7F800000u) return v;
    return (v + 0x1000) & ~0x1FFFu;  // ties away from zero
  }
#endif
};

}  // namespace fastconv::cuda

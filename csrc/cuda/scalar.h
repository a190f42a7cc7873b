// The element types of kernels. A 16-bit number is stored as its bits and computed with as float; rounding is to the
// nearest, ties to even. The same code runs on the device and on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__CUDACC__)
#define FC_HOST_DEVICE __host__ __device__
#define FC_INLINE __host__ __device__ __forceinline__
#else
#define FC_HOST_DEVICE
#define FC_INLINE inline
#endif

namespace fastconv::cuda {

FC_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
FC_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

struct bfloat16_t {
  bfloat16_t() = default;
  FC_INLINE explicit bfloat16_t(float value) {
    const uint32_t u = bits_of(value);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
  }
  FC_INLINE explicit bfloat16_t(double value) : bfloat16_t(static_cast<float>(value)) {}
  FC_INLINE operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  uint16_t bits;
};

struct half_t {
  half_t() = default;
  FC_INLINE explicit half_t(float value) {
#if defined(__CUDA_ARCH__)  // one instruction
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const uint32_t u = bits_of(value), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {  // NaN
      bits = static_cast<uint16_t>(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {  // 65520 and more
      bits = static_cast<uint16_t>(sign | 0x7c00);
    } else if (magnitude >= 0x38800000) {  // 2^-14 and more: normal
      bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
    } else {  // adding 1/2 shifts the fraction to the place of a subnormal one, rounded
      const uint32_t fraction = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
      bits = static_cast<uint16_t>(sign | fraction);
    }
#endif
  }
  FC_INLINE explicit half_t(double value) : half_t(static_cast<float>(value)) {}
  FC_INLINE operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + 0x38000000));
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  uint16_t bits;
};

// What sums and functions of T are computed in.
template <class T> struct Accumulator {
  using Type = float;
};
template <> struct Accumulator<double> {
  using Type = double;
};
template <class T> using Acc = typename Accumulator<T>::Type;

// Calls f(T{}) with the floating type that t names.
template <class F> decltype(auto) dispatch_real(DType t, F&& f) {
  switch (t) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kFloat16: return f(half_t{});
    case DType::kBFloat16: return f(bfloat16_t{});
    default: throw TypeError(concat("expected a floating type, got ", name(t)));
  }
}

}  // namespace fastconv::cuda

namespace fastconv {
template <> constexpr DType dtype_of<cuda::half_t>() { return DType::kFloat16; }
template <> constexpr DType dtype_of<cuda::bfloat16_t>() { return DType::kBFloat16; }
}  // namespace fastconv

#pragma once

#include <cstdint>

#include "core/error.h"

namespace fastconv {

// The 16-bit types exist on CUDA devices; on the CPU bfloat16 alone, as an operand of some convolutions.
enum class DType : uint8_t { kFloat32, kFloat64, kInt64, kUInt8, kFloat16, kBFloat16 };

inline int64_t itemsize(DType t) {
  switch (t) {
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
    case DType::kInt64: return 8;
    case DType::kUInt8: return 1;
    case DType::kFloat16: return 2;
    case DType::kBFloat16: return 2;
  }
  return 0;
}

inline const char* name(DType t) {
  switch (t) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kInt64: return "int64";
    case DType::kUInt8: return "uint8";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "?";
}

template <class T> constexpr DType dtype_of();
template <> constexpr DType dtype_of<float>() { return DType::kFloat32; }
template <> constexpr DType dtype_of<double>() { return DType::kFloat64; }
template <> constexpr DType dtype_of<int64_t>() { return DType::kInt64; }
template <> constexpr DType dtype_of<uint8_t>() { return DType::kUInt8; }

// Calls f(T{}) with the floating-point type that t names.
template <class F> decltype(auto) dispatch_float(DType t, F&& f) {
  FC_CHECK_TYPE(t == DType::kFloat32 || t == DType::kFloat64, "expected float32 or float64, got ", name(t));
  if (t == DType::kFloat32) return f(float{});
  return f(double{});
}

}  // namespace fastconv

// TensorView: what crosses the boundary. A pointer with sizes and strides in elements; it owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace fastconv {

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};  // in elements; may be zero or negative

  template <class T> T* as() const { return static_cast<T*>(data); }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[i];
    return n;
  }

  // Dense row-major in the order of dimensions given; dimensions of size one may have any stride.
  bool dense_in_order(const int* order) const {
    int64_t expect = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const int d = order[i];
      if (sizes[d] != 1 && strides[d] != expect) return false;
      expect *= sizes[d];
    }
    return true;
  }
  bool is_contiguous() const {
    static constexpr int order[kMaxDims] = {0, 1, 2, 3, 4, 5, 6, 7};
    return numel() == 0 || dense_in_order(order);
  }
  bool is_channels_last() const {
    static constexpr int order[4] = {0, 2, 3, 1};
    return ndim == 4 && (numel() == 0 || dense_in_order(order));
  }
};

inline std::string shape_string(const TensorView& t) {
  std::string s = "(";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.sizes[i]);
  return s + (t.ndim == 1 ? ",)" : ")");
}

}  // namespace fastconv

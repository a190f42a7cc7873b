#include "bindings/operands.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "cpu/layout.h"

namespace fastconv::bindings {
namespace {

// Dimensions by falling stride; those of size one do not count.
std::vector<int> memory_order(const TensorView& v) {
  std::vector<int> order;
  for (int i = 0; i < v.ndim; ++i)
    if (v.sizes[i] != 1) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return std::abs(v.strides[a]) > std::abs(v.strides[b]); });
  return order;
}

Strides strides_in_order(const TensorView& v, const int* order) {
  Strides strides{};
  int64_t expect = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    strides[order[i]] = expect;
    expect *= std::max<int64_t>(v.sizes[order[i]], 1);
  }
  return strides;
}

bool has_strides(const TensorView& v, const Strides& strides) {
  for (int i = 0; i < v.ndim; ++i)
    if (v.sizes[i] != 1 && v.strides[i] != strides[i]) return false;
  return true;
}

}  // namespace

bool is_dense(const TensorView& v) {
  if (v.numel() == 0) return true;
  const std::vector<int> order = memory_order(v);
  int64_t expect = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (v.strides[*d] != expect) return false;
    expect *= v.sizes[*d];
  }
  return true;
}

Strides row_major_strides(const TensorView& v) {
  int order[kMaxDims];
  std::iota(order, order + kMaxDims, 0);
  return strides_in_order(v, order);
}

Strides dense_strides(const TensorView& v) { return v.numel() > 0 && is_dense(v) ? v.strides : image_strides(v); }

Strides image_strides(const TensorView& v) { return strides_of(v, v.ndim == 4 ? layout_of(v) : Layout::kNCHW); }

Strides strides_of(const TensorView& v, Layout layout) {
  static constexpr int kChannelsLast[4] = {0, 2, 3, 1};
  return layout == Layout::kChannelsLast ? strides_in_order(v, kChannelsLast) : row_major_strides(v);
}

void copy_view(const TensorView& src, const TensorView& dst) {
  if (src.numel() == 0) return;
  if (src.ndim > 4) {  // one slice of the first dimension after the other
    TensorView a = src, b = dst;
    a.ndim = b.ndim = src.ndim - 1;
    for (int i = 0; i < a.ndim; ++i) {
      a.sizes[i] = b.sizes[i] = src.sizes[i + 1];
      a.strides[i] = src.strides[i + 1];
      b.strides[i] = dst.strides[i + 1];
    }
    const int64_t item = itemsize(src.dtype);
    for (int64_t i = 0; i < src.sizes[0]; ++i) {
      a.data = static_cast<char*>(src.data) + i * src.strides[0] * item;
      b.data = static_cast<char*>(dst.data) + i * dst.strides[0] * item;
      copy_view(a, b);
    }
    return;
  }
  const auto four = [](const TensorView& v) {
    TensorView w = v;
    w.ndim = 4;
    const int missing = 4 - v.ndim;
    for (int i = 0; i < 4; ++i) {
      w.sizes[i] = i < missing ? 1 : v.sizes[i - missing];
      w.strides[i] = i < missing ? 0 : v.strides[i - missing];
    }
    return w;
  };
  cpu::copy_strided(four(src), four(dst));
}

Vector::Vector(const TensorView& array, const char* name) : data_(array.data) {
  FC_CHECK(array.ndim == 1, name, " must have 1 dimension, got shape ", shape_string(array));
  if (array.is_contiguous()) return;
  copy_ = Buffer(array.numel() * itemsize(array.dtype));
  TensorView dense = array;
  dense.data = copy_.as<void>();
  dense.strides[0] = 1;
  copy_view(array, dense);
  data_ = dense.data;
}

Dense::Dense(const TensorView& array, const Strides& strides) : data_(array.data) {
  if (array.numel() == 0 || has_strides(array, strides)) return;
  copy_ = Buffer(array.numel() * itemsize(array.dtype));
  TensorView dense = array;
  dense.data = copy_.as<void>();
  dense.strides = strides;
  copy_view(array, dense);
  data_ = dense.data;
}

py::array new_dense(const TensorView& like, const Strides& strides) {
  const int64_t item = itemsize(like.dtype);
  std::vector<py::ssize_t> sizes(like.sizes.begin(), like.sizes.begin() + like.ndim), bytes(like.ndim);
  for (int i = 0; i < like.ndim; ++i) bytes[i] = strides[i] * item;
  void* data = allocate(std::max<int64_t>(like.numel(), 1) * item);
  py::capsule owner(data, [](void* p) { release(p); });
  return py::array(numpy_dtype(like.dtype), sizes, bytes, data, owner);
}

}  // namespace fastconv::bindings

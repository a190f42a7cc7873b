#include "bindings/operands.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "device/copy.h"

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

Vector::Vector(const TensorView& array, const char* name) : data_(array.data) {
  FC_CHECK(array.ndim == 1, name, " must have 1 dimension, got shape ", shape_string(array));
  if (array.is_contiguous()) return;
  copy_ = Buffer(array.numel() * itemsize(array.dtype));
  TensorView dense = array;
  dense.data = copy_.as<void>();
  dense.strides[0] = 1;
  device::copy_view(array, dense);
  data_ = dense.data;
}

Dense::Dense(const TensorView& array, const Strides& strides) : data_(array.data) {
  if (array.numel() == 0 || has_strides(array, strides)) return;
  copy_ = Buffer(array.numel() * itemsize(array.dtype));
  TensorView dense = array;
  dense.data = copy_.as<void>();
  dense.strides = strides;
  device::copy_view(array, dense);
  data_ = dense.data;
}

Array new_dense(const TensorView& like, const Strides& strides) {
  TensorView form = like;
  form.strides = strides;
  return new_strided(form);
}

}  // namespace fastconv::bindings

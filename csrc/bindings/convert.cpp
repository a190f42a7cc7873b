#include "bindings/convert.h"

#include <algorithm>

#include "bindings/operands.h"
#include "device/copy.h"

namespace fastconv::bindings {

Layout layout_of(const TensorView& v) {
  FC_CHECK(v.ndim == 4, "expected 4 dimensions (N, C, H, W), got shape ", shape_string(v));
  // Where both could be said (one channel, or one pixel) the strides as written decide, NCHW first.
  int64_t expect = 1;
  bool nchw = true;
  for (int i = 3; i >= 0; --i) {
    nchw = nchw && v.strides[i] == expect;
    expect *= v.sizes[i];
  }
  if (nchw) return Layout::kNCHW;
  if (v.is_channels_last()) return Layout::kChannelsLast;
  if (v.is_contiguous()) return Layout::kNCHW;
  // Any other view: whichever order its strides resemble.
  return std::abs(v.strides[1]) < std::max<int64_t>(std::abs(v.strides[3]), 1) ? Layout::kChannelsLast : Layout::kNCHW;
}

Array new_array(DType dtype, const std::vector<int64_t>& shape, Layout layout) {
  TensorView form;
  form.dtype = dtype;
  form.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), form.sizes.begin());
  form.strides = strides_of(form, layout);
  return new_strided(form);
}

Shape shape4(const TensorView& v, const char* name) {
  FC_CHECK(v.ndim == 4, name, " must have 4 dimensions, got shape ", shape_string(v));
  return {v.sizes[0], v.sizes[1], v.sizes[2], v.sizes[3]};
}

ChannelsLast::ChannelsLast(const Array& array, const char* name) : view_(bindings::view(array, name)) {
  shape4(view_, name);
  layout_ = layout_of(view_);
  if (view_.is_channels_last()) return;
  copy_ = Buffer(std::max<int64_t>(view_.numel(), 1) * itemsize(view_.dtype));
  TensorView dense = view_;
  dense.data = copy_.as<void>();
  dense.strides[1] = 1;
  dense.strides[3] = view_.sizes[1];
  dense.strides[2] = view_.sizes[3] * dense.strides[3];
  dense.strides[0] = view_.sizes[2] * dense.strides[2];
  device::copy_view(view_, dense);
  view_ = dense;
}

Output::Output(DType dtype, const Shape& shape, Layout layout)
    : channels_last_(new_array(dtype, {shape[0], shape[1], shape[2], shape[3]}, Layout::kChannelsLast)),
      layout_(layout) {}

Array Output::finish() {
  if (layout_ == Layout::kChannelsLast) return std::move(channels_last_);
  const TensorView src = view(channels_last_, "output");
  Array out = new_array(src.dtype, {src.sizes[0], src.sizes[1], src.sizes[2], src.sizes[3]}, Layout::kNCHW);
  const TensorView dst = view(out, "output");
  py::gil_scoped_release nogil;
  device::copy_view(src, dst);
  return out;
}

}  // namespace fastconv::bindings

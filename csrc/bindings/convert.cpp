#include "bindings/convert.h"

#include <algorithm>

#include "cpu/layout.h"

namespace fastconv::bindings {
namespace {

DType dtype_of_array(const py::array& array, const char* name) {
  const py::dtype type = array.dtype();
  const char order = type.byteorder();
  const bool native = order == '=' || order == '|';
  if (native && type.kind() == 'f' && type.itemsize() == 4) return DType::kFloat32;
  if (native && type.kind() == 'f' && type.itemsize() == 8) return DType::kFloat64;
  if (native && type.kind() == 'i' && type.itemsize() == 8) return DType::kInt64;
  if (native && type.kind() == 'u' && type.itemsize() == 1) return DType::kUInt8;
  if (type.kind() == 'V' && type.equal(numpy_dtype(DType::kBFloat16))) return DType::kBFloat16;
  throw TypeError(concat(name, " has dtype ", std::string(py::str(type)), ", which is not supported"));
}

}  // namespace

TensorView view(const py::array& array, const char* name) {
  TensorView v;
  v.dtype = dtype_of_array(array, name);
  FC_CHECK(array.ndim() <= kMaxDims, name, " has ", array.ndim(), " dimensions, at most ", kMaxDims, " are supported");
  v.ndim = static_cast<int>(array.ndim());
  v.data = const_cast<void*>(array.data());
  const int64_t item = itemsize(v.dtype);
  for (int i = 0; i < v.ndim; ++i) {
    v.sizes[i] = array.shape(i);
    const int64_t bytes = array.strides(i);
    FC_CHECK(v.sizes[i] <= 1 || bytes % item == 0, name, " has a stride of ", bytes, " bytes, not a multiple of ",
             item);
    v.strides[i] = bytes / item;
  }
  FC_CHECK(reinterpret_cast<uintptr_t>(v.data) % item == 0, name, " is not aligned to its item size");
  return v;
}

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

py::array new_array(DType dtype, const std::vector<int64_t>& shape, Layout layout) {
  const int64_t item = itemsize(dtype);
  const int ndim = static_cast<int>(shape.size());
  std::vector<py::ssize_t> sizes(shape.begin(), shape.end()), strides(ndim);
  static constexpr int kNHWC[4] = {0, 2, 3, 1};
  int64_t bytes = item;
  for (int i = ndim - 1; i >= 0; --i) {
    const int d = layout == Layout::kChannelsLast && ndim == 4 ? kNHWC[i] : i;
    strides[d] = bytes;
    bytes *= std::max<int64_t>(shape[d], 1);
  }
  void* data = allocate(bytes);
  py::capsule owner(data, [](void* p) { release(p); });
  return py::array(numpy_dtype(dtype), sizes, strides, data, owner);
}

py::dtype numpy_dtype(DType dtype) {
  if (dtype == DType::kBFloat16) {
    py::list fields;
    fields.append(py::make_tuple("bfloat16", "u2"));
    return py::dtype::from_args(fields);
  }
  const char* name = dtype == DType::kFloat32   ? "f4"
                     : dtype == DType::kFloat64 ? "f8"
                     : dtype == DType::kInt64   ? "i8"
                                                : "u1";
  return py::dtype(name);
}

Shape shape4(const TensorView& v, const char* name) {
  FC_CHECK(v.ndim == 4, name, " must have 4 dimensions, got shape ", shape_string(v));
  return {v.sizes[0], v.sizes[1], v.sizes[2], v.sizes[3]};
}

ChannelsLast::ChannelsLast(const py::array& array, const char* name) : view_(bindings::view(array, name)) {
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
  {
    py::gil_scoped_release nogil;
    cpu::copy_strided(view_, dense);
  }
  view_ = dense;
}

Output::Output(DType dtype, const Shape& shape, Layout layout)
    : channels_last_(new_array(dtype, {shape[0], shape[1], shape[2], shape[3]}, Layout::kChannelsLast)),
      layout_(layout) {}

py::array Output::finish() {
  if (layout_ == Layout::kChannelsLast) return std::move(channels_last_);
  const TensorView src = view(channels_last_, "output");
  py::array out = new_array(src.dtype, {src.sizes[0], src.sizes[1], src.sizes[2], src.sizes[3]}, Layout::kNCHW);
  const TensorView dst = view(out, "output");
  py::gil_scoped_release nogil;
  cpu::copy_strided(src, dst);
  return out;
}

}  // namespace fastconv::bindings

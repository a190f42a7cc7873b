// Arrays of the CPU: numpy's.
#include <algorithm>

#include "bindings/array.h"
#include "core/allocator.h"

namespace fastconv::bindings {
namespace {

// numpy has no bfloat16: a structure of one field of that name, of two bytes.
py::dtype numpy_dtype(DType dtype) {
  if (dtype != DType::kBFloat16) return py::dtype(name(dtype));
  py::list fields;
  fields.append(py::make_tuple("bfloat16", "u2"));
  return py::dtype::from_args(fields);
}

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

py::array new_strided(const TensorView& form) {
  const int64_t item = itemsize(form.dtype);
  std::vector<py::ssize_t> sizes(form.sizes.begin(), form.sizes.begin() + form.ndim), bytes(form.ndim);
  for (int i = 0; i < form.ndim; ++i) bytes[i] = form.strides[i] * item;
  void* data = allocate(std::max<int64_t>(form.numel(), 1) * item);
  py::capsule owner(data, [](void* p) { release(p); });
  return py::array(numpy_dtype(form.dtype), sizes, bytes, data, owner);
}

}  // namespace fastconv::bindings

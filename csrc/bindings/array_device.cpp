// Arrays of a CUDA device: making them, viewing them, and exchanging them with numpy and with other libraries.
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/dlpack.h"
#include "bindings/operands.h"
#include "core/allocator.h"
#include "core/channels_problem.h"
#include "core/check.h"
#include "cuda/array_math.h"
#include "cuda/device.h"
#include "device/copy.h"

namespace fastconv::bindings {
namespace {

// numpy has no bfloat16: arrays of it are seen as 16-bit integers where only their form matters.
py::dtype form_dtype(DType type) { return py::dtype(type == DType::kBFloat16 ? "uint16" : name(type)); }

py::tuple shape_of(const DeviceArray& a) {
  py::tuple shape(a.view().ndim);
  for (int i = 0; i < a.view().ndim; ++i) shape[i] = a.view().sizes[i];
  return shape;
}

py::tuple strides_of_bytes(const DeviceArray& a) {
  py::tuple strides(a.view().ndim);
  for (int i = 0; i < a.view().ndim; ++i) strides[i] = a.view().strides[i] * itemsize(a.view().dtype);
  return strides;
}

TensorView form(DType dtype, const std::vector<int64_t>& shape) {
  FC_CHECK(shape.size() <= kMaxDims, "an array has at most ", kMaxDims, " dimensions, got ", shape.size());
  TensorView v;
  v.dtype = dtype;
  v.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < v.ndim; ++i) {
    FC_CHECK(shape[i] >= 0, "a size must not be negative, got ", shape[i]);
    v.sizes[i] = shape[i];
  }
  v.strides = row_major_strides(v);
  return v;
}

// A view that numpy computes on an array of the same form, whose memory is never touched.
template <class F> DeviceArray view_by_numpy(const DeviceArray& a, F&& f) {
  const py::module_ numpy = py::module_::import("numpy");
  const py::object anchor = numpy.attr("empty")(1, form_dtype(a.view().dtype));
  const py::object like =
      numpy.attr("lib").attr("stride_tricks").attr("as_strided")(anchor, shape_of(a), strides_of_bytes(a));
  const py::array result = f(like, numpy);
  TensorView v;
  v.dtype = a.view().dtype;
  const int64_t item = itemsize(v.dtype);
  FC_CHECK(result.ndim() <= kMaxDims, "an array has at most ", kMaxDims, " dimensions, got ", result.ndim());
  v.ndim = static_cast<int>(result.ndim());
  for (int i = 0; i < v.ndim; ++i) {
    v.sizes[i] = result.shape(i);
    v.strides[i] = result.strides(i) / item;
  }
  v.data = static_cast<char*>(a.mutable_data()) +
           (static_cast<const char*>(result.data()) - static_cast<const char*>(py::array(anchor).data()));
  return DeviceArray(v, a.owner());
}

DeviceArray get_item(const DeviceArray& a, const py::object& key) {
  const py::tuple keys = py::isinstance<py::tuple>(key) ? py::tuple(key) : py::make_tuple(key);
  bool ellipsis = false;
  for (const py::handle k : keys) {
    const bool plain = py::isinstance<py::int_>(k) || py::isinstance<py::slice>(k) || k.is_none();
    ellipsis = ellipsis || k.is(py::ellipsis());
    FC_CHECK_TYPE(plain || k.is(py::ellipsis()), "an array of a CUDA device takes integers and slices as indices, got ",
                  std::string(py::str(py::type::of(k))));
  }
  // With an ellipsis numpy answers with a view, never with a number that it would have to read.
  const py::object all = ellipsis ? py::object(keys) : py::object(keys + py::make_tuple(py::ellipsis()));
  return view_by_numpy(a, [&](const py::object& like, const py::module_&) { return like[all]; });
}

DeviceArray dense_copy(const DeviceArray& a, const Strides& strides) {
  DeviceArray copy = new_dense(a.view(), strides);
  device::copy_view(a.view(), copy.view());
  return copy;
}

// The strides under which memory laid out as v shows the elements in row-major order under another shape; false where
// there are none.
bool reshaped_strides(const TensorView& v, TensorView& target) {
  TensorView from;  // without dimensions of one element
  for (int i = 0; i < v.ndim; ++i)
    if (v.sizes[i] != 1) {
      from.sizes[from.ndim] = v.sizes[i];
      from.strides[from.ndim++] = v.strides[i];
    }
  int i = 0, j = 0;
  while (i < from.ndim && j < target.ndim) {
    int i_end = i + 1, j_end = j + 1;
    int64_t a = from.sizes[i], b = target.sizes[j];
    while (a != b) {
      if (a < b)
        a *= from.sizes[i_end++];
      else
        b *= target.sizes[j_end++];
    }
    for (int k = i; k + 1 < i_end; ++k)
      if (from.strides[k] != from.sizes[k + 1] * from.strides[k + 1]) return false;
    int64_t stride = from.strides[i_end - 1];
    for (int k = j_end - 1; k >= j; --k) {
      target.strides[k] = stride;
      stride *= target.sizes[k];
    }
    i = i_end;
    j = j_end;
  }
  for (; j < target.ndim; ++j) target.strides[j] = 1;
  return true;
}

DeviceArray reshape(const DeviceArray& a, const py::args& args) {
  const auto wanted = args.size() == 1 && !py::isinstance<py::int_>(args[0]) ? args[0].cast<std::vector<int64_t>>()
                                                                             : args.cast<std::vector<int64_t>>();
  std::vector<int64_t> shape = wanted;
  const int64_t total = a.view().numel();
  int64_t known = 1;
  const auto open = std::find(shape.begin(), shape.end(), -1);
  for (auto it = shape.begin(); it != shape.end(); ++it)
    if (it != open) known *= *it;
  if (open != shape.end() && known != 0) *open = total / known;
  TensorView target = form(a.view().dtype, shape);
  FC_CHECK(target.numel() == total, "cannot reshape an array of shape ", shape_string(a.view()), " to ",
           shape_string(target));
  if (total == 0 || reshaped_strides(a.view(), target)) {
    target.data = a.mutable_data();
    return DeviceArray(target, a.owner());
  }
  const DeviceArray dense = dense_copy(a, row_major_strides(a.view()));
  target.strides = row_major_strides(target);
  target.data = dense.mutable_data();
  return DeviceArray(target, dense.owner());
}

// Numbers of a numpy array, in its order of memory where it is dense.
DeviceArray from_numpy(const py::array& array) {
  const std::string type = py::str(array.dtype().attr("name"));
  const py::module_ numpy = py::module_::import("numpy");
  // Dense in some order of dimensions, native byte order.
  const py::array host = numpy.attr("copy")(array, "K").attr("astype")(py::dtype(type));
  TensorView v = form(parse_dtype(type), std::vector<int64_t>(host.shape(), host.shape() + host.ndim()));
  for (int i = 0; i < v.ndim; ++i) v.strides[i] = host.strides(i) / itemsize(v.dtype);
  v.strides = dense_strides(v);
  DeviceArray result = new_strided(v);
  void* to = result.mutable_data();
  const void* from = host.data();
  {
    const py::gil_scoped_release no_gil;
    cuda::copy_bytes(to, from, v.numel() * itemsize(v.dtype), cuda::Copy::kToDevice);
  }
  return result;
}

DeviceArray cast(const DeviceArray& a, const std::string& type) {
  TensorView wanted = a.view();
  wanted.dtype = parse_dtype(type);
  wanted.strides = dense_strides(a.view());
  DeviceArray result = new_strided(wanted);
  if (wanted.dtype == a.view().dtype)
    device::copy_view(a.view(), result.view());
  else
    cuda::cast_view(a.view(), result.view());
  return result;
}

// bfloat16, which numpy does not have, becomes float32: no number changes.
py::array to_numpy(const DeviceArray& given) {
  const DeviceArray a = given.view().dtype == DType::kBFloat16 ? cast(given, "float32") : given;
  const Strides strides = dense_strides(a.view());
  const DeviceArray dense = is_dense(a.view()) ? a : dense_copy(a, strides);
  const int64_t item = itemsize(a.view().dtype);
  std::vector<py::ssize_t> sizes, bytes;
  for (int i = 0; i < a.view().ndim; ++i) {
    sizes.push_back(a.view().sizes[i]);
    bytes.push_back(strides[i] * item);
  }
  py::array host = py::module_::import("numpy").attr("empty")(std::max<int64_t>(a.view().numel(), 1),
                                                              py::dtype(name(a.view().dtype)));
  void* to = host.mutable_data();
  const void* from = dense.data();
  {
    const py::gil_scoped_release no_gil;  // it waits for the device
    cuda::copy_bytes(to, from, a.view().numel() * item, cuda::Copy::kToHost);
  }
  return py::array(host.dtype(), sizes, bytes, host.data(), host);
}

DeviceArray full(const std::vector<int64_t>& shape, double value, const std::string& type) {
  DeviceArray result = new_strided(form(parse_dtype(type), shape));
  cuda::fill_view(result.view(), value);
  return result;
}

DeviceArray empty_like(const DeviceArray& a) { return new_dense(a.view(), dense_strides(a.view())); }

// `a` repeated along dimensions of one element, as numpy does.
DeviceArray broadcast_to(const DeviceArray& a, const std::vector<int64_t>& shape) {
  const TensorView target = form(a.view().dtype, shape);
  const int missing = target.ndim - a.view().ndim;
  TensorView v = target;
  v.data = a.mutable_data();
  bool fits = missing >= 0;
  for (int i = 0; fits && i < v.ndim; ++i) {
    const int64_t size = i < missing ? 1 : a.view().sizes[i - missing];
    fits = size == 1 || size == v.sizes[i];
    v.strides[i] = i < missing || size == 1 ? 0 : a.view().strides[i - missing];
  }
  FC_CHECK(fits, "cannot broadcast an array of shape ", shape_string(a.view()), " to ", shape_string(target));
  return DeviceArray(v, a.owner());
}

std::vector<int64_t> sizes_of(const TensorView& v) { return {v.sizes.begin(), v.sizes.begin() + v.ndim}; }

std::vector<int64_t> common_shape(const TensorView& a, const TensorView& b) {
  std::vector<int64_t> shape(std::max(a.ndim, b.ndim));
  for (size_t i = 1; i <= shape.size(); ++i) {
    const int64_t x = static_cast<int>(i) <= a.ndim ? a.sizes[a.ndim - i] : 1;
    const int64_t y = static_cast<int>(i) <= b.ndim ? b.sizes[b.ndim - i] : 1;
    shape[shape.size() - i] = x == 1 ? y : x;
  }
  return shape;
}

cuda::Arithmetic parse_operation(const std::string& name) {
  if (name == "add") return cuda::Arithmetic::kAdd;
  if (name == "subtract") return cuda::Arithmetic::kSubtract;
  if (name == "multiply") return cuda::Arithmetic::kMultiply;
  if (name == "divide") return cuda::Arithmetic::kDivide;
  throw std::invalid_argument("no operation named '" + name + "'");
}

DeviceArray binary(const std::string& operation, const DeviceArray& a_in, const DeviceArray& b_in) {
  check_float("the first operand", a_in.view().dtype);
  check_dtype("the second operand", b_in.view(), a_in.view().dtype);
  const std::vector<int64_t> shape = common_shape(a_in.view(), b_in.view());
  const DeviceArray a = broadcast_to(a_in, shape), b = broadcast_to(b_in, shape);
  // In the order of memory of whichever operand has the result's shape.
  const bool like_b = sizes_of(a_in.view()) != shape && sizes_of(b_in.view()) == shape;
  DeviceArray y = new_dense(a.view(), dense_strides(like_b ? b.view() : a.view()));
  cuda::arithmetic(parse_operation(operation), a.view(), b.view(), y.view());
  return y;
}

void binary_in_place(const std::string& operation, const DeviceArray& a, const DeviceArray& b) {
  check_float("the array", a.view().dtype);
  check_dtype("the operand", b.view(), a.view().dtype);
  cuda::arithmetic(parse_operation(operation), a.view(), broadcast_to(b, sizes_of(a.view())).view(), a.view());
}

DeviceArray square_root(const DeviceArray& a) {
  check_float("the array", a.view().dtype);
  DeviceArray y = empty_like(a);
  cuda::square_root(a.view(), y.view());
  return y;
}

// axis: None for all dimensions, one, or several.
DeviceArray sum(const DeviceArray& a, const py::object& axis, bool keep) {
  check_float("the array", a.view().dtype);
  const int ndim = a.view().ndim;
  std::vector<bool> over(ndim, axis.is_none());
  if (py::isinstance<py::int_>(axis))
    over[normalized_dim(axis.cast<int64_t>(), ndim)] = true;
  else if (!axis.is_none())
    for (int64_t d : axis.cast<std::vector<int64_t>>()) over[normalized_dim(d, ndim)] = true;
  std::vector<int64_t> shape;
  for (int d = 0; d < ndim; ++d)
    if (!over[d] || keep) shape.push_back(over[d] ? 1 : a.view().sizes[d]);
  DeviceArray y = new_strided(form(a.view().dtype, shape));
  cuda::sum_over(a.view(), over, y.mutable_data());
  return y;
}

void assign(const DeviceArray& to, const DeviceArray& value) {
  const DeviceArray from = broadcast_to(value, sizes_of(to.view()));
  if (from.view().dtype == to.view().dtype)
    device::copy_view(from.view(), to.view());
  else
    cuda::cast_view(from.view(), to.view());
}

// The first and the last byte of an array that has elements.
std::pair<const char*, const char*> extent(const DeviceArray& a) {
  const char *low = static_cast<const char*>(a.data()), *high = low + itemsize(a.view().dtype);
  for (int i = 0; i < a.view().ndim; ++i) {
    const int64_t reach = (a.view().sizes[i] - 1) * a.view().strides[i] * itemsize(a.view().dtype);
    (reach < 0 ? low : high) += reach;
  }
  return {low, high};
}

bool may_share_memory(const DeviceArray& a, const DeviceArray& b) {
  if (a.view().numel() == 0 || b.view().numel() == 0) return false;
  const auto [low_a, high_a] = extent(a);
  const auto [low_b, high_b] = extent(b);
  return low_a < high_b && low_b < high_a;
}

py::dict cuda_array_interface(const DeviceArray& a) {
  using namespace py::literals;
  FC_CHECK_TYPE(a.view().dtype != DType::kBFloat16, "__cuda_array_interface__ has no bfloat16: use DLPack");
  return py::dict(
      "shape"_a = shape_of(a), "strides"_a = strides_of_bytes(a), "typestr"_a = form_dtype(a.view().dtype).attr("str"),
      "data"_a = py::make_tuple(reinterpret_cast<uintptr_t>(a.data()), false), "version"_a = 3,
      "stream"_a = cuda::current_stream() == nullptr ? 1 : reinterpret_cast<uintptr_t>(cuda::current_stream()));
}

DeviceArray from_pointer(uintptr_t pointer, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                         const std::string& type, py::object owner) {
  TensorView v = form(parse_dtype(type), shape);
  FC_CHECK(strides.size() == shape.size(), "got ", shape.size(), " sizes and ", strides.size(), " strides");
  std::copy(strides.begin(), strides.end(), v.strides.begin());
  v.data = reinterpret_cast<void*>(pointer);
  // Python's object is let go with the interpreter's lock held, whoever holds the array.
  auto* held = new py::object(std::move(owner));
  return DeviceArray(v, std::shared_ptr<void>(v.data, [held](void*) {
                       const py::gil_scoped_acquire gil;
                       delete held;
                     }));
}

}  // namespace

DType parse_dtype(const std::string& wanted) {
  for (DType type : {DType::kFloat32, DType::kFloat64, DType::kInt64, DType::kUInt8, DType::kFloat16, DType::kBFloat16})
    if (wanted == name(type)) return type;
  throw TypeError("dtype " + wanted + " is not supported on a CUDA device");
}

TensorView view(const DeviceArray& array, const char*) { return array.view(); }

DeviceArray new_strided(const TensorView& wanted) {
  TensorView v = wanted;
  v.data = allocate(std::max<int64_t>(v.numel(), 1) * itemsize(v.dtype));
  return DeviceArray(v, std::shared_ptr<void>(v.data, [](void* p) { release(p); }));
}

void bind_array(py::module_& m) {
  using namespace py::literals;
  const auto hooks = [] { return py::module_::import("fastconv.cuda"); };
  py::class_<DeviceArray> array(m, "Array", "An array in the memory of a CUDA device.");
  // numpy's functions decide what the operands mean; they come back through __array_ufunc__.
  for (const auto& [name, function] : {std::pair("add", "add"), std::pair("sub", "subtract"),
                                       std::pair("mul", "multiply"), std::pair("truediv", "divide")}) {
    const std::string ufunc = function;
    const auto apply = [ufunc](const py::object& a, const py::object& b, const py::kwargs& options) -> py::object {
      return py::module_::import("numpy").attr(ufunc.c_str())(a, b, **options);
    };
    array.def(concat("__", name, "__").c_str(), [apply](const py::object& a, const py::object& b) {
      return py::hasattr(b, "_node") ? py::reinterpret_borrow<py::object>(Py_NotImplemented) : apply(a, b, {});
    });
    array.def(concat("__r", name, "__").c_str(),
              [apply](const py::object& a, const py::object& b) { return apply(b, a, {}); });
    array.def(concat("__i", name, "__").c_str(), [apply](const py::object& a, const py::object& b) {
      return apply(a, b, py::dict(py::arg("out") = py::make_tuple(a)));
    });
  }
  array.def_property_readonly("shape", &shape_of)
      .def_property_readonly("strides", &strides_of_bytes, "In bytes.")
      .def_property_readonly("ndim", [](const DeviceArray& a) { return a.view().ndim; })
      .def_property_readonly("size", [](const DeviceArray& a) { return a.view().numel(); })
      .def_property_readonly("itemsize", [](const DeviceArray& a) { return itemsize(a.view().dtype); })
      .def_property_readonly("nbytes", [](const DeviceArray& a) { return a.view().numel() * itemsize(a.view().dtype); })
      .def_property_readonly("dtype_name", [](const DeviceArray& a) { return std::string(name(a.view().dtype)); })
      .def_property_readonly("dtype",
                             [hooks](const DeviceArray& a) { return hooks().attr("dtype_of")(name(a.view().dtype)); })
      .def_property_readonly("data_ptr", [](const DeviceArray& a) { return reinterpret_cast<uintptr_t>(a.data()); })
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("__dlpack_device__", [](const DeviceArray&) { return dlpack_device(); })
      .def("__dlpack__", &to_dlpack, py::kw_only(), "stream"_a = py::none(), "max_version"_a = py::none(),
           "dl_device"_a = py::none(), "copy"_a = py::none())
      .def("__len__",
           [](const DeviceArray& a) {
             FC_CHECK_TYPE(a.view().ndim > 0, "len() of an array without dimensions");
             return a.view().sizes[0];
           })
      .def("__getitem__", &get_item)
      .def("__setitem__", [](const DeviceArray& a, const py::object& key,
                             const DeviceArray& value) { assign(get_item(a, key), value); })
      .def("__setitem__", [](const DeviceArray& a, const py::object& key,
                             double value) { cuda::fill_view(get_item(a, key).view(), value); })
      .def("reshape", &reshape)
      .def("transpose",
           [](const DeviceArray& a, const py::args& axes) {
             return view_by_numpy(
                 a, [&](const py::object& like, const py::module_&) { return like.attr("transpose")(*axes); });
           })
      .def("swapaxes",
           [](const DeviceArray& a, int first, int second) {
             return view_by_numpy(
                 a, [&](const py::object& like, const py::module_&) { return like.attr("swapaxes")(first, second); });
           })
      .def(
          "squeeze",
          [](const DeviceArray& a, const py::object& axis) {
            return view_by_numpy(
                a, [&](const py::object& like, const py::module_&) { return like.attr("squeeze")(axis); });
          },
          "axis"_a = py::none())
      .def("broadcast_to", &broadcast_to)
      .def(
          "copy",
          [](const DeviceArray& a, const std::string& order) {
            return dense_copy(a, order == "K" ? dense_strides(a.view()) : row_major_strides(a.view()));
          },
          "order"_a = "K")
      .def("__deepcopy__",
           [](const DeviceArray& a, const py::object&) { return dense_copy(a, dense_strides(a.view())); })
      .def("cast", &cast, "dtype_name"_a)
      .def("numpy", &to_numpy, "The numbers as a numpy array; bfloat16 becomes float32.")
      .def("astype",
           [](const DeviceArray& a, const py::object& dtype) {
             return cast(a, py::module_::import("fastconv.cuda").attr("dtype_name")(dtype).cast<std::string>());
           })
      .def("item", [](const DeviceArray& a) { return to_numpy(a).attr("item")(); })
      .def("tolist", [](const DeviceArray& a) { return to_numpy(a).attr("tolist")(); })
      .def("sum", &sum, "axis"_a = py::none(), "keepdims"_a = false)
      .def("square_root", &square_root)
      .def("__neg__", [](const py::object& a) { return py::module_::import("numpy").attr("negative")(a); })
      .def("__array_ufunc__",
           [hooks](const py::object& self, const py::object& ufunc, const py::object& method, const py::args& inputs,
                   const py::kwargs& options) {
             return hooks().attr("array_ufunc")(self, ufunc, method, *inputs, **options);
           })
      .def("__array_function__",
           [hooks](const py::object& self, const py::object& function, const py::object& types, const py::object& args,
                   const py::object& kwargs) {
             return hooks().attr("array_function")(self, function, types, args, kwargs);
           })
      .def("__array__", [](const DeviceArray&, const py::args&, const py::kwargs&) -> py::object {
        throw TypeError("an array of a CUDA device does not become a numpy array by itself: use .cpu() or .numpy()");
      });
  m.def("from_numpy", &from_numpy, "array"_a);
  m.def("from_dlpack", &from_dlpack, "capsule"_a);
  m.def("from_pointer", &from_pointer, "pointer"_a, "shape"_a, "strides"_a, "dtype_name"_a, "owner"_a);
  m.def("full", &full, "shape"_a, "value"_a, "dtype_name"_a);
  m.def("empty_like", &empty_like, "array"_a);
  m.def("binary", &binary, "operation"_a, "a"_a, "b"_a);
  m.def("binary_in_place", &binary_in_place, "operation"_a, "a"_a, "b"_a);
  m.def("may_share_memory", &may_share_memory, "a"_a, "b"_a);
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include "bindings/operands.h"
#include "core/check.h"
#include "device/copy.h"
#include "device/elementwise.h"

namespace fastconv::bindings {
namespace {

struct Named {
  const char* name;
  Elementwise function;
};

// Names of the Python functions; "gelu_tanh" is gelu(approximate="tanh").
constexpr Named kFunctions[] = {
    {"relu", Elementwise::kReLU},
    {"relu6", Elementwise::kReLU6},
    {"leaky_relu", Elementwise::kLeakyReLU},
    {"elu", Elementwise::kELU},
    {"sigmoid", Elementwise::kSigmoid},
    {"tanh", Elementwise::kTanh},
    {"silu", Elementwise::kSiLU},
    {"gelu", Elementwise::kGELU},
    {"gelu_tanh", Elementwise::kGELUTanh},
    {"hardsigmoid", Elementwise::kHardsigmoid},
    {"hardswish", Elementwise::kHardswish},
};

Elementwise parse_function(const std::string& name) {
  for (const Named& known : kFunctions)
    if (name == known.name) return known.function;
  throw std::invalid_argument("no elementwise function named '" + name + "'");
}

Array forward(const std::string& name, const Array& x_in, double parameter) {
  const Elementwise function = parse_function(name);
  const TensorView v = view(x_in, "input");
  check_float("input", v.dtype);
  const Strides strides = dense_strides(v);
  Array y = new_dense(v, strides);
  void* out = y.mutable_data();
  {
    py::gil_scoped_release nogil;
    const Dense x(v, strides);
    device::elementwise(function, v.dtype, x.data(), out, v.numel(), parameter);
  }
  return y;
}

Array backward(const std::string& name, const Array& dy_in, const Array& x_in, double parameter) {
  const Elementwise function = parse_function(name);
  const TensorView v = view(x_in, "input"), dy_view = view(dy_in, "dy");
  check_float("input", v.dtype);
  check_same_shape("dy", dy_view, "the input", v);
  const Strides strides = dense_strides(v);
  Array dx = new_dense(v, strides);
  void* out = dx.mutable_data();
  {
    py::gil_scoped_release nogil;
    const Dense x(v, strides), dy(dy_view, strides);
    device::elementwise_backward(function, v.dtype, dy.data(), x.data(), out, v.numel(), parameter);
  }
  return dx;
}

// a += b
void add_to(const Array& a_in, const Array& b_in) {
  const TensorView v = view(a_in, "a"), b_view = view(b_in, "b");
  check_float("a", v.dtype);
  check_same_shape("b", b_view, "a", v);
  FC_CHECK(is_dense(v), "a must be dense to be added to, got shape ", shape_string(v));
  py::gil_scoped_release nogil;
  const Dense b(b_view, dense_strides(v));
  device::add(v.dtype, v.data, b.data(), v.data, v.numel());
}

Array add(const Array& a_in, const Array& b_in) {
  const TensorView v = view(a_in, "a"), b_view = view(b_in, "b");
  check_float("a", v.dtype);
  check_same_shape("b", b_view, "a", v);
  const Strides strides = dense_strides(v);
  Array y = new_dense(v, strides);
  void* out = y.mutable_data();
  {
    py::gil_scoped_release nogil;
    const Dense a(v, strides), b(b_view, strides);
    device::add(v.dtype, a.data(), b.data(), out, v.numel());
  }
  return y;
}

// Elements are numbered in logical row-major order whatever their order in memory, so that a gradient in another layout
// meets the same mask.
Array dropout(const Array& x_in, double p, uint64_t seed, uint64_t offset) {
  FC_CHECK(p >= 0 && p <= 1, "dropout probability must be between 0 and 1, got ", p);
  const TensorView v = view(x_in, "input");
  check_float("input", v.dtype);
  const Strides strides = dense_strides(v), numbered = row_major_strides(v);
  Array y = new_dense(v, strides);
  TensorView out = view(y, "output");
  {
    py::gil_scoped_release nogil;
    const Dense x(v, numbered);
    if (out.is_contiguous()) {
      device::dropout(v.dtype, x.data(), out.data, v.numel(), p, seed, offset);
    } else {
      const Buffer ordered(v.numel() * itemsize(v.dtype));
      device::dropout(v.dtype, x.data(), ordered.as<void>(), v.numel(), p, seed, offset);
      TensorView from = out;
      from.data = ordered.as<void>();
      from.strides = numbered;
      device::copy_view(from, out);
    }
  }
  return y;
}

// Of whole rows (slices of the first dimension), or of all of x at once.
Array stochastic_depth(const Array& x_in, double p, bool rows, uint64_t seed, uint64_t offset) {
  FC_CHECK(p >= 0 && p <= 1, "drop probability must be between 0 and 1, got ", p);
  const TensorView v = view(x_in, "input");
  check_float("input", v.dtype);
  FC_CHECK(!rows || v.ndim > 0, "rows need an input with at least one dimension, got shape ", shape_string(v));
  const Strides strides = image_strides(v);
  Array y = new_dense(v, strides);
  void* out = y.mutable_data();
  const int64_t count = rows ? v.sizes[0] : 1;
  {
    py::gil_scoped_release nogil;
    const Dense x(v, strides);
    device::stochastic_depth(v.dtype, x.data(), out, count, v.numel() / std::max<int64_t>(count, 1), p, seed, offset);
  }
  return y;
}

}  // namespace

void bind_elementwise(py::module_& m) {
  using namespace py::literals;
  m.def("elementwise", &forward, "name"_a, "x"_a, "parameter"_a);
  m.def("elementwise_backward", &backward, "name"_a, "dy"_a, "x"_a, "parameter"_a);
  m.def("add", &add, "a"_a, "b"_a);
  m.def("add_to", &add_to, "a"_a, "b"_a);
  m.def("dropout", &dropout, "x"_a, "p"_a, "seed"_a, "offset"_a);
  m.def("stochastic_depth", &stochastic_depth, "x"_a, "p"_a, "rows"_a, "seed"_a, "offset"_a);
}

}  // namespace fastconv::bindings

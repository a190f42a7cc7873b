#include <pybind11/stl.h>

#include <optional>

#include "bindings/operands.h"
#include "core/check.h"
#include "device/linear.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<Array>;

int64_t last_size(const TensorView& v, const char* name) {
  FC_CHECK(v.ndim >= 1, name, " must have at least 1 dimension, got shape ", shape_string(v));
  return v.sizes[v.ndim - 1];
}

int64_t leading_elements(const TensorView& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.ndim; ++i) rows *= v.sizes[i];
  return rows;
}

// The shape of v with another last dimension.
TensorView with_last(TensorView v, int64_t size) {
  v.sizes[v.ndim - 1] = size;
  return v;
}

Array linear(const Array& x_in, const Array& w_in, const MaybeArray& bias_in) {
  const TensorView x_view = view(x_in, "input"), w = view(w_in, "weight");
  const Conv2dProblem problem =
      device::make_linear(x_view.dtype, leading_elements(x_view), last_size(x_view, "input"), w);
  std::optional<Vector> bias;
  if (bias_in) {
    const TensorView v = view(*bias_in, "bias");
    check_vector("bias", v, problem.dtype, problem.k);
    bias.emplace(v, "bias");
  }
  const TensorView y_view = with_last(x_view, problem.k);
  Array y = new_dense(y_view, row_major_strides(y_view));
  void* out = y.mutable_data();
  {
    py::gil_scoped_release nogil;
    const Dense x(x_view, row_major_strides(x_view));
    device::linear(problem, x.data(), w, bias ? bias->data() : nullptr, out);
  }
  return y;
}

using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray>;

Gradients linear_backward(const Array& dy_in, const Array& x_in, const Array& w_in, std::array<bool, 3> needs) {
  const TensorView dy_view = view(dy_in, "dy"), x_view = view(x_in, "input"), w = view(w_in, "weight");
  const Conv2dProblem problem =
      device::make_linear(x_view.dtype, leading_elements(x_view), last_size(x_view, "input"), w);
  check_same_shape("dy", dy_view, "the output", with_last(x_view, problem.k));
  Gradients result;
  void *dx = nullptr, *db = nullptr;
  TensorView dw;
  if (needs[0]) {
    std::get<0>(result) = new_dense(x_view, row_major_strides(x_view));
    dx = std::get<0>(result)->mutable_data();
  }
  if (needs[1]) {
    std::get<1>(result) = new_dense(w, dense_strides(w));
    dw = view(*std::get<1>(result), "dw");
  }
  if (needs[2]) {
    std::get<2>(result) = new_array(problem.dtype, {problem.k});
    db = std::get<2>(result)->mutable_data();
  }
  {
    py::gil_scoped_release nogil;
    const Dense dy(dy_view, row_major_strides(dy_view));
    if (dx) device::linear_backward_input(problem, dy.data(), w, dx);
    if (needs[1]) {
      const Dense x(x_view, row_major_strides(x_view));
      device::linear_backward_weight(problem, dy.data(), x.data(), dw);
    }
    if (db) device::linear_backward_bias(problem, dy.data(), db);
  }
  return result;
}

}  // namespace

void bind_linear(py::module_& m) {
  using namespace py::literals;
  m.def("linear", &linear, "x"_a, "w"_a, "bias"_a);
  m.def("linear_backward", &linear_backward, "dy"_a, "x"_a, "w"_a, "needs"_a);
}

}  // namespace fastconv::bindings

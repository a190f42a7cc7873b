#include <pybind11/stl.h>

#include <optional>

#include "bindings/convert.h"
#include "core/check.h"
#include "device/pool2d.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<Array>;

std::tuple<Array, MaybeArray> max_pool2d(const Array& x_in, Pair kernel, Pair stride, Pair padding, Pair dilation,
                                         bool ceil_mode, bool return_indices, bool return_places) {
  const TensorView x_view = view(x_in, "input");
  const Pool2dProblem problem =
      make_max_pool2d(x_view.dtype, shape4(x_view, "input"), kernel, stride, padding, dilation, ceil_mode);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.y_shape(), x.layout());
  std::optional<Output> where;
  if (return_indices) where.emplace(DType::kInt64, problem.y_shape(), x.layout());
  if (return_places) {
    check_places(kernel);
    where.emplace(DType::kUInt8, problem.y_shape(), x.layout());
  }
  {
    py::gil_scoped_release nogil;
    device::max_pool2d(problem, x.data(), y.data(), return_indices ? static_cast<int64_t*>(where->data()) : nullptr,
                       return_places ? static_cast<uint8_t*>(where->data()) : nullptr);
  }
  return {y.finish(), where ? MaybeArray(where->finish()) : std::nullopt};
}

Array max_pool2d_backward(const Array& dy_in, const Array& x_in, Pair kernel, Pair stride, Pair padding, Pair dilation,
                          bool ceil_mode, const MaybeArray& indices_in, const MaybeArray& places_in) {
  const TensorView x_view = view(x_in, "input"), dy_view = view(dy_in, "dy");
  const Pool2dProblem problem =
      make_max_pool2d(x_view.dtype, shape4(x_view, "input"), kernel, stride, padding, dilation, ceil_mode);
  check_dtype("dy", dy_view, problem.dtype);
  check_shape4("dy", dy_view, problem.y_shape());
  std::optional<ChannelsLast> indices, places, x;
  const auto where = [&](const MaybeArray& given, const char* name, DType dtype, std::optional<ChannelsLast>& out) {
    const TensorView v = view(*given, name);
    check_dtype(name, v, dtype);
    check_shape4(name, v, problem.y_shape());
    out.emplace(*given, name);
  };
  if (indices_in) {
    where(indices_in, "indices", DType::kInt64, indices);
  } else if (places_in) {
    check_places(kernel);
    where(places_in, "places", DType::kUInt8, places);
  } else {
    x.emplace(x_in, "input");
  }
  const ChannelsLast dy(dy_in, "dy");
  Output dx(problem.dtype, problem.x_shape(), layout_of(x_view));
  {
    py::gil_scoped_release nogil;
    if (indices)
      device::max_pool2d_backward_indices(problem, dy.data(), static_cast<const int64_t*>(indices->data()), dx.data());
    else if (places)
      device::max_pool2d_backward_places(problem, dy.data(), static_cast<const uint8_t*>(places->data()), dx.data());
    else
      device::max_pool2d_backward(problem, dy.data(), x->data(), dx.data());
  }
  return dx.finish();
}

Array average(const Pool2dProblem& problem, const Array& x_in) {
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.y_shape(), x.layout());
  {
    py::gil_scoped_release nogil;
    device::avg_pool2d(problem, x.data(), y.data());
  }
  return y.finish();
}

// x gives the shape and the layout only.
Array average_backward(const Pool2dProblem& problem, const Array& dy_in, const TensorView& x) {
  const TensorView dy_view = view(dy_in, "dy");
  check_dtype("dy", dy_view, problem.dtype);
  check_shape4("dy", dy_view, problem.y_shape());
  const ChannelsLast dy(dy_in, "dy");
  Output dx(problem.dtype, problem.x_shape(), layout_of(x));
  {
    py::gil_scoped_release nogil;
    device::avg_pool2d_backward(problem, dy.data(), dx.data());
  }
  return dx.finish();
}

Pool2dProblem sliding_average(const TensorView& x, Pair kernel, Pair stride, Pair padding, bool ceil_mode,
                              bool count_include_pad, std::optional<int64_t> divisor_override) {
  return make_avg_pool2d(x.dtype, shape4(x, "input"), kernel, stride, padding, ceil_mode, count_include_pad,
                         divisor_override);
}

Array avg_pool2d(const Array& x, Pair kernel, Pair stride, Pair padding, bool ceil_mode, bool count_include_pad,
                 std::optional<int64_t> divisor_override) {
  return average(
      sliding_average(view(x, "input"), kernel, stride, padding, ceil_mode, count_include_pad, divisor_override), x);
}

Array avg_pool2d_backward(const Array& dy, const Array& x, Pair kernel, Pair stride, Pair padding, bool ceil_mode,
                          bool count_include_pad, std::optional<int64_t> divisor_override) {
  const TensorView x_view = view(x, "input");
  return average_backward(
      sliding_average(x_view, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override), dy, x_view);
}

Array adaptive_avg_pool2d(const Array& x, Pair output) {
  const TensorView x_view = view(x, "input");
  return average(make_adaptive_avg_pool2d(x_view.dtype, shape4(x_view, "input"), output), x);
}

// The output size is that of dy.
Array adaptive_avg_pool2d_backward(const Array& dy, const Array& x) {
  const TensorView x_view = view(x, "input");
  const Shape y = shape4(view(dy, "dy"), "dy");
  return average_backward(make_adaptive_avg_pool2d(x_view.dtype, shape4(x_view, "input"), {y[2], y[3]}), dy, x_view);
}

}  // namespace

void bind_pool2d(py::module_& m) {
  using namespace py::literals;
  m.def("max_pool2d", &max_pool2d, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a, "dilation"_a, "ceil_mode"_a,
        "return_indices"_a, "return_places"_a);
  m.def("max_pool2d_backward", &max_pool2d_backward, "dy"_a, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "dilation"_a, "ceil_mode"_a, "indices"_a, "places"_a);
  m.def("avg_pool2d", &avg_pool2d, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a, "ceil_mode"_a,
        "count_include_pad"_a, "divisor_override"_a);
  m.def("avg_pool2d_backward", &avg_pool2d_backward, "dy"_a, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "ceil_mode"_a, "count_include_pad"_a, "divisor_override"_a);
  m.def("adaptive_avg_pool2d", &adaptive_avg_pool2d, "x"_a, "output_size"_a);
  m.def("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward, "dy"_a, "x"_a);
}

}  // namespace fastconv::bindings

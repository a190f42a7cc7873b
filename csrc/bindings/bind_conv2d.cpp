#include <pybind11/stl.h>

#include "bindings/conv2d.h"
#include "bindings/operands.h"
#include "core/check.h"
#include "device/conv2d.h"
#include "device/elementwise.h"

namespace fastconv::bindings {
namespace {

// The bias, or another vector, of a problem with `channels` outputs, checked and dense.
std::optional<Vector> dense_bias(const MaybeArray& bias, DType dtype, int64_t channels, const char* name = "bias") {
  if (!bias) return std::nullopt;
  const TensorView v = view(*bias, name);
  check_vector(name, v, dtype, channels);
  return Vector(v, name);
}

}  // namespace

Array conv2d(const Array& x_in, const Array& w_in, const MaybeArray& bias, const MaybeArray& residual, Pair stride,
             const Padding& padding, Pair dilation, int64_t groups, const std::string& activation,
             const MaybeArray& scale, device::WeightCache* cache, double* moments) {
  const TensorView w = view(w_in, "weight");
  const TensorView x_view = view(x_in, "input");
  const Conv2dProblem problem =
      make_conv2d(x_view.dtype, shape4(x_view, "input"), shape4(w, "weight"), stride, padding, dilation, groups);
  if (problem.dtype != DType::kBFloat16) check_float("input", problem.dtype);
  problem.check("weight", w, problem.w_shape());
  const std::optional<Vector> b = dense_bias(bias, problem.dtype, problem.k);
  const std::optional<Vector> factors = dense_bias(scale, problem.dtype, problem.k, "scale");
  std::optional<ChannelsLast> dense_residual;
  if (residual) {
    problem.check("residual", view(*residual, "residual"), problem.y_shape());
    dense_residual.emplace(*residual, "residual");
  }
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.y_shape(), x.layout());
  const device::ForwardArguments args{x.data(),
                                      w,
                                      b ? b->data() : nullptr,
                                      dense_residual ? dense_residual->data() : nullptr,
                                      parse_activation(activation),
                                      y.data(),
                                      moments,
                                      factors ? factors->data() : nullptr,
                                      cache};
  {
    py::gil_scoped_release nogil;
    device::conv2d_forward(problem, args);
  }
  return y.finish();
}

namespace {

std::tuple<Array, Array> conv2d_moments(const Array& x, const Array& w, const MaybeArray& bias, Pair stride,
                                        const Padding& padding, Pair dilation, int64_t groups) {
  const TensorView w_view = view(w, "weight");
  check_float("weight", w_view.dtype);
  Array moments = new_array(DType::kFloat64, {2, shape4(w_view, "weight")[0]});
  Array y = conv2d(x, w, bias, std::nullopt, stride, padding, dilation, groups, "", std::nullopt, nullptr,
                   static_cast<double*>(moments.mutable_data()));
  return {y, moments};
}

Array backward_input(const Conv2dProblem& problem, const Array& dy_in, const Array& w_in, Layout layout) {
  const TensorView w = view(w_in, "weight");
  problem.check("weight", w, problem.w_shape());
  const ChannelsLast dy(dy_in, "dy");
  problem.check("dy", dy.view(), problem.y_shape());
  Output dx(problem.dtype, problem.x_shape(), layout);
  {
    py::gil_scoped_release nogil;
    device::conv2d_backward_input(problem, {dy.data(), w, dx.data()});
  }
  return dx.finish();
}

// dw in the layout of w: channels-last weights have channels-last gradients.
Array backward_weight(const Conv2dProblem& problem, const Array& dy_in, const Array& x_in, Layout layout) {
  const ChannelsLast dy(dy_in, "dy"), x(x_in, "input");
  problem.check("dy", dy.view(), problem.y_shape());
  problem.check("input", x.view(), problem.x_shape());
  Array dw = new_array(problem.dtype, {problem.k, problem.cg(), problem.r, problem.s}, layout);
  const TensorView out = view(dw, "dw");
  {
    py::gil_scoped_release nogil;
    device::conv2d_backward_weight(problem, {dy.data(), x.data(), out});
  }
  return dw;
}

// The gradient of a bias: dy[N, K, P, Q] summed over batch and pixels.
Array channel_sums(const Array& dy_in, DType dtype) {
  const ChannelsLast dy(dy_in, "dy");
  const auto& sizes = dy.view().sizes;
  Array db = new_array(dtype, {sizes[1]});
  void* out = db.mutable_data();
  {
    py::gil_scoped_release nogil;
    device::channel_sums(dtype, sizes[0] * sizes[2] * sizes[3], sizes[1], dy.data(), out);
  }
  return db;
}

}  // namespace

using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray>;

Gradients conv2d_backward(const Array& dy, const Array& x, const Array& w, Pair stride, const Padding& padding,
                          Pair dilation, int64_t groups, std::array<bool, 3> needs) {
  const TensorView x_view = view(x, "input"), w_view = view(w, "weight");
  const Conv2dProblem problem =
      make_conv2d(x_view.dtype, shape4(x_view, "input"), shape4(w_view, "weight"), stride, padding, dilation, groups);
  check_float("input", problem.dtype);
  problem.check("weight", w_view, problem.w_shape());
  problem.check("dy", view(dy, "dy"), problem.y_shape());
  Gradients out;
  // In this order the gradient that the layer before reads next is what was written last.
  if (needs[1]) std::get<1>(out) = backward_weight(problem, dy, x, layout_of(w_view));
  if (needs[0]) std::get<0>(out) = backward_input(problem, dy, w, layout_of(x_view));
  if (needs[2]) std::get<2>(out) = channel_sums(dy, problem.dtype);
  return out;
}

namespace {

Conv2dProblem transpose_problem(const TensorView& x, const TensorView& w, Pair stride, Pair padding,
                                Pair output_padding, Pair dilation, int64_t groups) {
  const Conv2dProblem problem = make_conv_transpose2d(x.dtype, shape4(x, "input"), shape4(w, "weight"), stride, padding,
                                                      output_padding, dilation, groups);
  check_float("input", problem.dtype);
  problem.check("weight", w, problem.w_shape());
  return problem;
}

// y of a transposed convolution is the input gradient of the convolution `problem`, plus a bias.
Array conv_transpose2d(const Array& x_in, const Array& w_in, const MaybeArray& bias, Pair stride, Pair padding,
                       Pair output_padding, Pair dilation, int64_t groups) {
  const TensorView w = view(w_in, "weight");
  const Conv2dProblem problem =
      transpose_problem(view(x_in, "input"), w, stride, padding, output_padding, dilation, groups);
  const std::optional<Vector> b = dense_bias(bias, problem.dtype, problem.c);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.x_shape(), x.layout());
  {
    py::gil_scoped_release nogil;
    device::conv2d_backward_input(problem, {x.data(), w, y.data()});
    if (b) device::add_channel_bias(problem.dtype, y.data(), problem.n * problem.h * problem.w, problem.c, b->data());
  }
  return y.finish();
}

Gradients conv_transpose2d_backward(const Array& dy_in, const Array& x, const Array& w_in, Pair stride, Pair padding,
                                    Pair output_padding, Pair dilation, int64_t groups, std::array<bool, 3> needs) {
  const TensorView x_view = view(x, "input"), w = view(w_in, "weight");
  const Conv2dProblem problem = transpose_problem(x_view, w, stride, padding, output_padding, dilation, groups);
  problem.check("dy", view(dy_in, "dy"), problem.x_shape());
  Gradients out;
  if (needs[0]) {
    const ChannelsLast dy(dy_in, "dy");
    Output dx(problem.dtype, problem.y_shape(), layout_of(x_view));
    {
      py::gil_scoped_release nogil;
      device::conv2d_forward(problem, {dy.data(), w, nullptr, nullptr, Activation::kNone, dx.data()});
    }
    std::get<0>(out) = dx.finish();
  }
  // Here x plays dy and dy plays x.
  if (needs[1]) std::get<1>(out) = backward_weight(problem, x, dy_in, layout_of(w));
  if (needs[2]) std::get<2>(out) = channel_sums(dy_in, problem.dtype);
  return out;
}

}  // namespace

Conv2dProblem describe_conv2d(const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation,
                              int64_t groups, const std::string& dtype) {
  // bfloat16: every device has a forward pass of some convolutions in it.
  std::string known;
  for (const DType type : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    if (!computes_in(type) && type != DType::kBFloat16) continue;
    if (dtype == name(type)) return make_conv2d(type, x, w, stride, padding, dilation, groups);
    known += (known.empty() ? "'" : ", '") + std::string(name(type)) + "'";
  }
  throw TypeError(concat("dtype must be one of ", known, ", got '", dtype, "'"));
}

void bind_conv2d(py::module_& m) {
  using namespace py::literals;
  m.def(
      "conv2d",
      [](const Array& x, const Array& w, const MaybeArray& bias, const MaybeArray& residual, Pair stride,
         const Padding& padding, Pair dilation, int64_t groups, const std::string& activation) {
        return conv2d(x, w, bias, residual, stride, padding, dilation, groups, activation, std::nullopt, nullptr);
      },
      "x"_a, "w"_a, "bias"_a, "residual"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "activation"_a);
  m.def("conv2d_moments", &conv2d_moments, "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a);
  m.def("conv2d_backward", &conv2d_backward, "dy"_a, "x"_a, "w"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a,
        "needs"_a);
  m.def("conv_transpose2d", &conv_transpose2d, "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a, "output_padding"_a,
        "dilation"_a, "groups"_a);
  m.def("conv_transpose2d_backward", &conv_transpose2d_backward, "dy"_a, "x"_a, "w"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a, "groups"_a, "needs"_a);
  m.def(
      "conv2d_output_shape",
      [](const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation, int64_t groups) {
        return describe_conv2d(x, w, stride, padding, dilation, groups, "float32").y_shape();
      },
      "x_shape"_a, "w_shape"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a);
  m.def(
      "explain_conv2d",
      [](const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation, int64_t groups,
         const std::string& dtype, const std::string& direction) {
        return device::explain_conv2d(describe_conv2d(x, w, stride, padding, dilation, groups, dtype),
                                      parse_direction(direction));
      },
      "x_shape"_a, "w_shape"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "dtype"_a, "direction"_a);
  m.def("set_strict_precision", &device::set_strict_precision, "on"_a);
  m.def("strict_precision", &device::strict_precision);
  m.def("set_algorithm", &device::set_conv2d_algorithm, "name"_a,
        "Forces one convolution algorithm by name in this thread; '' lets the lists decide.");
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include <optional>

#include "bindings/convert.h"
#include "cpu/conv2d.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<py::array>;

// Bias and residual as the kernels take them: a dense vector of K, and a tensor shaped and laid out like y.
struct Extras {
  Extras(const Conv2dProblem& problem, const MaybeArray& bias, const MaybeArray& residual) {
    if (bias) {
      const TensorView v = view(*bias, "bias");
      FC_CHECK_TYPE(v.dtype == problem.dtype, "bias must be ", name(problem.dtype), ", got ", name(v.dtype));
      FC_CHECK(v.ndim == 1 && v.sizes[0] == problem.k, "bias must have shape (", problem.k, ",), got ",
               shape_string(v));
      bias_ = Buffer(std::max<int64_t>(v.sizes[0], 1) * itemsize(v.dtype));
      dispatch_float(v.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t i = 0; i < v.sizes[0]; ++i) bias_.as<T>()[i] = v.as<T>()[i * v.strides[0]];
      });
    }
    if (residual) {
      residual_.emplace(*residual, "residual");
      problem.check("residual", residual_->view(), problem.y_shape());
    }
  }
  const void* bias() const { return bias_.as<void>(); }
  const void* residual() const { return residual_ ? residual_->data() : nullptr; }

 private:
  Buffer bias_;
  std::optional<ChannelsLast> residual_;
};

py::array conv2d(const py::array& x_in, const py::array& w_in, const MaybeArray& bias, const MaybeArray& residual,
                 Pair stride, const Padding& padding, Pair dilation, int64_t groups, const std::string& activation) {
  const TensorView w = view(w_in, "weight");
  const TensorView x_view = view(x_in, "input");
  const Conv2dProblem problem = make_conv2d(x_view.dtype, shape4(x_view, "input"), shape4(w, "weight"), stride, padding,
                                            dilation, groups);
  dispatch_float(problem.dtype, [](auto) {});
  problem.check("weight", w, problem.w_shape());
  const Extras extras(problem, bias, residual);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.y_shape(), x.layout());
  const cpu::ForwardArguments args{x.data(), w, extras.bias(), extras.residual(), parse_activation(activation), y.data()};
  {
    py::gil_scoped_release nogil;
    cpu::conv2d_forward(problem, args);
  }
  return y.finish();
}

py::array backward_input(const Conv2dProblem& problem, const py::array& dy_in, const py::array& w_in, Layout layout) {
  const TensorView w = view(w_in, "weight");
  problem.check("weight", w, problem.w_shape());
  const ChannelsLast dy(dy_in, "dy");
  problem.check("dy", dy.view(), problem.y_shape());
  Output dx(problem.dtype, problem.x_shape(), layout);
  {
    py::gil_scoped_release nogil;
    cpu::conv2d_backward_input(problem, {dy.data(), w, dx.data()});
  }
  return dx.finish();
}

// dw in the layout of w: channels-last weights have channels-last gradients.
py::array backward_weight(const Conv2dProblem& problem, const py::array& dy_in, const py::array& x_in, Layout layout) {
  const ChannelsLast dy(dy_in, "dy"), x(x_in, "input");
  problem.check("dy", dy.view(), problem.y_shape());
  problem.check("input", x.view(), problem.x_shape());
  py::array dw = new_array(problem.dtype, {problem.k, problem.cg(), problem.r, problem.s}, layout);
  const TensorView out = view(dw, "dw");
  {
    py::gil_scoped_release nogil;
    cpu::conv2d_backward_weight(problem, {dy.data(), x.data(), out});
  }
  return dw;
}

py::array backward_bias(const Conv2dProblem& problem, const py::array& dy_in) {
  const ChannelsLast dy(dy_in, "dy");
  problem.check("dy", dy.view(), problem.y_shape());
  py::array db = new_array(problem.dtype, {problem.k});
  void* out = db.mutable_data();
  {
    py::gil_scoped_release nogil;
    cpu::conv2d_backward_bias(problem, dy.data(), out);
  }
  return db;
}

using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray>;

Gradients conv2d_backward(const py::array& dy, const py::array& x, const py::array& w, Pair stride,
                          const Padding& padding, Pair dilation, int64_t groups, std::array<bool, 3> needs) {
  const TensorView x_view = view(x, "input"), w_view = view(w, "weight");
  const Conv2dProblem problem = make_conv2d(x_view.dtype, shape4(x_view, "input"), shape4(w_view, "weight"), stride,
                                            padding, dilation, groups);
  dispatch_float(problem.dtype, [](auto) {});
  problem.check("weight", w_view, problem.w_shape());
  problem.check("dy", view(dy, "dy"), problem.y_shape());
  Gradients out;
  if (needs[0]) std::get<0>(out) = backward_input(problem, dy, w, layout_of(x_view));
  if (needs[1]) std::get<1>(out) = backward_weight(problem, dy, x, layout_of(w_view));
  if (needs[2]) std::get<2>(out) = backward_bias(problem, dy);
  return out;
}

// y of a transposed convolution is the input gradient of the convolution `problem`, plus a bias.
py::array conv_transpose2d(const py::array& x, const py::array& w, Pair stride, Pair padding, Pair output_padding,
                           Pair dilation, int64_t groups) {
  const TensorView x_view = view(x, "input");
  const Conv2dProblem problem = make_conv_transpose2d(x_view.dtype, shape4(x_view, "input"),
                                                      shape4(view(w, "weight"), "weight"), stride, padding,
                                                      output_padding, dilation, groups);
  dispatch_float(problem.dtype, [](auto) {});
  return backward_input(problem, x, w, layout_of(x_view));
}

std::tuple<MaybeArray, MaybeArray> conv_transpose2d_backward(const py::array& dy, const py::array& x,
                                                             const py::array& w, Pair stride, Pair padding,
                                                             Pair output_padding, Pair dilation, int64_t groups,
                                                             std::array<bool, 2> needs) {
  const TensorView x_view = view(x, "input"), w_view = view(w, "weight");
  const Conv2dProblem problem = make_conv_transpose2d(x_view.dtype, shape4(x_view, "input"),
                                                      shape4(w_view, "weight"), stride, padding, output_padding,
                                                      dilation, groups);
  dispatch_float(problem.dtype, [](auto) {});
  problem.check("weight", w_view, problem.w_shape());
  problem.check("dy", view(dy, "dy"), problem.x_shape());
  std::tuple<MaybeArray, MaybeArray> out;
  if (needs[0]) {
    const ChannelsLast g(dy, "dy");
    Output dx(problem.dtype, problem.y_shape(), layout_of(x_view));
    {
      py::gil_scoped_release nogil;
      cpu::conv2d_forward(problem, {g.data(), w_view, nullptr, nullptr, Activation::kNone, dx.data()});
    }
    std::get<0>(out) = dx.finish();
  }
  // Here x plays dy and dy plays x.
  if (needs[1]) std::get<1>(out) = backward_weight(problem, x, dy, layout_of(w_view));
  return out;
}

Conv2dProblem describe(const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation,
                       int64_t groups, const std::string& dtype) {
  FC_CHECK_TYPE(dtype == "float32" || dtype == "float64", "dtype must be 'float32' or 'float64', got '", dtype, "'");
  return make_conv2d(dtype == "float32" ? DType::kFloat32 : DType::kFloat64, x, w, stride, padding, dilation, groups);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  using namespace py::literals;
  m.def("conv2d", &conv2d, "x"_a, "w"_a, "bias"_a, "residual"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a,
        "activation"_a);
  m.def("conv2d_backward", &conv2d_backward, "dy"_a, "x"_a, "w"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a,
        "needs"_a);
  m.def("conv_transpose2d", &conv_transpose2d, "x"_a, "w"_a, "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a,
        "groups"_a);
  m.def("conv_transpose2d_backward", &conv_transpose2d_backward, "dy"_a, "x"_a, "w"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a, "groups"_a, "needs"_a);
  m.def(
      "conv2d_output_shape",
      [](const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation, int64_t groups) {
        return describe(x, w, stride, padding, dilation, groups, "float32").y_shape();
      },
      "x_shape"_a, "w_shape"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a);
  m.def(
      "conv2d_padding",
      [](const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation, int64_t groups) {
        const Conv2dProblem p = describe(x, w, stride, padding, dilation, groups, "float32");
        return std::array<int64_t, 4>{p.pad_top, p.pad_bottom, p.pad_left, p.pad_right};
      },
      "x_shape"_a, "w_shape"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a);
  m.def(
      "explain_conv2d",
      [](const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation, int64_t groups,
         const std::string& dtype, const std::string& direction) {
        return cpu::explain_conv2d(describe(x, w, stride, padding, dilation, groups, dtype), direction);
      },
      "x_shape"_a, "w_shape"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "dtype"_a, "direction"_a);
  m.def("set_algorithm", &cpu::set_conv2d_algorithm, "name"_a,
        "Forces one convolution algorithm by name; '' lets the lists decide.");
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include <optional>

#include "bindings/operands.h"
#include "core/check.h"
#include "cpu/batch_norm.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<py::array>;

// A vector over the channels, checked and dense; null if not given.
class ChannelVector {
 public:
  ChannelVector(const MaybeArray& array, const char* name, const BatchNormProblem& problem) {
    if (!array) return;
    const TensorView v = view(*array, name);
    check_vector(name, v, problem.dtype, problem.channels());
    vector_.emplace(v, name);
  }
  const void* data() const { return vector_ ? vector_->data() : nullptr; }

 private:
  std::optional<Vector> vector_;
};

// A vector of running statistics: read and written in place through any strides.
class RunningVector {
 public:
  RunningVector(const MaybeArray& array, const char* name, const BatchNormProblem& problem) {
    if (!array) return;
    view_ = view(*array, name);
    check_vector(name, view_, problem.dtype, problem.channels());
    given_ = true;
  }
  bool given() const { return given_; }
  void update(const void* batch, double momentum) {
    if (!given_) return;
    TensorView dense = view_;
    Buffer copy(std::max<int64_t>(view_.numel(), 1) * itemsize(view_.dtype));
    dense.data = copy.as<void>();
    dense.strides[0] = 1;
    copy_view(view_, dense);
    cpu::update_running(view_.dtype, view_.sizes[0], batch, momentum, dense.data);
    copy_view(dense, view_);
  }

 private:
  TensorView view_;
  bool given_ = false;
};

std::optional<ChannelsLast> image(const MaybeArray& array, const char* name, const BatchNormProblem& problem) {
  std::optional<ChannelsLast> result;
  if (!array) return result;
  const TensorView v = view(*array, name);
  check_dtype(name, v, problem.dtype);
  check_shape4(name, v, problem.shape);
  result.emplace(*array, name);
  return result;
}

const void* data_of(const std::optional<ChannelsLast>& a) { return a ? a->data() : nullptr; }

std::tuple<py::array, py::array, py::array> batch_norm_train(const py::array& x_in, const MaybeArray& weight_in,
                                                             const MaybeArray& bias_in, const MaybeArray& mean_in,
                                                             const MaybeArray& var_in, double momentum, double eps,
                                                             const MaybeArray& residual_in,
                                                             const std::string& activation_name) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), eps, true);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  RunningVector running_mean(mean_in, "running_mean", problem), running_var(var_in, "running_var", problem);
  const auto residual = image(residual_in, "residual", problem);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.shape, x.layout());
  py::array mean = new_array(problem.dtype, {problem.channels()}),
            rstd = new_array(problem.dtype, {problem.channels()});
  void *mean_data = mean.mutable_data(), *rstd_data = rstd.mutable_data();
  {
    py::gil_scoped_release nogil;
    const Buffer variance(std::max<int64_t>(problem.channels(), 1) * itemsize(problem.dtype));
    cpu::batch_norm_statistics(problem, x.data(), mean_data, rstd_data, variance.as<void>());
    cpu::batch_norm_forward(
        problem, {x.data(), mean_data, rstd_data, weight.data(), bias.data(), data_of(residual), activation}, y.data());
    if (problem.rows() > 0) {
      running_mean.update(mean_data, momentum);
      running_var.update(variance.as<void>(), momentum);
    }
  }
  return {y.finish(), mean, rstd};
}

py::array batch_norm_eval(const py::array& x_in, const py::array& mean_in, const py::array& var_in,
                          const MaybeArray& weight_in, const MaybeArray& bias_in, double eps,
                          const MaybeArray& residual_in, const std::string& activation_name) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), eps, false);
  const ChannelVector mean(mean_in, "running_mean", problem), variance(var_in, "running_var", problem);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  const auto residual = image(residual_in, "residual", problem);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.shape, x.layout());
  {
    py::gil_scoped_release nogil;
    const Buffer rstd(std::max<int64_t>(problem.channels(), 1) * itemsize(problem.dtype));
    cpu::reciprocal_std(problem.dtype, problem.channels(), variance.data(), eps, rstd.as<void>());
    cpu::batch_norm_forward(
        problem, {x.data(), mean.data(), rstd.as<void>(), weight.data(), bias.data(), data_of(residual), activation},
        y.data());
  }
  return y.finish();
}

using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray>;

Gradients batch_norm_backward(const py::array& dy_in, const py::array& x_in, const MaybeArray& weight_in,
                              const py::array& mean_in, const py::array& rstd_in, const MaybeArray& bias_in,
                              const MaybeArray& residual_in, const std::string& activation_name, bool training,
                              std::array<bool, 4> needs) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  const ChannelVector mean(mean_in, "mean", problem), rstd(rstd_in, "rstd", problem);
  const auto dy = image(dy_in, "dy", problem);
  const auto residual = image(residual_in, "residual", problem);
  const ChannelsLast x(x_in, "input");
  std::optional<Output> dx, dresidual;
  Gradients result;
  cpu::BatchNormGradients out;
  if (needs[0]) {
    dx.emplace(problem.dtype, problem.shape, x.layout());
    out.dx = dx->data();
  }
  if (needs[1]) {
    std::get<1>(result) = new_array(problem.dtype, {problem.channels()});
    out.dweight = std::get<1>(result)->mutable_data();
  }
  if (needs[2]) {
    std::get<2>(result) = new_array(problem.dtype, {problem.channels()});
    out.dbias = std::get<2>(result)->mutable_data();
  }
  if (needs[3] && residual) {
    dresidual.emplace(problem.dtype, problem.shape, residual->layout());
    out.dresidual = dresidual->data();
  }
  {
    py::gil_scoped_release nogil;
    cpu::batch_norm_backward(
        problem, {x.data(), mean.data(), rstd.data(), weight.data(), bias.data(), data_of(residual), activation},
        dy->data(), training, out);
  }
  if (dx) std::get<0>(result) = dx->finish();
  if (dresidual) std::get<3>(result) = dresidual->finish();
  return result;
}

}  // namespace

void bind_batch_norm(py::module_& m) {
  using namespace py::literals;
  m.def("batch_norm_train", &batch_norm_train, "x"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a,
        "momentum"_a, "eps"_a, "residual"_a, "activation"_a);
  m.def("batch_norm_eval", &batch_norm_eval, "x"_a, "running_mean"_a, "running_var"_a, "weight"_a, "bias"_a, "eps"_a,
        "residual"_a, "activation"_a);
  m.def("batch_norm_backward", &batch_norm_backward, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "bias"_a,
        "residual"_a, "activation"_a, "training"_a, "needs"_a);
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include "bindings/batch_norm.h"
#include "bindings/operands.h"
#include "core/check.h"
#include "device/batch_norm.h"
#include "device/copy.h"

namespace fastconv::bindings {
namespace {

// A vector over the channels, checked and dense; null if not given.
class ChannelVector {
 public:
  ChannelVector(const MaybeArray& array, const char* name, const BatchNormProblem& problem)
      : ChannelVector(array, name, problem, problem.parameter_dtype()) {}
  ChannelVector(const MaybeArray& array, const char* name, const BatchNormProblem& problem, DType dtype) {
    if (!array) return;
    const TensorView v = view(*array, name);
    check_vector(name, v, dtype, problem.channels());
    vector_.emplace(v, name);
  }
  const void* data() const { return vector_ ? vector_->data() : nullptr; }
  const double* doubles() const { return static_cast<const double*>(data()); }

 private:
  std::optional<Vector> vector_;
};

// A vector of running statistics: read and written in place through any strides.
class RunningVector {
 public:
  RunningVector(const MaybeArray& array, const char* name, const BatchNormProblem& problem) {
    if (!array) return;
    view_ = view(*array, name);
    check_vector(name, view_, problem.parameter_dtype(), problem.channels());
    given_ = true;
  }
  bool given() const { return given_; }
  void update(const void* batch, double momentum) {
    if (!given_) return;
    TensorView dense = view_;
    Buffer copy(std::max<int64_t>(view_.numel(), 1) * itemsize(view_.dtype));
    dense.data = copy.as<void>();
    dense.strides[0] = 1;
    device::copy_view(view_, dense);
    device::update_running(view_.dtype, view_.sizes[0], batch, momentum, dense.data);
    device::copy_view(dense, view_);
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

// Two vectors of doubles over the channels, a row each.
Array two_rows(const BatchNormProblem& problem) { return new_array(DType::kFloat64, {2, problem.channels()}); }

Array batch_norm_moments(const Array& x_in) {
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
  const ChannelsLast x(x_in, "input");
  Array moments = two_rows(problem);
  auto* mean = static_cast<double*>(moments.mutable_data());
  {
    py::gil_scoped_release nogil;
    device::batch_norm_moments(problem, x.data(), mean, mean + problem.channels());
  }
  return moments;
}

// (count, mean, squares) as Python gives them.
using MomentArrays = std::optional<std::tuple<int64_t, Array, Array>>;

class CheckedMoments {
 public:
  CheckedMoments(const MomentArrays& given, const Array& x) {
    if (!given) return;
    const TensorView x_view = view(x, "input");
    const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
    mean_.emplace(MaybeArray(std::get<1>(*given)), "mean", problem, DType::kFloat64);
    squares_.emplace(MaybeArray(std::get<2>(*given)), "squares", problem, DType::kFloat64);
    moments_ = {std::get<0>(*given), mean_->doubles(), squares_->doubles()};
  }
  const GivenMoments& get() const { return moments_; }

 private:
  std::optional<ChannelVector> mean_, squares_;
  GivenMoments moments_;
};

// The statistics of a batch in training: its moments, given or taken of x, and what follows from them.
class BatchStatistics {
 public:
  BatchStatistics(const BatchNormProblem& problem, const GivenMoments& given) : problem_(problem), given_(given) {
    FC_CHECK(!given || (given->count >= problem.rows() && given->count != 1),
             "the whole batch must have more than one value per channel and those of the input, got ", given->count,
             " and ", problem.rows());
  }
  // Without the GIL: mean and rstd, and the running statistics of a batch that is not empty.
  void take(const void* x, void* mean, void* rstd, double momentum, RunningVector& running_mean,
            RunningVector& running_var) const {
    const int64_t channels = std::max<int64_t>(problem_.channels(), 1);
    const Buffer variance(channels * itemsize(problem_.parameter_dtype())),
        own(given_ ? 0 : 2 * channels * sizeof(double));
    const device::Moments moments =
        given_ ? *given_ : device::Moments{problem_.rows(), own.as<double>(), own.as<double>() + channels};
    if (!given_) device::batch_norm_moments(problem_, x, own.as<double>(), own.as<double>() + channels);
    device::batch_norm_statistics(problem_, moments, mean, rstd, variance.as<void>());
    if (moments.count == 0) return;
    running_mean.update(mean, momentum);
    running_var.update(variance.as<void>(), momentum);
  }

 private:
  const BatchNormProblem& problem_;
  const GivenMoments& given_;
};

}  // namespace

std::tuple<Array, Array, Array> batch_norm_train(const Array& x_in, const MaybeArray& weight_in,
                                                 const MaybeArray& bias_in, const MaybeArray& mean_in,
                                                 const MaybeArray& var_in, double momentum, double eps,
                                                 const MaybeArray& residual_in, const std::string& activation_name,
                                                 const GivenMoments& given) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), eps, !given);
  const BatchStatistics statistics(problem, given);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  RunningVector running_mean(mean_in, "running_mean", problem), running_var(var_in, "running_var", problem);
  const auto residual = image(residual_in, "residual", problem);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.shape, x.layout());
  Array mean = new_array(problem.parameter_dtype(), {problem.channels()}),
        rstd = new_array(problem.parameter_dtype(), {problem.channels()});
  void *mean_data = mean.mutable_data(), *rstd_data = rstd.mutable_data();
  {
    py::gil_scoped_release nogil;
    statistics.take(x.data(), mean_data, rstd_data, momentum, running_mean, running_var);
    device::batch_norm_forward(
        problem, {x.data(), mean_data, rstd_data, weight.data(), bias.data(), data_of(residual), activation}, y.data());
  }
  return {y.finish(), mean, rstd};
}

namespace {

Array batch_norm_eval(const Array& x_in, const Array& mean_in, const Array& var_in, const MaybeArray& weight_in,
                      const MaybeArray& bias_in, double eps, const MaybeArray& residual_in,
                      const std::string& activation_name) {
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
    const Buffer rstd(std::max<int64_t>(problem.channels(), 1) * itemsize(problem.parameter_dtype()));
    device::reciprocal_std(problem.parameter_dtype(), problem.channels(), variance.data(), eps, rstd.as<void>());
    device::batch_norm_forward(
        problem, {x.data(), mean.data(), rstd.as<void>(), weight.data(), bias.data(), data_of(residual), activation},
        y.data());
  }
  return y.finish();
}

}  // namespace

using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray>;

Gradients batch_norm_backward(const Array& dy_in, const Array& x_in, const MaybeArray& weight_in, const Array& mean_in,
                              const Array& rstd_in, const MaybeArray& bias_in, const MaybeArray& residual_in,
                              const std::string& activation_name, bool training, std::array<bool, 4> needs) {
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
  device::BatchNormGradients out;
  if (needs[0]) {
    dx.emplace(problem.dtype, problem.shape, x.layout());
    out.dx = dx->data();
  }
  if (needs[1]) {
    std::get<1>(result) = new_array(problem.parameter_dtype(), {problem.channels()});
    out.dweight = std::get<1>(result)->mutable_data();
  }
  if (needs[2]) {
    std::get<2>(result) = new_array(problem.parameter_dtype(), {problem.channels()});
    out.dbias = std::get<2>(result)->mutable_data();
  }
  if (needs[3] && residual) {
    dresidual.emplace(problem.dtype, problem.shape, residual->layout());
    out.dresidual = dresidual->data();
  }
  {
    py::gil_scoped_release nogil;
    device::batch_norm_backward(
        problem, {x.data(), mean.data(), rstd.data(), weight.data(), bias.data(), data_of(residual), activation},
        dy->data(), training, out);
  }
  if (dx) std::get<0>(result) = dx->finish();
  if (dresidual) std::get<3>(result) = dresidual->finish();
  return result;
}

namespace {

std::tuple<Array, MaybeArray> batch_norm_backward_sums(const Array& dy_in, const Array& x_in,
                                                       const MaybeArray& weight_in, const Array& mean_in,
                                                       const Array& rstd_in, const MaybeArray& bias_in,
                                                       const MaybeArray& residual_in,
                                                       const std::string& activation_name) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  const ChannelVector mean(mean_in, "mean", problem), rstd(rstd_in, "rstd", problem);
  const auto dy = image(dy_in, "dy", problem);
  const auto residual = image(residual_in, "residual", problem);
  const ChannelsLast x(x_in, "input");
  std::optional<Output> dresidual;
  if (residual) dresidual.emplace(problem.dtype, problem.shape, residual->layout());
  Array totals = two_rows(problem);
  auto* totals_data = static_cast<double*>(totals.mutable_data());
  {
    py::gil_scoped_release nogil;
    device::batch_norm_backward_sums(
        problem, {x.data(), mean.data(), rstd.data(), weight.data(), bias.data(), data_of(residual), activation},
        dy->data(), dresidual ? dresidual->data() : nullptr, totals_data);
  }
  return {totals, dresidual ? MaybeArray(dresidual->finish()) : std::nullopt};
}

Array batch_norm_backward_input(const Array& dy_in, const Array& x_in, const MaybeArray& weight_in,
                                const Array& mean_in, const Array& rstd_in, const Array& sum_in,
                                const Array& products_in, int64_t count, const MaybeArray& bias_in,
                                const std::string& activation_name) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
  FC_CHECK(count >= problem.rows(), "count must be at least the values per channel of the input, got ", count, " and ",
           problem.rows());
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  const ChannelVector mean(mean_in, "mean", problem), rstd(rstd_in, "rstd", problem);
  const ChannelVector sum(sum_in, "sum", problem, DType::kFloat64);
  const ChannelVector products(products_in, "products", problem, DType::kFloat64);
  const auto dy = image(dy_in, "dy", problem);
  const ChannelsLast x(x_in, "input");
  Output dx(problem.dtype, problem.shape, x.layout());
  {
    py::gil_scoped_release nogil;
    device::batch_norm_backward_input(
        problem, {x.data(), mean.data(), rstd.data(), weight.data(), bias.data(), nullptr, activation}, dy->data(),
        sum.doubles(), products.doubles(), count, dx.data());
  }
  return dx.finish();
}

}  // namespace

std::tuple<Array, Array, Array, Array> batch_norm_max_pool_train(const Array& x_in, const MaybeArray& weight_in,
                                                                 const MaybeArray& bias_in, const MaybeArray& mean_in,
                                                                 const MaybeArray& var_in, double momentum, double eps,
                                                                 const std::string& activation_name, Pair kernel,
                                                                 Pair stride, const GivenMoments& given) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), eps, !given);
  const BatchStatistics statistics(problem, given);
  const Pool2dProblem pool = make_max_pool2d(problem.dtype, problem.shape, kernel, stride, {0, 0}, {1, 1}, false);
  check_places(kernel);
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  RunningVector running_mean(mean_in, "running_mean", problem), running_var(var_in, "running_var", problem);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, pool.y_shape(), x.layout()), places(DType::kUInt8, pool.y_shape(), x.layout());
  Array mean = new_array(problem.parameter_dtype(), {problem.channels()}),
        rstd = new_array(problem.parameter_dtype(), {problem.channels()});
  void *mean_data = mean.mutable_data(), *rstd_data = rstd.mutable_data();
  {
    py::gil_scoped_release nogil;
    statistics.take(x.data(), mean_data, rstd_data, momentum, running_mean, running_var);
    device::batch_norm_max_pool(problem,
                                {x.data(), mean_data, rstd_data, weight.data(), bias.data(), nullptr, activation}, pool,
                                y.data(), static_cast<uint8_t*>(places.data()));
  }
  return {y.finish(), places.finish(), mean, rstd};
}

std::tuple<MaybeArray, MaybeArray, MaybeArray> batch_norm_max_pool_backward(
    const Array& dy_in, const Array& x_in, const Array& places_in, const MaybeArray& weight_in, const Array& mean_in,
    const Array& rstd_in, const MaybeArray& bias_in, const std::string& activation_name, Pair kernel, Pair stride,
    std::array<bool, 3> needs) {
  const Activation activation = parse_activation(activation_name);
  const TensorView x_view = view(x_in, "input"), dy_view = view(dy_in, "dy"), places_view = view(places_in, "places");
  const BatchNormProblem problem = make_batch_norm(x_view.dtype, shape4(x_view, "input"), 0, false);
  const Pool2dProblem pool = make_max_pool2d(problem.dtype, problem.shape, kernel, stride, {0, 0}, {1, 1}, false);
  check_places(kernel);
  check_dtype("dy", dy_view, problem.dtype);
  check_shape4("dy", dy_view, pool.y_shape());
  check_dtype("places", places_view, DType::kUInt8);
  check_shape4("places", places_view, pool.y_shape());
  const ChannelVector weight(weight_in, "weight", problem), bias(bias_in, "bias", problem);
  const ChannelVector mean(mean_in, "mean", problem), rstd(rstd_in, "rstd", problem);
  const ChannelsLast dy(dy_in, "dy"), places(places_in, "places"), x(x_in, "input");
  std::optional<Output> dx;
  std::tuple<MaybeArray, MaybeArray, MaybeArray> result;
  device::BatchNormGradients out;
  if (needs[0]) {
    dx.emplace(problem.dtype, problem.shape, x.layout());
    out.dx = dx->data();
  }
  const auto vector = [&](bool needed, MaybeArray& array, void*& data) {
    if (!needed) return;
    array = new_array(problem.parameter_dtype(), {problem.channels()});
    data = array->mutable_data();
  };
  vector(needs[1], std::get<1>(result), out.dweight);
  vector(needs[2], std::get<2>(result), out.dbias);
  {
    py::gil_scoped_release nogil;
    device::batch_norm_max_pool_backward(
        problem, {x.data(), mean.data(), rstd.data(), weight.data(), bias.data(), nullptr, activation}, pool, dy.data(),
        static_cast<const uint8_t*>(places.data()), out);
  }
  if (dx) std::get<0>(result) = dx->finish();
  return result;
}

void bind_batch_norm(py::module_& m) {
  using namespace py::literals;
  m.def(
      "batch_norm_train",
      [](const Array& x, const MaybeArray& weight, const MaybeArray& bias, const MaybeArray& running_mean,
         const MaybeArray& running_var, double momentum, double eps, const MaybeArray& residual,
         const std::string& activation, const MomentArrays& moments) {
        return batch_norm_train(x, weight, bias, running_mean, running_var, momentum, eps, residual, activation,
                                CheckedMoments(moments, x).get());
      },
      "x"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a, "momentum"_a, "eps"_a, "residual"_a,
      "activation"_a, "moments"_a);
  m.def("batch_norm_moments", &batch_norm_moments, "x"_a);
  m.def("batch_norm_eval", &batch_norm_eval, "x"_a, "running_mean"_a, "running_var"_a, "weight"_a, "bias"_a, "eps"_a,
        "residual"_a, "activation"_a);
  m.def("batch_norm_backward", &batch_norm_backward, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "bias"_a,
        "residual"_a, "activation"_a, "training"_a, "needs"_a);
  m.def("batch_norm_backward_sums", &batch_norm_backward_sums, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "bias"_a,
        "residual"_a, "activation"_a);
  m.def("batch_norm_backward_input", &batch_norm_backward_input, "dy"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a, "sum"_a,
        "products"_a, "count"_a, "bias"_a, "activation"_a);
  m.def(
      "batch_norm_max_pool_train",
      [](const Array& x, const MaybeArray& weight, const MaybeArray& bias, const MaybeArray& running_mean,
         const MaybeArray& running_var, double momentum, double eps, const std::string& activation, Pair kernel,
         Pair stride, const MomentArrays& moments) {
        return batch_norm_max_pool_train(x, weight, bias, running_mean, running_var, momentum, eps, activation, kernel,
                                         stride, CheckedMoments(moments, x).get());
      },
      "x"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a, "momentum"_a, "eps"_a, "activation"_a,
      "kernel_size"_a, "stride"_a, "moments"_a);
  m.def("batch_norm_max_pool_backward", &batch_norm_max_pool_backward, "dy"_a, "x"_a, "places"_a, "weight"_a, "mean"_a,
        "rstd"_a, "bias"_a, "activation"_a, "kernel_size"_a, "stride"_a, "needs"_a);
}

}  // namespace fastconv::bindings

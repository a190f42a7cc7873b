// A convolution and the batch norm behind it, in training, as one call each way: fewer crossings from Python, and the
// gradient between the two is gone when the call is over.
#include <pybind11/stl.h>

#include "bindings/batch_norm.h"
#include "bindings/conv2d.h"
#include "core/check.h"

namespace fastconv::bindings {
namespace {

using MaybePair = std::optional<Pair>;

// (y, z, mean, rstd, places): z is the convolution's result; places are those of the max pooling, if there is one.
std::tuple<Array, Array, Array, Array, MaybeArray> conv2d_batch_norm_train(
    const Array& x, const Array& w, const MaybeArray& conv_bias, Pair stride, const Padding& padding, Pair dilation,
    int64_t groups, const MaybeArray& weight, const MaybeArray& bias, const MaybeArray& running_mean,
    const MaybeArray& running_var, double momentum, double eps, const MaybeArray& residual,
    const std::string& activation, const MaybePair& pool_kernel, const MaybePair& pool_stride) {
  const TensorView w_view = view(w, "weight");
  check_float("weight", w_view.dtype);
  const int64_t channels = shape4(w_view, "weight")[0];
  const Buffer moments(std::max<int64_t>(2 * channels, 1) * sizeof(double));
  const Array z = conv2d(x, w, conv_bias, std::nullopt, stride, padding, dilation, groups, "", std::nullopt, nullptr,
                         moments.as<double>());
  const TensorView z_view = view(z, "input");
  const int64_t count = make_batch_norm(z_view.dtype, shape4(z_view, "input"), eps, true).rows();
  const device::Moments given{count, moments.as<double>(), moments.as<double>() + channels};
  if (pool_kernel) {
    auto [y, places, mean, rstd] =
        batch_norm_max_pool_train(z, weight, bias, running_mean, running_var, momentum, eps, activation, *pool_kernel,
                                  pool_stride.value_or(*pool_kernel), given);
    return {y, z, mean, rstd, places};
  }
  auto [y, mean, rstd] =
      batch_norm_train(z, weight, bias, running_mean, running_var, momentum, eps, residual, activation, given);
  return {y, z, mean, rstd, std::nullopt};
}

// (dx, dw, dbias of the convolution, which is zero, dweight, dbias, dresidual), those that are needed.
using Gradients = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray, MaybeArray, MaybeArray>;

Gradients conv2d_batch_norm_backward(const Array& dy, const Array& x, const Array& w, const Array& z, Pair stride,
                                     const Padding& padding, Pair dilation, int64_t groups, const MaybeArray& weight,
                                     const MaybeArray& bias, const Array& mean, const Array& rstd,
                                     const MaybeArray& residual, const std::string& activation,
                                     const MaybeArray& places, const MaybePair& pool_kernel,
                                     const MaybePair& pool_stride, std::array<bool, 6> needs) {
  const bool inner = needs[0] || needs[1];
  MaybeArray dz;
  Gradients out;
  if (places) {
    FC_CHECK(pool_kernel, "places of a pooling need its kernel_size");
    std::tie(dz, std::get<3>(out), std::get<4>(out)) =
        batch_norm_max_pool_backward(dy, z, *places, weight, mean, rstd, bias, activation, *pool_kernel,
                                     pool_stride.value_or(*pool_kernel), {inner, needs[3], needs[4]});
  } else {
    std::tie(dz, std::get<3>(out), std::get<4>(out), std::get<5>(out)) = batch_norm_backward(
        dy, z, weight, mean, rstd, bias, residual, activation, true, {inner, needs[3], needs[4], needs[5]});
  }
  if (dz)
    std::tie(std::get<0>(out), std::get<1>(out), std::ignore) =
        conv2d_backward(*dz, x, w, stride, padding, dilation, groups, {needs[0], needs[1], false});
  if (needs[2]) {
    // What a bias adds to a channel, its mean takes away: the sum of dz is zero but for rounding.
    const TensorView z_view = view(z, "z");
    std::get<2>(out) = new_array(z_view.dtype, {shape4(z_view, "z")[1]});
    device::channel_sums(z_view.dtype, 0, z_view.sizes[1], nullptr, std::get<2>(out)->mutable_data());
  }
  return out;
}

}  // namespace

void bind_conv2d_batch_norm(py::module_& m) {
  using namespace py::literals;
  m.def("conv2d_batch_norm_train", &conv2d_batch_norm_train, "x"_a, "w"_a, "conv_bias"_a, "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a, "momentum"_a, "eps"_a,
        "residual"_a, "activation"_a, "pool_kernel"_a, "pool_stride"_a);
  m.def("conv2d_batch_norm_backward", &conv2d_batch_norm_backward, "dy"_a, "x"_a, "w"_a, "z"_a, "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a, "weight"_a, "bias"_a, "mean"_a, "rstd"_a, "residual"_a, "activation"_a, "places"_a,
        "pool_kernel"_a, "pool_stride"_a, "needs"_a);
}

}  // namespace fastconv::bindings

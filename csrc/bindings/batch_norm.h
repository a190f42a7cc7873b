// Batch norm in training, for bindings that do more with it.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "bindings/convert.h"
#include "device/batch_norm.h"

namespace fastconv::bindings {

using MaybeArray = std::optional<Array>;

// Of the whole batch, where x is a part of it or whoever made x has taken them.
using GivenMoments = std::optional<device::Moments>;

// (y, mean, rstd).
std::tuple<Array, Array, Array> batch_norm_train(const Array& x, const MaybeArray& weight, const MaybeArray& bias,
                                                 const MaybeArray& running_mean, const MaybeArray& running_var,
                                                 double momentum, double eps, const MaybeArray& residual,
                                                 const std::string& activation, const GivenMoments& given);

// (y, places, mean, rstd).
std::tuple<Array, Array, Array, Array> batch_norm_max_pool_train(const Array& x, const MaybeArray& weight,
                                                                 const MaybeArray& bias, const MaybeArray& running_mean,
                                                                 const MaybeArray& running_var, double momentum,
                                                                 double eps, const std::string& activation, Pair kernel,
                                                                 Pair stride, const GivenMoments& given);

// (dx, dweight, dbias, dresidual), those that are needed.
std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray> batch_norm_backward(
    const Array& dy, const Array& x, const MaybeArray& weight, const Array& mean, const Array& rstd,
    const MaybeArray& bias, const MaybeArray& residual, const std::string& activation, bool training,
    std::array<bool, 4> needs);

// (dx, dweight, dbias), those that are needed.
std::tuple<MaybeArray, MaybeArray, MaybeArray> batch_norm_max_pool_backward(const Array& dy, const Array& x,
                                                                            const Array& places,
                                                                            const MaybeArray& weight, const Array& mean,
                                                                            const Array& rstd, const MaybeArray& bias,
                                                                            const std::string& activation, Pair kernel,
                                                                            Pair stride, std::array<bool, 3> needs);

}  // namespace fastconv::bindings

// Convolution, for bindings that do more with it.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "bindings/convert.h"
#include "device/conv2d.h"

namespace fastconv::bindings {

using MaybeArray = std::optional<Array>;

// moments, scale and cache: see device::ForwardArguments.
Array conv2d(const Array& x, const Array& w, const MaybeArray& bias, const MaybeArray& residual, Pair stride,
             const Padding& padding, Pair dilation, int64_t groups, const std::string& activation,
             const MaybeArray& scale, device::WeightCache* cache, double* moments = nullptr);

// (dx, dw, db), those that are needed.
std::tuple<MaybeArray, MaybeArray, MaybeArray> conv2d_backward(const Array& dy, const Array& x, const Array& w,
                                                               Pair stride, const Padding& padding, Pair dilation,
                                                               int64_t groups, std::array<bool, 3> needs);

}  // namespace fastconv::bindings

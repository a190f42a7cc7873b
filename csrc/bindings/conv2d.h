// The forward pass, which a device may bind with more arguments than all devices have.
#pragma once

#include <optional>

#include "bindings/convert.h"
#include "device/conv2d.h"

namespace fastconv::bindings {

using MaybeArray = std::optional<Array>;

// moments, scale and cache: see device::ForwardArguments.
Array conv2d(const Array& x, const Array& w, const MaybeArray& bias, const MaybeArray& residual, Pair stride,
             const Padding& padding, Pair dilation, int64_t groups, const std::string& activation,
             const MaybeArray& scale, device::WeightCache* cache, double* moments = nullptr);

}  // namespace fastconv::bindings

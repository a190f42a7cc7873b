// Copies between layouts.
#pragma once

#include "core/tensor.h"

namespace fastconv::FASTCONV_DEVICE {

// dst = src, any strides, same shape and dtype.
void copy_view(const TensorView& src, const TensorView& dst);

}  // namespace fastconv::FASTCONV_DEVICE

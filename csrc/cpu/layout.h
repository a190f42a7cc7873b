// Images from one layout to another.
#pragma once

#include "core/tensor.h"

namespace fastconv::cpu {

// dst (dense in channels-last or NCHW order of a 4-D shape) = src, of any strides, in parallel.
void copy_strided(const TensorView& src, const TensorView& dst);

}  // namespace fastconv::cpu

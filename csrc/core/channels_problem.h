// Checks of the operations on channels: joining arrays along a dimension, and gating.
#pragma once

#include <vector>

#include "core/problem.h"

namespace fastconv {

// The dimension, counted from the front: -ndim <= dim < ndim. ValueError for another.
int normalized_dim(int64_t dim, int ndim);

// The joined array as a view without memory. ValueError unless there is an array and all of them have the same shape
// but for dimension `dim`; TypeError unless they have one dtype.
TensorView make_cat(const std::vector<TensorView>& arrays, int dim);

// The parts of `joined` as views without memory. ValueError unless the sizes add up to its dimension `dim`.
std::vector<TensorView> make_split(const TensorView& joined, const std::vector<int64_t>& sizes, int dim);

// Of x[N,C,H,W] and gate[N,C,1,1]: ValueError for other shapes, TypeError unless both are float32 or float64.
void check_channel_gate(const TensorView& x, const TensorView& gate);

}  // namespace fastconv

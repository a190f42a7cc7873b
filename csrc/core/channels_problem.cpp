#include "core/channels_problem.h"

#include "core/check.h"

namespace fastconv {

int normalized_dim(int64_t dim, int ndim) {
  FC_CHECK(-ndim <= dim && dim < ndim, "dim must be in [", -ndim, ", ", ndim, ") for ", ndim, " dimensions, got ", dim);
  return static_cast<int>(dim < 0 ? dim + ndim : dim);
}

TensorView make_cat(const std::vector<TensorView>& arrays, int dim) {
  TensorView joined = arrays.front();
  joined.data = nullptr;
  for (size_t i = 1; i < arrays.size(); ++i) {
    const TensorView& array = arrays[i];
    FC_CHECK_TYPE(array.dtype == joined.dtype, "cat needs arrays of one dtype, got ", name(joined.dtype), " and ",
                  name(array.dtype));
    bool fits = array.ndim == joined.ndim;
    for (int d = 0; fits && d < joined.ndim; ++d) fits = d == dim || array.sizes[d] == joined.sizes[d];
    FC_CHECK(fits, "cat along dimension ", dim, " needs arrays of the same shape elsewhere, got ",
             shape_string(arrays.front()), " and ", shape_string(array));
    joined.sizes[dim] += array.sizes[dim];
  }
  return joined;
}

std::vector<TensorView> make_split(const TensorView& joined, const std::vector<int64_t>& sizes, int dim) {
  std::vector<TensorView> parts;
  int64_t total = 0;
  for (int64_t size : sizes) {
    FC_CHECK(size >= 0 && size <= joined.sizes[dim] - total, "the sizes must add up to dimension ", dim, " of shape ",
             shape_string(joined), ", got a size of ", size, " after ", total);
    total += size;
    parts.push_back(joined);
    parts.back().data = nullptr;
    parts.back().sizes[dim] = size;
  }
  FC_CHECK(total == joined.sizes[dim], "the sizes must add up to dimension ", dim, " of shape ", shape_string(joined),
           ", got ", total);
  return parts;
}

void check_channel_gate(const TensorView& x, const TensorView& gate) {
  check_float("input", x.dtype);
  check_dtype("gate", gate, x.dtype);
  FC_CHECK(x.ndim == 4, "input must have 4 dimensions, got shape ", shape_string(x));
  check_shape4("gate", gate, {x.sizes[0], x.sizes[1], 1, 1});
}

}  // namespace fastconv

// Convolution with scaled weights that are kept packed: of the CPU alone.
#include <pybind11/stl.h>

#include "bindings/conv2d.h"
#include "cpu/weight_cache.h"

namespace fastconv::bindings {

void bind_weight_cache(py::module_& m) {
  using namespace py::literals;
  py::class_<cpu::WeightCache>(m, "WeightCache", "The packed forms of one set of weights, between calls.")
      .def(py::init<>());
  m.def(
      "conv2d_cached",
      [](const Array& x, const Array& w, const MaybeArray& bias, const MaybeArray& residual, Pair stride,
         const Padding& padding, Pair dilation, int64_t groups, const std::string& activation, const MaybeArray& scale,
         cpu::WeightCache* cache) {
        return conv2d(x, w, bias, residual, stride, padding, dilation, groups, activation, scale, cache);
      },
      "x"_a, "w"_a, "bias"_a, "residual"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "activation"_a,
      "scale"_a, "cache"_a);
}

}  // namespace fastconv::bindings

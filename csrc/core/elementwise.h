// The elementwise functions. Kernels of every ISA include this: no standard library beyond <cstdint>.
#pragma once

#include <cstdint>

namespace fastconv {

enum class Elementwise : uint8_t {
  kReLU,
  kReLU6,
  kLeakyReLU,  // parameter: slope of the negative half
  kELU,        // parameter: alpha
  kSigmoid,
  kTanh,
  kSiLU,
  kGELU,
  kGELUTanh,
  kHardsigmoid,
  kHardswish,
};
constexpr int kElementwiseFunctions = 11;

}  // namespace fastconv

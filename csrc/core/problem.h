// Problems: what is to be computed, without any pointer. Making one checks everything that a caller can get wrong and
// derives the output's shape; nothing below checks again. Letters: x[N,C,H,W], w[K,C/G,R,S], y[N,K,P,Q].
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <variant>

#include "core/dtype.h"
#include "core/tensor.h"

namespace fastconv {

using Pair = std::array<int64_t, 2>;   // height, width
using Shape = std::array<int64_t, 4>;  // N, C, H, W

// (top, bottom, left, right), or "same" (size ceil(in / stride), the odd one at the end) or "valid".
using Padding = std::variant<std::string, std::array<int64_t, 4>>;

enum class Activation : uint8_t { kNone, kReLU, kReLU6, kSiLU, kSigmoid, kTanh, kHardswish };
Activation parse_activation(const std::string& name);  // "" is none

// floor((size + before + after - effective) / stride) + 1, the size of every convolution and pooling (Dumoulin and
// Visin, arXiv 1603.07285, relationship 15). Throws where the window does not fit.
int64_t output_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after,
                    int64_t dilation);

struct Conv2dProblem {
  DType dtype = DType::kFloat32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t k = 0, r = 0, s = 0;
  int64_t p = 0, q = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;

  int64_t cg() const { return c / groups; }  // channels a group reads
  int64_t kg() const { return k / groups; }  // channels a group writes
  bool depthwise() const { return groups == c && groups == k && groups > 1; }
  Shape x_shape() const { return {n, c, h, w}; }
  Shape w_shape() const { return {k, cg(), r, s}; }
  Shape y_shape() const { return {n, k, p, q}; }
  bool empty() const { return n == 0 || k == 0 || c == 0; }

  // ValueError unless the view has the shape (and TypeError unless it has the dtype) of this role.
  void check(const char* role, const TensorView& view, const Shape& expected) const;
};

Conv2dProblem make_conv2d(DType dtype, const Shape& x, const Shape& w, Pair stride, const Padding& padding,
                          Pair dilation, int64_t groups);

// The convolution whose input gradient is this transposed convolution: x here is y there. w[C, K/G, R, S].
Conv2dProblem make_conv_transpose2d(DType dtype, const Shape& x, const Shape& w, Pair stride, Pair padding,
                                    Pair output_padding, Pair dilation, int64_t groups);

// What a convolution is run for.
enum class Direction : uint8_t { kForward, kBackwardInput, kBackwardWeight };

Direction parse_direction(const std::string& name);  // "forward", "backward_input" or "backward_weight"
const char* name_of(Direction);

}  // namespace fastconv

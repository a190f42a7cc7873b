#include "core/problem.h"

#include <algorithm>

#include "core/check.h"

namespace fastconv {
namespace {

// Sizes above this would overflow products of a few of them; no array of such a size exists.
constexpr int64_t kMaxSize = int64_t{1} << 40;

std::string text(Pair p) { return concat("(", p[0], ", ", p[1], ")"); }

void check_elements(const char* what, const Shape& s) {
  int64_t n = 1;
  for (int64_t d : s)
    FC_CHECK(!__builtin_mul_overflow(n, std::max<int64_t>(d, 1), &n) && n < (int64_t{1} << 60), what, " of shape ",
             shape_string(s), " has too many elements");
}

void check_common(const Shape& x, const Shape& w, Pair stride, Pair dilation, int64_t groups) {
  for (int64_t d : x) FC_CHECK(d >= 0 && d < kMaxSize, "bad input shape ", shape_string(x));
  for (int64_t d : w) FC_CHECK(d >= 0 && d < kMaxSize, "bad weight shape ", shape_string(w));
  check_elements("input", x);
  check_elements("weight", w);
  FC_CHECK(stride[0] > 0 && stride[1] > 0, "stride must be positive, got ", text(stride));
  FC_CHECK(dilation[0] > 0 && dilation[1] > 0, "dilation must be positive, got ", text(dilation));
  FC_CHECK(stride[0] < kMaxSize && stride[1] < kMaxSize, "stride is too large: ", text(stride));
  FC_CHECK(dilation[0] < kMaxSize && dilation[1] < kMaxSize, "dilation is too large: ", text(dilation));
  FC_CHECK(groups > 0, "groups must be positive, got ", groups);
  FC_CHECK(w[2] > 0 && w[3] > 0, "kernel must not be empty, got weight shape ", shape_string(w));
}

int64_t effective(int64_t kernel, int64_t dilation) {
  int64_t e;
  FC_CHECK(!__builtin_mul_overflow(kernel - 1, dilation, &e) && e < kMaxSize, "kernel size ", kernel, " with dilation ",
           dilation, " is too large");
  return e + 1;
}

}  // namespace

Activation parse_activation(const std::string& name) {
  static const std::pair<const char*, Activation> known[] = {
      {"", Activation::kNone},
      {"relu", Activation::kReLU},
      {"relu6", Activation::kReLU6},
      {"silu", Activation::kSiLU},
      {"sigmoid", Activation::kSigmoid},
      {"tanh", Activation::kTanh},
      {"hardswish", Activation::kHardswish},
  };
  for (const auto& [key, value] : known)
    if (name == key) return value;
  throw std::invalid_argument(
      "activation must be None, 'relu', 'relu6', 'silu', 'sigmoid', 'tanh' or 'hardswish', got '" + name + "'");
}

int64_t output_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after,
                    int64_t dilation) {
  FC_CHECK(before >= 0 && after >= 0, "padding must not be negative, got (", before, ", ", after, ") for ", axis);
  FC_CHECK(before < kMaxSize && after < kMaxSize, "padding is too large: (", before, ", ", after, ") for ", axis);
  const int64_t window = effective(kernel, dilation);
  const int64_t padded = size + before + after;
  FC_CHECK(padded >= window, "kernel does not fit: ", axis, " ", size, " with padding (", before, ", ", after, ") is ",
           padded, ", smaller than the kernel's ", window, " (size ", kernel, ", dilation ", dilation, ")");
  return (padded - window) / stride + 1;
}

void Conv2dProblem::check(const char* role, const TensorView& view, const Shape& expected) const {
  check_dtype(role, view, dtype);
  check_shape4(role, view, expected);
}

Conv2dProblem make_conv2d(DType dtype, const Shape& x, const Shape& w, Pair stride, const Padding& padding,
                          Pair dilation, int64_t groups) {
  check_common(x, w, stride, dilation, groups);
  FC_CHECK(x[1] % groups == 0, "groups must divide the input's channels: ", x[1], " channels, ", groups, " groups");
  FC_CHECK(w[0] % groups == 0, "groups must divide the output's channels: ", w[0], " channels, ", groups, " groups");
  FC_CHECK(w[1] == x[1] / groups, "weight of shape ", shape_string(w), " with ", groups, " groups needs an input of ",
           w[1] * std::min(groups, kMaxSize / std::max<int64_t>(w[1], 1)), " channels, got ", x[1]);
  FC_CHECK(x[2] > 0 && x[3] > 0, "the input's height and width must be positive, got shape ", shape_string(x));

  Conv2dProblem problem;
  problem.dtype = dtype;
  problem.n = x[0], problem.c = x[1], problem.h = x[2], problem.w = x[3];
  problem.k = w[0], problem.r = w[2], problem.s = w[3];
  problem.stride_h = stride[0], problem.stride_w = stride[1];
  problem.dilation_h = dilation[0], problem.dilation_w = dilation[1];
  problem.groups = groups;

  if (const auto* mode = std::get_if<std::string>(&padding)) {
    FC_CHECK(*mode == "same" || *mode == "valid",
             "padding must be a number, a pair, ((top, bottom), (left, right)), "
             "'same' or 'valid', got '",
             *mode, "'");
    if (*mode == "same") {
      const auto total = [](int64_t size, int64_t kernel, int64_t step, int64_t dilate) {
        const int64_t out = (size + step - 1) / step;
        return std::max<int64_t>((out - 1) * step + effective(kernel, dilate) - size, 0);
      };
      const int64_t rows = total(problem.h, problem.r, stride[0], dilation[0]);
      const int64_t columns = total(problem.w, problem.s, stride[1], dilation[1]);
      problem.pad_top = rows / 2, problem.pad_bottom = rows - rows / 2;
      problem.pad_left = columns / 2, problem.pad_right = columns - columns / 2;
    }
  } else {
    const auto& four = std::get<std::array<int64_t, 4>>(padding);
    problem.pad_top = four[0], problem.pad_bottom = four[1], problem.pad_left = four[2], problem.pad_right = four[3];
  }
  problem.p = output_size("height", problem.h, problem.r, stride[0], problem.pad_top, problem.pad_bottom, dilation[0]);
  problem.q = output_size("width", problem.w, problem.s, stride[1], problem.pad_left, problem.pad_right, dilation[1]);
  check_elements("output", problem.y_shape());
  return problem;
}

Conv2dProblem make_conv_transpose2d(DType dtype, const Shape& x, const Shape& w, Pair stride, Pair padding,
                                    Pair output_padding, Pair dilation, int64_t groups) {
  check_common(x, w, stride, dilation, groups);
  FC_CHECK(x[1] % groups == 0, "groups must divide the input's channels: ", x[1], " channels, ", groups, " groups");
  FC_CHECK(w[0] == x[1], "weight of shape ", shape_string(w), " needs an input of ", w[0], " channels, got ", x[1]);
  FC_CHECK(x[2] > 0 && x[3] > 0, "the input's height and width must be positive, got shape ", shape_string(x));
  FC_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[0] < kMaxSize && padding[1] < kMaxSize,
           "padding must not be negative or huge, got ", text(padding));
  Shape out{x[0], 0, 0, 0};
  FC_CHECK(!__builtin_mul_overflow(w[1], groups, &out[1]) && out[1] < kMaxSize, "too many output channels: ", w[1],
           " times ", groups, " groups");
  for (int i = 0; i < 2; ++i) {
    FC_CHECK(output_padding[i] >= 0 && output_padding[i] < std::max(stride[i], dilation[i]),
             "output_padding must not be negative and must be smaller than stride or dilation, got output_padding ",
             text(output_padding), ", stride ", text(stride), ", dilation ", text(dilation));
    int64_t span;
    FC_CHECK(!__builtin_mul_overflow(x[2 + i] - 1, stride[i], &span) && span < kMaxSize, "stride ", text(stride),
             " is too large for the input's shape ", shape_string(x));
    out[2 + i] = span - 2 * padding[i] + effective(w[2 + i], dilation[i]) + output_padding[i];
    FC_CHECK(out[2 + i] > 0, "the output would be empty: input shape ", shape_string(x), ", weight shape ",
             shape_string(w), ", padding ", text(padding));
  }
  Conv2dProblem problem = make_conv2d(
      dtype, out, w, stride, std::array<int64_t, 4>{padding[0], padding[0], padding[1], padding[1]}, dilation, groups);
  // output_padding may leave room for one more window; the transposed problem has exactly x's size.
  problem.p = x[2], problem.q = x[3];
  return problem;
}

Direction parse_direction(const std::string& name) {
  for (Direction direction : {Direction::kForward, Direction::kBackwardInput, Direction::kBackwardWeight})
    if (name == name_of(direction)) return direction;
  throw std::invalid_argument("direction must be 'forward', 'backward_input' or 'backward_weight', got '" + name + "'");
}

const char* name_of(Direction direction) {
  switch (direction) {
    case Direction::kForward: return "forward";
    case Direction::kBackwardInput: return "backward_input";
    case Direction::kBackwardWeight: return "backward_weight";
  }
  return "?";
}

}  // namespace fastconv

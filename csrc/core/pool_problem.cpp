#include "core/pool_problem.h"

#include <algorithm>

#include "core/check.h"

namespace fastconv {
namespace {

// Products of a few sizes below this do not overflow; no array of such a size exists.
constexpr int64_t kMaxSize = int64_t{1} << 40;
constexpr int64_t kMaxElements = int64_t{1} << 60;
constexpr int64_t kMaxWindow = int64_t{1} << 31;  // elements of a max-pool window: the maximum's place is an int32

void check_input(const Shape& x) {
  int64_t elements = 1;
  for (int64_t d : x) {
    FC_CHECK(d >= 0 && d < kMaxSize, "bad input shape ", shape_string(x));
    FC_CHECK(!__builtin_mul_overflow(elements, std::max<int64_t>(d, 1), &elements) && elements < kMaxElements,
             "input of shape ", shape_string(x), " has too many elements");
  }
  FC_CHECK(x[2] > 0 && x[3] > 0, "the input's height and width must be positive, got shape ", shape_string(x));
}

void check_output(const Shape& y) {
  int64_t elements = 1;
  for (int64_t d : y)
    FC_CHECK(!__builtin_mul_overflow(elements, std::max<int64_t>(d, 1), &elements) && elements < kMaxElements,
             "output of shape ", shape_string(y), " has too many elements");
}

int64_t pooled_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                    bool ceil_mode) {
  FC_CHECK(kernel > 0, "kernel_size must be positive, got ", kernel, " for ", axis);
  FC_CHECK(stride > 0, "stride must be positive, got ", stride, " for ", axis);
  FC_CHECK(dilation > 0, "dilation must be positive, got ", dilation, " for ", axis);
  FC_CHECK(kernel < kMaxSize && stride < kMaxSize && dilation < kMaxSize, "kernel_size ", kernel, ", stride ", stride,
           " or dilation ", dilation, " is too large for ", axis);
  FC_CHECK(pad >= 0, "padding must not be negative, got ", pad, " for ", axis);
  FC_CHECK(pad <= kernel / 2, "padding must be at most half the kernel size, got padding ", pad, " and kernel size ",
           kernel, " for ", axis);
  int64_t window;
  FC_CHECK(!__builtin_mul_overflow(kernel - 1, dilation, &window) && window < kMaxSize, "kernel size ", kernel,
           " with dilation ", dilation, " is too large");
  ++window;
  const int64_t room = size + 2 * pad - window + (ceil_mode ? stride - 1 : 0);
  FC_CHECK(room >= 0, "the window does not fit: ", axis, " ", size, " with padding ", pad, " is ", size + 2 * pad,
           ", smaller than the window's ", window, " (kernel size ", kernel, ", dilation ", dilation, ")");
  const int64_t outputs = room / stride + 1;
  return ceil_mode && (outputs - 1) * stride >= size + pad ? outputs - 1 : outputs;
}

PoolAxis windows_of(int64_t size, int64_t outputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                    bool include_pad) {
  PoolAxis axis;
  axis.step = dilation;
  axis.windows.reserve(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t start = i * stride - pad;
    const int64_t before = start < 0 ? (-start + dilation - 1) / dilation : 0;  // taps in the padding before the image
    const int64_t within = start < size ? (size - 1 - start) / dilation + 1 : 0;
    const int64_t count = std::max<int64_t>(std::min(kernel, within) - before, 0);
    const int64_t extent = include_pad ? std::min(start + kernel, size + pad) - start : count;
    axis.windows.push_back({start + before * dilation, count, extent});
  }
  return axis;
}

Pool2dProblem sliding(DType dtype, const Shape& x, Pair kernel, Pair stride, Pair padding, Pair dilation,
                      bool ceil_mode, bool include_pad) {
  check_float("input", dtype);
  check_input(x);
  Pool2dProblem problem;
  problem.dtype = dtype;
  problem.n = x[0], problem.c = x[1], problem.h = x[2], problem.w = x[3];
  const int64_t p = pooled_size("height", x[2], kernel[0], stride[0], padding[0], dilation[0], ceil_mode);
  const int64_t q = pooled_size("width", x[3], kernel[1], stride[1], padding[1], dilation[1], ceil_mode);
  check_output({x[0], x[1], p, q});
  problem.rows = windows_of(x[2], p, kernel[0], stride[0], padding[0], dilation[0], include_pad);
  problem.columns = windows_of(x[3], q, kernel[1], stride[1], padding[1], dilation[1], include_pad);
  return problem;
}

PoolAxis adaptive_axis(int64_t size, int64_t outputs) {
  PoolAxis axis;
  axis.windows.reserve(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t begin = i * size / outputs, end = ((i + 1) * size + outputs - 1) / outputs;
    axis.windows.push_back({begin, end - begin, end - begin});
  }
  return axis;
}

}  // namespace

bool PoolAxis::disjoint() const {
  if (step != 1) return false;
  for (size_t i = 1; i < windows.size(); ++i)
    if (windows[i - 1].begin + windows[i - 1].count > windows[i].begin) return false;
  return true;
}

bool PoolAxis::tiles(int64_t size) const {
  int64_t covered = 0;
  for (const AxisWindow& window : windows) covered += window.count;
  return disjoint() && covered == size;
}

Pool2dProblem make_max_pool2d(DType dtype, const Shape& x, Pair kernel, Pair stride, Pair padding, Pair dilation,
                              bool ceil_mode) {
  Pool2dProblem problem = sliding(dtype, x, kernel, stride, padding, dilation, ceil_mode, false);
  const int64_t elements = std::min(kernel[0], x[2]) * std::min(kernel[1], x[3]);
  FC_CHECK(elements < kMaxWindow, "a window of ", elements, " elements (kernel size ", kernel[0], ", ", kernel[1],
           ") is too large");
  return problem;
}

void check_places(Pair kernel) {
  FC_CHECK(kernel[0] * kernel[1] <= 256, "places are for windows of at most 256 elements, got ", kernel[0], " x ",
           kernel[1]);
}

Pool2dProblem make_avg_pool2d(DType dtype, const Shape& x, Pair kernel, Pair stride, Pair padding, bool ceil_mode,
                              bool count_include_pad, std::optional<int64_t> divisor_override) {
  FC_CHECK(!divisor_override || *divisor_override != 0, "divisor_override must not be zero, got 0");
  Pool2dProblem problem = sliding(dtype, x, kernel, stride, padding, {1, 1}, ceil_mode, count_include_pad);
  problem.divisor = divisor_override;
  return problem;
}

Pool2dProblem make_adaptive_avg_pool2d(DType dtype, const Shape& x, Pair output) {
  check_float("input", dtype);
  check_input(x);
  Pool2dProblem problem;
  problem.dtype = dtype;
  problem.n = x[0], problem.c = x[1], problem.h = x[2], problem.w = x[3];
  for (int i = 0; i < 2; ++i) {
    const char* axis = i == 0 ? "height" : "width";
    FC_CHECK(output[i] > 0, "output_size must be positive, got ", output[i], " for ", axis);
    int64_t product;
    FC_CHECK(output[i] < kMaxSize && !__builtin_mul_overflow(output[i], x[2 + i], &product),
             "output_size is too large: ", output[i], " for ", axis);
  }
  check_output({x[0], x[1], output[0], output[1]});
  problem.rows = adaptive_axis(x[2], output[0]);
  problem.columns = adaptive_axis(x[3], output[1]);
  return problem;
}

}  // namespace fastconv

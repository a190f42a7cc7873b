// Which algorithm runs: three ordered lists, fastest first. A new algorithm is its own file and one line here.
#include "cpu/conv2d.h"

#include <atomic>
#include <cstring>
#include <numeric>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/tuning.h"
#include "device/elementwise.h"

namespace fastconv::cpu {
namespace {

constexpr ConvForward kForward[] = {
    {"depthwise", depthwise::supports, depthwise::forward},
    {"winograd_rows", winograd_rows::supports_forward, winograd_rows::forward},
    {"first_layer", first_layer::supports, first_layer::forward},
    {"few_pixels", few_pixels::supports, few_pixels::forward},
    {"pointwise", pointwise::supports, pointwise::forward},
    {"grouped", grouped::supports, grouped::forward},
    {"winograd", winograd::supports, winograd::forward},
    {"direct", direct::supports, direct::forward},
    {"reference", reference::supports, reference::forward},
};

constexpr ConvBackwardInput kBackwardInput[] = {
    {"depthwise", depthwise::supports, depthwise::backward_input},
    {"first_layer", first_layer::supports_backward_input, first_layer::backward_input},
    {"few_pixels", few_pixels::supports_backward, few_pixels::backward_input},
    {"pointwise", pointwise::supports, pointwise::backward_input},
    {"grouped", grouped::supports, grouped::backward_input},
    {"winograd", winograd::supports_backward_input, winograd::backward_input},
    {"direct", direct::supports, direct::backward_input},
    {"reference", reference::supports, reference::backward_input},
};

constexpr ConvBackwardWeight kBackwardWeight[] = {
    {"depthwise", depthwise::supports, depthwise::backward_weight},
    {"winograd_rows", winograd_rows::supports, winograd_rows::backward_weight},
    {"first_layer", first_layer::supports, first_layer::backward_weight},
    {"few_pixels", few_pixels::supports_backward, few_pixels::backward_weight},
    {"pointwise", pointwise::supports, pointwise::backward_weight},
    {"grouped", grouped::supports, grouped::backward_weight},
    {"winograd", winograd::supports, winograd::backward_weight},
    {"direct", direct::supports, direct::backward_weight},
    {"reference", reference::supports, reference::backward_weight},
};

thread_local std::string forced_algorithm;

std::atomic<bool> strict{false};

// What runs, by force, by a tuning file, or by the order of the list.
template <class List> const auto& choose(const List& list, const Conv2dProblem& problem, Direction direction) {
  record(problem, direction);
  return select(list, problem, forced_algorithm, tuned_implementation(problem, direction).name);
}

// Calls f with the list of a direction.
template <class F> auto with_list(Direction direction, F&& f) {
  switch (direction) {
    case Direction::kForward: return f(kForward);
    case Direction::kBackwardInput: return f(kBackwardInput);
    case Direction::kBackwardWeight: break;
  }
  return f(kBackwardWeight);
}

int64_t elements(const Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

// bfloat16 has one implementation.
void check_bfloat16(const Conv2dProblem& problem, const ForwardArguments& args, bool activation_is_clamp) {
  if (problem.dtype != DType::kBFloat16) return;
  const char* reason = winograd::supports(problem);
  FC_CHECK_TYPE(reason == nullptr, "bfloat16 is supported by conv2d where Winograd is; here ", reason, ": use float32");
  FC_CHECK_TYPE(activation_is_clamp, "with bfloat16, conv2d supports the activations None, 'relu' and 'relu6'");
  FC_CHECK_TYPE(args.scale == nullptr, "with bfloat16, conv2d has no scale of its weights");
}

// w[k] * scale[k] in a memory of its own, channels-last.
TensorView scaled(const Conv2dProblem& a, TensorView w, const void* scale, const Buffer& memory) {
  const int64_t row = a.s * a.cg();
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_ranges(a.k, std::max<int64_t>(8192 / (a.r * row), 1), [&](int64_t begin, int64_t end) {
      T* to = memory.as<T>() + begin * a.r * row;
      for (int64_t k = begin; k < end; ++k)
        for (int64_t r = 0; r < a.r; ++r)
          for (int64_t s = 0; s < a.s; ++s) {
            const T* from = w.as<T>() + k * w.strides[0] + r * w.strides[2] + s * w.strides[3];
            for (int64_t c = 0; c < a.cg(); ++c) *to++ = from[c * w.strides[1]] * static_cast<const T*>(scale)[k];
          }
    });
  });
  w.data = memory.as<void>();
  w.strides = {a.r * row, 1, row, a.cg()};
  return w;
}

}  // namespace

void set_conv2d_algorithm(const std::string& name) {
  bool known = name.empty();
  for (const auto& implementation : kForward) known = known || name == implementation.name;
  for (const auto& implementation : kBackwardInput) known = known || name == implementation.name;
  FC_CHECK(known, "no convolution algorithm named '", name, "'");
  forced_algorithm = name;
}

void set_strict_precision(bool on) { strict = on; }
bool strict_precision() { return strict; }

void conv2d_forward(const Conv2dProblem& problem, const ForwardArguments& args) {
  if (elements(problem.y_shape()) == 0) return args.moments ? read_moments(problem, args) : void();
  // Activations that are a clamp are part of every kernel's epilogue; the others are one pass over the finished y.
  ForwardArguments clamped = args;
  const bool is_clamp = args.activation == Activation::kNone || args.activation == Activation::kReLU ||
                        args.activation == Activation::kReLU6;
  check_bfloat16(problem, args, is_clamp);
  if (!is_clamp) clamped.activation = Activation::kNone;
  const ConvForward& implementation = choose(kForward, problem, Direction::kForward);
  Buffer folded;
  if (args.scale && !(args.cache && args.cache->holds(implementation.name))) {
    folded = Buffer(elements(problem.w_shape()) * itemsize(problem.dtype));
    clamped.w = scaled(problem, args.w, args.scale, folded);
  }
  implementation.run(problem, clamped);
  if (!is_clamp) apply_activation(args.activation, problem.dtype, args.y, elements(problem.y_shape()));
  if (args.moments) read_moments(problem, args);
}

void conv2d_backward_input(const Conv2dProblem& problem, const BackwardInputArguments& args) {
  const int64_t size = elements(problem.x_shape());
  if (size == 0) return;
  if (problem.empty()) {
    std::memset(args.dx, 0, size * itemsize(problem.dtype));
    return;
  }
  choose(kBackwardInput, problem, Direction::kBackwardInput).run(problem, args);
}

void conv2d_backward_weight(const Conv2dProblem& problem, const BackwardWeightArguments& args) {
  if (elements(problem.w_shape()) == 0) return;
  // The plain loops define an empty sum, too.
  if (problem.empty()) return reference::backward_weight(problem, args);
  choose(kBackwardWeight, problem, Direction::kBackwardWeight).run(problem, args);
}

Explanation explain_conv2d(const Conv2dProblem& problem, Direction direction) {
  const TunedChoice tuned = tuned_implementation(problem, direction);
  return with_list(direction, [&](const auto& list) {
    return explain(list, problem, tuned.name, concat("tuning file '", tuned.source, "'"));
  });
}

std::vector<std::string> conv2d_candidates(const Conv2dProblem& problem, Direction direction) {
  return with_list(direction, [&](const auto& list) { return candidates(list, problem); });
}

void check_implementation(const std::string& name, Direction direction) {
  const bool known = with_list(direction, [&](const auto& list) {
    return std::any_of(std::begin(list), std::end(list), [&](const auto& one) { return name == one.name; });
  });
  FC_CHECK(known, "no implementation '", name, "' of ", name_of(direction));
}

namespace {

// Column sums of a [rows][k] matrix: partial sums over fixed chunks of rows, added in order.
template <class T> void column_sums(const T* dy, int64_t rows, int64_t k, T* db) {
  const int64_t chunks = std::clamp<int64_t>(rows * k >> 15, 1, std::min<int64_t>(32, std::max<int64_t>(rows, 1)));
  Buffer partial(chunks * k * sizeof(T));
  T* sums = partial.as<T>();
  parallel_for(chunks, [&](int64_t i, int) {
    T* out = sums + i * k;
    std::memset(out, 0, k * sizeof(T));
    const Range range = split(rows, chunks, i);
    for (int64_t row = range.begin; row < range.end; ++row)
      for (int64_t j = 0; j < k; ++j) out[j] += dy[row * k + j];
  });
  std::memset(db, 0, k * sizeof(T));
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t j = 0; j < k; ++j) db[j] += sums[i * k + j];
}

}  // namespace

void channel_sums(DType dtype, int64_t rows, int64_t channels, const void* dy, void* db) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    column_sums(static_cast<const T*>(dy), rows, channels, static_cast<T*>(db));
  });
}

Epilogue make_epilogue(const ForwardArguments& args) {
  Epilogue e;
  e.bias = static_cast<const float*>(args.bias);
  e.residual = static_cast<const float*>(args.residual);
  if (args.activation == Activation::kReLU || args.activation == Activation::kReLU6) e.low = 0.0f;
  if (args.activation == Activation::kReLU6) e.high = 6.0f;
  return e;
}

AxisTaps forward_axis(int64_t outputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  AxisTaps axis;
  axis.outputs = outputs;
  axis.step = stride;
  for (int64_t r = 0; r < kernel; ++r) axis.taps.push_back({r * dilation - pad, r});
  return axis;
}

// dx[i] = sum over r of w[r] dy[(i + pad - r*dilation) / stride], where that divides. Inputs i = f + j*stride share the
// taps r with (f + pad - r*dilation) divisible by the stride, and read dy[j + (f + pad - r*dilation) / stride].
std::vector<AxisTaps> backward_axes(int64_t inputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  std::vector<AxisTaps> axes;
  for (int64_t f = 0; f < std::min(stride, inputs); ++f) {
    AxisTaps axis;
    axis.outputs = (inputs - f + stride - 1) / stride;
    axis.out_first = f;
    axis.out_step = stride;
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t at = f + pad - r * dilation;
      if (at % stride == 0) axis.taps.push_back({at / stride, r});
    }
    axes.push_back(std::move(axis));
  }
  return axes;
}

}  // namespace fastconv::cpu

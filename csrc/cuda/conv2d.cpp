// Which algorithm runs: three ordered lists, fastest first. A new algorithm is its own file and one line here.
#include "cuda/conv2d.h"

#include <atomic>

#include "core/device.h"
#include "device/copy.h"

namespace fastconv::cuda {
namespace {

constexpr ConvForward kForward[] = {
    {"depthwise", depthwise::supports, depthwise::forward},
    {"sm90", sm90::supports, sm90::forward},
    {"sm80", sm80::supports, sm80::forward},
    {"simt", simt::supports, simt::forward},
};

constexpr ConvBackwardInput kBackwardInput[] = {
    {"depthwise", depthwise::supports, depthwise::backward_input},
    {"sm90", sm90::supports_backward_input, sm90::backward_input},
    {"sm80", sm80::supports_backward_input, sm80::backward_input},
    {"simt", simt::supports, simt::backward_input},
};

constexpr ConvBackwardWeight kBackwardWeight[] = {
    {"depthwise", depthwise::supports, depthwise::backward_weight},
    {"sm90", sm90::supports_backward_weight, sm90::backward_weight},
    {"sm80", sm80::supports_backward_weight, sm80::backward_weight},
    {"simt", simt::supports, simt::backward_weight},
};

thread_local std::string forced_algorithm;

std::atomic<bool> strict{false}, tf32{false};

int64_t elements(const Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

// dw or w as a dense [k][r][s][c] array at `data`.
TensorView krsc_view(const TensorView& like, void* data) {
  TensorView v = like;
  v.data = data;
  v.strides[1] = 1;
  v.strides[3] = v.sizes[1];
  v.strides[2] = v.sizes[3] * v.strides[3];
  v.strides[0] = v.sizes[2] * v.strides[2];
  return v;
}

}  // namespace

void set_conv2d_algorithm(const std::string& name) {
  bool known = name.empty();
  for (const auto& implementation : kForward) known = known || name == implementation.name;
  FC_CHECK(known, "no convolution algorithm named '", name, "'");
  forced_algorithm = name;
}

void set_strict_precision(bool on) { strict = on; }
bool strict_precision() { return strict; }
void allow_tf32(bool on) { tf32 = on; }
bool tf32_allowed() { return tf32 && !strict; }

void conv2d_forward(const Conv2dProblem& problem, const ForwardArguments& args) {
  if (elements(problem.y_shape()) == 0) return args.moments ? read_moments(problem, args) : void();
  // Of no input channels: the plain loops define an empty sum.
  if (problem.empty()) return simt::forward(problem, args);
  select(kForward, problem, forced_algorithm).run(problem, args);
}

void conv2d_backward_input(const Conv2dProblem& problem, const BackwardInputArguments& args) {
  const int64_t size = elements(problem.x_shape());
  if (size == 0) return;
  if (problem.empty()) return zero_bytes(args.dx, size * itemsize(problem.dtype));
  select(kBackwardInput, problem, forced_algorithm).run(problem, args);
}

void conv2d_backward_weight(const Conv2dProblem& problem, const BackwardWeightArguments& args) {
  if (elements(problem.w_shape()) == 0) return;
  if (problem.empty()) return simt::backward_weight(problem, args);
  select(kBackwardWeight, problem, forced_algorithm).run(problem, args);
}

Explanation explain_conv2d(const Conv2dProblem& problem, Direction direction) {
  switch (direction) {
    case Direction::kForward: return explain(kForward, problem);
    case Direction::kBackwardInput: return explain(kBackwardInput, problem);
    case Direction::kBackwardWeight: break;
  }
  return explain(kBackwardWeight, problem);
}

const void* krsc_weights(const Conv2dProblem& problem, const TensorView& w, Buffer& copy) {
  if (w.is_channels_last()) return w.data;
  copy = Buffer(elements(problem.w_shape()) * itemsize(problem.dtype));
  copy_view(w, krsc_view(w, copy.as<void>()));
  return copy.as<void>();
}

void* krsc_gradient(const Conv2dProblem& problem, const TensorView& dw, Buffer& copy) {
  if (dw.is_channels_last()) return dw.data;
  copy = Buffer(elements(problem.w_shape()) * itemsize(problem.dtype));
  return copy.as<void>();
}

void store_krsc(const TensorView& dw, const Buffer& copy) {
  if (copy.as<void>() != nullptr) copy_view(krsc_view(dw, copy.as<void>()), dw);
}

}  // namespace fastconv::cuda

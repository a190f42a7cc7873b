// The gradients of 1x1 kernels over few pixels, as in dense layers and squeeze-excitation: packing the weights would
// cost more than using them, so w is read and dw written where it lies, once. Bound: memory, for w or dw.
#include <algorithm>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::few_pixels {
namespace {

constexpr int64_t kMaxPixels = 64;
constexpr int64_t kSpan = 1024;  // channels of x of a chunk: a row of 4 KiB, so that some rows fit L1
constexpr int64_t kDepth = 8;    // rows of w at a time
constexpr int64_t kOuts = 64;    // rows of dw of a chunk

int64_t pixels(const Conv2dProblem& a) { return a.n * a.p * a.q; }

}  // namespace

const char* supports_backward(const Conv2dProblem& a) {
  if (a.dtype != DType::kFloat32) return "fp32 only";
  if (a.r != 1 || a.s != 1 || a.groups != 1) return "the kernel is not 1x1, or has groups";
  if (a.p != a.h || a.q != a.w || a.pad_top != 0 || a.pad_left != 0) return "there is a stride or padding";
  if (pixels(a) > kMaxPixels) return "more than 64 pixels";
  return nullptr;
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  if (args.w.strides[1] != 1) return pointwise::backward_input(a, args);
  const auto* w = args.w.as<float>();
  const auto* dy = static_cast<const float*>(args.dy);
  const int64_t w_step = args.w.strides[0];
  parallel_for(ceil_divide(a.c, kSpan), [&](int64_t i, int) {
    OuterTile t{};
    t.a_row_step = a.k, t.a_step = 1;
    t.b_step = w_step;
    t.y = static_cast<float*>(args.dx) + i * kSpan, t.y_step = a.c;
    t.rows = pixels(a);
    t.length = std::min(kSpan, a.c - i * kSpan);
    for (int64_t k = 0; k < a.k; k += kDepth) {
      t.a = dy + k;
      t.b = w + k * w_step + i * kSpan;
      t.depth = std::min(kDepth, a.k - k);
      t.b_next = k + 2 * kDepth <= a.k ? t.b + kDepth * w_step : nullptr;
      t.accumulate = k > 0;
      kernels().conv2d.outer(t);
    }
  });
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  if (args.dw.strides[1] != 1) return pointwise::backward_weight(a, args);
  auto* dw = args.dw.as<float>();
  const int64_t dw_step = args.dw.strides[0];
  const bool aligned = reinterpret_cast<uintptr_t>(dw) % 64 == 0 && dw_step % 16 == 0;
  const int64_t spans = ceil_divide(a.c, kSpan);
  parallel_for(ceil_divide(a.k, kOuts) * spans, [&](int64_t i, int) {
    const int64_t c = i % spans * kSpan, k = i / spans * kOuts;
    OuterTile t{};
    t.a = static_cast<const float*>(args.dy) + k, t.a_row_step = 1, t.a_step = a.k;
    t.b = static_cast<const float*>(args.x) + c, t.b_step = a.c;
    t.y = dw + k * dw_step + c, t.y_step = dw_step;
    t.rows = std::min(kOuts, a.k - k);
    t.depth = pixels(a);
    t.length = std::min(kSpan, a.c - c);
    t.streaming = aligned && worth_streaming(a.k, a.c);
    kernels().conv2d.outer(t);
  });
}

}  // namespace fastconv::cpu::few_pixels

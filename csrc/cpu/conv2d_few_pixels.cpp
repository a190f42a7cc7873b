// 1x1 kernels over few pixels, as in dense layers and squeeze-excitation: packing the weights would cost more than
// using them, so they are read, and their gradient is written, where they lie, once. Bound: memory, for w or dw.
#include <algorithm>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::few_pixels {
namespace {

// Weights of a chunk: they stay in L2 while all pixels use them, and are enough to be worth a thread's while.
constexpr int64_t kChunkFloats = 64 * 1024;
// Outputs of a chunk: a multiple of the rows of weights that every kernel takes at once would leave none over.
constexpr int64_t kChunkOuts = 24;
// Of the gradients: channels of x of a chunk, a row of 4 KiB, so that some rows fit L1; rows of w at a time; rows of dw
// of a chunk.
constexpr int64_t kSpan = 1024, kDepth = 8, kOuts = 64;

int64_t pixels(const Conv2dProblem& a) { return a.n * a.p * a.q; }

// Why it is no dense layer.
const char* not_dense(const Conv2dProblem& a) {
  if (a.dtype != DType::kFloat32) return "fp32 only";
  if (a.r != 1 || a.s != 1 || a.groups != 1) return "the kernel is not 1x1, or has groups";
  if (a.p != a.h || a.q != a.w || a.pad_top != 0 || a.pad_left != 0) return "there is a stride or padding";
  return nullptr;
}

// The weights as rows of neighbouring floats: themselves, or a copy.
class Rows {
 public:
  Rows(const Conv2dProblem& a, const TensorView& w) : data_(w.as<float>()), step_(w.strides[0]) {
    if (w.strides[1] == 1 || a.c == 1) return;
    copy_ = Buffer(a.k * a.c * sizeof(float));
    for (int64_t k = 0; k < a.k; ++k)
      for (int64_t c = 0; c < a.c; ++c)
        copy_.as<float>()[k * a.c + c] = w.as<float>()[k * w.strides[0] + c * w.strides[1]];
    data_ = copy_.as<float>();
    step_ = a.c;
  }
  const float* at(int64_t row) const { return data_ + row * step_; }
  int64_t step() const { return step_; }

 private:
  Buffer copy_;
  const float* data_;
  int64_t step_;
};

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (const char* reason = not_dense(a)) return reason;
  return pixels(a) > 32 ? "more than 32 pixels" : nullptr;
}

const char* supports_backward(const Conv2dProblem& a) {
  if (const char* reason = not_dense(a)) return reason;
  return pixels(a) > 64 ? "more than 64 pixels" : nullptr;
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const auto& k = kernels().conv2d;
  const Rows w(a, args.w);
  const Epilogue epilogue = make_epilogue(args);
  const int64_t outs = ceil_divide(std::max<int64_t>(kChunkFloats / a.c, 1), kChunkOuts) * kChunkOuts;
  DotTile shape{};
  shape.x_step = a.c, shape.w_step = w.step(), shape.y_step = a.k;
  shape.length = a.c;
  shape.low = epilogue.low, shape.high = epilogue.high;
  parallel_for(ceil_divide(a.k, outs), [&](int64_t i, int) {
    DotTile t = shape;
    const int64_t first = i * outs, parts = ceil_divide(pixels(a), k.dot_rows);
    t.w = w.at(first);
    t.outs = std::min(outs, a.k - first);
    t.bias = epilogue.bias ? epilogue.bias + first : nullptr;
    for (int64_t part = 0; part < parts; ++part) {
      const Range mine = split(pixels(a), parts, part);
      t.rows = mine.end - mine.begin;
      t.x = static_cast<const float*>(args.x) + mine.begin * a.c;
      t.y = static_cast<float*>(args.y) + mine.begin * a.k + first;
      t.residual = epilogue.residual ? epilogue.residual + mine.begin * a.k + first : nullptr;
      k.dot(t);
    }
  });
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

// 1x1 kernels over few pixels, as in dense layers and squeeze-excitation: packing the weights would cost more than
// using them, so they are read where they lie. Bound: memory, for the weights.
#include <algorithm>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::few_pixels {
namespace {

constexpr int64_t kMaxPixels = 32;
// Weights of a chunk: they stay in L2 while all pixels use them, and are enough to be worth a thread's while.
constexpr int64_t kChunkFloats = 64 * 1024;
// Outputs of a chunk: a multiple of the rows of weights that every kernel takes at once would leave none over.
constexpr int64_t kChunkOuts = 24;

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
  if (a.dtype != DType::kFloat32) return "fp32 only";
  if (a.r != 1 || a.s != 1 || a.groups != 1) return "the kernel is not 1x1, or has groups";
  if (a.p != a.h || a.q != a.w || a.pad_top != 0 || a.pad_left != 0) return "there is a stride or padding";
  if (a.n * a.p * a.q > kMaxPixels) return "more than 32 pixels";
  return nullptr;
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const auto& k = kernels().conv2d;
  const Rows w(a, args.w);
  const Epilogue epilogue = make_epilogue(args);
  const int64_t pixels = a.n * a.p * a.q;
  const int64_t outs = ceil_divide(std::max<int64_t>(kChunkFloats / a.c, 1), kChunkOuts) * kChunkOuts;
  DotTile shape{};
  shape.x_step = a.c, shape.w_step = w.step(), shape.y_step = a.k;
  shape.length = a.c;
  shape.low = epilogue.low, shape.high = epilogue.high;
  parallel_for(ceil_divide(a.k, outs), [&](int64_t i, int) {
    DotTile t = shape;
    const int64_t first = i * outs, parts = ceil_divide(pixels, k.dot_rows);
    t.w = w.at(first);
    t.outs = std::min(outs, a.k - first);
    t.bias = epilogue.bias ? epilogue.bias + first : nullptr;
    for (int64_t part = 0; part < parts; ++part) {
      const Range mine = split(pixels, parts, part);
      t.rows = mine.end - mine.begin;
      t.x = static_cast<const float*>(args.x) + mine.begin * a.c;
      t.y = static_cast<float*>(args.y) + mine.begin * a.k + first;
      t.residual = epilogue.residual ? epilogue.residual + mine.begin * a.k + first : nullptr;
      k.dot(t);
    }
  });
}

}  // namespace fastconv::cpu::few_pixels

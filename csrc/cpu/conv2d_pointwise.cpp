// 1x1 kernels at stride 1: a plain GEMM over pixels. The whole batch is one row of pixels for the direct engine, so
// tiles are full whatever the size of an image.
#include "cpu/conv2d_direct.h"

namespace fastconv::cpu::pointwise {
namespace {

SourceImage one_row(const void* data, int64_t pixels, int64_t channels, int64_t groups) {
  return {static_cast<const float*>(data), 1, pixels, channels, 0, channels / groups};
}

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.r != 1 || a.s != 1) return "the kernel is not 1x1";
  if (a.stride_h != 1 || a.stride_w != 1) return "the stride is not 1";
  if (a.p != a.h || a.q != a.w) return "there is padding";
  return direct::supports(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const int64_t pixels = a.n * a.h * a.w;
  direct::run(direct::DirectProblem{1, one_row(args.x, pixels, a.c, a.groups), forward_axis(1, 1, 1, 0, 1),
                                    forward_axis(pixels, 1, 1, 0, 1), a.groups, a.kg(),
                                    direct::forward_weights(a, args.w), static_cast<float*>(args.y), 1, pixels, a.k,
                                    make_epilogue(args)});
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const int64_t pixels = a.n * a.h * a.w;
  direct::run(direct::DirectProblem{1,
                                    one_row(args.dy, pixels, a.k, a.groups),
                                    forward_axis(1, 1, 1, 0, 1),
                                    forward_axis(pixels, 1, 1, 0, 1),
                                    a.groups,
                                    a.cg(),
                                    direct::backward_weights(a, args.w),
                                    static_cast<float*>(args.dx),
                                    1,
                                    pixels,
                                    a.c,
                                    {}});
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const int64_t pixels = a.n * a.h * a.w;
  direct::run(direct::WeightGradientProblem{1, one_row(args.x, pixels, a.c, a.groups), forward_axis(1, 1, 1, 0, 1),
                                            forward_axis(pixels, 1, 1, 0, 1), a.groups, a.kg(),
                                            static_cast<const float*>(args.dy), direct::forward_weights(a, args.dw)});
}

}  // namespace fastconv::cpu::pointwise

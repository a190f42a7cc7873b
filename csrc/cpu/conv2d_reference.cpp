// The definition: plain loops, any shape, fp32 and fp64. Never declines. Cross-correlation, as in every CNN library:
// y[n,k,p,q] = b[k] + sum over c,r,s of x[n, c, p*stride - pad + r*dilation, q*stride - pad + s*dilation] w[k,c,r,s].
#include <cmath>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"

namespace fastconv::cpu::reference {
namespace {

template <class T> struct Weights {
  explicit Weights(const TensorView& v) : data(v.as<T>()), strides(v.strides) {}
  T& operator()(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return data[k * strides[0] + c * strides[1] + r * strides[2] + s * strides[3]];
  }
  T* data;
  std::array<int64_t, kMaxDims> strides;
};

// Calls f(r, s, ih, iw) for the taps of output pixel (p, q) that lie inside the image.
template <class F> void for_taps(const Conv2dProblem& a, int64_t p, int64_t q, F&& f) {
  for (int64_t r = 0; r < a.r; ++r) {
    const int64_t ih = p * a.stride_h - a.pad_top + r * a.dilation_h;
    if (ih < 0 || ih >= a.h) continue;
    for (int64_t s = 0; s < a.s; ++s) {
      const int64_t iw = q * a.stride_w - a.pad_left + s * a.dilation_w;
      if (iw >= 0 && iw < a.w) f(r, s, ih, iw);
    }
  }
}

template <class T> void forward_as(const Conv2dProblem& a, const ForwardArguments& args) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* bias = static_cast<const T*>(args.bias);
  const auto* residual = static_cast<const T*>(args.residual);
  auto* y = static_cast<T*>(args.y);
  const Weights<T> w(args.w);
  const bool relu = args.activation == Activation::kReLU, relu6 = args.activation == Activation::kReLU6;
  parallel_ranges(a.n * a.p, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t q = 0; q < a.q; ++q)
        for (int64_t k = 0; k < a.k; ++k) {
          const int64_t c0 = k / a.kg() * a.cg();
          T sum = 0;
          for_taps(a, row % a.p, q, [&](int64_t r, int64_t s, int64_t ih, int64_t iw) {
            const T* pixel = x + ((row / a.p * a.h + ih) * a.w + iw) * a.c + c0;
            for (int64_t c = 0; c < a.cg(); ++c) sum += pixel[c] * w(k, c, r, s);
          });
          const int64_t at = (row * a.q + q) * a.k + k;
          if (bias) sum += bias[k];
          if (residual) sum += residual[at];
          if ((relu || relu6) && sum < 0) sum = 0;
          if (relu6 && sum > 6) sum = 6;
          y[at] = sum;
        }
  });
}

template <class T> void backward_input_as(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const auto* dy = static_cast<const T*>(args.dy);
  auto* dx = static_cast<T*>(args.dx);
  const Weights<T> w(args.w);
  // The source of tap r for input row ih is output row (ih + pad - r*dilation) / stride, where that divides.
  const auto source = [](int64_t i, int64_t pad, int64_t tap, int64_t dilation, int64_t stride, int64_t outputs) {
    const int64_t at = i + pad - tap * dilation;
    return at >= 0 && at % stride == 0 && at / stride < outputs ? at / stride : -1;
  };
  parallel_ranges(a.n * a.h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t iw = 0; iw < a.w; ++iw) {
        T* out = dx + (row * a.w + iw) * a.c;
        for (int64_t c = 0; c < a.c; ++c) out[c] = 0;
        for (int64_t r = 0; r < a.r; ++r) {
          const int64_t p = source(row % a.h, a.pad_top, r, a.dilation_h, a.stride_h, a.p);
          if (p < 0) continue;
          for (int64_t s = 0; s < a.s; ++s) {
            const int64_t q = source(iw, a.pad_left, s, a.dilation_w, a.stride_w, a.q);
            if (q < 0) continue;
            const T* g = dy + ((row / a.h * a.p + p) * a.q + q) * a.k;
            for (int64_t k = 0; k < a.k; ++k)
              for (int64_t c = 0; c < a.cg(); ++c) out[k / a.kg() * a.cg() + c] += g[k] * w(k, c, r, s);
          }
        }
      }
  });
}

template <class T> void backward_weight_as(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* dy = static_cast<const T*>(args.dy);
  const Weights<T> dw(args.dw);
  parallel_ranges(a.k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t c0 = k / a.kg() * a.cg();
      for (int64_t c = 0; c < a.cg(); ++c)
        for (int64_t r = 0; r < a.r; ++r)
          for (int64_t s = 0; s < a.s; ++s) dw(k, c, r, s) = 0;
      for (int64_t row = 0; row < a.n * a.p; ++row)
        for (int64_t q = 0; q < a.q; ++q) {
          const T g = dy[(row * a.q + q) * a.k + k];
          for_taps(a, row % a.p, q, [&](int64_t r, int64_t s, int64_t ih, int64_t iw) {
            const T* pixel = x + ((row / a.p * a.h + ih) * a.w + iw) * a.c + c0;
            for (int64_t c = 0; c < a.cg(); ++c) dw(k, c, r, s) += g * pixel[c];
          });
        }
    }
  });
}

}  // namespace

const char* supports(const Conv2dProblem& a) { return a.dtype == DType::kBFloat16 ? "fp32 and fp64 only" : nullptr; }

void forward(const Conv2dProblem& problem, const ForwardArguments& args) {
  dispatch_float(problem.dtype, [&](auto t) { forward_as<decltype(t)>(problem, args); });
}
void backward_input(const Conv2dProblem& problem, const BackwardInputArguments& args) {
  dispatch_float(problem.dtype, [&](auto t) { backward_input_as<decltype(t)>(problem, args); });
}
void backward_weight(const Conv2dProblem& problem, const BackwardWeightArguments& args) {
  dispatch_float(problem.dtype, [&](auto t) { backward_weight_as<decltype(t)>(problem, args); });
}

}  // namespace fastconv::cpu::reference

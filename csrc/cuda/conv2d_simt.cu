// The definition on the device: a thread computes one output by plain loops, for any shape and every type. Never
// declines; the oracle of the faster implementations.
#include <algorithm>

#include "cuda/activation.h"
#include "cuda/conv2d.h"
#include "cuda/launch.h"

namespace fastconv::cuda::simt {
namespace {

template <class T> struct Weights {
  explicit Weights(const TensorView& v)
      : data(v.as<T>()), k(v.strides[0]), c(v.strides[1]), r(v.strides[2]), s(v.strides[3]) {}
  T* data;
  int64_t k, c, r, s;
  FC_HOST_DEVICE T& at(int64_t ik, int64_t ic, int64_t ir, int64_t is) const {
    return data[ik * k + ic * c + ir * r + is * s];
  }
};

// One output y[n, p, q, k].
template <class T> struct Forward {
  Conv2dProblem a;
  const T* x;
  Weights<T> w;
  const T *bias, *residual;
  Activation activation;
  T* y;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t k = i % a.k, q = i / a.k % a.q, p = i / a.k / a.q % a.p, n = i / a.k / a.q / a.p;
    const int64_t cg = a.c / a.groups, c0 = k / (a.k / a.groups) * cg;
    Acc<T> sum = 0;
    for (int64_t r = 0; r < a.r; ++r) {
      const int64_t h = p * a.stride_h - a.pad_top + r * a.dilation_h;
      if (h < 0 || h >= a.h) continue;
      for (int64_t s = 0; s < a.s; ++s) {
        const int64_t column = q * a.stride_w - a.pad_left + s * a.dilation_w;
        if (column < 0 || column >= a.w) continue;
        const T* pixel = x + ((n * a.h + h) * a.w + column) * a.c + c0;
        for (int64_t c = 0; c < cg; ++c) sum += static_cast<Acc<T>>(pixel[c]) * static_cast<Acc<T>>(w.at(k, c, r, s));
      }
    }
    if (bias) sum += static_cast<Acc<T>>(bias[k]);
    if (residual) sum += static_cast<Acc<T>>(residual[i]);
    y[i] = T(activate(activation, sum));
  }
};

// The output row that tap r gives to input row h, or -1.
FC_INLINE int64_t source(int64_t h, int64_t pad, int64_t r, int64_t dilation, int64_t stride, int64_t outputs) {
  const int64_t at = h + pad - r * dilation;
  return at >= 0 && at % stride == 0 && at / stride < outputs ? at / stride : -1;
}

// One dx[n, h, w, c].
template <class T> struct BackwardInput {
  Conv2dProblem a;
  const T* dy;
  Weights<T> w;
  T* dx;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % a.c, column = i / a.c % a.w, h = i / a.c / a.w % a.h, n = i / a.c / a.w / a.h;
    const int64_t cg = a.c / a.groups, kg = a.k / a.groups, k0 = c / cg * kg;
    Acc<T> sum = 0;
    for (int64_t r = 0; r < a.r; ++r) {
      const int64_t p = source(h, a.pad_top, r, a.dilation_h, a.stride_h, a.p);
      if (p < 0) continue;
      for (int64_t s = 0; s < a.s; ++s) {
        const int64_t q = source(column, a.pad_left, s, a.dilation_w, a.stride_w, a.q);
        if (q < 0) continue;
        const T* g = dy + ((n * a.p + p) * a.q + q) * a.k + k0;
        for (int64_t k = 0; k < kg; ++k)
          sum += static_cast<Acc<T>>(g[k]) * static_cast<Acc<T>>(w.at(k0 + k, c % cg, r, s));
      }
    }
    dx[i] = T(sum);
  }
};

// The partial sum of one dw[k, r, s, c] over one slice of the output rows n * p.
template <class T> struct PartialWeight {
  Conv2dProblem a;
  const T *dy, *x;
  int64_t slices;
  Acc<T>* partial;  // [slice][k][r][s][c]

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t cg = a.c / a.groups, c = i % cg, s = i / cg % a.s, r = i / cg / a.s % a.r,
                  k = i / cg / a.s / a.r % a.k;
    const int64_t slice = i / cg / a.s / a.r / a.k, rows = a.n * a.p;
    const int64_t c0 = k / (a.k / a.groups) * cg;
    Acc<T> sum = 0;
    for (int64_t row = rows * slice / slices; row < rows * (slice + 1) / slices; ++row) {
      const int64_t h = row % a.p * a.stride_h - a.pad_top + r * a.dilation_h;
      if (h < 0 || h >= a.h) continue;
      const T *g = dy + row * a.q * a.k + k, *line = x + (row / a.p * a.h + h) * a.w * a.c + c0 + c;
      for (int64_t q = 0; q < a.q; ++q) {
        const int64_t column = q * a.stride_w - a.pad_left + s * a.dilation_w;
        if (column >= 0 && column < a.w)
          sum += static_cast<Acc<T>>(g[q * a.k]) * static_cast<Acc<T>>(line[column * a.c]);
      }
    }
    partial[i] = sum;
  }
};

// Adds the slices in order.
template <class T> struct FinishWeight {
  Conv2dProblem a;
  int64_t slices, size;
  const Acc<T>* partial;
  Weights<T> dw;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t cg = a.c / a.groups;
    Acc<T> sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * size + i];
    dw.at(i / cg / a.s / a.r, i % cg, i / cg / a.s % a.r, i / cg % a.s) = T(sum);
  }
};

int64_t elements(const Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

// A function of the shape alone, so that the bits are those of every device.
int64_t slice_count(const Conv2dProblem& a) {
  constexpr int64_t kThreadsWanted = 1 << 17;
  const int64_t wanted = ceil_divide(kThreadsWanted, elements(a.w_shape()));
  return std::clamp<int64_t>(std::min(wanted, a.n * a.p), 1, 64);
}

}  // namespace

const char* supports(const Conv2dProblem&) { return nullptr; }

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    for_each(elements(a.y_shape()),
             Forward<T>{a, static_cast<const T*>(args.x), Weights<T>(args.w), static_cast<const T*>(args.bias),
                        static_cast<const T*>(args.residual), args.activation, static_cast<T*>(args.y)});
  });
  if (args.moments) read_moments(a, args);
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    for_each(elements(a.x_shape()),
             BackwardInput<T>{a, static_cast<const T*>(args.dy), Weights<T>(args.w), static_cast<T*>(args.dx)});
  });
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const int64_t size = elements(a.w_shape()), slices = slice_count(a);
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffer partial(slices * size * sizeof(Acc<T>));
    for_each(slices * size, PartialWeight<T>{a, static_cast<const T*>(args.dy), static_cast<const T*>(args.x), slices,
                                             partial.as<Acc<T>>()});
    for_each(size, FinishWeight<T>{a, slices, size, partial.as<Acc<T>>(), Weights<T>(args.dw)});
  });
}

}  // namespace fastconv::cuda::simt

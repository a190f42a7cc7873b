// What the tensor-core convolutions do around their kernels: operands in the layouts that these want, partial sums of
// weight gradients into the caller's array, activations that are no clamp.
#pragma once

#include <climits>
#include <limits>

#include "core/allocator.h"
#include "cuda/conv2d.h"
#include "cuda/epilogue.h"
#include "cuda/launch.h"
#include "device/elementwise.h"

namespace fastconv::cuda {

inline int64_t elements(const Shape& s) { return s[0] * s[1] * s[2] * s[3]; }

// `data` where copies of 16 bytes can reach it: itself, or a copy.
inline const void* aligned_operand(const void* data, int64_t bytes, Buffer& copy) {
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) return data;
  copy = Buffer(static_cast<size_t>(bytes));
  copy_bytes(copy.as<void>(), data, static_cast<size_t>(bytes), Copy::kOnDevice);
  return copy.as<void>();
}

// packed[group][column][tap][channel], channels padded with zeros, from weights of any strides. Columns are output
// channels and channels input channels, or the other way round for an input gradient.
template <class T> struct PackWeights {
  const T* w;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int64_t columns, taps, padded, channels, kernel_w, kg;
  bool backward;
  T* packed;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t channel = i % padded, tap = i / padded % taps, column = i / padded / taps % columns;
    const int64_t group = i / padded / taps / columns;
    if (channel >= channels) {
      packed[i] = T(0.0f);
      return;
    }
    const int64_t k = group * kg + (backward ? channel : column), c = backward ? column : channel;
    packed[i] = w[k * stride_k + c * stride_c + tap / kernel_w * stride_r + tap % kernel_w * stride_s];
  }
};

template <class T> Buffer pack_weights(const Conv2dProblem& a, const TensorView& w, bool backward, int64_t padded) {
  const int64_t columns = backward ? a.cg() : a.kg(), channels = backward ? a.kg() : a.cg();
  const int64_t size = a.groups * columns * a.r * a.s * padded;
  Buffer packed(size * sizeof(T));
  for_each(size, PackWeights<T>{w.as<T>(), w.strides[0], w.strides[1], w.strides[2], w.strides[3], columns, a.r * a.s,
                                padded, channels, a.s, a.kg(), backward, packed.as<T>()});
  return packed;
}

// Images of few channels with `wide` of them, zeros at the end.
template <class T> struct WidenImage {
  const T* x;
  int64_t channels, wide;
  T* widened;

  FC_HOST_DEVICE void operator()(int64_t pixel) const {
    for (int64_t c = 0; c < wide; ++c) widened[pixel * wide + c] = c < channels ? x[pixel * channels + c] : T(0.0f);
  }
};
template <class T> Buffer widen_image(const void* x, int64_t pixels, int64_t channels, int64_t wide) {
  Buffer widened(pixels * wide * sizeof(T));
  for_each(pixels, WidenImage<T>{static_cast<const T*>(x), channels, wide, widened.as<T>()});
  return widened;
}

// dw = the slices' partial sums [split][k][tap][channel, padded], added in order.
template <class T> struct SumPartials {
  const float* partial;
  int64_t splits, stride, taps, padded, channels, kernel_w;
  T* dw;
  int64_t stride_k, stride_c, stride_r, stride_s;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % channels, tap = i / channels % taps, k = i / channels / taps;
    const float* from = partial + (k * taps + tap) * padded + c;
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += from[split * stride];
    dw[k * stride_k + c * stride_c + tap / kernel_w * stride_r + tap % kernel_w * stride_s] = T(sum);
  }
};
template <class T>
void sum_partials(const Conv2dProblem& a, const float* partial, int64_t splits, int64_t padded, const TensorView& dw) {
  for_each(elements(a.w_shape()),
           SumPartials<T>{partial, splits, a.k * a.r * a.s * padded, a.r * a.s, padded, a.cg(), a.s, dw.as<T>(),
                          dw.strides[0], dw.strides[1], dw.strides[2], dw.strides[3]});
}

inline bool is_clamp(Activation f) {
  return f == Activation::kNone || f == Activation::kReLU || f == Activation::kReLU6;
}
inline Epilogue epilogue_of(const ForwardArguments& args) {
  Epilogue e;
  e.bias = args.bias;
  e.residual = args.residual;
  if (args.activation == Activation::kReLU || args.activation == Activation::kReLU6) e.low = 0.0f;
  if (args.activation == Activation::kReLU6) e.high = 6.0f;
  return e;
}
// An activation that is no clamp is a pass over the finished, rounded y, as two calls would be.
inline void finish_activation(const Conv2dProblem& a, const ForwardArguments& args) {
  if (!is_clamp(args.activation)) apply_activation(args.activation, a.dtype, args.y, elements(a.y_shape()));
}

// The statistics that the kernel takes of y before it stores it, in slices of `pixels` pixels, if they are wanted. An
// activation that is no clamp comes later.
class EpilogueStatistics {
 public:
  EpilogueStatistics(const Conv2dProblem& a, const ForwardArguments& args, int64_t pixels)
      : problem_(a), args_(args), pixels_(pixels) {
    if (args.moments && is_clamp(args.activation))
      slices_ = Buffer(ceil_divide(a.n * a.p * a.q, pixels) * a.k * sizeof(SliceStatistics));
  }
  SliceStatistics* slices() const { return slices_.as<SliceStatistics>(); }
  // After y has been made.
  void merge() const {
    if (slices())
      merge_statistics(problem_.n * problem_.p * problem_.q, problem_.k, slices(), pixels_, args_.moments);
    else if (args_.moments)
      read_moments(problem_, args_);
  }

 private:
  const Conv2dProblem& problem_;
  const ForwardArguments& args_;
  int64_t pixels_;
  Buffer slices_;
};

// What both tensor-core implementations decline: sizes that 32-bit indices of pixels do not hold, and in the emulator
// what would take minutes.
inline const char* too_large(const Conv2dProblem& a) {
  constexpr int64_t kMost = INT_MAX - 1024;
  for (const int64_t size : {a.n * a.h * a.w, a.n * a.p * a.q, a.k * a.r * a.s, a.c * a.r * a.s, a.r * a.s * a.c * 2})
    if (size > kMost) return "more than 2^31 pixels";
  if (emulated() && elements(a.y_shape()) * a.cg() * a.r * a.s > int64_t{1} << 23) return "too large to emulate";
  return nullptr;
}

}  // namespace fastconv::cuda

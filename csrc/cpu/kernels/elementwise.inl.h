// Activations, sums and dropout. Bound: memory, except dropout (ten rounds of Philox for four elements).
// Definitions and the gradients at the kinks are PyTorch's (ATen/native/cpu/Activation.cpp).
#pragma once

#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/math.inl.h"

namespace fastconv::cpu {
namespace {

// Each function: forward(x, a), backward(dy, x, a); V is a vector, S(number) one of equal lanes, a the parameter.
// Conditions are written so that NaN goes to the branch that keeps it.
template <class T> struct Constant {
  using V = typename Lanes<T>::V;
  static V of(double value) { return set1(static_cast<T>(value)); }
};

struct ReLU {
  template <class T, class V> static V forward(V x, V) { return x <= V{} ? V{} : x; }
  template <class T, class V> static V backward(V dy, V x, V) { return x <= V{} ? V{} : dy; }
};

struct ReLU6 {
  template <class T, class V> static V forward(V x, V) { return clamp(x, V{}, Constant<T>::of(6)); }
  template <class T, class V> static V backward(V dy, V x, V) {
    const V g = x <= V{} ? V{} : dy;
    return x >= Constant<T>::of(6) ? V{} : g;
  }
};

struct LeakyReLU {
  template <class T, class V> static V forward(V x, V slope) { return x > V{} ? x : x * slope; }
  template <class T, class V> static V backward(V dy, V x, V slope) { return x > V{} ? dy : dy * slope; }
};

struct ELU {
  template <class T, class V> static V forward(V x, V alpha) {
    const V negative = alpha * expm1_negative(x);
    return x > V{} ? x : negative;
  }
  template <class T, class V> static V backward(V dy, V x, V alpha) {
    const V negative = dy * alpha * exp_lanes(x);
    return x > V{} ? dy : negative;
  }
};

// 1 / (1 + exp(-x)) and its derivative exp(-|x|) / (1 + exp(-|x|))^2, without cancellation on either side.
template <class V> struct Logistic {
  V value, slope;
};
template <class T, class V> Logistic<V> logistic(V x) {
  const V one = Constant<T>::of(1), e = exp_lanes(x > V{} ? -x : x), scale = one / (one + e);
  const V small = e * scale;
  return {x > V{} ? scale : small, small * scale};
}

struct Sigmoid {
  template <class T, class V> static V forward(V x, V) { return logistic<T>(x).value; }
  template <class T, class V> static V backward(V dy, V x, V) { return dy * logistic<T>(x).slope; }
};

struct Tanh {
  template <class T, class V> static V forward(V x, V) { return tanh_lanes(x); }
  template <class T, class V> static V backward(V dy, V x, V) {
    return dy * (Constant<T>::of(4) * logistic<T>(x + x).slope);
  }
};

struct SiLU {
  template <class T, class V> static V forward(V x, V) { return x * logistic<T>(x).value; }
  template <class T, class V> static V backward(V dy, V x, V) {
    const Logistic<V> s = logistic<T>(x);
    return dy * (s.value + x * s.slope);
  }
};

// x times the normal distribution function: Hendrycks and Gimpel, arXiv 1606.08415.
struct GELU {
  template <class T, class V> static V forward(V x, V) { return x * normal_distribution(x); }
  template <class T, class V> static V backward(V dy, V x, V) {
    const V density = Constant<T>::of(0.39894228040143267794) * exp_lanes(x * x * Constant<T>::of(-0.5));
    return dy * (normal_distribution(x) + x * density);
  }
};

// 0.5 x (1 + tanh(u)) = x logistic(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same paper's approximation.
struct GELUTanh {
  template <class T, class V> static V argument(V x) {
    return Constant<T>::of(2 * kScale) * (x + Constant<T>::of(kCubic) * x * x * x);
  }
  template <class T, class V> static V forward(V x, V) { return x * logistic<T>(argument<T>(x)).value; }
  template <class T, class V> static V backward(V dy, V x, V) {
    const Logistic<V> s = logistic<T>(argument<T>(x));
    const V inner = Constant<T>::of(2 * kScale) * (Constant<T>::of(1) + Constant<T>::of(3 * kCubic) * x * x);
    // Where the logistic function is flat the inner derivative may be infinite: 0 times it is 0.
    const V bend = s.slope == V{} ? V{} : x * s.slope * inner;
    return dy * (s.value + bend);
  }
  static constexpr double kScale = 0.79788456080286535588;  // sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
};

struct Hardsigmoid {
  template <class T, class V> static V forward(V x, V) {
    return clamp(x + Constant<T>::of(3), V{}, Constant<T>::of(6)) / Constant<T>::of(6);
  }
  template <class T, class V> static V backward(V dy, V x, V) {
    V g = dy / Constant<T>::of(6);
    g = x <= Constant<T>::of(-3) ? V{} : g;
    return x >= Constant<T>::of(3) ? V{} : g;
  }
};

struct Hardswish {
  template <class T, class V> static V forward(V x, V a) { return x * Hardsigmoid::forward<T>(x, a); }
  template <class T, class V> static V backward(V dy, V x, V) {
    V g = dy * (x / Constant<T>::of(3) + Constant<T>::of(0.5));
    g = x <= Constant<T>::of(-3) ? V{} : g;
    return x >= Constant<T>::of(3) ? dy : g;
  }
};

template <class F, class T> void elementwise_forward(const T* x, T* y, int64_t n, T parameter) {
  const auto a = set1(parameter);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    store_lanes<tail.value>(y + i, F::template forward<T>(load_lanes<tail.value>(x + i, lanes), a), lanes);
  });
}

template <class F, class T> void elementwise_backward(const T* dy, const T* x, T* dx, int64_t n, T parameter) {
  const auto a = set1(parameter);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto g = load_lanes<tail.value>(dy + i, lanes);
    store_lanes<tail.value>(dx + i, F::template backward<T>(g, load_lanes<tail.value>(x + i, lanes), a), lanes);
  });
}

template <class T> void add_arrays(const T* a, const T* b, T* y, int64_t n) {
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    store_lanes<tail.value>(y + i, load_lanes<tail.value>(a + i, lanes) + load_lanes<tail.value>(b + i, lanes), lanes);
  });
}

template <class T> void add_bias(T* y, int64_t rows, int64_t channels, const T* bias) {
  for (int64_t row = 0; row < rows; ++row) add_arrays(y + row * channels, bias, y + row * channels, channels);
}

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
// Block b of four words is a function of (seed, b) alone; kBlocks of them at a time so that the rounds are vectors.
constexpr int kBlocks = 16;

inline void philox(uint64_t seed, uint64_t first_block, uint32_t* words) {
  uint32_t a[kBlocks], b[kBlocks], c[kBlocks], d[kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    const uint64_t counter = first_block + i;
    a[i] = static_cast<uint32_t>(counter);
    b[i] = static_cast<uint32_t>(counter >> 32);
    c[i] = d[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t p = uint64_t{0xD2511F53} * a[i], q = uint64_t{0xCD9E8D57} * c[i];
      a[i] = static_cast<uint32_t>(q >> 32) ^ b[i] ^ key0;
      b[i] = static_cast<uint32_t>(q);
      c[i] = static_cast<uint32_t>(p >> 32) ^ d[i] ^ key1;
      d[i] = static_cast<uint32_t>(p);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int i = 0; i < kBlocks; ++i) {
    words[4 * i] = a[i];
    words[4 * i + 1] = b[i];
    words[4 * i + 2] = c[i];
    words[4 * i + 3] = d[i];
  }
}

template <class T>
void dropout(const T* x, T* y, int64_t n, uint64_t seed, uint64_t offset, uint32_t threshold, T scale) {
  constexpr int64_t kWords = 4 * kBlocks;
  uint32_t words[kWords];
  int64_t skip = static_cast<int64_t>(offset % 4);
  uint64_t block = offset / 4;
  for (int64_t i = 0; i < n; block += kBlocks) {
    philox(seed, block, words);
    const int64_t count = n - i < kWords - skip ? n - i : kWords - skip;
    for (int64_t j = 0; j < count; ++j) y[i + j] = words[skip + j] >= threshold ? x[i + j] * scale : T{0};
    i += count;
    skip = 0;
  }
}

template <class T> constexpr ElementwiseKernels<T> elementwise_kernels() {
  return {
      {elementwise_forward<ReLU, T>, elementwise_forward<ReLU6, T>, elementwise_forward<LeakyReLU, T>,
       elementwise_forward<ELU, T>, elementwise_forward<Sigmoid, T>, elementwise_forward<Tanh, T>,
       elementwise_forward<SiLU, T>, elementwise_forward<GELU, T>, elementwise_forward<GELUTanh, T>,
       elementwise_forward<Hardsigmoid, T>, elementwise_forward<Hardswish, T>},
      {elementwise_backward<ReLU, T>, elementwise_backward<ReLU6, T>, elementwise_backward<LeakyReLU, T>,
       elementwise_backward<ELU, T>, elementwise_backward<Sigmoid, T>, elementwise_backward<Tanh, T>,
       elementwise_backward<SiLU, T>, elementwise_backward<GELU, T>, elementwise_backward<GELUTanh, T>,
       elementwise_backward<Hardsigmoid, T>, elementwise_backward<Hardswish, T>},
      add_arrays<T>,
      add_bias<T>,
      dropout<T>,
  };
}

}  // namespace
}  // namespace fastconv::cpu

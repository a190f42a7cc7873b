// Activations, sums, multiples and dropout. Bound: memory, except dropout (ten rounds of Philox for four elements).
// Definitions and the gradients at the kinks are PyTorch's (ATen/native/cpu/Activation.cpp).
#pragma once

#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/math.inl.h"

namespace fastconv::cpu {
namespace {

// Each function: forward(x, a) and backward(dy, x, a) of vectors, a the parameter in every lane.
// Conditions are written so that NaN goes to the branch that keeps it.
// A number in every lane: Constant<T>::of(6).
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
  const V one = Constant<T>::of(1), e = exp_lanes(minus_absolute(x)), scale = one / (one + e);
  const V small = e * scale;
  return {x > V{} ? scale : small, small * scale};
}
// a / (1 + exp(-x))
template <class T, class V> V times_logistic(V a, V x) {
  const V one = Constant<T>::of(1), e = exp_lanes(minus_absolute(x));
  return (x > V{} ? a : a * e) / (one + e);
}

struct Sigmoid {
  template <class T, class V> static V forward(V x, V) { return times_logistic<T>(Constant<T>::of(1), x); }
  template <class T, class V> static V backward(V dy, V x, V) { return dy * logistic<T>(x).slope; }
};

struct Tanh {
  template <class T, class V> static V forward(V x, V) { return tanh_lanes(x); }
  template <class T, class V> static V backward(V dy, V x, V) {
    return dy * (Constant<T>::of(4) * logistic<T>(x + x).slope);
  }
};

struct SiLU {
  template <class T, class V> static V forward(V x, V) { return times_logistic<T>(x, x); }
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
  template <class T, class V> static V forward(V x, V) { return times_logistic<T>(x, argument<T>(x)); }
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

template <class F, class T> void elementwise_forward(const T* x, T* y, int64_t n, T parameter, bool streaming) {
  const auto a = set1(parameter);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    put_lanes<tail.value>(streaming, y + i, F::template forward<T>(load_lanes<tail.value>(x + i, lanes), a), lanes);
  });
}

template <class F, class T>
void elementwise_backward(const T* dy, const T* x, T* dx, int64_t n, T parameter, bool streaming) {
  const auto a = set1(parameter);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto g = load_lanes<tail.value>(dy + i, lanes);
    const auto at = load_lanes<tail.value>(x + i, lanes);
    put_lanes<tail.value>(streaming, dx + i, F::template backward<T>(g, at, a), lanes);
  });
}

template <class T> void add_arrays(const T* a, const T* b, T* y, int64_t n, bool streaming) {
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    const auto sum = load_lanes<tail.value>(a + i, lanes) + load_lanes<tail.value>(b + i, lanes);
    put_lanes<tail.value>(streaming, y + i, sum, lanes);
  });
}

template <class T> void scale_array(const T* x, T* y, int64_t n, T factor) {
  const auto a = set1(factor);
  for_lanes<T>(n, [&](auto tail, int64_t i, int64_t lanes) {
    store_lanes<tail.value>(y + i, load_lanes<tail.value>(x + i, lanes) * a, lanes);
  });
}

template <class T> void add_bias(T* y, int64_t rows, int64_t channels, const T* bias) {
  for (int64_t row = 0; row < rows; ++row) add_arrays(y + row * channels, bias, y + row * channels, channels, false);
}

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
// Block b of four words is a function of (seed, b) alone. A word sits in a lane of 64 bits, so that its product with a
// constant is whole; several vectors of blocks at a time hide the latency of the multiplications.
constexpr int kWordLanes = kVectorBytes / 8;
constexpr int kBlockVectors = 2;
constexpr int kBlocks = kBlockVectors * kWordLanes;

inline void philox(uint64_t seed, uint64_t first_block, uint32_t* words) {
  constexpr uint64_t kLow = 0xffffffff;
  const Words first = Words{} + 0xD2511F53, second = Words{} + 0xCD9E8D57;
  Words a[kBlockVectors], b[kBlockVectors], c[kBlockVectors], d[kBlockVectors];
  for (int v = 0; v < kBlockVectors; ++v) {
    Words counter;
    for (int i = 0; i < kWordLanes; ++i) counter[i] = first_block + v * kWordLanes + i;
    a[v] = counter & kLow;
    b[v] = counter >> 32;
    c[v] = d[v] = Words{};
  }
  uint64_t key0 = seed & kLow, key1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int v = 0; v < kBlockVectors; ++v) {
      const Words p = multiply_words(a[v], first), q = multiply_words(c[v], second);
      a[v] = (q >> 32) ^ b[v] ^ key0;
      b[v] = q & kLow;
      c[v] = (p >> 32) ^ d[v] ^ key1;
      d[v] = p & kLow;
    }
    key0 = (key0 + 0x9E3779B9) & kLow;
    key1 = (key1 + 0xBB67AE85) & kLow;
  }
  for (int v = 0; v < kBlockVectors; ++v)
    for (int i = 0; i < kWordLanes; ++i) {
      uint32_t* block = words + 4 * (v * kWordLanes + i);
      block[0] = static_cast<uint32_t>(a[v][i]);
      block[1] = static_cast<uint32_t>(b[v][i]);
      block[2] = static_cast<uint32_t>(c[v][i]);
      block[3] = static_cast<uint32_t>(d[v][i]);
    }
}

template <class T>
void dropout(const T* x, T* y, int64_t n, uint64_t seed, uint64_t offset, uint32_t threshold, T scale) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  constexpr int64_t kWords = 256;
  uint32_t words[kWords];
  Int keep[kWords + Lanes<T>::kCount] = {};  // all bits set, or none; a tail reads a whole vector
  int64_t skip = static_cast<int64_t>(offset % 4);
  uint64_t block = offset / 4;
  for (int64_t i = 0; i < n;) {
    for (int64_t j = 0; j < kWords; j += 4 * kBlocks, block += kBlocks) philox(seed, block, words + j);
    for (int64_t j = 0; j < kWords; ++j) keep[j] = -static_cast<Int>(words[j] >= threshold);
    const int64_t count = n - i < kWords - skip ? n - i : kWords - skip;
    for_lanes<T>(count, [&](auto tail, int64_t j, int64_t lanes) {
      I mask;
      __builtin_memcpy(&mask, keep + skip + j, sizeof(mask));
      const V scaled = load_lanes<tail.value>(x + i + j, lanes) * set1(scale);
      store_lanes<tail.value>(y + i + j, mask ? scaled : V{}, lanes);
    });
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
      scale_array<T>,
      add_bias<T>,
      dropout<T>,
  };
}

}  // namespace
}  // namespace fastconv::cpu

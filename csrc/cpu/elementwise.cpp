#include "device/elementwise.h"

#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

// Elements of a unit of work: a multiple of every vector and of a cache line.
constexpr int64_t kUnit = 1024;
constexpr int64_t kUnitsPerChunk = 16;

// body(begin, count) over [0, n) in pieces that begin at multiples of kUnit.
template <class Body> void parallel_elements(int64_t n, Body&& body) {
  parallel_ranges((n + kUnit - 1) / kUnit, kUnitsPerChunk,
                  [&](int64_t begin, int64_t end) { body(begin * kUnit, std::min(end * kUnit, n) - begin * kUnit); });
}

// An array of this size leaves the caches before anybody reads it, so it is better written around them; not where it
// overwrites what has just been read.
constexpr int64_t kStreamBytes = 16 << 20;
bool worth_streaming(DType dtype, const void* out, const void* read, int64_t n) {
  constexpr int64_t kLine = 64;
  return out != read && reinterpret_cast<uintptr_t>(out) % kLine == 0 && n * itemsize(dtype) >= kStreamBytes;
}

Elementwise function_of(Activation activation) {
  switch (activation) {
    case Activation::kReLU6: return Elementwise::kReLU6;
    case Activation::kSiLU: return Elementwise::kSiLU;
    case Activation::kSigmoid: return Elementwise::kSigmoid;
    case Activation::kTanh: return Elementwise::kTanh;
    case Activation::kHardswish: return Elementwise::kHardswish;
    default: return Elementwise::kReLU;
  }
}

}  // namespace

void elementwise(Elementwise function, DType dtype, const void* x, void* y, int64_t n, double parameter) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().forward[static_cast<int>(function)];
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    const bool streaming = worth_streaming(dtype, y, x, n);
    parallel_elements(
        n, [&](int64_t i, int64_t count) { kernel(from + i, to + i, count, static_cast<T>(parameter), streaming); });
  });
}

void elementwise_backward(Elementwise function, DType dtype, const void* dy, const void* x, void* dx, int64_t n,
                          double parameter) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().backward[static_cast<int>(function)];
    const auto *g = static_cast<const T*>(dy), *at = static_cast<const T*>(x);
    auto* to = static_cast<T*>(dx);
    const bool streaming = worth_streaming(dtype, dx, dx == x ? x : dy, n);
    parallel_elements(n, [&](int64_t i, int64_t count) {
      kernel(g + i, at + i, to + i, count, static_cast<T>(parameter), streaming);
    });
  });
}

void add(DType dtype, const void* a, const void* b, void* y, int64_t n) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().add;
    const auto *first = static_cast<const T*>(a), *second = static_cast<const T*>(b);
    auto* to = static_cast<T*>(y);
    const bool streaming = worth_streaming(dtype, y, a, n);
    parallel_elements(n, [&](int64_t i, int64_t count) { kernel(first + i, second + i, to + i, count, streaming); });
  });
}

void apply_activation(Activation activation, DType dtype, void* y, int64_t n) {
  if (activation != Activation::kNone) elementwise(function_of(activation), dtype, y, y, n, 0);
}

void apply_activation_backward(Activation activation, DType dtype, const void* dy, const void* x, void* dx, int64_t n) {
  if (activation == Activation::kNone) {
    std::memcpy(dx, dy, n * itemsize(dtype));
    return;
  }
  elementwise_backward(function_of(activation), dtype, dy, x, dx, n, 0);
}

void add_channel_bias(DType dtype, void* y, int64_t rows, int64_t channels, const void* bias) {
  if (channels == 0) return;
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().add_bias;
    auto* to = static_cast<T*>(y);
    parallel_ranges(rows, std::max<int64_t>(kUnit * kUnitsPerChunk / channels, 1), [&](int64_t begin, int64_t end) {
      kernel(to + begin * channels, end - begin, channels, static_cast<const T*>(bias));
    });
  });
}

void dropout(DType dtype, const void* x, void* y, int64_t n, double p, uint64_t seed, uint64_t offset) {
  constexpr double kWords = 4294967296.0;  // 2^32 values of a random word
  const double threshold = p * kWords + 0.5;
  if (threshold >= kWords) {  // everything is dropped
    if (n > 0) std::memset(y, 0, n * itemsize(dtype));
    return;
  }
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().dropout;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    parallel_elements(n, [&](int64_t i, int64_t count) {
      kernel(from + i, to + i, count, seed, offset + static_cast<uint64_t>(i), static_cast<uint32_t>(threshold),
             static_cast<T>(1 / (1 - p)));
    });
  });
}

void stochastic_depth(DType dtype, const void* x, void* y, int64_t rows, int64_t size, double p, uint64_t seed,
                      uint64_t offset) {
  if (rows * size == 0) return;
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().elementwise.of<T>().scale;
    Buffer buffer(rows * sizeof(T));
    T* factors = buffer.as<T>();
    std::fill(factors, factors + rows, T{1});
    dropout(dtype, factors, factors, rows, p, seed, offset);
    const int64_t parts = (size + kUnit - 1) / kUnit;  // of a row
    parallel_ranges(rows * parts, kUnitsPerChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / parts, first = i % parts * kUnit, count = std::min(kUnit, size - first);
        const int64_t at = row * size + first;
        T* to = static_cast<T*>(y) + at;
        if (factors[row] == T{0})
          std::memset(to, 0, count * sizeof(T));
        else
          kernel(static_cast<const T*>(x) + at, to, count, factors[row]);
      }
    });
  });
}

}  // namespace fastconv::cpu

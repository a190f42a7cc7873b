// Elementwise operations and dropout. Bound: memory, 16 bytes a thread at a time.
#include "device/elementwise.h"

#include "core/allocator.h"
#include "cuda/activation.h"
#include "cuda/philox.h"
#include "cuda/vector.h"

namespace fastconv::cuda {
namespace {

template <class A> struct Function {
  Elementwise function;
  A parameter;
  FC_INLINE A operator()(A x) const { return activate(function, x, parameter); }
};

template <class A> struct Derivative {
  Elementwise function;
  A parameter;
  FC_INLINE A operator()(A dy, A x) const { return activate_gradient(function, dy, x, parameter); }
};

template <class A> struct Sum {
  FC_INLINE A operator()(A a, A b) const { return a + b; }
};

template <class T> struct AddBias {
  int64_t channels;
  const T* bias;
  T* y;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    y[i] = T(static_cast<Acc<T>>(y[i]) + static_cast<Acc<T>>(bias[i % channels]));
  }
};

// Four elements that share a block of random words. The first block may begin before element 0.
template <class T> struct Dropout {
  const T* x;
  T* y;
  int64_t n;
  DropRule rule;
  FC_HOST_DEVICE void operator()(int64_t block) const {
    uint32_t words[4];
    const uint64_t offset = rule.offset_now();
    philox(rule.seed_now(), offset / 4 + static_cast<uint64_t>(block), words);
    const int64_t first = 4 * block - static_cast<int64_t>(offset % 4);
    for (int j = 0; j < 4; ++j) {
      const int64_t i = first + j;
      if (i >= 0 && i < n)
        y[i] = words[j] >= rule.threshold ? T(static_cast<Acc<T>>(x[i]) * static_cast<Acc<T>>(rule.scale)) : T(0.0f);
    }
  }
};

template <class T> struct DropRows {
  const T* x;
  T* y;
  int64_t size;
  DropRule rule;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const bool kept =
        random_word(rule.seed_now(), rule.offset_now() + static_cast<uint64_t>(i / size)) >= rule.threshold;
    y[i] = kept ? T(static_cast<Acc<T>>(x[i]) * static_cast<Acc<T>>(rule.scale)) : T(0.0f);
  }
};

}  // namespace

void elementwise(Elementwise function, DType dtype, const void* x, void* y, int64_t n, double parameter) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    map_one(n, static_cast<const T*>(x), static_cast<T*>(y),
            Function<Acc<T>>{function, static_cast<Acc<T>>(parameter)});
  });
}

void elementwise_backward(Elementwise function, DType dtype, const void* dy, const void* x, void* dx, int64_t n,
                          double parameter) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    map_two(n, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
            Derivative<Acc<T>>{function, static_cast<Acc<T>>(parameter)});
  });
}

void add(DType dtype, const void* a, const void* b, void* y, int64_t n) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    map_two(n, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(y), Sum<Acc<T>>{});
  });
}

void apply_activation(Activation activation, DType dtype, void* y, int64_t n) {
  if (activation != Activation::kNone) elementwise(function_of(activation), dtype, y, y, n, 0);
}

void apply_activation_backward(Activation activation, DType dtype, const void* dy, const void* x, void* dx, int64_t n) {
  if (activation == Activation::kNone) return copy_bytes(dx, dy, n * itemsize(dtype), Copy::kOnDevice);
  elementwise_backward(function_of(activation), dtype, dy, x, dx, n, 0);
}

void add_channel_bias(DType dtype, void* y, int64_t rows, int64_t channels, const void* bias) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    for_each(rows * channels, AddBias<T>{channels, static_cast<const T*>(bias), static_cast<T*>(y)});
  });
}

void dropout(DType dtype, const void* x, void* y, int64_t n, double p, uint64_t seed, uint64_t offset) {
  const DropRule rule = drop_rule(p, seed, offset);
  if (rule.all) return zero_bytes(y, n * itemsize(dtype));
  if (n == 0) return;
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = ceil_divide(n + 3, 4);  // enough for any offset, which is another in each replay
    for_each(blocks, Dropout<T>{static_cast<const T*>(x), static_cast<T*>(y), n, rule});
  });
}

void stochastic_depth(DType dtype, const void* x, void* y, int64_t rows, int64_t size, double p, uint64_t seed,
                      uint64_t offset) {
  const DropRule rule = drop_rule(p, seed, offset);
  if (rule.all) return zero_bytes(y, rows * size * itemsize(dtype));
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    for_each(rows * size, DropRows<T>{static_cast<const T*>(x), static_cast<T*>(y), size, rule});
  });
}

}  // namespace fastconv::cuda

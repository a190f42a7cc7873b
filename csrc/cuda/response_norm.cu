// Local response normalisation: Krizhevsky, Sutskever, Hinton 2012, section 3.3, with PyTorch's mean instead of a sum.
// A thread an element; the windows' sums are taken again from the cache.
#include "device/response_norm.h"

#include <cmath>

#include "core/allocator.h"
#include "cuda/launch.h"

namespace fastconv::cuda {
namespace {

template <class A> FC_INLINE A raise(A s, A beta) { return beta == A(0.75) ? sqrt(s) * sqrt(sqrt(s)) : pow(s, beta); }

template <class T> struct Windows {
  using A = Acc<T>;
  int64_t channels, before, after;
  A scale, beta, k;
  const T* x;

  // Of the window of element i.
  FC_HOST_DEVICE A denominator(int64_t i) const {
    const int64_t c = i % channels;
    A sum = 0;
    for (int64_t j = c - before; j <= c + after; ++j)
      if (j >= 0 && j < channels) {
        const A value = x[i - c + j];
        sum += value * value;
      }
    return k + scale * sum;
  }
};

template <class T> Windows<T> windows_of(const ResponseNormProblem& a, const void* x) {
  using A = Acc<T>;
  const int64_t last = a.channels() - 1;
  return {a.channels(),
          std::min(a.size / 2, last),
          std::min((a.size - 1) / 2, last),
          static_cast<A>(a.alpha / static_cast<double>(a.size)),
          static_cast<A>(a.beta),
          static_cast<A>(a.k),
          static_cast<const T*>(x)};
}

template <class T> struct Forward {
  Windows<T> w;
  T* y;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    y[i] = T(static_cast<Acc<T>>(w.x[i]) / raise(w.denominator(i), w.beta));
  }
};

// What an element contributes to the gradients of its window: dy x / s^(beta + 1).
template <class T> struct Shares {
  Windows<T> w;
  const T* dy;
  Acc<T>*direct, *shares;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Acc<T> s = w.denominator(i);
    direct[i] = static_cast<Acc<T>>(dy[i]) / raise(s, w.beta);
    shares[i] = direct[i] * static_cast<Acc<T>>(w.x[i]) / s;
  }
};

template <class T> struct Backward {
  Windows<T> w;
  const Acc<T>*direct, *shares;
  T* dx;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % w.channels;
    Acc<T> sum = 0;  // over the windows that have channel c
    for (int64_t j = c - w.after; j <= c + w.before; ++j)
      if (j >= 0 && j < w.channels) sum += shares[i - c + j];
    dx[i] = T(direct[i] - 2 * w.scale * w.beta * static_cast<Acc<T>>(w.x[i]) * sum);
  }
};

}  // namespace

void response_norm(const ResponseNormProblem& a, const void* x, void* y) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    for_each(a.pixels() * a.channels(), Forward<T>{windows_of<T>(a, x), static_cast<T*>(y)});
  });
}

void response_norm_backward(const ResponseNormProblem& a, const void* dy, const void* x, void* dx) {
  const int64_t n = a.pixels() * a.channels();
  if (n == 0) return;
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffer scratch(2 * n * sizeof(Acc<T>));
    auto* direct = scratch.as<Acc<T>>();
    for_each(n, Shares<T>{windows_of<T>(a, x), static_cast<const T*>(dy), direct, direct + n});
    for_each(n, Backward<T>{windows_of<T>(a, x), direct, direct + n, static_cast<T*>(dx)});
  });
}

}  // namespace fastconv::cuda

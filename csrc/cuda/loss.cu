// Softmax of rows and columns, and cross entropy. A warp takes a row; its threads' sums are added in order. Bound: for
// the class counts of networks, the start of the kernels.
#include "device/loss.h"

#include <cmath>

#include "core/allocator.h"
#include "cuda/first_where.h"
#include "cuda/launch.h"

namespace fastconv::cuda {
namespace {

constexpr int kRowThreads = 32;

template <class A> FC_INLINE A largest(const A (&values)[kRowThreads]) {
  A best = values[0];
  for (int i = 1; i < kRowThreads; ++i) best = values[i] > best ? values[i] : best;
  return best;
}
template <class A> FC_INLINE A total(const A (&values)[kRowThreads]) {
  A sum = 0;
  for (int i = 0; i < kRowThreads; ++i) sum += values[i];
  return sum;
}

template <class T> FC_INLINE Acc<T> row_maximum(const T* x, int64_t length, int64_t first, int64_t step) {
  Acc<T> best = -static_cast<Acc<T>>(INFINITY);
  for (int64_t i = first; i < length; i += step) {
    const Acc<T> v = x[i];
    best = v > best ? v : best;
  }
  return best;
}

template <class T> struct SoftmaxRows {
  using A = Acc<T>;
  static constexpr int kThreads = kRowThreads, kPhases = 3;
  struct Shared {
    A maxima[kRowThreads], sums[kRowThreads];
  };
  using Local = Nothing;
  int64_t length;
  const T* x;
  T* y;
  bool logarithm;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t row, int thread, Shared& shared, Local&) const {
    const T* from = x + row * length;
    if constexpr (PHASE == 0) {
      shared.maxima[thread] = row_maximum(from, length, thread, kThreads);
    } else if constexpr (PHASE == 1) {
      const A maximum = largest(shared.maxima);
      A sum = 0;
      for (int64_t i = thread; i < length; i += kThreads) sum += exp(static_cast<A>(from[i]) - maximum);
      shared.sums[thread] = sum;
    } else {
      const A maximum = largest(shared.maxima), sum = total(shared.sums), log_sum = log(sum);
      for (int64_t i = thread; i < length; i += kThreads) {
        const A distance = static_cast<A>(from[i]) - maximum;
        y[row * length + i] = T(logarithm ? distance - log_sum : exp(distance) / sum);
      }
    }
  }
};

// softmax: dx = y (dy - sum of dy y); log softmax: dx = dy - exp(y) sum of dy
template <class T> struct SoftmaxRowsBackward {
  using A = Acc<T>;
  static constexpr int kThreads = kRowThreads, kPhases = 2;
  struct Shared {
    A sums[kRowThreads];
  };
  using Local = Nothing;
  int64_t length;
  const T *dy, *y;
  T* dx;
  bool logarithm;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t row, int thread, Shared& shared, Local&) const {
    const T *g = dy + row * length, *p = y + row * length;
    if constexpr (PHASE == 0) {
      A sum = 0;
      for (int64_t i = thread; i < length; i += kThreads)
        sum += static_cast<A>(g[i]) * (logarithm ? A(1) : static_cast<A>(p[i]));
      shared.sums[thread] = sum;
    } else {
      const A sum = total(shared.sums);
      for (int64_t i = thread; i < length; i += kThreads) {
        const A value = p[i], gradient = g[i];
        dx[row * length + i] = T(logarithm ? gradient - exp(value) * sum : value * (gradient - sum));
      }
    }
  }
};

// A thread a column.
template <class T> struct SoftmaxColumns {
  using A = Acc<T>;
  int64_t length, inner;
  const T* x;
  T* y;
  bool logarithm;
  FC_HOST_DEVICE void operator()(int64_t column) const {
    const int64_t first = column / inner * length * inner + column % inner, end = first + length * inner;
    const A maximum = row_maximum(x, end, first, inner);
    A sum = 0;
    for (int64_t i = first; i < end; i += inner) sum += exp(static_cast<A>(x[i]) - maximum);
    const A log_sum = log(sum);
    for (int64_t i = first; i < end; i += inner) {
      const A distance = static_cast<A>(x[i]) - maximum;
      y[i] = T(logarithm ? distance - log_sum : exp(distance) / sum);
    }
  }
};

template <class T> struct SoftmaxColumnsBackward {
  using A = Acc<T>;
  int64_t length, inner;
  const T *dy, *y;
  T* dx;
  bool logarithm;
  FC_HOST_DEVICE void operator()(int64_t column) const {
    const int64_t first = column / inner * length * inner + column % inner, end = first + length * inner;
    A sum = 0;
    for (int64_t i = first; i < end; i += inner)
      sum += static_cast<A>(dy[i]) * (logarithm ? A(1) : static_cast<A>(y[i]));
    for (int64_t i = first; i < end; i += inner) {
      const A value = y[i], gradient = dy[i];
      dx[i] = T(logarithm ? gradient - exp(value) * sum : value * (gradient - sum));
    }
  }
};

// Loss of one row: with p the softmax and s the label smoothing over C classes,
// -(1 - s) w[t] log p[t] - s / C sum over c of w[c] log p[c] (Szegedy et al., arXiv 1512.00567, section 7).
template <class T> struct RowLosses {
  using A = Acc<T>;
  static constexpr int kThreads = kRowThreads, kPhases = 3;
  struct Shared {
    A maxima[kRowThreads], sums[kRowThreads];
    double smooth[kRowThreads];
  };
  using Local = Nothing;
  CrossEntropyProblem a;
  const T* logits;
  const int64_t* target;
  const T* weight;
  double* losses;

  FC_HOST_DEVICE double weight_of(int64_t c) const {
    return weight ? static_cast<double>(static_cast<A>(weight[c])) : 1.0;
  }

  template <int PHASE> FC_HOST_DEVICE void run(int64_t row, int thread, Shared& shared, Local&) const {
    const T* x = logits + row * a.classes;
    const bool ignored = target[row] == a.ignore_index;
    if constexpr (PHASE == 0) {
      shared.maxima[thread] = ignored ? A(0) : row_maximum(x, a.classes, thread, kThreads);
    } else if constexpr (PHASE == 1) {
      const A maximum = largest(shared.maxima);
      A sum = 0;
      double smooth = 0;  // the sum of w (maximum - x)
      for (int64_t i = thread; !ignored && i < a.classes; i += kThreads) {
        sum += exp(static_cast<A>(x[i]) - maximum);
        if (a.label_smoothing > 0) smooth += weight_of(i) * (static_cast<double>(maximum) - static_cast<A>(x[i]));
      }
      shared.sums[thread] = sum;
      shared.smooth[thread] = smooth;
    } else if (thread == 0) {
      losses[row] = ignored ? 0 : loss(x, target[row], shared);
    }
  }

  FC_HOST_DEVICE double loss(const T* x, int64_t t, const Shared& shared) const {
    const double top = largest(shared.maxima), log_sum = log(static_cast<double>(total(shared.sums)));
    const double s = a.label_smoothing;
    double value = (1 - s) * weight_of(t) * (log_sum + (top - static_cast<double>(static_cast<A>(x[t]))));
    if (s > 0) {
      double weights = 0;
      for (int64_t c = 0; c < a.classes; ++c) weights += weight_of(c);
      value += s / static_cast<double>(a.classes) * (log_sum * weights + total(shared.smooth));
    }
    return value;
  }
};

// What the loss and its gradient share: sums over all rows, by one block.
struct Totals {
  double loss, target_weight, all_weights;
};
template <class T> struct SumRows {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    double losses[kThreads], weights[kThreads];
  };
  using Local = Nothing;
  CrossEntropyProblem a;
  const double* losses;  // or null
  const int64_t* target;
  const T* weight;
  Totals* totals;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t, int thread, Shared& shared, Local&) const {
    if constexpr (PHASE == 0) {
      double loss = 0, weights = 0;
      for (int64_t i = thread; i < a.rows; i += kThreads) {
        if (losses) loss += losses[i];
        if (target[i] != a.ignore_index)
          weights += weight ? static_cast<double>(static_cast<Acc<T>>(weight[target[i]])) : 1;
      }
      shared.losses[thread] = loss;
      shared.weights[thread] = weights;
    } else if (thread == 0) {
      Totals sum{0, 0, 0};
      for (int i = 0; i < kThreads; ++i) {
        sum.loss += shared.losses[i];
        sum.target_weight += shared.weights[i];
      }
      for (int64_t c = 0; c < a.classes; ++c)
        sum.all_weights += weight ? static_cast<double>(static_cast<Acc<T>>(weight[c])) : 1;
      *totals = sum;
    }
  }
};

template <class T> struct StoreLoss {
  const double* losses;  // of each row, or null: the sum or the mean
  const Totals* totals;
  bool mean;
  T* loss;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    if (losses)
      loss[i] = T(losses[i]);
    else
      *loss = T(mean ? totals->loss / totals->target_weight : totals->loss);
  }
};

// Finished in double, because the terms cancel where smoothed labels are met; p[target] - 1 is minus the sum of the
// others, because it cancels where the prediction is right.
template <class T> struct RowGradients {
  using A = Acc<T>;
  static constexpr int kThreads = kRowThreads, kPhases = 3;
  struct Shared {
    A maxima[kRowThreads];
    double others[kRowThreads];
  };
  using Local = Nothing;
  CrossEntropyProblem a;
  const T *dloss, *logits;
  const int64_t* target;
  const T* weight;
  const Totals* totals;
  T* dlogits;

  FC_HOST_DEVICE double weight_of(int64_t c) const {
    return weight ? static_cast<double>(static_cast<A>(weight[c])) : 1.0;
  }

  template <int PHASE> FC_HOST_DEVICE void run(int64_t row, int thread, Shared& shared, Local&) const {
    const T* x = logits + row * a.classes;
    T* dx = dlogits + row * a.classes;
    const int64_t t = target[row];
    const bool ignored = t == a.ignore_index;
    if constexpr (PHASE == 0) {
      shared.maxima[thread] = ignored ? A(0) : row_maximum(x, a.classes, thread, kThreads);
    } else if constexpr (PHASE == 1) {
      const A maximum = largest(shared.maxima);
      double others = 0;
      for (int64_t i = thread; !ignored && i < a.classes; i += kThreads)
        if (i != t) others += exp(static_cast<A>(x[i]) - maximum);
      shared.others[thread] = others;
    } else {
      if (ignored) {
        for (int64_t i = thread; i < a.classes; i += kThreads) dx[i] = T(0.0f);
        return;
      }
      const A maximum = largest(shared.maxima);
      const double own = exp(static_cast<A>(x[t]) - maximum), others = total(shared.others), sum = others + own;
      const double s = a.label_smoothing;
      const double given = static_cast<A>(a.reduction == Reduction::kNone ? dloss[row] : *dloss);
      const double g = given / (a.reduction == Reduction::kMean ? totals->target_weight : 1.0);
      const double hard = g * (1 - s) * weight_of(t), smooth = g * (s / static_cast<double>(a.classes));
      const double spread = smooth * totals->all_weights / sum, scale = hard / sum + spread;
      for (int64_t i = thread; i < a.classes; i += kThreads)
        dx[i] = T(i == t ? spread * own - smooth * weight_of(t) - hard * (others / sum)
                         : scale * static_cast<double>(exp(static_cast<A>(x[i]) - maximum)) - smooth * weight_of(i));
    }
  }
};

struct BadTarget {
  CrossEntropyProblem a;
  const int64_t* target;
  int64_t step;
  FC_HOST_DEVICE bool operator()(int64_t i) const {
    const int64_t t = target[i * step];
    return t != a.ignore_index && (t < 0 || t >= a.classes);
  }
};

}  // namespace

void softmax(const SoftmaxProblem& a, const void* x, void* y, bool logarithm) {
  if (a.outer * a.length * a.inner == 0) return;
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* from = static_cast<const T*>(x);
    if (a.inner == 1) return launch(SoftmaxRows<T>{a.length, from, static_cast<T*>(y), logarithm}, a.outer);
    for_each(a.outer * a.inner, SoftmaxColumns<T>{a.length, a.inner, from, static_cast<T*>(y), logarithm});
  });
}

void softmax_backward(const SoftmaxProblem& a, const void* dy, const void* y, void* dx, bool logarithm) {
  if (a.outer * a.length * a.inner == 0) return;
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto *g = static_cast<const T*>(dy), *p = static_cast<const T*>(y);
    auto* to = static_cast<T*>(dx);
    if (a.inner == 1) return launch(SoftmaxRowsBackward<T>{a.length, g, p, to, logarithm}, a.outer);
    for_each(a.outer * a.inner, SoftmaxColumnsBackward<T>{a.length, a.inner, g, p, to, logarithm});
  });
}

void check_targets(const CrossEntropyProblem& a, const TensorView& target) {
  const int64_t i = first_where(a.rows, BadTarget{a, target.as<int64_t>(), target.strides[0]});
  if (i == a.rows) return;
  int64_t wrong = 0;
  copy_bytes(&wrong, target.as<int64_t>() + i * target.strides[0], sizeof(wrong), Copy::kToHost);
  FC_CHECK(false, "target[", i, "] is ", wrong, ", not one of ", a.classes, " classes");
}

void cross_entropy(const CrossEntropyProblem& a, const void* logits, const int64_t* target, const void* weight,
                   void* loss) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* w = static_cast<const T*>(weight);
    const Buffer scratch(sizeof(Totals) + a.rows * sizeof(double));
    auto* totals = scratch.as<Totals>();
    auto* losses = reinterpret_cast<double*>(totals + 1);
    launch(RowLosses<T>{a, static_cast<const T*>(logits), target, w, losses}, a.rows);
    if (a.reduction == Reduction::kNone)
      return for_each(a.rows, StoreLoss<T>{losses, nullptr, false, static_cast<T*>(loss)});
    launch(SumRows<T>{a, losses, target, w, totals}, 1);
    for_each(1, StoreLoss<T>{nullptr, totals, a.reduction == Reduction::kMean, static_cast<T*>(loss)});
  });
}

void cross_entropy_backward(const CrossEntropyProblem& a, const void* dloss, const void* logits, const int64_t* target,
                            const void* weight, void* dlogits) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* w = static_cast<const T*>(weight);
    const Buffer totals(sizeof(Totals));
    launch(SumRows<T>{a, nullptr, target, w, totals.as<Totals>()}, 1);
    launch(RowGradients<T>{a, static_cast<const T*>(dloss), static_cast<const T*>(logits), target, w,
                           totals.as<Totals>(), static_cast<T*>(dlogits)},
           a.rows);
  });
}

}  // namespace fastconv::cuda

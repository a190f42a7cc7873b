#include "device/loss.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kChunkElements = 8192;
constexpr int64_t kColumnBlock = 512;

int64_t rows_per_chunk(int64_t length) { return std::max<int64_t>(kChunkElements / std::max<int64_t>(length, 1), 1); }

// rows(first, last) over contiguous rows, or columns(offset, count) over columns side by side.
template <class Rows, class Columns> void parallel_softmax(const SoftmaxProblem& a, Rows&& rows, Columns&& columns) {
  if (a.outer * a.length * a.inner == 0) return;
  if (a.inner == 1) return parallel_ranges(a.outer, rows_per_chunk(a.length), rows);
  const int64_t blocks = (a.inner + kColumnBlock - 1) / kColumnBlock;
  parallel_ranges(a.outer * blocks, rows_per_chunk(a.length * std::min(a.inner, kColumnBlock)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t first = i % blocks * kColumnBlock;
                      columns(i / blocks * a.length * a.inner + first, std::min(kColumnBlock, a.inner - first));
                    }
                  });
}

// What the mean divides by: the weights of the targets that are not ignored.
template <class T> double target_weight(const CrossEntropyProblem& a, const int64_t* target, const T* weight) {
  double total = 0;
  for (int64_t i = 0; i < a.rows; ++i)
    if (target[i] != a.ignore_index) total += weight ? weight[target[i]] : T{1};
  return total;
}

// Loss of one row: with p the softmax and s the label smoothing over C classes,
// -(1 - s) w[t] log p[t] - s / C sum over c of w[c] log p[c] (Szegedy et al., arXiv 1512.00567, section 7).
template <class T>
double row_loss(const CrossEntropyProblem& a, const T* x, int64_t t, const T* weight, T maximum, T sum) {
  const double log_sum = std::log(static_cast<double>(sum)), top = maximum, s = a.label_smoothing;
  const auto w = [&](int64_t c) { return weight ? static_cast<double>(weight[c]) : 1.0; };
  double loss = (1 - s) * w(t) * (log_sum + (top - x[t]));
  if (s > 0) {
    double all = 0;
    for (int64_t c = 0; c < a.classes; ++c) all += w(c) * (log_sum + (top - x[c]));
    loss += s / static_cast<double>(a.classes) * all;
  }
  return loss;
}

template <class T>
void cross_entropy_as(const CrossEntropyProblem& a, const T* logits, const int64_t* target, const T* weight, T* loss) {
  const auto& kernel = kernels().loss.of<T>();
  std::vector<double> losses(a.rows);
  parallel_ranges(a.rows, rows_per_chunk(a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] == a.ignore_index) continue;
      const T* x = logits + i * a.classes;
      T maximum, sum;
      kernel.row_sums(x, a.classes, &maximum, &sum);
      losses[i] = row_loss(a, x, target[i], weight, maximum, sum);
    }
  });
  if (a.reduction == Reduction::kNone) {
    for (int64_t i = 0; i < a.rows; ++i) loss[i] = static_cast<T>(losses[i]);
    return;
  }
  double total = 0;
  for (double row : losses) total += row;
  if (a.reduction == Reduction::kMean) total /= target_weight(a, target, weight);
  *loss = static_cast<T>(total);
}

template <class T>
void cross_entropy_backward_as(const CrossEntropyProblem& a, const T* dloss, const T* logits, const int64_t* target,
                               const T* weight, T* dlogits) {
  const auto& kernel = kernels().loss.of<T>();
  const double denominator = a.reduction == Reduction::kMean ? target_weight(a, target, weight) : 1.0;
  const double s = a.label_smoothing, smooth = s / static_cast<double>(std::max<int64_t>(a.classes, 1));
  double all_weights = 0;
  for (int64_t c = 0; c < a.classes; ++c) all_weights += weight ? weight[c] : T{1};
  parallel_ranges(a.rows, rows_per_chunk(a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = logits + i * a.classes;
      T* dx = dlogits + i * a.classes;
      const int64_t t = target[i];
      if (t == a.ignore_index) {
        std::memset(dx, 0, a.classes * sizeof(T));
        continue;
      }
      const double g = (a.reduction == Reduction::kNone ? dloss[i] : *dloss) / denominator;
      const double hard = g * (1 - s) * (weight ? weight[t] : T{1});
      kernel.cross_entropy_row_backward(x, dx, a.classes, t, hard, g * smooth, all_weights, weight);
    }
  });
}

}  // namespace

void softmax(const SoftmaxProblem& a, const void* x, void* y, bool logarithm) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().loss.of<T>();
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    parallel_softmax(
        a,
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            kernel.softmax_row(from + i * a.length, to + i * a.length, a.length, logarithm);
        },
        [&](int64_t at, int64_t count) {
          kernel.softmax_columns(from + at, to + at, a.length, a.inner, count, logarithm);
        });
  });
}

void softmax_backward(const SoftmaxProblem& a, const void* dy, const void* y, void* dx, bool logarithm) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().loss.of<T>();
    const auto *g = static_cast<const T*>(dy), *p = static_cast<const T*>(y);
    auto* to = static_cast<T*>(dx);
    parallel_softmax(
        a,
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin * a.length; i < end * a.length; i += a.length)
            kernel.softmax_row_backward(g + i, p + i, to + i, a.length, logarithm);
        },
        [&](int64_t at, int64_t count) {
          kernel.softmax_columns_backward(g + at, p + at, to + at, a.length, a.inner, count, logarithm);
        });
  });
}

void check_targets(const CrossEntropyProblem& a, const TensorView& target) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t t = target.as<int64_t>()[i * target.strides[0]];
    FC_CHECK(t == a.ignore_index || (t >= 0 && t < a.classes), "target[", i, "] is ", t, ", not one of ", a.classes,
             " classes");
  }
}

void cross_entropy(const CrossEntropyProblem& a, const void* logits, const int64_t* target, const void* weight,
                   void* loss) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    cross_entropy_as<T>(a, static_cast<const T*>(logits), target, static_cast<const T*>(weight), static_cast<T*>(loss));
  });
}

void cross_entropy_backward(const CrossEntropyProblem& a, const void* dloss, const void* logits, const int64_t* target,
                            const void* weight, void* dlogits) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    cross_entropy_backward_as<T>(a, static_cast<const T*>(dloss), static_cast<const T*>(logits), target,
                                 static_cast<const T*>(weight), static_cast<T*>(dlogits));
  });
}

}  // namespace fastconv::cpu

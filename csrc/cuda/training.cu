// Bound: memory for the batch; the rest is a few numbers.
#include "cuda/training.h"

#include <cmath>

#include "core/allocator.h"
#include "cuda/launch.h"

namespace fastconv::cuda {
namespace {

// Two roundings, as on the CPU, so that the pixels are the same to the bit.
FC_INLINE float scaled(float pixel, float scale, float shift) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(pixel, scale), shift);
#else
  const float product = pixel * scale;
  return product + shift;
#endif
}

// A thread a pixel of the result.
template <class T> struct GatherBatch {
  BatchProblem a;
  const uint8_t* images;
  const int64_t* labels;
  const Pick* picks;
  const float *scale, *shift;
  T* x;
  int64_t* y;
  FC_HOST_DEVICE void operator()(int64_t pixel) const {
    const int64_t column = pixel % a.width, row = pixel / a.width % a.height, image = pixel / (a.width * a.height);
    const Pick pick = picks[image];
    if (column == 0 && row == 0) y[image] = labels[pick.index];
    const int64_t h = row + pick.top - a.padding;
    const int64_t w = (pick.mirrored ? a.width - 1 - column : column) + pick.left - a.padding;
    const bool inside = h >= 0 && h < a.height && w >= 0 && w < a.width;
    const uint8_t* from = images + ((pick.index * a.height + h) * a.width + w) * a.channels;
    for (int64_t c = 0; c < a.channels; ++c)
      x[pixel * a.channels + c] = T(scaled(inside ? static_cast<float>(from[c]) : 0.0f, scale[c], shift[c]));
  }
};

// Whether a row's largest number is at its target: the first of equal ones, and NaN before all, as numpy's argmax. A
// warp takes a row.
template <class T> struct RightRows {
  static constexpr int kThreads = 32, kPhases = 2;
  struct Shared {
    Acc<T> best[kThreads];
    int64_t place[kThreads];
  };
  using Local = Nothing;
  const T* logits;
  const int64_t* target;
  int64_t classes;
  int* right;

  FC_HOST_DEVICE static bool ahead(Acc<T> v, int64_t at, Acc<T> best, int64_t place) {
    const bool nan = v != v, best_nan = best != best;
    if (nan != best_nan) return nan;
    return v > best || ((nan || v == best) && at < place);
  }
  template <int PHASE> FC_HOST_DEVICE void run(int64_t row, int thread, Shared& shared, Local&) const {
    const T* x = logits + row * classes;
    if constexpr (PHASE == 0) {
      Acc<T> best = -static_cast<Acc<T>>(INFINITY);
      int64_t place = classes;
      for (int64_t i = thread; i < classes; i += kThreads) {
        const Acc<T> v = x[i];
        if (ahead(v, i, best, place)) best = v, place = i;
      }
      shared.best[thread] = best;
      shared.place[thread] = place;
    } else if (thread == 0) {
      int first = 0;
      for (int i = 1; i < kThreads; ++i)
        if (ahead(shared.best[i], shared.place[i], shared.best[first], shared.place[first])) first = i;
      right[row] = shared.place[first] == target[row];
    }
  }
};

template <class T> struct AddFigures {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    int64_t right[kThreads];
  };
  using Local = Nothing;
  StepFigures* figures;
  const T* loss;
  double weight;
  const int* right;
  int64_t rows;
  template <int PHASE> FC_HOST_DEVICE void run(int64_t, int thread, Shared& shared, Local&) const {
    if constexpr (PHASE == 0) {
      int64_t count = 0;
      for (int64_t i = thread; i < rows; i += kThreads) count += right[i];
      shared.right[thread] = count;
    } else if (thread == 0) {
      int64_t count = 0;
      for (int64_t part : shared.right) count += part;
      figures->correct += static_cast<double>(count);
      const double share = static_cast<double>(static_cast<Acc<T>>(*loss)) * weight;
#ifdef __CUDA_ARCH__
      figures->loss = __dadd_rn(figures->loss, share);  // not fused: the host's bits
#else
      figures->loss += share;
#endif
    }
  }
};

struct Judge {
  StepFigures* figures;
  double max_norm;
  FC_HOST_DEVICE void operator()(int64_t) const {
    double factor = 1;
    if (max_norm < static_cast<double>(INFINITY)) {
      const double clipped = max_norm / (figures->norm + 1e-6);
      factor = clipped > 1 ? 1 : clipped;
      if (!(fabs(figures->norm) < static_cast<double>(INFINITY))) factor = NAN;
    }
    if (!(fabs(figures->loss) < static_cast<double>(INFINITY))) factor = NAN;
    figures->factor = factor;
  }
};

}  // namespace

void gather_batch(const BatchProblem& a, const uint8_t* images, const int64_t* labels, const Pick* picks,
                  const float* scale, const float* shift, DType dtype, void* x, int64_t* y) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    for_each(a.count * a.height * a.width,
             GatherBatch<T>{a, images, labels, picks, scale, shift, static_cast<T*>(x), y});
  });
}

void add_figures(StepFigures* figures, DType loss_type, const void* loss, double weight, DType logits_type,
                 const void* logits, const int64_t* target, int64_t rows, int64_t classes) {
  const Buffer right(rows * sizeof(int));
  dispatch_real(logits_type, [&](auto t) {
    using T = decltype(t);
    launch(RightRows<T>{static_cast<const T*>(logits), target, classes, right.as<int>()}, rows);
  });
  dispatch_real(loss_type, [&](auto t) {
    using T = decltype(t);
    launch(AddFigures<T>{figures, static_cast<const T*>(loss), weight, right.as<int>(), rows}, 1);
  });
}

void judge(StepFigures* figures, double max_norm) { for_each(1, Judge{figures, max_norm}); }

}  // namespace fastconv::cuda

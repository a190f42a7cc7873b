// Statistics: blocks of rows give mean and squared distances in one pass, from sums of distances from a value near the
// mean: for the first few rows of a chunk the first of them, then the mean so far. The square of how far that lies from
// the block's mean, of which digits may cancel, is part of the squares of the whole, too. Blocks are merged in order by
// Chan's formula in double, first within a chunk, then chunks (Chan, Golub and LeVeque, "Algorithms for computing the
// sample variance", The American Statistician 37, 1983). Forward in training reads x twice and writes y once; backward
// reads dy and x twice and writes dx once, finding the activation's derivative again on the way.
#include "device/batch_norm.h"

#include <algorithm>
#include <cmath>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/pool2d.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kBlockElements = 8192;       // of a block of rows: 32 KiB of fp32
constexpr int64_t kMaxBlockRows = 256;         // bounds the rounding error of a block's sums
constexpr int64_t kMinBlockRows = 64;          // bounds the work of merging blocks of many channels
constexpr int64_t kFirstRows = 16;             // of a chunk, around its first
constexpr int64_t kChunkElements = 64 * 1024;  // of a chunk that has sums of its own
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kStreamBytes = 16 << 20;  // an output of this size leaves the caches before anybody reads it

static_assert(static_cast<int>(Activation::kHardswish) + 1 == kBatchNormActivations);

int64_t block_rows(int64_t channels) {
  return std::clamp(kBlockElements / std::max<int64_t>(channels, 1), kMinBlockRows, kMaxBlockRows);
}

int64_t chunk_count(int64_t rows, int64_t channels) {
  return std::clamp<int64_t>(rows * channels / kChunkElements, 1, std::min(kMaxChunks, std::max<int64_t>(rows, 1)));
}

// body(first row, rows) over the blocks of a range.
template <class Body> void for_blocks(Range range, int64_t channels, Body&& body) {
  const int64_t step = block_rows(channels);
  for (int64_t row = range.begin; row < range.end; row += step) body(row, std::min(step, range.end - row));
}

// body(first row, rows) in parallel over rows that own their outputs. Backwards: the pass before has left the end of
// each thread's share in its cache.
template <class Body> void parallel_rows(int64_t rows, int64_t channels, Body&& body) {
  parallel_ranges(
      rows, std::max<int64_t>(kChunkElements / 4 / std::max<int64_t>(channels, 1), 1),
      [&](int64_t begin, int64_t end) { body(begin, end - begin); }, Order::kBackwards);
}

// The sums of all chunks in order: [chunks][channels] of doubles to totals[channels].
void add_chunks(const double* partial, int64_t chunks, int64_t stride, int64_t channels, double* totals) {
  parallel_ranges(channels, 512, [&](int64_t begin, int64_t end) {
    std::copy(partial + begin, partial + end, totals + begin);
    for (int64_t i = 1; i < chunks; ++i)
      for (int64_t c = begin; c < end; ++c) totals[c] += partial[i * stride + c];
  });
}

// Chan's formula: (mean, squares) of `count` values joined by `added` values of (other_mean, other_squares).
template <class T>
void merge(int64_t count, int64_t added, int64_t begin, int64_t end, const T* other_mean, const T* other_squares,
           double* mean, double* squares) {
  const double share = static_cast<double>(added) / static_cast<double>(count + added);
  const double weight = share * static_cast<double>(count);
  for (int64_t c = begin; c < end; ++c) {
    const double delta = other_mean[c] - mean[c];
    mean[c] += delta * share;
    squares[c] += other_squares[c] + delta * delta * weight;
  }
}

template <class T> void moments(const BatchNormProblem& a, const T* x, double* mean, double* squares) {
  const int64_t rows = a.rows(), channels = a.channels();
  const int64_t chunks = chunk_count(rows, channels);
  const auto& kernel = kernels().batch_norm.of<T>();
  Buffer sums(chunks * 2 * channels * sizeof(double));
  auto* partial = sums.as<double>();  // [chunk][mean, squares][channel]
  parallel_for(chunks, [&](int64_t i, int) {
    double *chunk_mean = partial + 2 * i * channels, *chunk_squares = chunk_mean + channels;
    std::fill(chunk_mean, chunk_mean + 2 * channels, 0.0);
    Buffer scratch(3 * channels * sizeof(T));
    T *block_mean = scratch.as<T>(), *block_squares = block_mean + channels, *near = block_squares + channels;
    int64_t count = 0;
    const auto add = [&](int64_t row, int64_t block) {
      for (int64_t c = 0; c < channels; ++c)
        near[c] = count > 0 ? static_cast<T>(chunk_mean[c]) : x[row * channels + c];
      kernel.moments(x + row * channels, block, channels, near, block_mean, block_squares);
      merge(count, block, 0, channels, block_mean, block_squares, chunk_mean, chunk_squares);
      count += block;
    };
    const Range mine = split(rows, chunks, i);
    const int64_t first = std::min(kFirstRows, mine.end - mine.begin);
    if (first > 0) add(mine.begin, first);
    for_blocks({mine.begin + first, mine.end}, channels, add);
  });
  parallel_ranges(channels, 512, [&](int64_t begin, int64_t end) {
    std::copy(partial + begin, partial + end, mean + begin);
    std::copy(partial + channels + begin, partial + channels + end, squares + begin);
    int64_t count = split(rows, chunks, 0).end;
    for (int64_t i = 1; i < chunks; ++i) {
      const Range range = split(rows, chunks, i);
      const double* other = partial + 2 * i * channels;
      merge(count, range.end - range.begin, begin, end, other, other + channels, mean, squares);
      count = range.end;
    }
  });
}

template <class T>
void statistics(const BatchNormProblem& a, const Moments& of, T* mean, T* rstd, T* unbiased_variance) {
  for (int64_t c = 0; c < a.channels(); ++c) {
    mean[c] = static_cast<T>(of.mean[c]);
    rstd[c] = static_cast<T>(1 / std::sqrt(of.squares[c] / std::max<double>(of.count, 1) + a.eps));
    unbiased_variance[c] = static_cast<T>(of.squares[c] / std::max<double>(of.count - 1, 1));
  }
}

// scale = rstd weight, and a bias that is never null.
template <class T> struct Affine {
  Affine(const BatchNormProblem& a, const BatchNormArguments& args) : vectors(2 * a.channels() * sizeof(T)) {
    const auto *rstd = static_cast<const T*>(args.rstd), *weight = static_cast<const T*>(args.weight);
    const auto* given_bias = static_cast<const T*>(args.bias);
    T *s = vectors.template as<T>(), *b = s + a.channels();
    for (int64_t c = 0; c < a.channels(); ++c) {
      s[c] = weight ? rstd[c] * weight[c] : rstd[c];
      b[c] = given_bias ? given_bias[c] : T{0};
    }
    scale = s;
    bias = b;
  }
  Buffer vectors;
  const T *scale, *bias;
};

template <class T>
BatchNormRows<T> rows_at(const BatchNormProblem& a, const BatchNormArguments& args, const Affine<T>& affine,
                         int64_t row, int64_t rows, bool streaming = false) {
  const int64_t at = row * a.channels();
  const auto *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  return {x + at,
          residual ? residual + at : nullptr,
          rows,
          a.channels(),
          static_cast<const T*>(args.mean),
          affine.scale,
          affine.bias,
          streaming};
}

// Whether the rows of an output go around the caches: that takes whole vectors.
template <class T> bool worth_streaming(const BatchNormProblem& a, const T* out) {
  constexpr int64_t kLine = 64;
  const int64_t row_bytes = a.channels() * static_cast<int64_t>(sizeof(T));
  return row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0 &&
         a.rows() * row_bytes >= kStreamBytes;
}

// So many operations that finding the derivative a second time takes longer than storing dz.
bool costly(Activation activation) {
  return activation == Activation::kSiLU || activation == Activation::kSigmoid || activation == Activation::kTanh;
}

template <class T> void forward(const BatchNormProblem& a, const BatchNormArguments& args, T* y) {
  const Affine<T> affine(a, args);
  const auto kernel = kernels().batch_norm.of<T>().forward[static_cast<int>(args.activation)];
  const bool streaming = worth_streaming(a, y);
  parallel_rows(a.rows(), a.channels(), [&](int64_t row, int64_t rows) {
    kernel(rows_at<T>(a, args, affine, row, rows, streaming), y + row * a.channels());
  });
}

template <class T>
void forward_max_pool(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool, T* y,
                      uint8_t* places) {
  const Affine<T> affine(a, args);
  const auto kernel = kernels().batch_norm.of<T>().forward[static_cast<int>(args.activation)];
  const PoolBands<T> bands(pool);
  const int64_t most = bands.most_rows() * pool.w;
  parallel_rows(bands.count(), most * a.channels(), [&](int64_t first, int64_t count) {
    const Buffer scratch(std::max<int64_t>(most * a.channels(), 1) * sizeof(T));
    for (int64_t band = first; band < first + count; ++band) {
      const Range rows = bands.rows(band);
      kernel(rows_at<T>(a, args, affine, rows.begin * pool.w, (rows.end - rows.begin) * pool.w), scratch.as<T>());
      bands.max(band, scratch.as<const T>(), y, places);
    }
  });
}

// totals: sum of dz, then sum of dz (x - mean), of each channel. dz is stored unless null.
template <class T>
void gradient_sums(const BatchNormProblem& a, const BatchNormArguments& args, const Affine<T>& affine, const T* dy,
                   T* dz, double* totals) {
  const int64_t channels = a.channels(), chunks = chunk_count(a.rows(), channels);
  const auto kernel = kernels().batch_norm.of<T>().backward_sums[static_cast<int>(args.activation)];
  Buffer sums(chunks * 2 * channels * sizeof(double));
  parallel_for(chunks, [&](int64_t i, int) {
    double* chunk = sums.as<double>() + 2 * i * channels;
    std::fill(chunk, chunk + 2 * channels, 0.0);
    Buffer scratch(2 * channels * sizeof(T));
    T* block = scratch.as<T>();
    for_blocks(split(a.rows(), chunks, i), channels, [&](int64_t row, int64_t rows) {
      const int64_t at = row * channels;
      kernel(rows_at<T>(a, args, affine, row, rows), dy + at, dz ? dz + at : nullptr, block, block + channels);
      for (int64_t c = 0; c < 2 * channels; ++c) chunk[c] += block[c];
    });
  });
  add_chunks(sums.as<double>(), chunks, 2 * channels, 2 * channels, totals);
}

// What is subtracted from dz in dx = rstd weight (dz - mean of dz - (x - mean) rstd^2 mean of dz (x - mean)), the means
// over `count` values: of each channel the mean of dz, and the slope over x - mean.
template <class T> struct Subtracted {
  Subtracted(int64_t channels, const BatchNormArguments& args, const double* sum, const double* products, int64_t count)
      : vectors(2 * channels * sizeof(T)) {
    T *m = vectors.template as<T>(), *s = m + channels;
    const auto* rstd = static_cast<const T*>(args.rstd);
    for (int64_t c = 0; c < channels; ++c) {
      const double r = rstd[c], values = static_cast<double>(std::max<int64_t>(count, 1));
      m[c] = static_cast<T>(sum[c] / values);
      s[c] = static_cast<T>(products[c] * r * r / values);
    }
    mean_dz = m;
    slope = s;
  }
  Buffer vectors;
  const T *mean_dz, *slope;
};

template <class T>
void backward_input(const BatchNormProblem& a, const BatchNormArguments& args, const Affine<T>& affine, const T* dy,
                    const double* sum, const double* products, int64_t count, T* dx) {
  const int64_t channels = a.channels();
  const auto kernel = kernels().batch_norm.of<T>().backward_input[static_cast<int>(args.activation)];
  const Subtracted<T> terms(channels, args, sum, products, count);
  const bool streaming = dx != dy && worth_streaming(a, dx);
  parallel_rows(a.rows(), channels, [&](int64_t row, int64_t rows) {
    const int64_t at = row * channels;
    kernel(rows_at<T>(a, args, affine, row, rows, streaming), dy + at, terms.mean_dz, terms.slope, dx + at);
  });
}

// Of the parameters, from the sums of dz and of dz (x - mean).
template <class T>
void store_gradients(int64_t channels, const BatchNormArguments& args, const double* totals,
                     const BatchNormGradients& out) {
  const auto* rstd = static_cast<const T*>(args.rstd);
  for (int64_t c = 0; c < channels; ++c) {
    if (out.dweight) static_cast<T*>(out.dweight)[c] = static_cast<T>(totals[channels + c] * rstd[c]);
    if (out.dbias) static_cast<T*>(out.dbias)[c] = static_cast<T>(totals[c]);
  }
}

template <class T>
void backward(const BatchNormProblem& a, BatchNormArguments args, const T* dy, bool training,
              const BatchNormGradients& out) {
  const int64_t rows = a.rows(), channels = a.channels();
  const Affine<T> affine(a, args);
  const auto& kernel = kernels().batch_norm.of<T>();
  auto *dx = static_cast<T*>(out.dx), *dresidual = static_cast<T*>(out.dresidual);
  const bool sums = (training && dx) || out.dweight || out.dbias;
  if (!sums && !dx && !dresidual) return;

  const Buffer vectors(2 * channels * sizeof(double));
  auto* totals = vectors.as<double>();
  if (sums || !dx) {
    T* dz = dresidual ? dresidual : dx && costly(args.activation) ? dx : nullptr;
    gradient_sums<T>(a, args, affine, dy, dz, totals);
    store_gradients<T>(channels, args, totals, out);
    if (dz) {  // the derivative has been applied: the second pass need not find it again
      dy = dz;
      dresidual = nullptr;
      args.activation = Activation::kNone;
    }
  }
  if (!dx) return;
  // z serves the activation alone.
  if (args.activation == Activation::kNone) args.residual = nullptr;
  if (!training) {
    parallel_rows(rows, channels, [&](int64_t row, int64_t count) {
      const int64_t at = row * channels;
      kernel.backward_constant[static_cast<int>(args.activation)](rows_at<T>(a, args, affine, row, count), dy + at,
                                                                  dx + at, dresidual ? dresidual + at : nullptr);
    });
    return;
  }
  backward_input<T>(a, args, affine, dy, totals, totals + channels, rows, dx);
}

// Windows that tile the image: the sums are those of the maxima alone, and neither pass needs the gradient of the
// normalised image in memory.
template <class T>
void backward_max_pool(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool,
                       const T* dy, const uint8_t* places, const BatchNormGradients& out) {
  const int64_t channels = a.channels(), activation = static_cast<int64_t>(args.activation);
  const auto& kernel = kernels().batch_norm.of<T>();
  const auto* x = static_cast<const T*>(args.x);
  const Affine<T> affine(a, args);
  const BatchNormRows<T> vectors = rows_at<T>(a, args, affine, 0, 0);
  const PoolBands<T> bands(pool);
  const int64_t chunks = std::min(chunk_count(a.rows(), channels), bands.count());
  const int64_t block_bands = std::max<int64_t>(kMaxBlockRows / pool.q(), 1);

  const Buffer sums(chunks * 2 * channels * sizeof(double)), vectors_of_totals(2 * channels * sizeof(double));
  auto* totals = vectors_of_totals.as<double>();
  parallel_for(chunks, [&](int64_t i, int) {
    double* chunk = sums.as<double>() + 2 * i * channels;
    std::fill(chunk, chunk + 2 * channels, 0.0);
    const Buffer scratch(2 * channels * sizeof(T));
    T* block = scratch.as<T>();
    const Range mine = split(bands.count(), chunks, i);
    for (int64_t first = mine.begin; first < mine.end; first += block_bands) {
      std::fill(block, block + 2 * channels, T{0});
      for (int64_t band = first; band < std::min(first + block_bands, mine.end); ++band)
        kernel.pooled_sums[activation](bands.backward_row(band, x, dy, places, nullptr), vectors, block,
                                       block + channels);
      for (int64_t c = 0; c < 2 * channels; ++c) chunk[c] += block[c];
    }
  });
  add_chunks(sums.as<double>(), chunks, 2 * channels, 2 * channels, totals);
  store_gradients<T>(channels, args, totals, out);
  auto* dx = static_cast<T*>(out.dx);
  if (!dx) return;

  const Subtracted<T> terms(channels, args, totals, totals + channels, a.rows());
  const bool streaming = worth_streaming(a, dx);
  // Backwards, as parallel_rows.
  parallel_ranges(
      bands.count(), std::max<int64_t>(kChunkElements / 4 * bands.count() / (a.rows() * channels), 1),
      [&](int64_t begin, int64_t end) {
        for (int64_t band = begin; band < end; ++band) {
          PoolRow<T> row = bands.backward_row(band, x, dy, places, dx);
          row.streaming = streaming;
          kernel.pooled_input[activation](row, vectors, terms.mean_dz, terms.slope);
        }
      },
      Order::kBackwards);
}

}  // namespace

void batch_norm_moments(const BatchNormProblem& a, const void* x, double* mean, double* squares) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    moments<T>(a, static_cast<const T*>(x), mean, squares);
  });
}

void batch_norm_statistics(const BatchNormProblem& a, const Moments& of, void* mean, void* rstd,
                           void* unbiased_variance) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    statistics<T>(a, of, static_cast<T*>(mean), static_cast<T*>(rstd), static_cast<T*>(unbiased_variance));
  });
}

void update_running(DType dtype, int64_t channels, const void* batch, double momentum, void* running) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    auto* r = static_cast<T*>(running);
    for (int64_t c = 0; c < channels; ++c)
      r[c] = static_cast<T>((1 - momentum) * r[c] + momentum * static_cast<const T*>(batch)[c]);
  });
}

void reciprocal_std(DType dtype, int64_t channels, const void* variance, double eps, void* rstd) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t c = 0; c < channels; ++c)
      static_cast<T*>(rstd)[c] = static_cast<T>(1 / std::sqrt(static_cast<const T*>(variance)[c] + eps));
  });
}

void batch_norm_forward(const BatchNormProblem& a, const BatchNormArguments& args, void* y) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    forward<T>(a, args, static_cast<T*>(y));
  });
}

void batch_norm_backward_sums(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy, void* dz,
                              double* totals) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    gradient_sums<T>(a, args, Affine<T>(a, args), static_cast<const T*>(dy), static_cast<T*>(dz), totals);
  });
}

void batch_norm_backward_input(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy,
                               const double* sum, const double* products, int64_t count, void* dx) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    backward_input<T>(a, args, Affine<T>(a, args), static_cast<const T*>(dy), sum, products, count,
                      static_cast<T*>(dx));
  });
}

void batch_norm_backward(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy, bool training,
                         const BatchNormGradients& out) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    backward<T>(a, args, static_cast<const T*>(dy), training, out);
  });
}

void batch_norm_max_pool(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool, void* y,
                         uint8_t* places) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    forward_max_pool<T>(a, args, pool, static_cast<T*>(y), places);
  });
}

void batch_norm_max_pool_backward(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool,
                                  const void* dy, const uint8_t* places, const BatchNormGradients& out) {
  if (!pool.rows.tiles(pool.h) || !pool.columns.tiles(pool.w) || a.rows() * a.channels() == 0)
    return backward_one_by_one(a, args, pool, dy, places, out);
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    backward_max_pool<T>(a, args, pool, static_cast<const T*>(dy), places, out);
  });
}

}  // namespace fastconv::cpu

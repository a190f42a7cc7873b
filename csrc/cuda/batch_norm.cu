// Batch normalisation. Forward in training reads x twice and writes y once; backward reads dy and x twice and writes dx
// once, finding the activation's derivative again on the way. Statistics by Welford's recurrence in a thread, merged by
// Chan's formula in double (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American
// Statistician 37, 1983): no cancellation however large the mean is. Bound: memory.
#include "device/batch_norm.h"

#include "cuda/activation.h"
#include "cuda/epilogue.h"
#include "cuda/windows.h"

namespace fastconv::cuda {
namespace {

// Of a set of numbers: how many they are, their mean, the sum of squared distances from it.
template <class A> struct Spread {
  A count, mean, squares;

  FC_INLINE void merge(const Spread& b) {
    if (b.count == 0) return;
    const A all = count + b.count, delta = b.mean - mean, share = b.count / all;
    mean += delta * share;
    squares += b.squares + delta * delta * share * count;
    count = all;
  }
};

template <class T, int WIDTH> struct MomentsBody {
  static constexpr int kWidth = WIDTH;
  using Wide = Spread<double>;
  using Value = Spread<Acc<T>>;
  struct Channels {};
  const T* x;

  FC_HOST_DEVICE void prepare(int64_t, Channels&) const {}
  FC_HOST_DEVICE void start(Value& v) const { v = Value{0, 0, 0}; }
  FC_HOST_DEVICE void row(int64_t at, Channels&, Value (&values)[WIDTH]) const {
    Acc<T> v[WIDTH];
    load_channels<WIDTH>(x, at, v);
    const Acc<T> share = 1 / (values[0].count + 1);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const Acc<T> delta = v[j] - values[j].mean;
      values[j].count += 1;
      values[j].mean += delta * share;
      values[j].squares += delta * (v[j] - values[j].mean);
    }
  }
  FC_HOST_DEVICE static Wide widen(const Value& v) { return {v.count, v.mean, v.squares}; }
  FC_HOST_DEVICE static void merge(Wide& a, const Wide& b) { a.merge(b); }
};

// The moments that a convolution left of each slice of `pixels` pixels: a row a slice.
struct SlicesBody {
  static constexpr int kWidth = 1;
  using Wide = Spread<double>;
  using Value = Spread<double>;
  struct Channels {};
  const SliceStatistics* slices;
  int64_t channels, pixels, rows;

  FC_HOST_DEVICE void prepare(int64_t, Channels&) const {}
  FC_HOST_DEVICE void start(Value& v) const { v = Value{0, 0, 0}; }
  FC_HOST_DEVICE void row(int64_t at, Channels&, Value (&values)[1]) const {
    const int64_t left = rows - at / channels * pixels;
    values[0].merge({static_cast<double>(left < pixels ? left : pixels), slices[at].mean, slices[at].m2});
  }
  FC_HOST_DEVICE static Wide widen(const Value& v) { return v; }
  FC_HOST_DEVICE static void merge(Wide& a, const Wide& b) { a.merge(b); }
};

struct StoreMoments {
  double *mean, *squares;
  FC_HOST_DEVICE void operator()(int64_t channel, const Spread<double>& m) const {
    mean[channel] = m.mean;
    squares[channel] = m.squares;
  }
};

template <class P> struct Statistics {
  int64_t count;
  double eps;
  const double *batch_mean, *squares;
  P *mean, *rstd, *unbiased_variance;
  FC_HOST_DEVICE void operator()(int64_t c) const {
    mean[c] = static_cast<P>(batch_mean[c]);
    rstd[c] = static_cast<P>(1 / sqrt(squares[c] / static_cast<double>(count > 1 ? count : 1) + eps));
    unbiased_variance[c] = static_cast<P>(squares[c] / static_cast<double>(count > 2 ? count - 1 : 1));
  }
};

template <class P> struct UpdateRunning {
  const P* batch;
  double momentum;
  P* running;
  FC_HOST_DEVICE void operator()(int64_t c) const {
    running[c] = static_cast<P>((1 - momentum) * running[c] + momentum * batch[c]);
  }
};

template <class P> struct ReciprocalStd {
  const P* variance;
  double eps;
  P* rstd;
  FC_HOST_DEVICE void operator()(int64_t c) const { rstd[c] = static_cast<P>(1 / sqrt(variance[c] + eps)); }
};

// The arguments, and what a thread keeps of its channels.
template <class T, int WIDTH> struct Normalized {
  using P = Acc<T>;
  struct Channels {
    P mean[WIDTH], scale[WIDTH], bias[WIDTH];
  };
  const T* x;
  const P *mean, *rstd, *weight, *bias;
  const T* residual;
  Activation activation;

  explicit Normalized(const BatchNormArguments& a)
      : x(static_cast<const T*>(a.x)),
        mean(static_cast<const P*>(a.mean)),
        rstd(static_cast<const P*>(a.rstd)),
        weight(static_cast<const P*>(a.weight)),
        bias(static_cast<const P*>(a.bias)),
        residual(static_cast<const T*>(a.residual)),
        activation(a.activation) {}

  FC_HOST_DEVICE void prepare(int64_t channel, Channels& c) const {
    P factor[WIDTH];
    load_vector<WIDTH>(mean, channel, P(0), c.mean);
    load_vector<WIDTH>(rstd, channel, P(1), c.scale);
    load_vector<WIDTH>(weight, channel, P(1), factor);
    load_vector<WIDTH>(bias, channel, P(0), c.bias);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) c.scale[j] *= factor[j];
  }
  // distance = x - mean, z = what the activation is applied to.
  FC_HOST_DEVICE void load(int64_t at, const Channels& c, P (&distance)[WIDTH], P (&z)[WIDTH]) const {
    P r[WIDTH];
    load_channels<WIDTH>(x, at, distance);
    if (residual) load_channels<WIDTH>(residual, at, r);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      distance[j] -= c.mean[j];
      z[j] = distance[j] * c.scale[j] + c.bias[j] + (residual ? r[j] : P(0));
    }
  }
};

template <class T, int WIDTH> struct ForwardBody {
  static constexpr int kWidth = WIDTH;
  using Channels = typename Normalized<T, WIDTH>::Channels;
  Normalized<T, WIDTH> args;
  T* y;
  FC_HOST_DEVICE void prepare(int64_t channel, Channels& c) const { args.prepare(channel, c); }
  FC_HOST_DEVICE void row(int64_t at, const Channels& c) const {
    Acc<T> distance[WIDTH], z[WIDTH];
    args.load(at, c, distance, z);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) z[j] = activate(args.activation, z[j]);
    store_channels<WIDTH>(y, at, z);
  }
};

// The image that batch norm would write, for the pooling behind it: rounded as if it had.
template <class T, int WIDTH> struct NormalizedImage {
  using Channels = typename Normalized<T, WIDTH>::Channels;
  Normalized<T, WIDTH> args;
  FC_HOST_DEVICE void prepare(int64_t channel, Channels& c) const { args.prepare(channel, c); }
  FC_HOST_DEVICE void load(int64_t at, const Channels& c, Acc<T> (&values)[WIDTH]) const {
    Acc<T> distance[WIDTH];
    args.load(at, c, distance, values);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
      values[j] = static_cast<Acc<T>>(static_cast<T>(activate(args.activation, values[j])));
  }
};

struct WideSums {
  double sum, products;
};

// The sums of dz and of dz (x - mean); dz is stored unless null.
template <class T, int WIDTH> struct SumsBody {
  static constexpr int kWidth = WIDTH;
  using Channels = typename Normalized<T, WIDTH>::Channels;
  using Wide = WideSums;
  struct Value {
    Acc<T> sum, products;
  };
  Normalized<T, WIDTH> args;
  const T* dy;
  T* dz;
  FC_HOST_DEVICE void prepare(int64_t channel, Channels& c) const { args.prepare(channel, c); }
  FC_HOST_DEVICE void start(Value& v) const { v = Value{0, 0}; }
  FC_HOST_DEVICE void row(int64_t at, const Channels& c, Value (&values)[WIDTH]) const {
    Acc<T> distance[WIDTH], z[WIDTH], g[WIDTH];
    args.load(at, c, distance, z);
    load_channels<WIDTH>(dy, at, g);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      g[j] = activate_gradient(args.activation, g[j], z[j]);
      values[j].sum += g[j];
      values[j].products += g[j] * distance[j];
    }
    if (dz) store_channels<WIDTH>(dz, at, g);
  }
  FC_HOST_DEVICE static Wide widen(const Value& v) { return {v.sum, v.products}; }
  FC_HOST_DEVICE static void merge(Wide& a, const Wide& b) {
    a.sum += b.sum;
    a.products += b.products;
  }
};

template <class P> struct StoreSums {
  int64_t channels;
  double* totals;  // [2][channels]
  const P* rstd;
  P *dweight, *dbias;  // each may be null
  FC_HOST_DEVICE void operator()(int64_t c, const WideSums& s) const {
    totals[c] = s.sum;
    totals[channels + c] = s.products;
    if (dweight) dweight[c] = static_cast<P>(s.products * rstd[c]);
    if (dbias) dbias[c] = static_cast<P>(s.sum);
  }
};

// dx = scale (dz - mean of dz - (x - mean) rstd^2 mean of dz (x - mean)), the means over `count` values; without sums
// dx = scale dz. dz is stored unless null.
template <class T, int WIDTH> struct BackwardBody {
  static constexpr int kWidth = WIDTH;
  using P = Acc<T>;
  struct Channels {
    typename Normalized<T, WIDTH>::Channels of;
    P mean_dz[WIDTH], slope[WIDTH];
  };
  Normalized<T, WIDTH> args;
  const T* dy;
  const double *sum, *products;  // or null: mean and rstd are constants
  double count;
  T *dx, *dz;
  FC_HOST_DEVICE void prepare(int64_t channel, Channels& c) const {
    args.prepare(channel, c.of);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const double r = args.rstd[channel + j];
      c.mean_dz[j] = sum ? static_cast<P>(sum[channel + j] / count) : P(0);
      c.slope[j] = sum ? static_cast<P>(products[channel + j] * r * r / count) : P(0);
    }
  }
  FC_HOST_DEVICE void row(int64_t at, const Channels& c) const {
    P distance[WIDTH], z[WIDTH], g[WIDTH];
    args.load(at, c.of, distance, z);
    load_channels<WIDTH>(dy, at, g);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      g[j] = activate_gradient(args.activation, g[j], z[j]);
      z[j] = (g[j] - c.mean_dz[j] - distance[j] * c.slope[j]) * c.of.scale[j];
    }
    if (dz) store_channels<WIDTH>(dz, at, g);
    store_channels<WIDTH>(dx, at, z);
  }
};

template <class T>
void gradient_sums(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy, void* dz, double* totals,
                   void* dweight, void* dbias) {
  using P = Acc<T>;
  with_width<T>(
      a.channels(),
      [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        reduce_columns(a.rows(), a.channels(),
                       SumsBody<T, kWidth>{Normalized<T, kWidth>(args), static_cast<const T*>(dy), static_cast<T*>(dz)},
                       StoreSums<P>{a.channels(), totals, static_cast<const P*>(args.rstd), static_cast<P*>(dweight),
                                    static_cast<P*>(dbias)});
      },
      args.x, args.residual, dy, dz);
}

template <class T>
void input_gradient(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy, const double* sum,
                    const double* products, int64_t count, void* dx, void* dz) {
  with_width<T>(
      a.channels(),
      [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        map_columns(a.rows(), a.channels(),
                    BackwardBody<T, kWidth>{Normalized<T, kWidth>(args), static_cast<const T*>(dy), sum, products,
                                            static_cast<double>(count > 1 ? count : 1), static_cast<T*>(dx),
                                            static_cast<T*>(dz)});
      },
      args.x, args.residual, dy, dx, dz);
}

}  // namespace

void batch_norm_moments(const BatchNormProblem& a, const void* x, double* mean, double* squares) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(
        a.channels(),
        [&](auto width) {
          reduce_columns(a.rows(), a.channels(), MomentsBody<T, decltype(width)::value>{static_cast<const T*>(x)},
                         StoreMoments{mean, squares});
        },
        x);
  });
}

void merge_statistics(int64_t rows, int64_t channels, const SliceStatistics* slices, int64_t pixels, double* moments) {
  reduce_columns((rows + pixels - 1) / pixels, channels, SlicesBody{slices, channels, pixels, rows},
                 StoreMoments{moments, moments + channels});
}

void batch_norm_statistics(const BatchNormProblem& a, const Moments& of, void* mean, void* rstd,
                           void* unbiased_variance) {
  dispatch_float(a.parameter_dtype(), [&](auto p) {
    using P = decltype(p);
    for_each(a.channels(), Statistics<P>{of.count, a.eps, of.mean, of.squares, static_cast<P*>(mean),
                                         static_cast<P*>(rstd), static_cast<P*>(unbiased_variance)});
  });
}

void update_running(DType dtype, int64_t channels, const void* batch, double momentum, void* running) {
  dispatch_float(dtype, [&](auto p) {
    using P = decltype(p);
    for_each(channels, UpdateRunning<P>{static_cast<const P*>(batch), momentum, static_cast<P*>(running)});
  });
}

void reciprocal_std(DType dtype, int64_t channels, const void* variance, double eps, void* rstd) {
  dispatch_float(dtype, [&](auto p) {
    using P = decltype(p);
    for_each(channels, ReciprocalStd<P>{static_cast<const P*>(variance), eps, static_cast<P*>(rstd)});
  });
}

void batch_norm_forward(const BatchNormProblem& a, const BatchNormArguments& args, void* y) {
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(
        a.channels(),
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          map_columns(a.rows(), a.channels(), ForwardBody<T, kWidth>{Normalized<T, kWidth>(args), static_cast<T*>(y)});
        },
        args.x, args.residual, y);
  });
}

void batch_norm_backward_sums(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy, void* dz,
                              double* totals) {
  dispatch_real(a.dtype, [&](auto t) { gradient_sums<decltype(t)>(a, args, dy, dz, totals, nullptr, nullptr); });
}

void batch_norm_backward_input(const BatchNormProblem& a, const BatchNormArguments& args, const void* dy,
                               const double* sum, const double* products, int64_t count, void* dx) {
  dispatch_real(a.dtype, [&](auto t) { input_gradient<decltype(t)>(a, args, dy, sum, products, count, dx, nullptr); });
}

void batch_norm_backward(const BatchNormProblem& a, const BatchNormArguments& given, const void* dy, bool training,
                         const BatchNormGradients& out) {
  const bool sums = (training && out.dx) || out.dweight || out.dbias;
  if (!sums && !out.dx && !out.dresidual) return;
  BatchNormArguments args = given;
  void* dresidual = out.dresidual;
  const Buffer vectors(2 * a.channels() * sizeof(double) + 1);
  auto* totals = vectors.as<double>();
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (sums || !out.dx) {
      gradient_sums<T>(a, args, dy, dresidual, totals, out.dweight, out.dbias);
      if (dresidual) {  // the derivative has been applied: the second pass need not find it again
        dy = dresidual;
        dresidual = nullptr;
        args.activation = Activation::kNone;
      }
    }
    if (!out.dx) return;
    if (args.activation == Activation::kNone) args.residual = nullptr;  // z serves the activation alone
    input_gradient<T>(a, args, dy, training ? totals : nullptr, totals + a.channels(), a.rows(), out.dx, dresidual);
  });
}

void batch_norm_max_pool(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool, void* y,
                         uint8_t* places) {
  const int64_t outputs = pool.n * pool.p() * pool.q() * pool.c;
  if (outputs == 0) return;
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(
        a.channels(),
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          using Image = NormalizedImage<T, kWidth>;
          for_each(outputs / kWidth,
                   Maximum<T, kWidth, uint8_t, Image>{make_pool_geometry(pool), Image{Normalized<T, kWidth>(args)},
                                                      static_cast<T*>(y), nullptr, places});
        },
        args.x, y, places);
  });
}

void batch_norm_max_pool_backward(const BatchNormProblem& a, const BatchNormArguments& args, const Pool2dProblem& pool,
                                  const void* dy, const uint8_t* places, const BatchNormGradients& out) {
  backward_one_by_one(a, args, pool, dy, places, out);
}

}  // namespace fastconv::cuda

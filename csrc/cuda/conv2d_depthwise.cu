// Depthwise convolution: every channel its own kernel, so a few multiply-adds for each number read; memory decides. A
// thread has 16 bytes of channels (one channel where they do not fill that) of kPixels results beside each other, reads
// each source pixel of a row once and gives it to all taps that want it.
#include "cuda/activation.h"
#include "cuda/columns.h"
#include "cuda/conv2d.h"
#include "cuda/conv2d_operands.h"
#include "cuda/geometry.h"

namespace fastconv::cuda::depthwise {
namespace {

constexpr int kPixels = 4;

// Calls f(values, result, tap) for the source pixels of kPixels results along a row and the kTaps taps that begin at
// `first_tap`: result i, tap t reads pixel first + i * step + t. kStep 0: the step is known only here, and kTaps is 1.
template <class T, int kWidth, int kTaps, int kStep, class F>
FC_INLINE void for_row(const T* row, int columns, int64_t channels, int first, int step, F&& f) {
  constexpr int kReach = kStep == 0 ? kPixels : (kPixels - 1) * kStep + kTaps;
#pragma unroll
  for (int i = 0; i < kReach; ++i) {
    const int at = first + (kStep == 0 ? i * step : i);
    Acc<T> values[kWidth] = {};
    if (at >= 0 && at < columns) load_channels<kWidth>(row, at * channels, values);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      constexpr int kBy = kStep == 0 ? 1 : kStep;
      if (i >= tap && (i - tap) % kBy == 0 && (i - tap) / kBy < kPixels) f(values, (i - tap) / kBy, tap);
    }
  }
}

// One axis of results for each: forward, or one phase of the input gradient.
template <class T, int kWidth, int kTaps, int kStep> struct Convolve {
  static constexpr int kThreads = kBlockThreads, kPhases = 1;
  using Shared = Nothing;
  using Local = Nothing;

  int threads;
  Axis h, w;
  int source_h, source_w, result_h, result_w, kernel_w;
  int64_t channels;
  const T *source, *weights;  // weights [r][s][channels]
  const T *bias, *residual;
  Acc<T> low, high;
  T* result;

  // Threads count image, row, kPixels columns, channels; the last runs fastest. In 32 bits: divisions of 64 are calls,
  // around which registers would be spilled.
  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared&, Local&) const {
    const int i = static_cast<int>(block) * kThreads + thread, units = static_cast<int>(channels) / kWidth;
    if (i >= threads) return;
    const int blocks = divide_up(w.results, kPixels);
    const int64_t channel = i % units * kWidth;
    const Pixel at = pixel_of(i / units, h.results, blocks);
    const int column = at.j * kPixels, first = w.source_first + column * w.source_step;
    Acc<T> sum[kPixels][kWidth] = {};
    for (int a = 0; a < h.taps; ++a) {
      const int row = h.source_first + at.i * h.source_step + a * h.tap_step;
      if (row < 0 || row >= source_h) continue;
      const T* from = source + (static_cast<int64_t>(at.n) * source_h + row) * source_w * channels + channel;
      const T* taps = weights + (h.weight_first + a * h.weight_step) * kernel_w * channels + channel;
      for (int b = 0; b < w.taps; b += kTaps) {
        Acc<T> weight[kTaps][kWidth];
#pragma unroll
        for (int t = 0; t < kTaps; ++t)
          load_channels<kWidth>(taps, (w.weight_first + (b + t) * w.weight_step) * channels, weight[t]);
        for_row<T, kWidth, kTaps, kStep>(from, source_w, channels, first + b * w.tap_step, w.source_step,
                                         [&](const Acc<T>(&values)[kWidth], int pixel, int tap) {
#pragma unroll
                                           for (int c = 0; c < kWidth; ++c) sum[pixel][c] += values[c] * weight[tap][c];
                                         });
      }
    }
    const int64_t line =
        (static_cast<int64_t>(at.n) * result_h + h.result_first + at.i * h.result_step) * result_w + w.result_first;
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      if (column + pixel >= w.results) continue;
      const int64_t to = (line + static_cast<int64_t>(column + pixel) * w.result_step) * channels + channel;
      Acc<T> extra[kWidth];
      if (bias) {
        load_channels<kWidth>(bias, channel, extra);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[pixel][c] += extra[c];
      }
      if (residual) {
        load_channels<kWidth>(residual, to, extra);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[pixel][c] += extra[c];
      }
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum[pixel][c] = clamped(sum[pixel][c], low, high);
      store_channels<kWidth>(result, to, sum[pixel]);
    }
  }
};

// Partial sums [slice][r][s][channels] of the weight gradient. A block has the channels and slice of a ColumnGrid,
// whose rows are pieces of kPixels pixels of dy, and kTaps taps of one kernel row.
template <class T, int kWidth, int kTaps, int kStep> struct PartialWeight {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    Acc<T> sums[kTaps][kWidth][kBlockThreads];
  };
  using Local = Nothing;

  ColumnGrid grid;
  Axis h, w;
  int source_h, source_w;
  const T *x, *dy;
  Acc<T>* partial;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    const int groups_w = w.taps / kTaps, groups = h.taps * groups_w;
    const int group = static_cast<int>(block % groups), r = group / groups_w, s = group % groups_w * kTaps;
    const ColumnPlace place = column_place(grid, block / groups, thread);
    const bool active = place.channel < grid.channels;
    if constexpr (PHASE == 0) {
      Acc<T> sum[kTaps][kWidth] = {};
      const int pieces = divide_up(w.results, kPixels);
      for (int64_t row = place.first_row; active && row < place.end_row; row += grid.height) {
        const Pixel at = pixel_of(static_cast<int>(row), h.results, pieces);
        const int source_row = h.source_first + at.i * h.source_step + r * h.tap_step, column = at.j * kPixels;
        if (source_row < 0 || source_row >= source_h) continue;
        const T* line =
            dy + (static_cast<int64_t>(at.n) * h.results + at.i) * w.results * grid.channels + place.channel;
        Acc<T> of_dy[kPixels][kWidth] = {};
#pragma unroll
        for (int pixel = 0; pixel < kPixels; ++pixel)
          if (column + pixel < w.results)
            load_channels<kWidth>(line, static_cast<int64_t>(column + pixel) * grid.channels, of_dy[pixel]);
        for_row<T, kWidth, kTaps, kStep>(
            x + (static_cast<int64_t>(at.n) * source_h + source_row) * source_w * grid.channels + place.channel,
            source_w, grid.channels, w.source_first + column * w.source_step + s * w.tap_step, w.source_step,
            [&](const Acc<T>(&values)[kWidth], int pixel, int tap) {
#pragma unroll
              for (int c = 0; c < kWidth; ++c) sum[tap][c] += values[c] * of_dy[pixel][c];
            });
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) shared.sums[tap][c][thread] = sum[tap][c];
    } else {
      if (place.height != 0 || !active) return;
      for (int tap = 0; tap < kTaps; ++tap)
        for (int c = 0; c < kWidth; ++c) {
          Acc<T> sum = 0;
          for (int i = 0; i < grid.height; ++i) sum += shared.sums[tap][c][i * grid.lanes + place.lane];
          partial[((place.slice * h.taps + r) * w.taps + s + tap) * grid.channels + place.channel + c] = sum;
        }
    }
  }
};

// dw = the slices' partial sums, added in order.
template <class T> struct FinishWeight {
  int64_t slices, channels, taps, kernel_w;
  const Acc<T>* partial;
  T* dw;
  int64_t stride_k, stride_r, stride_s;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t k = i % channels, tap = i / channels;
    Acc<T> sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * taps * channels + i];
    dw[k * stride_k + tap / kernel_w * stride_r + tap % kernel_w * stride_s] = T(sum);
  }
};

// weights[r][s][k] from any strides.
template <class T> struct TapsFirst {
  const T* w;
  int64_t stride_k, stride_r, stride_s, channels, kernel_w;
  T* taps_first;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t k = i % channels, tap = i / channels;
    taps_first[i] = w[k * stride_k + tap / kernel_w * stride_r + tap % kernel_w * stride_s];
  }
};
template <class T> Buffer taps_first(const Conv2dProblem& a, const TensorView& w) {
  Buffer packed(a.k * a.r * a.s * sizeof(T));
  for_each(a.k * a.r * a.s,
           TapsFirst<T>{w.as<T>(), w.strides[0], w.strides[2], w.strides[3], a.k, a.s, packed.as<T>()});
  return packed;
}

// Calls f(taps, step) with the constants that fit the axis; (1, 0) fits every one.
template <class F> void with_taps(const Axis& w, bool whole_packs, F&& f) {
  using std::integral_constant;
  const auto taps = [&](auto step) {
    if (w.taps == 3) return f(integral_constant<int, 3>(), step), true;
    if (w.taps == 5) return f(integral_constant<int, 5>(), step), true;
    return false;
  };
  if (whole_packs && w.tap_step == 1) {
    if (w.source_step == 1 && taps(integral_constant<int, 1>())) return;
    if (w.source_step == 2 && taps(integral_constant<int, 2>())) return;
    if (w.source_step == 1 && w.taps == 2) return f(integral_constant<int, 2>(), integral_constant<int, 1>());
  }
  f(integral_constant<int, 1>(), integral_constant<int, 0>());
}

template <class F> void dispatch(DType t, F&& f) {
  if (t == DType::kFloat32) return f(float{});
  if (t == DType::kFloat16) return f(half_t{});
  f(bfloat16_t{});
}

struct Images {
  const void* source;
  int source_h, source_w;
  void* result;
  int result_h, result_w;
};

template <class T>
void run(const Conv2dProblem& a, const Axis& h, const Axis& w, const Images& images, const T* weights,
         const Epilogue& epilogue) {
  const T *source = static_cast<const T*>(images.source), *bias = static_cast<const T*>(epilogue.bias);
  const T* residual = static_cast<const T*>(epilogue.residual);
  T* result = static_cast<T*>(images.result);
  with_width<T>(
      a.c,
      [&](auto width) {
        with_taps(w, width > 1, [&](auto taps, auto step) {
          // Packs of one channel have only the kernel that fits every axis.
          constexpr bool kWide = width > 1;
          constexpr int kTaps = kWide ? int(taps) : 1, kStep = kWide ? int(step) : 0;
          using Kernel = Convolve<T, width, kTaps, kStep>;
          const int64_t threads = a.n * h.results * divide_up(w.results, kPixels) * (a.c / width);
          launch(Kernel{static_cast<int>(threads), h, w, images.source_h, images.source_w, images.result_h,
                        images.result_w, static_cast<int>(a.s), a.c, source, weights, bias, residual, epilogue.low,
                        epilogue.high, result},
                 ceil_divide(threads, kBlockThreads));
        });
      },
      source, bias, residual, result);
}

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (!a.depthwise()) return "not depthwise";
  if (a.dtype == DType::kFloat64) return "float64";
  if (elements(a.x_shape()) > INT_MAX - 1024 || elements(a.y_shape()) > INT_MAX - 1024) return "more than 2^31 numbers";
  return too_large(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffer weights = taps_first<T>(a, args.w);
    const auto i = [](int64_t v) { return static_cast<int>(v); };
    run<T>(a, forward_axis(i(a.p), i(a.r), i(a.stride_h), i(a.pad_top), i(a.dilation_h)),
           forward_axis(i(a.q), i(a.s), i(a.stride_w), i(a.pad_left), i(a.dilation_w)),
           {args.x, i(a.h), i(a.w), args.y, i(a.p), i(a.q)}, weights.as<T>(), epilogue_of(args));
  });
  finish_activation(a, args);
  if (args.moments) read_moments(a, args);
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffer weights = taps_first<T>(a, args.w);
    const auto i = [](int64_t v) { return static_cast<int>(v); };
    for (int fh = 0; fh < backward_phases(i(a.h), i(a.stride_h)); ++fh)
      for (int fw = 0; fw < backward_phases(i(a.w), i(a.stride_w)); ++fw)
        run<T>(a, backward_axis(i(a.h), i(a.r), i(a.stride_h), i(a.pad_top), i(a.dilation_h), fh),
               backward_axis(i(a.w), i(a.s), i(a.stride_w), i(a.pad_left), i(a.dilation_w), fw),
               {args.dy, i(a.p), i(a.q), args.dx, i(a.h), i(a.w)}, weights.as<T>(), Epilogue());
  });
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto i = [](int64_t v) { return static_cast<int>(v); };
    const Axis h = forward_axis(i(a.p), i(a.r), i(a.stride_h), i(a.pad_top), i(a.dilation_h));
    const Axis w = forward_axis(i(a.q), i(a.s), i(a.stride_w), i(a.pad_left), i(a.dilation_w));
    const T *x = static_cast<const T*>(args.x), *dy = static_cast<const T*>(args.dy);
    const int64_t size = a.k * a.r * a.s;
    with_width<T>(
        a.c,
        [&](auto width) {
          with_taps(w, width > 1, [&](auto taps, auto step) {
            constexpr bool kWide = width > 1;
            constexpr int kTaps = kWide ? int(taps) : 1, kStep = kWide ? int(step) : 0;
            using Kernel = PartialWeight<T, width, kTaps, kStep>;
            const ColumnGrid grid = column_grid(a.n * a.p * divide_up(w.results, kPixels), a.c, width, 16);
            const Buffer partial(grid.slices * size * sizeof(Acc<T>));
            launch(Kernel{grid, h, w, i(a.h), i(a.w), x, dy, partial.as<Acc<T>>()},
                   grid.blocks() * a.r * (a.s / kTaps));
            for_each(size, FinishWeight<T>{grid.slices, a.k, a.r * a.s, a.s, partial.as<Acc<T>>(), args.dw.as<T>(),
                                           args.dw.strides[0], args.dw.strides[2], args.dw.strides[3]});
          });
        },
        x, dy);
  });
}

}  // namespace fastconv::cuda::depthwise

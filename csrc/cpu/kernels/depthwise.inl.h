// Depthwise convolution: one channel a group. Loops run along the channels, which are contiguous, for four neighbouring
// outputs at a time, so that every stream is sequential and a source pixel is loaded once for all taps of a row.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastconv::cpu {
namespace {

constexpr int kDepthwisePixels = 4;
constexpr int kMaxDepthwiseColumns = 5;  // kernel columns with a specialised loop

template <bool TAIL> inline Vec load_channels(const float* p, int64_t n) {
  if constexpr (TAIL) return load_first(p, n);
  return load(p);
}

template <bool TAIL> inline void store_channels(float* p, Vec a, int64_t n) {
  if constexpr (TAIL)
    store_first(p, a, n);
  else
    store(p, a);
}

// Outputs [begin, end) whose every tap lies inside [0, width): first + j * step + b * tap_step, step and tap_step > 0.
inline void interior(int64_t first, int64_t step, int64_t tap_step, int64_t taps, int64_t width, int64_t outputs,
                     int64_t* begin, int64_t* end) {
  const int64_t highest = first + (taps - 1) * tap_step;
  *begin = first >= 0 ? 0 : (-first + step - 1) / step;
  *end = highest >= width ? 0 : (width - 1 - highest) / step + 1;
  if (*end > outputs) *end = outputs;
  if (*begin > *end) *begin = *end;
}

// The taps [b0, b0 + count) of output j that lie inside.
inline void taps_inside(int64_t first, int64_t step, int64_t tap_step, int64_t taps, int64_t width, int64_t j,
                        int64_t* b0, int64_t* count) {
  *b0 = *count = 0;
  for (int64_t b = 0; b < taps; ++b) {
    const int64_t column = first + j * step + b * tap_step;
    if (column < 0 || column >= width) continue;
    if (*count == 0) *b0 = b;
    ++*count;
  }
}

// How the source pixels of P neighbouring outputs and S taps are laid out: STEP > 0 means neighbouring taps are
// neighbouring pixels and neighbouring outputs STEP apart, so that (P - 1) * STEP + S pixels are loaded once each; STEP
// = 0 any steps, P * S loads. Pixels of many channels are often a multiple of 2 KiB apart and then share two sets of
// L1: kept in registers, each line is touched once, however many taps use it.
template <int S, int STEP, int P, bool TAIL> struct DepthwiseWindow {
  static constexpr int kCount = STEP > 0 ? (P - 1) * STEP + S : P * S;
  Vec x[kCount];

  inline __attribute__((always_inline)) void read(const float* at, int64_t output, int64_t tap, int64_t n) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) {
      x[i] = load_channels<TAIL>(STEP > 0 ? at + i * tap : at + (i / S) * output + (i % S) * tap, n);
      if (STEP > 0) keep(x[i]);
    }
  }
  inline __attribute__((always_inline)) Vec operator()(int p, int b) const {
    return x[STEP > 0 ? p * STEP + b : p * S + b];
  }
};

// The image rows that the next row of outputs reads first: its loads jump from pixel to pixel, which the hardware does
// not foresee.
template <int STEP, int P>
inline __attribute__((always_inline)) void prefetch_rows(const float* at, int64_t next_row, int64_t row_step,
                                                         int64_t pixel) {
  if (STEP == 0) return;
  for (int64_t r = 1; r <= row_step; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < P * STEP; ++i) prefetch_l2(at + r * next_row + i * pixel);
}

// Outputs [begin, end) in groups of P (end - begin a multiple of P), S taps a row from column b0, all inside.
// Bound: memory for 3x3, FMA beyond; a kernel row costs P*S FMAs against S weights and (P-1)*STEP+S pixels loaded.
template <int S, int STEP, int P, bool TAIL>
void depthwise_outputs(const DepthwiseRow& t, int64_t begin, int64_t end, int64_t b0, int64_t c0, int64_t channels) {
  const int64_t output = t.step * t.x_pixel, tap = t.tap_step * t.x_pixel, y_pixel = t.y_pixel, rows = t.kernel_rows;
  const int64_t w_step = t.kernel_columns * kLanes, next_row = t.x_width * t.x_pixel;
  const float* const* const x_rows = t.x_rows;
  const float* const* const w_rows = t.w_rows;
  const float* const bias = t.bias;
  const bool plain = !t.bias && !t.residual, streaming = t.streaming;
  const int64_t row_step = t.row_step;
  const Vec low = set1(t.low), high = set1(t.high);
  for (int64_t j = begin; j < end; j += P) {
    const int64_t at = (t.first + b0 * t.tap_step + j * t.step) * t.x_pixel;
    float* const y = t.y + j * y_pixel;
    const float* const residual = t.residual ? t.residual + j * y_pixel : nullptr;
    int64_t w_at = c0 / kLanes * w_step + b0 * kLanes;
    for (int64_t c = c0; c < channels; c += kLanes, w_at += w_step) {
      const int64_t n = channels - c;
      Vec sum[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[p] = zero();
      for (int64_t a = 0; a < rows; ++a) {
        const float* const w = w_rows[a] + w_at;
        DepthwiseWindow<S, STEP, P, TAIL> window;
        window.read(x_rows[a] + at + c, output, tap, n);
#pragma GCC unroll 5
        for (int b = 0; b < S; ++b) {
          const Vec weight = load(w + b * kLanes);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sum[p] = fma(weight, window(p, b), sum[p]);
        }
      }
      prefetch_rows<STEP, P>(x_rows[rows - 1] + at + c, next_row, row_step, tap);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int64_t to = p * y_pixel + c;
        if (!plain) {
          if (bias) sum[p] = add(sum[p], load_channels<TAIL>(bias + c, n));
          if (residual) sum[p] = add(sum[p], load_channels<TAIL>(residual + to, n));
        }
        sum[p] = clamp(sum[p], low, high);
        if (!TAIL && streaming)
          stream(y + to, sum[p]);
        else
          store_channels<TAIL>(y + to, sum[p], n);
      }
    }
  }
}

// One output under `count` taps a row from b0, any number of them.
template <bool TAIL>
void depthwise_output(const DepthwiseRow& t, int64_t j, int64_t b0, int64_t count, int64_t c0, int64_t channels) {
  for (int64_t c = c0; c < channels; c += kLanes) {
    const int64_t n = channels - c, to = j * t.y_pixel + c;
    Vec sum = zero();
    for (int64_t a = 0; a < t.kernel_rows; ++a) {
      const float* w = t.w_rows[a] + (c / kLanes * t.kernel_columns + b0) * kLanes;
      const float* x = t.x_rows[a] + (t.first + b0 * t.tap_step + j * t.step) * t.x_pixel + c;
      for (int64_t b = 0; b < count; ++b)
        sum = fma(load(w + b * kLanes), load_channels<TAIL>(x + b * t.tap_step * t.x_pixel, n), sum);
    }
    if (t.bias) sum = add(sum, load_channels<TAIL>(t.bias + c, n));
    if (t.residual) sum = add(sum, load_channels<TAIL>(t.residual + to, n));
    store_channels<TAIL>(t.y + to, clamp(sum, set1(t.low), set1(t.high)), n);
  }
}

// Weight gradient: dw[a][c][b] += sum over outputs [begin, end) of dy[j] x[a][.. + b]; accumulators stay in L1.
template <int S, int STEP, int P, bool TAIL>
void depthwise_weight_outputs(const DepthwiseWeightRow& t, int64_t begin, int64_t end, int64_t b0, int64_t c0,
                              int64_t channels) {
  const int64_t output = t.step * t.pixel, tap = t.tap_step * t.pixel, pixel = t.pixel, rows = t.kernel_rows;
  const int64_t dw_step = t.kernel_columns * kLanes, next_row = t.x_width * t.pixel;
  const float* const* const x_rows = t.x_rows;
  float* const* const dw_rows = t.dw_rows;
  const int64_t row_step = t.row_step;
  for (int64_t j = begin; j < end; j += P) {
    const int64_t at = (t.first + b0 * t.tap_step + j * t.step) * pixel;
    const float* const dy_at = t.dy + j * pixel;
    int64_t dw_at = c0 / kLanes * dw_step + b0 * kLanes;
    for (int64_t c = c0; c < channels; c += kLanes, dw_at += dw_step) {
      const int64_t n = channels - c;
      Vec dy[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) dy[p] = load_channels<TAIL>(dy_at + p * pixel + c, n);
      for (int64_t a = 0; a < rows; ++a) {
        float* const dw = dw_rows[a] + dw_at;
        DepthwiseWindow<S, STEP, P, TAIL> window;
        window.read(x_rows[a] + at + c, output, tap, n);
#pragma GCC unroll 5
        for (int b = 0; b < S; ++b) {
          Vec sum = load(dw + b * kLanes);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sum = fma(dy[p], window(p, b), sum);
          store(dw + b * kLanes, sum);
        }
      }
      prefetch_rows<STEP, P>(x_rows[rows - 1] + at + c, next_row, row_step, tap);
    }
  }
}

template <bool TAIL>
void depthwise_weight_output(const DepthwiseWeightRow& t, int64_t j, int64_t b0, int64_t count, int64_t c0,
                             int64_t channels) {
  for (int64_t c = c0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Vec dy = load_channels<TAIL>(t.dy + j * t.pixel + c, n);
    for (int64_t a = 0; a < t.kernel_rows; ++a) {
      float* dw = t.dw_rows[a] + (c / kLanes * t.kernel_columns + b0) * kLanes;
      const float* x = t.x_rows[a] + (t.first + b0 * t.tap_step + j * t.step) * t.pixel + c;
      for (int64_t b = 0; b < count; ++b)
        store(dw + b * kLanes, fma(dy, load_channels<TAIL>(x + b * t.tap_step * t.pixel, n), load(dw + b * kLanes)));
    }
  }
}

// The loops of one direction: [tap columns - 1][STEP: any, 1, 2] for four outputs, [tap columns - 1] for one, and one
// for any number of taps.
template <class Row> struct DepthwiseLoops {
  using Outputs = void (*)(const Row&, int64_t begin, int64_t end, int64_t b0, int64_t c0, int64_t channels);
  Outputs four[kMaxDepthwiseColumns][3];
  Outputs one[kMaxDepthwiseColumns];
  void (*any)(const Row&, int64_t j, int64_t b0, int64_t count, int64_t c0, int64_t channels);
};

#define FC_DEPTHWISE_FOUR(F, S) \
  {F<S, 0, kDepthwisePixels, TAIL>, F<S, 1, kDepthwisePixels, TAIL>, F<S, 2, kDepthwisePixels, TAIL>}
#define FC_DEPTHWISE_LOOPS(F, ANY) \
  {{FC_DEPTHWISE_FOUR(F, 1), FC_DEPTHWISE_FOUR(F, 2), FC_DEPTHWISE_FOUR(F, 3), FC_DEPTHWISE_FOUR(F, 4), \
    FC_DEPTHWISE_FOUR(F, 5)}, \
   {F<1, 1, 1, TAIL>, F<2, 0, 1, TAIL>, F<3, 0, 1, TAIL>, F<4, 0, 1, TAIL>, F<5, 0, 1, TAIL>}, \
   ANY<TAIL>}

template <bool TAIL>
constexpr DepthwiseLoops<DepthwiseRow> kDepthwiseForward = FC_DEPTHWISE_LOOPS(depthwise_outputs, depthwise_output);
template <bool TAIL>
constexpr DepthwiseLoops<DepthwiseWeightRow> kDepthwiseWeight =
    FC_DEPTHWISE_LOOPS(depthwise_weight_outputs, depthwise_weight_output);

// All outputs of a row: fours of those whose taps all lie inside, the others singly under the taps that do.
template <class Row>
void depthwise_sweep(const Row& t, const DepthwiseLoops<Row>& loops, int64_t c0, int64_t channels) {
  const int64_t columns = t.kernel_columns;
  int64_t begin = 0, end = 0;
  if (t.kernel_rows > 0 && columns > 0 && columns <= kMaxDepthwiseColumns)
    interior(t.first, t.step, t.tap_step, columns, t.x_width, t.outputs, &begin, &end);
  const auto single = [&](int64_t j) {
    int64_t b0, count;
    taps_inside(t.first, t.step, t.tap_step, columns, t.x_width, j, &b0, &count);
    if (t.kernel_rows > 0 && count > 0 && count <= kMaxDepthwiseColumns)
      loops.one[count - 1](t, j, j + 1, b0, c0, channels);
    else
      loops.any(t, j, b0, count, c0, channels);
  };
  int64_t j = 0;
  for (; j < begin; ++j) single(j);
  const int step = t.tap_step == 1 && t.step <= 2 ? static_cast<int>(t.step) : 0;
  const int64_t fours = (end - begin) / kDepthwisePixels * kDepthwisePixels;
  if (fours > 0) loops.four[columns - 1][step](t, begin, begin + fours, 0, c0, channels);
  j += fours;
  for (; j < t.outputs; ++j) single(j);
}

void depthwise_row(const DepthwiseRow& t) {
  const int64_t full = t.channels / kLanes * kLanes;
  if (full > 0) depthwise_sweep(t, kDepthwiseForward<false>, 0, full);
  if (full < t.channels) depthwise_sweep(t, kDepthwiseForward<true>, full, t.channels);
}

void depthwise_weight_row(const DepthwiseWeightRow& t) {
  const int64_t full = t.channels / kLanes * kLanes;
  if (full > 0) depthwise_sweep(t, kDepthwiseWeight<false>, 0, full);
  if (full < t.channels) depthwise_sweep(t, kDepthwiseWeight<true>, full, t.channels);
}

}  // namespace
}  // namespace fastconv::cpu

// Depthwise convolution: one channel a group, vectorised over channels. Bound by memory for 3x3, by FMA for 5x5.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastconv::cpu {
namespace {

constexpr int kMaxDepthwiseTaps = 5;  // kernel rows and columns with a specialised loop

template <bool TAIL>
inline Vec load_channels(const float* p, int64_t n) {
  if constexpr (TAIL) return load_first(p, n);
  return load(p);
}

template <bool TAIL>
inline void store_channels(float* p, Vec a, int64_t n, bool streaming) {
  if constexpr (TAIL)
    store_first(p, a, n);
  else if (streaming)
    stream(p, a);
  else
    store(p, a);
}

// Outputs [begin, end) whose every tap lies inside [0, width): first + j * step + b * tap_step.
inline void interior(int64_t first, int64_t step, int64_t tap_step, int64_t taps, int64_t width, int64_t outputs,
                     int64_t* begin, int64_t* end) {
  const int64_t span = (taps - 1) * tap_step;
  const int64_t lowest = first + (span < 0 ? span : 0), highest = first + (span > 0 ? span : 0);
  *begin = lowest >= 0 ? 0 : (-lowest + step - 1) / step;
  *end = highest >= width ? 0 : (width - 1 - highest) / step + 1;
  if (*end > outputs) *end = outputs;
  if (*begin > *end) *begin = *end;
}

template <bool TAIL>
inline Vec depthwise_finish(const DepthwiseRow& t, Vec sum, int64_t j, int64_t c, int64_t n) {
  if (t.bias) sum = add(sum, load_channels<TAIL>(t.bias + c, n));
  if (t.residual) sum = add(sum, load_channels<TAIL>(t.residual + j * t.y_pixel + c, n));
  return clamp(sum, set1(t.low), set1(t.high));
}

// Outputs [begin, end): any tap may lie outside.
template <bool TAIL>
void depthwise_checked(const DepthwiseRow& t, int64_t begin, int64_t end, int64_t c, int64_t n) {
  for (int64_t j = begin; j < end; ++j) {
    Vec sum = zero();
    for (int64_t a = 0; a < t.kernel_rows; ++a) {
      if (!t.x_rows[a]) continue;
      for (int64_t b = 0; b < t.kernel_columns; ++b) {
        const int64_t column = t.first + j * t.step + b * t.tap_step;
        if (column < 0 || column >= t.x_width) continue;
        sum = fma(load_channels<TAIL>(t.w + (a * t.kernel_columns + b) * t.w_stride + c, n),
                  load_channels<TAIL>(t.x_rows[a] + column * t.x_pixel + c, n), sum);
      }
    }
    store_channels<TAIL>(t.y + j * t.y_pixel + c, depthwise_finish<TAIL>(t, sum, j, c, n), n, t.streaming);
  }
}

// The taps [b0, b0 + count) of output j that lie inside [0, width).
inline void taps_inside(int64_t first, int64_t step, int64_t tap_step, int64_t taps, int64_t width, int64_t j,
                        int64_t* b0, int64_t* count) {
  *count = 0;
  for (int64_t b = 0; b < taps; ++b) {
    const int64_t column = first + j * step + b * tap_step;
    if (column < 0 || column >= width) continue;
    if (*count == 0) *b0 = b;
    ++*count;
  }
}

// The kernel rows in the image, and the columns of taps [b0, b0 + S) under which outputs lie inside it.
struct DepthwiseTaps {
  const float* rows[kMaxDepthwiseTaps];     // column 0 of the source row
  const float* weights[kMaxDepthwiseTaps];  // of tap column b0
  int64_t b0;
};

// Outputs [begin, end), whose R x S taps all lie inside; weights in registers.
template <int R, int S, bool TAIL>
void depthwise_inside(const DepthwiseRow& t, const DepthwiseTaps& taps, int64_t begin, int64_t end, int64_t c,
                      int64_t n) {
  Vec w[R * S];
#pragma GCC unroll 5
  for (int a = 0; a < R; ++a)
#pragma GCC unroll 5
    for (int b = 0; b < S; ++b) w[a * S + b] = load_channels<TAIL>(taps.weights[a] + b * t.w_stride + c, n);
  const int64_t tap = t.tap_step * t.x_pixel;
  const int64_t ahead = t.x_width * t.x_pixel;  // the next image row, which the next call reads
  const bool plain = !t.bias && !t.residual;
  const Vec low = set1(t.low), high = set1(t.high);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t at = (t.first + taps.b0 * t.tap_step + j * t.step) * t.x_pixel + c;
    Vec sum = zero();
#pragma GCC unroll 5
    for (int a = 0; a < R; ++a)
#pragma GCC unroll 5
      for (int b = 0; b < S; ++b) sum = fma(w[a * S + b], load_channels<TAIL>(taps.rows[a] + at + b * tap, n), sum);
    prefetch(taps.rows[R - 1] + at + ahead);
    sum = plain ? clamp(sum, low, high) : depthwise_finish<TAIL>(t, sum, j, c, n);
    store_channels<TAIL>(t.y + j * t.y_pixel + c, sum, n, t.streaming);
  }
}

using DepthwiseInside = void (*)(const DepthwiseRow&, const DepthwiseTaps&, int64_t, int64_t, int64_t, int64_t);

template <bool TAIL>
constexpr DepthwiseInside kDepthwiseInside[kMaxDepthwiseTaps][kMaxDepthwiseTaps] = {
    {depthwise_inside<1, 1, TAIL>, depthwise_inside<1, 2, TAIL>, depthwise_inside<1, 3, TAIL>,
     depthwise_inside<1, 4, TAIL>, depthwise_inside<1, 5, TAIL>},
    {depthwise_inside<2, 1, TAIL>, depthwise_inside<2, 2, TAIL>, depthwise_inside<2, 3, TAIL>,
     depthwise_inside<2, 4, TAIL>, depthwise_inside<2, 5, TAIL>},
    {depthwise_inside<3, 1, TAIL>, depthwise_inside<3, 2, TAIL>, depthwise_inside<3, 3, TAIL>,
     depthwise_inside<3, 4, TAIL>, depthwise_inside<3, 5, TAIL>},
    {depthwise_inside<4, 1, TAIL>, depthwise_inside<4, 2, TAIL>, depthwise_inside<4, 3, TAIL>,
     depthwise_inside<4, 4, TAIL>, depthwise_inside<4, 5, TAIL>},
    {depthwise_inside<5, 1, TAIL>, depthwise_inside<5, 2, TAIL>, depthwise_inside<5, 3, TAIL>,
     depthwise_inside<5, 4, TAIL>, depthwise_inside<5, 5, TAIL>},
};

// One vector of channels: outputs [begin, end) have all their columns inside, the others some.
template <bool TAIL>
void depthwise_channels(const DepthwiseRow& t, DepthwiseTaps taps, int64_t row_taps, int64_t begin, int64_t end,
                        int64_t c, int64_t n) {
  const auto edge = [&](int64_t j) {
    DepthwiseTaps some = taps;
    int64_t count;
    taps_inside(t.first, t.step, t.tap_step, t.kernel_columns, t.x_width, j, &some.b0, &count);
    if (count == 0) return depthwise_checked<TAIL>(t, j, j + 1, c, n);
    for (int64_t a = 0; a < row_taps; ++a) some.weights[a] += some.b0 * t.w_stride;
    kDepthwiseInside<TAIL>[row_taps - 1][count - 1](t, some, j, j + 1, c, n);
  };
  for (int64_t j = 0; j < begin; ++j) edge(j);
  if (begin < end) kDepthwiseInside<TAIL>[row_taps - 1][t.kernel_columns - 1](t, taps, begin, end, c, n);
  for (int64_t j = end; j < t.outputs; ++j) edge(j);
}

void depthwise_row(const DepthwiseRow& t) {
  DepthwiseTaps taps{};
  int64_t row_taps = 0;
  const bool small = t.kernel_rows <= kMaxDepthwiseTaps && t.kernel_columns <= kMaxDepthwiseTaps;
  for (int64_t a = 0; small && a < t.kernel_rows; ++a)
    if (t.x_rows[a]) {
      taps.rows[row_taps] = t.x_rows[a];
      taps.weights[row_taps++] = t.w + a * t.kernel_columns * t.w_stride;
    }
  int64_t begin = 0, end = 0;
  if (row_taps > 0) interior(t.first, t.step, t.tap_step, t.kernel_columns, t.x_width, t.outputs, &begin, &end);
  int64_t c = 0;
  for (; c < t.channels; c += kLanes) {
    const int64_t n = t.channels - c;
    if (row_taps == 0 && n >= kLanes)
      depthwise_checked<false>(t, 0, t.outputs, c, kLanes);
    else if (row_taps == 0)
      depthwise_checked<true>(t, 0, t.outputs, c, n);
    else if (n >= kLanes)
      depthwise_channels<false>(t, taps, row_taps, begin, end, c, kLanes);
    else
      depthwise_channels<true>(t, taps, row_taps, begin, end, c, n);
  }
}

// Adds the R x S taps from kernel row a0 on, over all output rows where these R kernel rows lie in the image, with the
// accumulators in registers throughout.
template <int R, int S, bool TAIL>
void depthwise_weight_inside(const DepthwiseWeightRow& t, int64_t a0, int64_t begin, int64_t end, int64_t c,
                             int64_t n) {
  Vec acc[R * S];
#pragma GCC unroll 25
  for (int i = 0; i < R * S; ++i) acc[i] = zero();
  const int64_t tap = t.tap_step * t.pixel;
  for (int64_t y = 0; y < t.output_rows; ++y) {
    const float* const* rows = t.x_rows + y * t.kernel_rows + a0;
    bool inside = true;
#pragma GCC unroll 5
    for (int a = 0; a < R; ++a) inside = inside && rows[a];
    if (!inside) continue;
    const float* dy = t.dy_rows[y] + c;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = (t.first + j * t.step) * t.pixel + c;
      const Vec g = load_channels<TAIL>(dy + j * t.pixel, n);
#pragma GCC unroll 5
      for (int a = 0; a < R; ++a)
#pragma GCC unroll 5
        for (int b = 0; b < S; ++b)
          acc[a * S + b] = fma(g, load_channels<TAIL>(rows[a] + at + b * tap, n), acc[a * S + b]);
    }
  }
#pragma GCC unroll 25
  for (int i = 0; i < R * S; ++i) {
    float* out = t.dw + ((a0 + i / S) * t.kernel_columns + i % S) * t.dw_stride + c;
    const Vec sum = add(load_channels<TAIL>(out, n), acc[i]);
    if constexpr (TAIL)
      store_first(out, sum, n);
    else
      store(out, sum);
  }
}

// Kernel row a of large kernels in output row y; any column may lie outside.
template <bool TAIL>
void depthwise_weight_checked(const DepthwiseWeightRow& t, int64_t y, int64_t a, int64_t c, int64_t n) {
  const float* x = t.x_rows[y * t.kernel_rows + a];
  if (!x) return;
  for (int64_t b = 0; b < t.kernel_columns; ++b) {
    float* out = t.dw + (a * t.kernel_columns + b) * t.dw_stride + c;
    Vec sum = zero();
    for (int64_t j = 0; j < t.outputs; ++j) {
      const int64_t column = t.first + j * t.step + b * t.tap_step;
      if (column < 0 || column >= t.x_width) continue;
      sum = fma(load_channels<TAIL>(t.dy_rows[y] + j * t.pixel + c, n),
                load_channels<TAIL>(x + column * t.pixel + c, n), sum);
    }
    sum = add(load_channels<TAIL>(out, n), sum);
    if constexpr (TAIL)
      store_first(out, sum, n);
    else
      store(out, sum);
  }
}

// All taps at once need R*S accumulators, dy and one operand in registers.
constexpr bool fits_registers(int taps) { return taps + 2 <= (kTilePixels > 8 ? 32 : 16); }

// Outputs [begin, end) of all rows, whose S columns of taps all lie inside. Rows at the image's edge miss some kernel
// rows: those go a kernel row at a time, the rest all taps at once where the registers suffice.
template <int R, int S, bool TAIL>
void depthwise_weight_columns(const DepthwiseWeightRow& t, int64_t begin, int64_t end, int64_t c, int64_t n) {
  if constexpr (R > 1 && fits_registers(R * S)) {
    DepthwiseWeightRow row = t;
    row.output_rows = 1;
    for (int64_t y = 0; y < t.output_rows; ++y) {
      bool inside = true;
      for (int64_t a = 0; a < R; ++a) inside = inside && t.x_rows[y * R + a];
      if (inside) continue;
      row.x_rows = t.x_rows + y * R;
      row.dy_rows = t.dy_rows + y;
      for (int64_t a = 0; a < R; ++a) depthwise_weight_inside<1, S, TAIL>(row, a, begin, end, c, n);
    }
    depthwise_weight_inside<R, S, TAIL>(t, 0, begin, end, c, n);
  } else {
    for (int64_t a = 0; a < R; ++a) depthwise_weight_inside<1, S, TAIL>(t, a, begin, end, c, n);
  }
}

using DepthwiseWeightColumns = void (*)(const DepthwiseWeightRow&, int64_t, int64_t, int64_t, int64_t);

template <bool TAIL>
constexpr DepthwiseWeightColumns kDepthwiseWeightColumns[kMaxDepthwiseTaps][kMaxDepthwiseTaps] = {
    {depthwise_weight_columns<1, 1, TAIL>, depthwise_weight_columns<1, 2, TAIL>, depthwise_weight_columns<1, 3, TAIL>,
     depthwise_weight_columns<1, 4, TAIL>, depthwise_weight_columns<1, 5, TAIL>},
    {depthwise_weight_columns<2, 1, TAIL>, depthwise_weight_columns<2, 2, TAIL>, depthwise_weight_columns<2, 3, TAIL>,
     depthwise_weight_columns<2, 4, TAIL>, depthwise_weight_columns<2, 5, TAIL>},
    {depthwise_weight_columns<3, 1, TAIL>, depthwise_weight_columns<3, 2, TAIL>, depthwise_weight_columns<3, 3, TAIL>,
     depthwise_weight_columns<3, 4, TAIL>, depthwise_weight_columns<3, 5, TAIL>},
    {depthwise_weight_columns<4, 1, TAIL>, depthwise_weight_columns<4, 2, TAIL>, depthwise_weight_columns<4, 3, TAIL>,
     depthwise_weight_columns<4, 4, TAIL>, depthwise_weight_columns<4, 5, TAIL>},
    {depthwise_weight_columns<5, 1, TAIL>, depthwise_weight_columns<5, 2, TAIL>, depthwise_weight_columns<5, 3, TAIL>,
     depthwise_weight_columns<5, 4, TAIL>, depthwise_weight_columns<5, 5, TAIL>},
};

// One vector of channels: outputs [begin, end) have all their columns inside, the others some.
template <bool TAIL>
void depthwise_weight_channels(const DepthwiseWeightRow& t, int64_t begin, int64_t end, int64_t c, int64_t n) {
  if (t.kernel_rows > kMaxDepthwiseTaps || t.kernel_columns > kMaxDepthwiseTaps) {
    for (int64_t y = 0; y < t.output_rows; ++y)
      for (int64_t a = 0; a < t.kernel_rows; ++a) depthwise_weight_checked<TAIL>(t, y, a, c, n);
    return;
  }
  const auto* columns = kDepthwiseWeightColumns<TAIL>[t.kernel_rows - 1];
  const auto edge = [&](int64_t j) {
    int64_t b0, count;
    taps_inside(t.first, t.step, t.tap_step, t.kernel_columns, t.x_width, j, &b0, &count);
    if (count == 0) return;
    DepthwiseWeightRow some = t;
    some.first += b0 * t.tap_step;
    some.dw += b0 * t.dw_stride;
    columns[count - 1](some, j, j + 1, c, n);
  };
  for (int64_t j = 0; j < begin; ++j) edge(j);
  if (begin < end) columns[t.kernel_columns - 1](t, begin, end, c, n);
  for (int64_t j = end; j < t.outputs; ++j) edge(j);
}

void depthwise_weight_rows(const DepthwiseWeightRow& t) {
  int64_t begin, end;
  interior(t.first, t.step, t.tap_step, t.kernel_columns, t.x_width, t.outputs, &begin, &end);
  int64_t c = 0;
  for (; c + kLanes <= t.channels; c += kLanes) depthwise_weight_channels<false>(t, begin, end, c, kLanes);
  if (c < t.channels) depthwise_weight_channels<true>(t, begin, end, c, t.channels - c);
}

}  // namespace
}  // namespace fastconv::cpu

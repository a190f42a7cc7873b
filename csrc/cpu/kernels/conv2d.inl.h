// Direct convolution on packed bands: register tiles and packing, written once for all ISAs.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastconv::cpu {
namespace {

constexpr int kTileVectors = 2;

// direct_tile: y[ROWS*P][V*lanes] = sum over blocks, taps, channels of x[pixel][channel] * w[channel][V*lanes].
//   x  packed pixels BLOCK floats apart, so a pixel is a displacement of its row's pointer
//   w  one panel, read once from front to back
// Registers: ROWS*P*V accumulators + V weights + 1 broadcast.
// Bound: FMA; ROWS*P*V FMAs against ROWS*P + V loads a step.
// Tails: the panel is zero-padded in k; the last block runs its own number of channels; only the store looks at k.
template <int BLOCK, int V, int ROWS, int P> void direct_tile(const DirectTile& t) {
  constexpr int W = V * kLanes;
  Vec acc[ROWS * P][V];
#pragma GCC unroll 32
  for (int p = 0; p < ROWS * P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[p][v] = zero();

  for (int64_t b = 0; b < t.blocks; ++b) {
    const int64_t channels = b + 1 < t.blocks ? BLOCK : t.last_channels;
    const float* panel = t.w + b * t.panel_taps * BLOCK * W;
    for (int64_t i = 0; i < t.tap_count; ++i) {
      const float* x0 = t.taps[i].x[0] + t.x_offset + b * t.block_stride;
      const float* x1 = ROWS > 1 ? t.taps[i].x[1] + t.x_offset + b * t.block_stride : nullptr;
      const float* w = panel + t.taps[i].index * channels * W;
      const float* next = t.next + (w - t.w);
      const auto step = [&](int64_t c) __attribute__((always_inline)) {
        Vec weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[v] = load(w + c * W + v * kLanes);
        if constexpr (BLOCK == kBlock) {
#pragma GCC unroll 2
          for (int i = 0; i < W; i += kBlock) prefetch_l2(next + c * W + i);
          prefetch(x0 + t.block_stride + c * BLOCK);
        }
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const Vec x = set1(x0[p * BLOCK + c]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[p][v] = fma(x, weights[v], acc[p][v]);
        }
        if constexpr (ROWS > 1) {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            const Vec x = set1(x1[p * BLOCK + c]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[P + p][v] = fma(x, weights[v], acc[P + p][v]);
          }
        }
      };
      if (channels == BLOCK) {
#pragma GCC unroll 2
        for (int64_t c = 0; c < BLOCK; ++c) step(c);
      } else if (BLOCK == kSmallBlock && channels == 3) {  // colour images
#pragma GCC unroll 3
        for (int64_t c = 0; c < 3; ++c) step(c);
      } else {
#pragma GCC unroll 1
        for (int64_t c = 0; c < channels; ++c) step(c);
      }
    }
  }

  const Vec low = set1(t.low), high = set1(t.high);
  const bool plain = !t.bias && !t.residual && t.low == -__builtin_inff() && t.high == __builtin_inff();
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t n = t.channels - v * kLanes;
    if (n <= 0) break;
    const bool full = n >= kLanes;
    const Vec bias = !t.bias ? zero() : full ? load(t.bias + v * kLanes) : load_first(t.bias + v * kLanes, n);
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const int64_t at = r * t.row_stride + p * t.pixel_stride + v * kLanes;
        Vec sum = acc[r * P + p][v];
        if (!plain) {
          sum = add(sum, bias);
          if (t.residual) sum = add(sum, full ? load(t.residual + at) : load_first(t.residual + at, n));
          sum = clamp(sum, low, high);
        }
        if (!full)
          store_first(t.y + at, sum, n);
        else if (t.streaming)
          stream(t.y + at, sum);
        else
          store(t.y + at, sum);
      }
  }
}

void pack_pixels(const float* src, int64_t src_step, int64_t pixels, int64_t channels, float* dst,
                 int64_t block_stride) {
  for (int64_t p = 0; p < pixels; ++p) {
    const float* s = src + p * src_step;
    float* d = dst + p * kBlock;
    int64_t c = 0;
    for (; c + kBlock <= channels; c += kBlock, d += block_stride)
      for (int i = 0; i < kBlock; i += kLanes) store(d + i, load(s + c + i));
    if (c < channels)
      for (int i = 0; i < kBlock; i += kLanes) {
        const int64_t n = channels - c - i;
        store(d + i, n >= kLanes ? load(s + c + i) : n > 0 ? load_first(s + c + i, n) : zero());
      }
  }
}

void pack_slice(const float* src, int64_t src_step, int64_t pixels, int64_t valid, int64_t width, float* dst) {
  for (int64_t p = 0; p < pixels; ++p, src += src_step, dst += width)
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = valid - i;
      store(dst + i, n >= kLanes ? load(src + i) : n > 0 ? load_first(src + i, n) : zero());
    }
}

void pack_small_pixels(const float* src, int64_t src_step, int64_t pixels, int64_t channels, float* dst) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) dst[p * kSmallBlock + c] = src[p * src_step + c];
}

// dst[i * dst_step + j] = src[j * src_step + i] for a square of kLanes: rows i and i + L/2 are zipped, log2(L) times.
inline void transpose_square(const float* src, int64_t src_step, float* dst, int64_t dst_step) {
  typedef int Index __attribute__((vector_size(sizeof(Vec))));
  Index low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  Vec rows[kLanes], zipped[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = load(src + i * src_step);
    // So many rows at once are more streams than the hardware follows.
    prefetch(src + i * src_step + 4 * kLanes);
    prefetch(dst + i * dst_step + kLanes);
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(dst + i * dst_step, rows[i]);
}

// Rows of the weights are often a multiple of 4 KiB apart, so a loop that takes one element of each in turn would miss
// L1 every time; squares read each cache line once.
void pack_weights(const float* src, int64_t out_step, int64_t in_step, int64_t outs, int64_t ins, int64_t width,
                  float* dst) {
  const bool squares = in_step == 1 && out_step != 1;
  const int64_t square_outs = squares ? outs / kLanes * kLanes : 0, square_ins = squares ? ins / kLanes * kLanes : 0;
  for (int64_t o = 0; o < square_outs; o += kLanes)
    for (int64_t i = 0; i < square_ins; i += kLanes)
      transpose_square(src + o * out_step + i, out_step, dst + i * width + o, width);
  if (out_step == 1) {
    for (int64_t i = 0; i < ins; ++i) {
      for (int64_t o = 0; o < width; o += kBlock) prefetch(src + (i + 8) * in_step + o);
      pack_slice(src + i * in_step, 0, 1, outs, width, dst + i * width);
    }
    return;
  }
  for (int64_t o = 0; o < outs; ++o)
    for (int64_t i = o < square_outs ? square_ins : 0; i < ins; ++i)
      dst[i * width + o] = src[o * out_step + i * in_step];
  for (int64_t i = 0; i < ins; ++i)
    for (int64_t o = outs; o < width; ++o) dst[i * width + o] = 0.0f;
}

void unpack_weights(const float* src, int64_t width, int64_t outs, int64_t ins, float* dst, int64_t out_step,
                    int64_t in_step) {
  const bool squares = in_step == 1;
  const int64_t square_outs = squares ? outs / kLanes * kLanes : 0, square_ins = squares ? ins / kLanes * kLanes : 0;
  for (int64_t o = 0; o < square_outs; o += kLanes)
    for (int64_t i = 0; i < square_ins; i += kLanes)
      transpose_square(src + i * width + o, width, dst + o * out_step + i, out_step);
  for (int64_t o = 0; o < outs; ++o)
    for (int64_t i = o < square_outs ? square_ins : 0; i < ins; ++i)
      dst[o * out_step + i * in_step] = src[i * width + o];
}

// weight_tile: C channels x V vectors of one tap's weight gradient, summed over a band of pixels.
// Registers: C*V accumulators + V of dy + 1 broadcast. Bound: FMA; C*V FMAs against C + V loads a pixel.
template <int C, int V> void weight_tile_part(const WeightTile& t, int64_t c0) {
  constexpr int W = V * kLanes;
  Vec acc[C][V];
  float* out = t.acc + c0 * W;
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[c][v] = load(out + c * W + v * kLanes);
  const float* dy = t.dy;
  const float* next = t.next;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = t.x + t.row_offsets[r] + c0;
#pragma GCC unroll 2
    for (int64_t q = 0; q < t.columns; ++q, x += kBlock, dy += W, next += kBlock) {
      prefetch(next);
      Vec g[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) g[v] = load(dy + v * kLanes);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const Vec a = set1(x[c]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[c][v] = fma(a, g[v], acc[c][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + c * W + v * kLanes, acc[c][v]);
}

void weight_tile(const WeightTile& t) {
  for (int64_t c = 0; c < t.channels; c += kTileChannels)
    if (t.width == kLanes)
      weight_tile_part<kTileChannels, 1>(t, c);
    else
      weight_tile_part<kTileChannels, 2>(t, c);
}

// first_layer_weight: J (column, channel) pairs x V vectors of one kernel row, summed over a band of pixels.
// Registers and bound as weight_tile.
template <int J, int V> void first_layer_weight_part(const FirstLayerWeightTile& t, int64_t j0) {
  constexpr int W = V * kLanes;
  Vec acc[J][V];
  float* out = t.acc + j0 * W;
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[j][v] = load(out + j * W + v * kLanes);
  const float* dy = t.dy;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = t.x + r * t.x_row_step + j0;
#pragma GCC unroll 2
    for (int64_t q = 0; q < t.columns; ++q, x += t.x_step, dy += W) {
      Vec g[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) g[v] = load(dy + v * kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const Vec a = set1(x[j]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[j][v] = fma(a, g[v], acc[j][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + j * W + v * kLanes, acc[j][v]);
}

// The taps of a kernel row are cut into parts of at most kFirstTaps pairs of accumulators.
constexpr int kFirstTaps = kTilePixels > 12 ? 12 : kTilePixels;

template <int V, int J = kFirstTaps>
void first_layer_weight_dispatch(const FirstLayerWeightTile& t, int64_t j0, int64_t taps) {
  if (taps == J) return first_layer_weight_part<J, V>(t, j0);
  if constexpr (J > 1) first_layer_weight_dispatch<V, J - 1>(t, j0, taps);
}

void first_layer_weight_tile(const FirstLayerWeightTile& t) {
  const int64_t parts = (t.taps + kFirstTaps - 1) / kFirstTaps;
  for (int64_t i = 0, j = 0; i < parts; ++i) {
    const int64_t taps = (t.taps - j + parts - i - 1) / (parts - i);
    if (t.width == kLanes)
      first_layer_weight_dispatch<1>(t, j, taps);
    else
      first_layer_weight_dispatch<2>(t, j, taps);
    j += taps;
  }
}

template <int BLOCK, int V, int ROWS, int P> constexpr DirectTileFunction direct_or_null() {
  if constexpr (ROWS * P <= kTilePixels)
    return &direct_tile<BLOCK, V, ROWS, P>;
  else
    return nullptr;
}

#define FC_DIRECT_ROW(B, V, R) \
  { \
      direct_or_null<B, V, R, 1>(),  direct_or_null<B, V, R, 2>(),  direct_or_null<B, V, R, 3>(), \
      direct_or_null<B, V, R, 4>(),  direct_or_null<B, V, R, 5>(),  direct_or_null<B, V, R, 6>(), \
      direct_or_null<B, V, R, 7>(),  direct_or_null<B, V, R, 8>(),  direct_or_null<B, V, R, 9>(), \
      direct_or_null<B, V, R, 10>(), direct_or_null<B, V, R, 11>(), direct_or_null<B, V, R, 12>(), \
      direct_or_null<B, V, R, 13>(), direct_or_null<B, V, R, 14>(), direct_or_null<B, V, R, 15>(), \
      direct_or_null<B, V, R, 16>(), \
  }
#define FC_DIRECT_BLOCK(B) \
  { \
    {FC_DIRECT_ROW(B, 1, 1), FC_DIRECT_ROW(B, 1, 2)}, { FC_DIRECT_ROW(B, 2, 1), FC_DIRECT_ROW(B, 2, 2) } \
  }

}  // namespace
}  // namespace fastconv::cpu

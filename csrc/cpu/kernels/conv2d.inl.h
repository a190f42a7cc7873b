// Direct convolution on packed bands: register tiles and packing, written once for all ISAs.
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/layout.inl.h"

namespace fastconv::cpu {
namespace {

constexpr int kTileVectors = 2;

inline bool is_plain(const TileOutput& t) {
  return !t.bias && !t.residual && t.low == -__builtin_inff() && t.high == __builtin_inff();
}

// Sums of ROWS x P pixels and V vectors, finished and stored.
template <int V, int ROWS, int P>
__attribute__((always_inline)) inline void store_tile(const Vec (&sums)[ROWS * P][V], const TileOutput& t) {
  const Vec low = set1(t.low), high = set1(t.high);
  const bool plain = is_plain(t);
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
        Vec sum = sums[r * P + p][v];
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

template <int V, int ROWS, int P>
__attribute__((always_inline)) inline void prefetch_tile(const TileOutput& t, const float* first) {
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) prefetch(first + r * t.row_stride + p * t.pixel_stride + v * kLanes);
}

// Has the cache lines of a tile's outputs, and of what is added to them, at hand when its sums are finished.
template <int V, int ROWS, int P> __attribute__((always_inline)) inline void prefetch_outputs(const TileOutput& t) {
  if (t.residual) prefetch_tile<V, ROWS, P>(t, t.residual);
  if (!t.streaming) prefetch_tile<V, ROWS, P>(t, t.y);
}

// direct_tile: y[ROWS*P][V*lanes] = sum over blocks, taps, channels of x[pixel][channel] * w[channel][V*lanes].
//   x  packed pixels kBlock floats apart, so a pixel is a displacement of its row's pointer
//   w  one panel, read once from front to back
// Registers: ROWS*P*V accumulators + V weights + 1 broadcast.
// Bound: FMA; ROWS*P*V FMAs against ROWS*P + V loads a step.
// Tails: the panel is zero-padded in k; the last block runs its own number of channels; only the store looks at k.
template <int V, int ROWS, int P> void direct_tile(const DirectTile& t) {
  constexpr int W = V * kLanes;
  prefetch_outputs<V, ROWS, P>(t);
  Vec acc[ROWS * P][V];
#pragma GCC unroll 32
  for (int p = 0; p < ROWS * P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[p][v] = zero();
  if (t.accumulate)
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r * P + p][v] = load(t.y + r * t.row_stride + p * t.pixel_stride + v * kLanes);

  const float *next = t.next, *later = t.later ? t.later : t.w;
  for (int64_t b = 0; b < t.blocks; ++b) {
    const int64_t channels = b + 1 < t.blocks ? kBlock : t.last_channels;
    const float* panel = t.w + b * t.panel_taps * kBlock * W;
    for (int64_t i = 0; i < t.tap_count; ++i) {
      const float* x0 = t.taps[i].x[0] + t.x_offset + b * t.block_stride;
      const float* x1 = ROWS > 1 ? t.taps[i].x[1] + t.x_offset + b * t.block_stride : nullptr;
      const float* w = panel + t.taps[i].index * channels * W;
      const auto step = [&](int64_t c) __attribute__((always_inline)) {
        Vec weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[v] = load(w + c * W + v * kLanes);
#pragma GCC unroll 2
        for (int j = 0; j < W; j += kBlock) prefetch_l2(next + c * W + j);
        prefetch(x0 + t.block_stride + c * kBlock);
        prefetch_l2(later);
        later += t.later_step;
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const Vec x = set1(x0[p * kBlock + c]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[p][v] = fma(x, weights[v], acc[p][v]);
        }
        if constexpr (ROWS > 1) {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            const Vec x = set1(x1[p * kBlock + c]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[P + p][v] = fma(x, weights[v], acc[P + p][v]);
          }
        }
      };
      if (channels == kBlock) {
#pragma GCC unroll 2
        for (int64_t c = 0; c < kBlock; ++c) step(c);
      } else {
#pragma GCC unroll 1
        for (int64_t c = 0; c < channels; ++c) step(c);
      }
      next += channels * W;
    }
  }

  if (!is_plain(t) || t.channels < W || t.streaming) return store_tile<V, ROWS, P>(acc, t);
  // The products of Winograd: a branch for each vector took 1 to 5% of the time of a layer.
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(t.y + r * t.row_stride + p * t.pixel_stride + v * kLanes, acc[r * P + p][v]);
}

void pack_pixels(const float* src, int64_t src_step, int64_t pixels, int64_t channels, float* dst,
                 int64_t block_stride) {
  // The hardware does not foresee pixels that lie far apart: groups at stride 2. Those closer take no less time.
  constexpr int64_t kAhead = 3;
  const bool apart = src_step > 2 * channels;
  for (int64_t p = 0; p < pixels; ++p) {
    const float* s = src + p * src_step;
    float* d = dst + p * kBlock;
    int64_t c = 0;
    for (; c + kBlock <= channels; c += kBlock, d += block_stride) {
      if (apart) prefetch(s + kAhead * src_step + c);
      for (int i = 0; i < kBlock; i += kLanes) store(d + i, load(s + c + i));
    }
    if (c < channels)
      for (int i = 0; i < kBlock; i += kLanes) {
        const int64_t n = channels - c - i;
        store(d + i, n >= kLanes ? load(s + c + i) : n > 0 ? load_first(s + c + i, n) : zero());
      }
  }
}

// Bound: memory. Neighbouring pixels are further apart than the hardware fetches ahead.
void pack_panels(const float* src, int64_t src_step, int64_t pixels, int64_t panels, float* dst, int64_t panel_stride) {
  constexpr int64_t kWidth = kTileVectors * kLanes, kAhead = 4;
  for (int64_t p = 0; p < pixels; ++p, src += src_step, dst += kWidth)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* from = src + panel * kWidth;
      float* to = dst + panel * panel_stride;
      for (int64_t i = 0; i < kWidth; i += kBlock)
        prefetch(from + kAhead * src_step + i), prefetch(to + kAhead * kWidth + i);
      for (int64_t i = 0; i < kWidth; i += kLanes) store(to + i, load(from + i));
    }
}

template <class T>
void pack_slice(const T* src, int64_t src_step, int64_t pixels, int64_t valid, int64_t width, float* dst) {
  for (int64_t p = 0; p < pixels; ++p, src += src_step, dst += width)
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = valid - i;
      store(dst + i, n >= kLanes ? load(src + i) : n > 0 ? load_first(src + i, n) : zero());
    }
}

void zero_pixels(float* dst, int64_t step, int64_t pixels, int64_t channels, bool streaming) {
  for (int64_t p = 0; p < pixels; ++p, dst += step)
    for (int64_t i = 0; i < channels; i += kLanes)
      if (channels - i < kLanes)
        store_first(dst + i, zero(), channels - i);
      else if (streaming)
        stream(dst + i, zero());
      else
        store(dst + i, zero());
}

// Rows of the weights are often a multiple of 4 KiB apart, so a loop that takes one element of each in turn would miss
// L1 every time; squares read each cache line once.
template <class T>
void pack_weights(const T* src, int64_t out_step, int64_t in_step, int64_t outs, int64_t ins, int64_t width,
                  float* dst) {
  if (out_step == 1) {
    for (int64_t i = 0; i < ins; ++i) {
      for (int64_t o = 0; o < width; o += kBlock) prefetch(src + (i + 8) * in_step + o);
      pack_slice(src + i * in_step, 0, 1, outs, width, dst + i * width);
    }
    return;
  }
  if (in_step != 1 || !for_squares(outs, ins, [&](int64_t o, int64_t i) {
        transpose_square<Stores::kPlain>(src + o * out_step + i, out_step, dst + i * width + o, width);
      }))
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t i = 0; i < ins; ++i) dst[i * width + o] = to_float(src[o * out_step + i * in_step]);
  for (int64_t i = 0; i < ins; ++i)
    for (int64_t o = outs; o < width; ++o) dst[i * width + o] = 0.0f;
}

void unpack_weights(const float* src, int64_t width, int64_t outs, int64_t ins, float* dst, int64_t out_step,
                    int64_t in_step, bool streaming) {
  if (in_step == 1 && for_squares(outs, ins, [&](int64_t o, int64_t i) {
        const float* from = src + i * width + o;
        float* to = dst + o * out_step + i;
        if (streaming && i % kLanes == 0)
          transpose_square<Stores::kStreaming>(from, width, to, out_step);
        else
          transpose_square<Stores::kPlain>(from, width, to, out_step);
      }))
    return;
  for (int64_t o = 0; o < outs; ++o)
    for (int64_t i = 0; i < ins; ++i) dst[o * out_step + i * in_step] = src[i * width + o];
}

// Weights whose taps lie side by side in memory, as those of an NCHW kernel. Mostly all taps of all inputs of an output
// do, and they are transposed in squares, whatever input they belong to. Bound: memory.

// Where the elements of an output's taps, one after the other, have their place in a panel.
class TapPlaces {
 public:
  TapPlaces(const int64_t* places, int64_t taps, int64_t width) : places_(places), taps_(taps), width_(width) {}
  int64_t next() {
    const int64_t place = places_[tap_] + input_;
    if (++tap_ == taps_) tap_ = 0, input_ += width_;
    return place;
  }

 private:
  const int64_t* places_;
  int64_t taps_, width_, tap_ = 0, input_ = 0;
};

template <class T>
void pack_taps(const T* src, int64_t out_step, int64_t in_step, int64_t taps, int64_t outs, int64_t ins, int64_t width,
               const int64_t* places, float* dst) {
  constexpr int64_t kLine = 64 / sizeof(T);
  Vec rows[kLanes];
  if (in_step == taps) {
    for (int64_t o = 0; o < width; o += kLanes) {
      TapPlaces place(places, taps, width);
      for (int64_t e = 0; e < ins * taps; e += kLanes) {
        const int64_t left = ins * taps - e, count = left < kLanes ? left : kLanes, valid = outs - o;
        const T* from = src + o * out_step + e;
        if (count == kLanes && valid >= kLanes) {
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) {
            rows[j] = load(from + j * out_step);
            prefetch(from + j * out_step + 4 * kLine);  // so many rows are more streams than the hardware follows
          }
        } else {
          for (int j = 0; j < kLanes; ++j) rows[j] = j < valid ? load_first(from + j * out_step, count) : zero();
        }
        transpose_rows(rows);
        for (int j = 0; j < count; ++j) store(dst + place.next() + o, rows[j]);
      }
    }
    return;
  }
  constexpr int64_t kAhead = 8;  // inputs, which are further apart than the hardware fetches ahead
  for (int64_t i = 0; i < ins; ++i) {
    if (out_step == taps) {
      const T* ahead = src + (i + kAhead) * in_step;
      for (int64_t e = 0; e < outs * taps; e += kLine) prefetch(ahead + e);
    }
    for (int64_t o = 0; o < width; o += kLanes)
      for (int64_t t = 0; t < taps; t += kLanes) {
        const int64_t count = taps - t < kLanes ? taps - t : kLanes, valid = outs - o;
        const T* from = src + o * out_step + i * in_step + t;
        for (int j = 0; j < kLanes; ++j) rows[j] = j < valid ? load_first(from + j * out_step, count) : zero();
        transpose_rows(rows);
        for (int j = 0; j < count; ++j) store(dst + places[t + j] + i * width + o, rows[j]);
      }
  }
}

void unpack_taps(const float* src, int64_t width, const int64_t* places, int64_t taps, int64_t outs, int64_t ins,
                 float* dst, int64_t out_step, int64_t in_step) {
  Vec rows[kLanes];
  const bool side_by_side = in_step == taps;
  const int64_t lines = side_by_side ? 1 : ins, line = side_by_side ? ins * taps : taps;
  for (int64_t o = 0; o < outs; o += kLanes) {
    TapPlaces place(places, taps, width);
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t e = 0; e < line; e += kLanes) {
        const int64_t count = line - e < kLanes ? line - e : kLanes;
        for (int j = 0; j < kLanes; ++j) rows[j] = j < count ? load(src + place.next() + o) : zero();
        transpose_rows(rows);
        float* to = dst + o * out_step + i * in_step + e;
        for (int j = 0; j < kLanes && j < outs - o; ++j) store_first(to + j * out_step, rows[j], count);
      }
  }
}

// An output's lines are stored side by side, for the memory's sake.
void stream_taps(const float* src, int64_t width, const int64_t* places, int64_t taps, int64_t outs, int64_t ins,
                 float* dst, int64_t out_step) {
  constexpr int64_t kAtOnce = 9 * kBlock;
  alignas(64) float lines[kLanes][kAtOnce];
  Vec rows[kLanes];
  for (int64_t o = 0; o < outs; o += kLanes) {
    TapPlaces place(places, taps, width);
    for (int64_t begin = 0; begin < ins * taps; begin += kAtOnce) {
      const int64_t left = ins * taps - begin, count = left < kAtOnce ? left : kAtOnce;
      for (int64_t e = 0; e < count; e += kLanes) {
        for (int j = 0; j < kLanes; ++j) rows[j] = load(src + place.next() + o);
        transpose_rows(rows);
        for (int j = 0; j < kLanes; ++j) store(lines[j] + e, rows[j]);
      }
      for (int j = 0; j < kLanes && j < outs - o; ++j)
        for (int64_t e = 0; e < count; e += kLanes) stream(dst + (o + j) * out_step + begin + e, load(lines[j] + e));
    }
  }
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
    for (int v = 0; v < V; ++v) acc[c][v] = t.add ? load(out + c * W + v * kLanes) : zero();
  // The first part of a block fetches what is wanted next, the second what is wanted later.
  const bool second = c0 == C && t.later;
  const float* next = second ? t.later : t.next;
  const int64_t next_step = second ? t.later_step : t.next_step;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float *x = t.x + t.row[r].x + c0, *dy = t.dy + t.row[r].dy;
#pragma GCC unroll 2
    for (int64_t q = 0; q < t.columns; ++q, x += kBlock, dy += W, next += next_step) {
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
  int64_t c = 0;
  for (; c < t.channels; c += kTileChannels)
    if (t.width == kLanes)
      weight_tile_part<kTileChannels, 1>(t, c);
    else
      weight_tile_part<kTileChannels, 2>(t, c);
  if (!t.add)  // the rest of a block is read with it
    for (int64_t i = c * t.width; i < kBlock * t.width; i += kLanes) store(t.acc + i, zero());
}

template <int V, int ROWS, int P> constexpr DirectTileFunction direct_or_null() {
  if constexpr (ROWS * P <= kTilePixels)
    return &direct_tile<V, ROWS, P>;
  else
    return nullptr;
}

#define FC_DIRECT_ROW(V, R) \
  { \
      direct_or_null<V, R, 1>(),  direct_or_null<V, R, 2>(),  direct_or_null<V, R, 3>(),  direct_or_null<V, R, 4>(), \
      direct_or_null<V, R, 5>(),  direct_or_null<V, R, 6>(),  direct_or_null<V, R, 7>(),  direct_or_null<V, R, 8>(), \
      direct_or_null<V, R, 9>(),  direct_or_null<V, R, 10>(), direct_or_null<V, R, 11>(), direct_or_null<V, R, 12>(), \
      direct_or_null<V, R, 13>(), direct_or_null<V, R, 14>(), direct_or_null<V, R, 15>(), direct_or_null<V, R, 16>(), \
  }

}  // namespace
}  // namespace fastconv::cpu

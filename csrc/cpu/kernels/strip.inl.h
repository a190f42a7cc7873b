// Convolutions whose outputs read contiguous runs of floats, and convolutions of planes: what first layers (C <= 4) and
// 1x1 kernels need, without packing more than padding. Written once for all ISAs.
#pragma once

#include "cpu/kernels/conv2d.inl.h"

namespace fastconv::cpu {
namespace {

// A pixel tile fills all registers but four, in vectors of two.
constexpr int kRegisters = 2 * kTilePixels + 4;

template <int N> struct Count {
  static constexpr int value = N;
};

// strip_tile: y[P][V*lanes] = sum over rows r and j of x[r][p * step + j] * w[r][j][V*lanes].
//   x  any distance between pixels: one pointer for three of them, so that the rest is addressing
//   w  read once from front to back
// Registers: P*V accumulators + V weights + 1 broadcast. Bound: FMA; P*V FMAs against P + V loads a step.
// Tails: the weights are zero-padded in k; only the store looks at k.
template <int V, int P> void strip_tile(const StripTile& t) {
  constexpr int kTriples = (P + 2) / 3, kUnroll = 3;
  Vec acc[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[p][v] = zero();

  // Outputs, and what is added to them, are fetched a pixel with every few of the last taps: all at once, their misses
  // would hold up the loop. Where there are not enough taps, or x is fetched, too, it has to be.
  const bool at_once = t.next || t.rows > 1 || t.taps < P * kUnroll;
  if (at_once) prefetch_outputs<V, 1, P>(t);
  const bool fetch_residual = t.residual && !at_once, fetch_y = !t.streaming && !at_once;
  const float *residual = fetch_residual ? t.residual : t.w, *y = fetch_y ? t.y : t.w;
  const int64_t fetch_from = t.taps - 2 * P * kUnroll;
  const float* w = t.w;
  const float* next_w = t.next_w ? t.next_w : t.w;
  const int64_t step = t.x_step, next_w_step = t.next_w ? kBlock : 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x[kTriples];
#pragma GCC unroll 6
    for (int i = 0; i < kTriples; ++i) x[i] = t.x + r * t.x_row_step + 3 * i * step;
    const auto add_taps = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 3
      for (int j = 0; j < kCount; ++j) {
        Vec weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[v] = load(w + (j * V + v) * kLanes);
        prefetch_l2(next_w + j * next_w_step);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const Vec a = set1(x[p / 3][p % 3 * step + j]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[p][v] = fma(a, weights[v], acc[p][v]);
        }
      }
      w += kCount * V * kLanes;
      next_w += kCount * next_w_step;
#pragma GCC unroll 6
      for (int i = 0; i < kTriples; ++i) x[i] += kCount;
    };
    int64_t j = 0;
    if (t.next && r == 0)
      for (; j + kTriples * kUnroll <= t.taps; j += kTriples * kUnroll) {
        const float* next = t.next + j;
#pragma GCC unroll 1
        for (int i = 0; i < kTriples; ++i, next += 3 * t.next_step) {
          prefetch_l2(next), prefetch_l2(next + t.next_step), prefetch_l2(next + 2 * t.next_step);
          add_taps(Count<kUnroll>{});
        }
      }
    for (; j + kUnroll <= t.taps; j += kUnroll) {
      if (j >= fetch_from) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) prefetch(residual + v * kLanes), prefetch(y + v * kLanes);
        residual += fetch_residual ? t.pixel_stride : 0, y += fetch_y ? t.pixel_stride : 0;
      }
      add_taps(Count<kUnroll>{});
    }
    for (; j < t.taps; ++j) add_taps(Count<1>{});
  }
  store_tile<V, 1, P>(acc, t);
}

// strip_weight: ROWS x J elements of V vectors' weight gradient, summed over rows of pixels.
// Registers: ROWS*J*V accumulators + V of b + 1 broadcast. Bound: FMA; n*V FMAs against n + V loads a pixel, n =
// ROWS*J. With one vector loads are as many as FMAs, so two of b are taken together where there are two.
template <int V, int ROWS, int J> void strip_weight_part(const StripWeightTile& t, const float* a_first, float* out) {
  Vec acc[ROWS * J][V];
#pragma GCC unroll 32
  for (int j = 0; j < ROWS * J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[j][v] = load(out + j * t.acc_step + v * kLanes);
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* a[ROWS];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) a[r] = a_first + row * t.a_row_step + r * t.a_tap_step;
    const float *b = t.b + row * t.b_row_step, *next = t.next + row * t.next_row_step;
#pragma GCC unroll 2
    for (int64_t q = 0; q < t.columns; ++q, b += t.b_step) {
      Vec lanes[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) lanes[v] = load(b + v * kLanes);
      if constexpr (V == 1) prefetch(b + t.b_row_step);
      prefetch_l2(next);
      next += t.next_step;
#pragma GCC unroll 3
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 32
        for (int j = 0; j < J; ++j) {
          const Vec factor = set1(a[r][j]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[r * J + j][v] = fma(factor, lanes[v], acc[r * J + j][v]);
        }
        a[r] += t.a_step;
      }
    }
  }
#pragma GCC unroll 32
  for (int j = 0; j < ROWS * J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + j * t.acc_step + v * kLanes, acc[j][v]);
}

constexpr int kStripSums = kRegisters - 4;
constexpr int kStripRows = 3;

template <int V, int ROWS, int J>
void strip_weight_dispatch(const StripWeightTile& t, int64_t taps, const float* a, float* acc) {
  if (taps == J) return strip_weight_part<V, ROWS, J>(t, a, acc);
  if constexpr (J > 1) strip_weight_dispatch<V, ROWS, J - 1>(t, taps, a, acc);
}

// Parts of a row's taps whose sums fit the registers.
template <int V> void strip_weight_row(const StripWeightTile& t, const float* a, float* acc) {
  constexpr int kSums = kStripSums / V;
  const int64_t parts = (t.taps + kSums - 1) / kSums;
  for (int64_t i = 0, j = 0; i < parts; ++i) {
    const int64_t taps = (t.taps - j + parts - i - 1) / (parts - i);
    strip_weight_dispatch<V, 1, kSums>(t, taps, a + j, acc + j * t.acc_step);
    j += taps;
  }
}

// Three rows at once where their sums fit the registers: b is then read once.
void strip_weight_tile(const StripWeightTile& t) {
  const bool pair = t.acc_step == 2 * kLanes;
  int64_t r = 0;
  if (!pair && t.taps <= kStripSums / kStripRows)
    for (; r + kStripRows <= t.tap_rows; r += kStripRows)
      strip_weight_dispatch<1, kStripRows, kStripSums / kStripRows>(t, t.taps, t.a + r * t.a_tap_step,
                                                                    t.acc + r * t.taps * t.acc_step);
  for (; r < t.tap_rows; ++r) {
    const float* a = t.a + r * t.a_tap_step;
    float* acc = t.acc + r * t.taps * t.acc_step;
    pair ? strip_weight_row<2>(t, a, acc) : strip_weight_row<1>(t, a, acc);
  }
}

// planar_tile: y[C][V*lanes] = sum over planes and taps of x[plane][tap + p] * w[plane][tap][c].
// Registers: C*V accumulators + C weights + 1 of x. Bound: FMA; C*V FMAs against V + C loads a step.
template <int C, int V> void planar_part(const PlanarTile& t) {
  Vec acc[C][V];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[c][v] = zero();
  for (int64_t k = 0; k < t.planes; ++k) {
    const float *x = t.x + k * t.x_step, *w = t.w + k * t.w_step;
    for (int64_t i = 0; i < V * kLanes; i += kBlock) prefetch_l2(t.next + k * V * kLanes + i);
    for (int64_t i = 0; i < t.tap_count; ++i) {
      const PlanarTile::Tap& tap = t.taps[i];
      Vec weights[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) weights[c] = set1(w[tap.w + c]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Vec a = load(x + tap.x + v * kLanes);
        keep(a);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[c][v] = fma(a, weights[c], acc[c][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(t.y + c * t.y_step + v * kLanes, acc[c][v]);
}

template <int C> constexpr int planar_vectors() {
  constexpr int kFit = (kRegisters - 1 - C) / C;
  return kFit < 8 ? kFit : 8;
}

template <int C, int V = planar_vectors<C>()> void planar_dispatch(const PlanarTile& t) {
  if (t.vectors == V) return planar_part<C, V>(t);
  if constexpr (V > 1) planar_dispatch<C, V - 1>(t);
}

void planar_tile(const PlanarTile& t) {
  if (t.channels == 1) return planar_dispatch<1>(t);
  if (t.channels == 2) return planar_dispatch<2>(t);
  if (t.channels == 3) return planar_dispatch<3>(t);
  planar_dispatch<4>(t);
}

template <int V, int P> constexpr StripTileFunction strip_or_null() {
  if constexpr (P <= kTilePixels)
    return &strip_tile<V, P>;
  else
    return nullptr;
}

#define FC_STRIP_ROW(V) \
  { \
      strip_or_null<V, 1>(),  strip_or_null<V, 2>(),  strip_or_null<V, 3>(),  strip_or_null<V, 4>(), \
      strip_or_null<V, 5>(),  strip_or_null<V, 6>(),  strip_or_null<V, 7>(),  strip_or_null<V, 8>(), \
      strip_or_null<V, 9>(),  strip_or_null<V, 10>(), strip_or_null<V, 11>(), strip_or_null<V, 12>(), \
      strip_or_null<V, 13>(), strip_or_null<V, 14>(), strip_or_null<V, 15>(), strip_or_null<V, 16>(), \
  }

}  // namespace
}  // namespace fastconv::cpu

// Groups of so few channels that several share a vector. Lanes are output channels; a permutation gives every lane of a
// group the same channel of its input, so that no lane is wasted. Written once for all ISAs.
#pragma once

#include "cpu/kernels/conv2d.inl.h"

namespace fastconv::cpu {
namespace {

typedef int LaneIndex __attribute__((vector_size(sizeof(Vec))));

// Every lane gets the lane of `a` that index names.
inline Vec permute(Vec a, const int32_t* index) {
  LaneIndex from;
  __builtin_memcpy(&from, index, sizeof(from));
  return __builtin_shuffle(a, from);
}

// grouped_tile: y[P][lanes] of a run of T neighbouring taps after the other.
// Registers: P accumulators + T weights + 1 of x + 1 index. Bound: FMA; P*T FMAs against P + T - 1 permuted loads.
template <int P, int T>
__attribute__((always_inline)) inline void add_run(Vec (&acc)[P][1], const float* x, const float* w, int64_t group,
                                                   const int32_t* index) {
  for (int64_t i = 0; i < group; ++i) {
    Vec weights[T];
#pragma GCC unroll 4
    for (int s = 0; s < T; ++s) weights[s] = load(w + (s * group + i) * kLanes);
    const float* pixel = x;
    asm("" : "+r"(pixel));  // one pointer; GCC would keep one for every pixel
#pragma GCC unroll 20
    for (int c = 0; c < P + T - 1; ++c) {
      const Vec a = permute(load(pixel + c * kBlock), index + i * kLanes);
#pragma GCC unroll 4
      for (int s = 0; s < T; ++s)
        if (c - s >= 0 && c - s < P) acc[c - s][0] = fma(a, weights[s], acc[c - s][0]);
    }
  }
}

template <int P> void grouped_tile(const GroupedTile& t) {
  prefetch_outputs<1, 1, P>(t);
  Vec acc[P][1];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) acc[p][0] = zero();
  for (int64_t j = 0; j < t.run_count; ++j) {
    const GroupedTile::Run& run = t.runs[j];
    if (run.taps == 1)
      add_run<P, 1>(acc, run.x + t.x_offset, run.w, t.group, t.index);
    else if (run.taps == 2)
      add_run<P, 2>(acc, run.x + t.x_offset, run.w, t.group, t.index);
    else
      add_run<P, kGroupedTaps>(acc, run.x + t.x_offset, run.w, t.group, t.index);
  }
  store_tile<1, 1, P>(acc, t);
}

// grouped_weight_tile: I channels and T taps at once.
// Registers: T*I accumulators + T of dy + 1 of x + 1 index. Bound: FMA; T*I FMAs against I permutations a pixel.
template <int I, int T> void grouped_weight_part(const GroupedWeightTile& t, int64_t first) {
  Vec acc[T][I];
#pragma GCC unroll 4
  for (int s = 0; s < T; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) acc[s][i] = load(t.acc + (s * t.group + first + i) * kLanes);
  // Pixel c of x meets dy of pixel c - s under tap s; at the ends of a row not all of them exist.
  const auto add_pixel = [&](const float* x, const float* dy, int64_t from, int64_t to) __attribute__((always_inline)) {
    const Vec pixel = load(x);
    Vec g[T];
#pragma GCC unroll 4
    for (int s = 0; s < T; ++s)
      if (from <= s && s < to) g[s] = load(dy - s * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vec a = permute(pixel, t.index + (first + i) * kLanes);
#pragma GCC unroll 4
      for (int s = 0; s < T; ++s)
        if (from <= s && s < to) acc[s][i] = fma(a, g[s], acc[s][i]);
    }
  };
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = t.x + t.row_offsets[r];
    const float* dy = t.dy + r * t.columns * kLanes;
    int64_t c = 0;
    for (; c < T - 1; ++c) add_pixel(x + c * kBlock, dy + c * kLanes, c < t.columns ? 0 : c - t.columns + 1, c + 1);
    for (; c < t.columns; ++c) add_pixel(x + c * kBlock, dy + c * kLanes, 0, T);
    for (; c < t.columns + T - 1; ++c) add_pixel(x + c * kBlock, dy + c * kLanes, c - t.columns + 1, T);
  }
#pragma GCC unroll 4
  for (int s = 0; s < T; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) store(t.acc + (s * t.group + first + i) * kLanes, acc[s][i]);
}

template <int I> void grouped_weight_taps(const GroupedWeightTile& t, int64_t first) {
  if (t.taps == 1) return grouped_weight_part<I, 1>(t, first);
  if (t.taps == 2) return grouped_weight_part<I, 2>(t, first);
  grouped_weight_part<I, kGroupedTaps>(t, first);
}

void grouped_weight_tile(const GroupedWeightTile& t) {
  constexpr int kMost = kTilePixels > 8 ? 8 : 4;  // whose sums fit the registers
  int64_t i = 0;
  for (; i + kMost <= t.group; i += kMost) grouped_weight_taps<kMost>(t, i);
  for (; i + 2 <= t.group; i += 2) grouped_weight_taps<2>(t, i);
  for (; i < t.group; ++i) grouped_weight_taps<1>(t, i);
}

template <int P> constexpr GroupedTileFunction grouped_or_null() {
  if constexpr (P <= kTilePixels)
    return &grouped_tile<P>;
  else
    return nullptr;
}

#define FC_GROUPED_ROW \
  grouped_or_null<1>(), grouped_or_null<2>(), grouped_or_null<3>(), grouped_or_null<4>(), grouped_or_null<5>(), \
      grouped_or_null<6>(), grouped_or_null<7>(), grouped_or_null<8>(), grouped_or_null<9>(), grouped_or_null<10>(), \
      grouped_or_null<11>(), grouped_or_null<12>(), grouped_or_null<13>(), grouped_or_null<14>(), \
      grouped_or_null<15>(), grouped_or_null<16>()

}  // namespace
}  // namespace fastconv::cpu

// Convolution on Hopper: TMA copies tiles (im2col for the images) into a ring of stages, two warpgroups multiply them
// with wgmma, one thread of a third keeps the ring full; the grid is persistent. bfloat16 and float16, whole groups of
// eight channels, no groups.
//
//                      rows (M)        columns (N)   depth (k)        A                    B
//   forward            pixels of y     K             taps x C         im2col x, k-major    w, k-major
//   input gradient     pixels of dx    C             taps x K         im2col dy, k-major   w, n-major
//   weight gradient    K               tap, C        pixels           dy, m-major          im2col x, n-major
//
// An input gradient with strides is several im2col problems, one a phase (geometry.h), in one launch; a phase without
// taps runs no product and writes its zeros. Kernels in the form of machine.h: they run on the host, too.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/machine.h"
#include "cuda/tensor_map.h"

namespace fastconv::cuda::sm90 {

constexpr int kThreads = 384, kDepth = 64, kMostPhases = 4;

// --- Plan: what the host decides -------------------------------------------------------------------------------------

struct Phase {
  Axis h, w;
  int pixels, first_tile;
};

struct Plan {
  Phase phase[kMostPhases];
  int phases = 0;
  int tiles = 0, tiles_n = 0;
  int columns = 0;             // N of the product, of one tap for a weight gradient
  int depth_blocks = 0;        // blocks of kDepth channels that a tap adds
  int kernel_w = 0, taps = 0;  // S, R S
  int result_h = 0, result_w = 0;
  bool scattered = false;  // result pixels do not lie one after the other
  // Weight gradient.
  int rows = 0, tiles_m = 0;
  SplitPlan split = {1, 1};
};

// The maps of one launch, as plans here and encoded on the device.
template <class Map> struct Maps {
  Map source[kMostPhases];
  Map other;   // weights {C, R S, K}; dy {K, pixels} for a weight gradient
  Map result;  // {columns, pixels}
};

struct Shape {
  int n, c, h, w, k, r, s, p, q;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// Why the copy engine cannot walk this convolution; null where it can.
inline const char* declines(const Shape& a, bool backward_input) {
  if (a.c % 8 != 0 || a.k % 8 != 0) return "channels are not multiples of 8";
  const int64_t most = int64_t{1} << 31;
  if (int64_t{a.n} * a.h * a.w >= most || int64_t{a.n} * a.p * a.q >= most) return "more than 2^31 pixels";
  if (!backward_input) {
    const Axis h = forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h);
    const Axis w = forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w);
    return im2col_expressible(h, a.h) && im2col_expressible(w, a.w) ? nullptr : "beyond what TMA im2col can address";
  }
  const int phases_h = backward_phases(a.h, a.stride_h), phases_w = backward_phases(a.w, a.stride_w);
  if (phases_h * phases_w > kMostPhases) return "more than 4 phases of strides";
  for (int i = 0; i < phases_h * phases_w; ++i) {
    const Axis h = backward_axis(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h, i / phases_w);
    const Axis w = backward_axis(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w, i % phases_w);
    if (h.taps * w.taps > 0 && !(im2col_expressible(h, a.p) && im2col_expressible(w, a.q)))
      return "beyond what TMA im2col can address";
  }
  return nullptr;
}

// Tiles of forward and input gradient, of which the cheapest is taken.
constexpr TileShape kTiles[] = {{128, 256}, {256, 128}, {128, 128}, {256, 64}, {128, 64}};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr TileShape kGradientTiles[] = {{128, 128}, {128, 64}};
constexpr int kGradientTileCount = sizeof(kGradientTiles) / sizeof(kGradientTiles[0]);

inline int cheapest_tile(int64_t pixels, int columns, int steps, int multiprocessors) {
  int best = 0;
  for (int i = 1; i < kTileCount; ++i)
    if (tile_cost(kTiles[i], pixels, columns, steps, multiprocessors) <
        tile_cost(kTiles[best], pixels, columns, steps, multiprocessors))
      best = i;
  return best;
}

// The output channels come in whole tiles, so a small K takes the narrow one.
inline int gradient_tile(const Shape& a) { return a.c % 128 == 0 || a.c > 192 ? 0 : 1; }

struct Operands {
  const void *source, *other;
  void* result;
};

inline Plan plan_convolution(const Shape& a, bool backward, TileShape tile, TensorMapPlan::Numbers numbers,
                             const Operands& data, Maps<TensorMapPlan>& maps) {
  Plan plan;
  const int phases_w = backward ? backward_phases(a.w, a.stride_w) : 1;
  plan.phases = backward ? phases_w * backward_phases(a.h, a.stride_h) : 1;
  plan.columns = backward ? a.c : a.k;
  plan.depth_blocks = divide_up(backward ? a.k : a.c, kDepth);
  plan.kernel_w = a.s, plan.taps = a.r * a.s;
  plan.result_h = backward ? a.h : a.p, plan.result_w = backward ? a.w : a.q;
  plan.scattered = plan.phases > 1;
  plan.tiles_n = divide_up(plan.columns, tile.n);
  for (int i = 0; i < plan.phases; ++i) {
    Phase& phase = plan.phase[i];
    phase.h = backward ? backward_axis(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h, i / phases_w)
                       : forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h);
    phase.w = backward ? backward_axis(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w, i % phases_w)
                       : forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w);
    phase.pixels = a.n * phase.h.results * phase.w.results;
    phase.first_tile = plan.tiles;
    plan.tiles += divide_up(phase.pixels, tile.m) * plan.tiles_n;
    if (phase.h.taps * phase.w.taps > 0)
      maps.source[i] = im2col_map(numbers, data.source, a.n, backward ? a.p : a.h, backward ? a.q : a.w,
                                  backward ? a.k : a.c, phase.h, phase.w, tile.m);
  }
  if (backward)
    maps.other = tiled_map(numbers, data.other, {a.c, a.r * a.s, a.k}, {64, 1, kDepth});
  else
    maps.other = tiled_map(numbers, data.other, {a.c, a.r * a.s, a.k}, {kDepth, 1, tile.n});
  maps.result =
      tiled_map(numbers, data.result, {plan.columns, int64_t{a.n} * plan.result_h * plan.result_w}, {64, tile.m / 2});
  return plan;
}

inline Plan plan_weight_gradient(const Shape& a, TileShape tile, TensorMapPlan::Numbers numbers, int multiprocessors,
                                 const void* x, const void* dy, Maps<TensorMapPlan>& maps) {
  Plan plan;
  plan.phases = 1;
  Phase& phase = plan.phase[0];
  phase = {forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
           forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w), a.n * a.p * a.q, 0};
  plan.rows = a.k, plan.columns = a.c;
  plan.kernel_w = a.s, plan.taps = a.r * a.s;
  plan.tiles_m = divide_up(a.k, tile.m), plan.tiles_n = divide_up(a.c, tile.n);
  const int tiles = plan.tiles_m * plan.tiles_n * plan.taps;
  plan.split = plan_split(tiles, divide_up(phase.pixels, kDepth), multiprocessors, 6);
  plan.tiles = tiles * plan.split.splits;
  maps.source[0] = im2col_map(numbers, x, a.n, a.h, a.w, a.c, phase.h, phase.w, kDepth);
  maps.other = tiled_map(numbers, dy, {a.k, phase.pixels}, {64, kDepth});
  return plan;
}

// --- Kernels ---------------------------------------------------------------------------------------------------------

struct Arguments {
  Maps<TensorMap> maps;
  Plan plan;
  Epilogue epilogue;
  void* result;
};

// Shared memory: stages of A and B, staging of the result (A), sums of the statistics, barriers.
template <int kM, int kN, int kStages> struct Layout {
  static constexpr int kBytesA = kM * 128, kBytesB = kN * 128, kStageBytes = kBytesA + kBytesB;
  static constexpr int kStaging = kStages * kStageBytes, kStatistics = kStaging + kM * kN * 2;
  static constexpr int kBarriers = kStatistics + 2 * 1024, kBytes = kBarriers + kStages * 16;
  static_assert(kBytes <= 227 << 10, "shared memory of an sm_90 block");
};

// The ring: a stage is full when its bytes have arrived, empty when both warpgroups have read it.
template <int kStages> struct Ring {
  uint32_t barriers;
  int stage = 0;
  uint32_t round = 0;  // parity

  FC_DEVICE uint32_t full() const { return barriers + stage * 16; }
  FC_DEVICE uint32_t empty() const { return barriers + stage * 16 + 8; }
  FC_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

template <int kStages> FC_DEVICE void start_ring(uint32_t barriers) {
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(barriers + i * 16, 1);
      barrier_init(barriers + i * 16 + 8, 2);
    }
    fence_barrier_init();
  }
  block_sync();
}

// One warpgroup's part of a tile: rows kM / 2 of A times all of B, `steps` stages of the ring. Without steps the sums
// are undefined: zeroing them here would hold up the tensor cores of all other tiles.
template <class T, int kM, int kN, int kStages, bool kMajorA, bool kMajorB>
FC_DEVICE void accumulate(float (&sum)[kM / 128][kN / 2], Ring<kStages>& ring, uint32_t shared, int warpgroup,
                          int steps) {
  using L = Layout<kM, kN, kStages>;
  constexpr int kPanel = kDepth * 128;  // of an operand that is not k-major: 64 rows of k
  uint32_t release = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.full(), ring.round);
    const uint32_t tile_a = shared + ring.stage * L::kStageBytes, tile_b = tile_a + L::kBytesA;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kM / 128; ++i) {
      // 64 rows of A are 64 rows of 128 bytes, or one panel: as many bytes.
      const uint64_t a = wgmma_descriptor(tile_a + (warpgroup * (kM / 128) + i) * kPanel, kMajorA, kPanel);
      const uint64_t b = wgmma_descriptor(tile_b, kMajorB, kPanel);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        wgmma<kMajorA, kMajorB>(T(), sum[i], a + k * wgmma_k_step(kMajorA), b + k * wgmma_k_step(kMajorB),
                                step != 0 || k != 0);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the step before has read its stage
    if (step > 0 && thread_index() % 128 == 0) barrier_arrive(release);
    release = ring.empty();
    ring.next();
  }
  wgmma_wait<0>();
  if (steps > 0 && thread_index() % 128 == 0) barrier_arrive(release);
}

FC_DEVICE void warpgroup_sync(int warpgroup) {
  if (warpgroup == 0)
    group_sync<1, 128>();
  else
    group_sync<2, 128>();
}

struct TilePlace {
  int phase, m, n;  // m, n: first row and column
};
template <int kM, int kN> FC_DEVICE TilePlace place_of(const Plan& plan, int tile) {
  int phase = 0;
#pragma unroll
  for (int i = 1; i < kMostPhases; ++i)
    if (i < plan.phases && tile >= plan.phase[i].first_tile) phase = i;
  const int rest = tile - plan.phase[phase].first_tile, m = rest / plan.tiles_n;
  return {phase, m * kM, (rest - m * plan.tiles_n) * kN};
}

// Where the copy of pixel m and what follows it starts.
struct Base {
  int n, h, w;
};
FC_DEVICE Base base_of(const Phase& phase, int m) {
  const Pixel at = pixel_of(m, phase.h.results, phase.w.results);
  return {at.n, phase.h.source_first + at.i * phase.h.source_step, phase.w.source_first + at.j * phase.w.source_step};
}

struct Pair {
  float first, second;
};

template <class T> FC_DEVICE uint32_t pack(float low, float high) {
  union {
    typename T::Storage number[2];
    uint32_t word;
  } u;
  u.number[0] = T::store(low);
  u.number[1] = T::store(high);
  return u.word;
}

// Statistics of the first `count` rows that a warpgroup has staged, as they were rounded: its slice is kM / 2 pixels. A
// thread adds up two neighbouring columns of every kParts-th row.
template <class T, int kM, int kN>
FC_DEVICE void write_statistics(const Epilogue& epilogue, uint32_t staging, uint32_t scratch, int warpgroup, int slice,
                                int count, int n0, int columns) {
  constexpr int kPairs = kN / 2, kParts = 128 / kPairs;
  const int tid = thread_index() % 128, pair = tid % kPairs, part = tid / kPairs;
  const uint32_t column = staging + pair / 32 * (kM / 2) * 128;
  const auto reduce = [&](auto&& term) {
    float total[2] = {};
    for (int row = part; row < count; row += kParts) {
      union {
        uint32_t word;
        typename T::Storage number[2];
      } u;
      u.word = load_shared_word(column + swizzle_128b(static_cast<uint32_t>(row * 128 + pair % 32 * 4)));
      for (int e = 0; e < 2; ++e) total[e] += term(T::load(u.number[e]), e);
    }
    for (int e = 0; e < 2; ++e) store_shared(scratch + (part * kN + pair * 2 + e) * 4, total[e]);
    warpgroup_sync(warpgroup);
    for (int e = 0; e < 2; ++e) {
      total[e] = 0;
      for (int i = 0; i < kParts; ++i) total[e] += load_shared_float(scratch + (i * kN + pair * 2 + e) * 4);
    }
    warpgroup_sync(warpgroup);
    return Pair{total[0], total[1]};
  };
  const Pair sum = reduce([](float v, int) { return v; });
  const float mean[2] = {sum.first / count, sum.second / count};
  const Pair m2 = reduce([&](float v, int e) { return (v - mean[e]) * (v - mean[e]); });
  if (part != 0 || n0 + pair * 2 >= columns) return;
  SliceStatistics* out = epilogue.statistics + static_cast<int64_t>(slice) * columns + n0 + pair * 2;
  out[0] = {mean[0], m2.first};
  out[1] = {mean[1], m2.second};
}

// Forward and input gradient.
template <class T, int kM, int kN, int kStages, bool kBackward>
FC_DEVICE void convolve(const Arguments& a, uint32_t shared) {
  using L = Layout<kM, kN, kStages>;
  constexpr int kRows = kM / 2;  // of a warpgroup
  const Plan& plan = a.plan;
  Ring<kStages> ring{shared + L::kBarriers};
  start_ring<kStages>(ring.barriers);

  if (thread_index() < 128) {
    registers_release<40>();
    if (thread_index() == 0) {
      ring.round = 1;  // the stages are empty at first
      for (int tile = block_x(); tile < plan.tiles; tile += grid_x()) {
        const TilePlace at = place_of<kM, kN>(plan, tile);
        const Phase& phase = plan.phase[at.phase];
        const Base base = base_of(phase, at.m);
        const TensorMap* source = &a.maps.source[at.phase];
        for (int tap_h = 0; tap_h < phase.h.taps; ++tap_h)
          for (int tap_w = 0; tap_w < phase.w.taps; ++tap_w) {
            const int tap = (phase.h.weight_first + tap_h * phase.h.weight_step) * plan.kernel_w +
                            phase.w.weight_first + tap_w * phase.w.weight_step;
            for (int block = 0; block < plan.depth_blocks; ++block) {
              const uint32_t tile_a = shared + ring.stage * L::kStageBytes, tile_b = tile_a + L::kBytesA;
              barrier_wait(ring.empty(), ring.round);
              barrier_arrive_expect(ring.full(), L::kStageBytes);
              tma_load_im2col(tile_a, source, ring.full(), block * kDepth, base.w, base.h, base.n,
                              tap_w * phase.w.tap_step, tap_h * phase.h.tap_step);
              if constexpr (kBackward) {
                for (int panel = 0; panel < kN / 64; ++panel)
                  tma_load(tile_b + panel * kDepth * 128, &a.maps.other, ring.full(), at.n + panel * 64, tap,
                           block * kDepth);
              } else {
                tma_load(tile_b, &a.maps.other, ring.full(), block * kDepth, tap, at.n);
              }
              ring.next();
            }
          }
      }
    }
  } else {
    registers_take<232>();
    const int warpgroup = thread_index() / 128 - 1, tid = thread_index() % 128, warp = tid / 32, lane = tid % 32;
    const uint32_t staging = shared + L::kStaging + warpgroup * kRows * kN * 2;
    float sum[kM / 128][kN / 2];
    for (int tile = block_x(); tile < plan.tiles; tile += grid_x()) {
      const TilePlace at = place_of<kM, kN>(plan, tile);
      const Phase& phase = plan.phase[at.phase];
      const int steps = phase.h.taps * phase.w.taps * plan.depth_blocks;
      accumulate<T, kM, kN, kStages, true, !kBackward>(sum, ring, shared, warpgroup, steps);
      const uint32_t keep = !kBackward || steps > 0 ? ~0u : 0u;  // a phase without taps writes zeros
      const int m0 = at.m + warpgroup * kRows;
      // The copy engine, or this warpgroup, has read what was staged before.
      if (tid == 0) tma_store_wait_read();
      warpgroup_sync(warpgroup);
#pragma unroll
      for (int i = 0; i < kM / 128; ++i)
#pragma unroll
        for (int j = 0; j < kN / 16; ++j) {
          uint32_t r[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            Pair v = {sum[i][j * 8 + e * 2], sum[i][j * 8 + e * 2 + 1]};
            if constexpr (!kBackward) {
              const Element of = wgmma_accumulator(tid, j * 8 + e * 2);
              const int m = m0 + i * 64 + of.row, column = at.n + of.column;
              if (m < phase.pixels && column < plan.columns) {
                const int64_t lies = static_cast<int64_t>(m) * plan.columns + column;
                v.first = epilogue_value<T>(a.epilogue, v.first, column, lies);
                v.second = epilogue_value<T>(a.epilogue, v.second, column + 1, lies + 1);
              }
            }
            r[e] = pack<T>(v.first, v.second) & keep;
          }
          const int row = i * 64 + warp * 16 + lane % 16, column = j % 4 * 16 + lane / 16 * 8;
          stmatrix_x4(staging + j / 4 * kRows * 128 + swizzle_128b(static_cast<uint32_t>(row * 128 + column * 2)), r);
        }
      fence_async_proxy();
      warpgroup_sync(warpgroup);
      if (!kBackward || !plan.scattered) {
        if (tid == 0) {
          for (int panel = 0; panel < kN / 64; ++panel)
            tma_store(staging + panel * kRows * 128, &a.maps.result, at.n + panel * 64, m0);
          tma_store_commit();
        }
      } else {
        using Storage = typename T::Storage;
        for (int row = tid / 8; row < kRows && m0 + row < phase.pixels; row += 16) {
          const Pixel pixel = pixel_of(m0 + row, phase.h.results, phase.w.results);
          const int64_t lies =
              (static_cast<int64_t>(pixel.n) * plan.result_h + phase.h.result_first + pixel.i * phase.h.result_step) *
                  plan.result_w +
              phase.w.result_first + pixel.j * phase.w.result_step;
          for (int panel = 0; panel < kN / 64; ++panel) {
            const int column = at.n + panel * 64 + tid % 8 * 8;
            if (column < plan.columns)
              store_global(static_cast<Storage*>(a.result) + lies * plan.columns + column,
                           load_shared_chunk(staging + panel * kRows * 128 +
                                             swizzle_128b(static_cast<uint32_t>(row * 128 + tid % 8 * 16))));
          }
        }
      }
      if constexpr (!kBackward) {
        if (a.epilogue.statistics != nullptr && m0 < phase.pixels)
          write_statistics<T, kM, kN>(a.epilogue, staging, shared + L::kStatistics + warpgroup * 1024, warpgroup,
                                      m0 / kRows, smaller(kRows, phase.pixels - m0), at.n, plan.columns);
      }
    }
    if (tid == 0) tma_store_wait();
  }
}

// Weight gradient: partial sums [split][K][R S][C] in float.
template <class T, int kM, int kN, int kStages> FC_DEVICE void weight_gradient(const Arguments& a, uint32_t shared) {
  using L = Layout<kM, kN, kStages>;
  const Plan& plan = a.plan;
  const Phase& phase = plan.phase[0];
  const int total_steps = divide_up(phase.pixels, kDepth);
  Ring<kStages> ring{shared + L::kBarriers};
  start_ring<kStages>(ring.barriers);

  // Tiles of one split lie one after the other: they read the same pixels.
  const auto tile_at = [&](int tile, int& split, int& tap, int& m, int& n) {
    n = tile % plan.tiles_n * kN;
    tile /= plan.tiles_n;
    m = tile % plan.tiles_m * kM;
    tile /= plan.tiles_m;
    tap = tile % plan.taps;
    split = tile / plan.taps;
  };

  if (thread_index() < 128) {
    registers_release<40>();
    if (thread_index() == 0) {
      ring.round = 1;
      for (int tile = block_x(); tile < plan.tiles; tile += grid_x()) {
        int split, tap, m, n;
        tile_at(tile, split, tap, m, n);
        const int begin = split * plan.split.steps, end = smaller(begin + plan.split.steps, total_steps);
        const int tap_h = tap / plan.kernel_w, tap_w = tap - tap_h * plan.kernel_w;
        for (int step = begin; step < end; ++step) {
          const Base base = base_of(phase, step * kDepth);
          const uint32_t tile_a = shared + ring.stage * L::kStageBytes, tile_b = tile_a + L::kBytesA;
          barrier_wait(ring.empty(), ring.round);
          barrier_arrive_expect(ring.full(), L::kStageBytes);
          for (int panel = 0; panel < kM / 64; ++panel)
            tma_load(tile_a + panel * kDepth * 128, &a.maps.other, ring.full(), m + panel * 64, step * kDepth);
          for (int panel = 0; panel < kN / 64; ++panel)
            tma_load_im2col(tile_b + panel * kDepth * 128, &a.maps.source[0], ring.full(), n + panel * 64, base.w,
                            base.h, base.n, tap_w * phase.w.tap_step, tap_h * phase.h.tap_step);
          ring.next();
        }
      }
    }
  } else {
    registers_take<232>();
    const int warpgroup = thread_index() / 128 - 1, tid = thread_index() % 128;
    float sum[kM / 128][kN / 2];
    for (int tile = block_x(); tile < plan.tiles; tile += grid_x()) {
      int split, tap, m, n;
      tile_at(tile, split, tap, m, n);
      const int begin = split * plan.split.steps, end = smaller(begin + plan.split.steps, total_steps);
      accumulate<T, kM, kN, kStages, false, false>(sum, ring, shared, warpgroup, end - begin);
      float* partial =
          static_cast<float*>(a.result) + static_cast<int64_t>(split) * plan.rows * plan.taps * plan.columns;
#pragma unroll
      for (int i = 0; i < kM / 128; ++i)
#pragma unroll
        for (int e = 0; e < kN / 2; e += 2) {
          const Element of = wgmma_accumulator(tid, e);
          const int row = m + warpgroup * (kM / 2) + i * 64 + of.row, column = n + of.column;
          if (row < plan.rows && column < plan.columns)
            store_global(partial + (static_cast<int64_t>(row) * plan.taps + tap) * plan.columns + column, sum[i][e],
                         sum[i][e + 1]);
        }
    }
  }
}

}  // namespace fastconv::cuda::sm90

// Kernels on matrices [rows][channels] in which every thread stays with its channels: what belongs to a channel is kept
// in registers, and a warp reads whole lines. A block has `lanes` threads side by side, each with WIDTH neighbouring
// channels, and 256 / lanes such rows of threads, which take every (256 / lanes)-th row of the block's slice of rows.
//
// Reductions: a thread sums its rows, a block merges its threads in order, a second kernel merges the slices in order.
// The slices depend on the shape alone, so the bits do, too.
#pragma once

#include "core/allocator.h"
#include "cuda/vector.h"

namespace fastconv::cuda {

struct ColumnGrid {
  int64_t rows, channels;
  int width, lanes, height;  // channels a thread; threads side by side; rows of threads
  int64_t tiles, slices;     // blocks across the channels, blocks down the rows
  int64_t slice_rows;

  FC_INLINE int64_t blocks() const { return tiles * slices; }
};

// rows_each: rows of one thread.
inline ColumnGrid column_grid(int64_t rows, int64_t channels, int width, int64_t rows_each) {
  ColumnGrid g{rows, channels, width, 1, 1, 0, 0, 0};
  const int64_t units = ceil_divide(channels, width);
  while (g.lanes < 32 && g.lanes < units) g.lanes *= 2;
  g.height = kBlockThreads / g.lanes;
  g.tiles = ceil_divide(units, g.lanes);
  g.slice_rows = g.height * rows_each;
  g.slices = ceil_divide(rows, g.slice_rows);
  return g;
}

// Where a thread of a block begins.
struct ColumnPlace {
  int64_t channel, slice;
  int lane, height;
  int64_t first_row, end_row;
};
FC_INLINE ColumnPlace column_place(const ColumnGrid& g, int64_t block, int thread) {
  ColumnPlace p;
  p.slice = block / g.tiles;
  p.lane = thread % g.lanes;
  p.height = thread / g.lanes;
  p.channel = (block % g.tiles * g.lanes + p.lane) * g.width;
  p.first_row = p.slice * g.slice_rows + p.height;
  const int64_t end = (p.slice + 1) * g.slice_rows;
  p.end_row = end < g.rows ? end : g.rows;
  return p;
}

// Calls f(std::integral_constant<int, WIDTH>) with the channels that a thread may take: a pack where the channels and
// the pointers allow it, else one.
template <class T, class F, class... Pointers> void with_width(int64_t channels, F&& f, const Pointers*... pointers) {
  constexpr int kPack = Pack<T>::kCount;
  if (channels % kPack == 0 && aligned(pointers...)) return f(std::integral_constant<int, kPack>{});
  f(std::integral_constant<int, 1>{});
}

template <int WIDTH, class T> FC_INLINE void load_channels(const T* x, int64_t at, Acc<T> (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    values[0] = static_cast<Acc<T>>(x[at]);
  } else {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + at);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[j] = static_cast<Acc<T>>(pack.v[j]);
  }
}

template <int WIDTH, class T> FC_INLINE void store_channels(T* y, int64_t at, const Acc<T> (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    y[at] = T(values[0]);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) pack.v[j] = T(values[j]);
    *reinterpret_cast<Pack<T>*>(y + at) = pack;
  }
}

// The vector's values of WIDTH channels, or `missing` where there is no vector.
template <int WIDTH, class P> FC_INLINE void load_vector(const P* v, int64_t channel, P missing, P (&values)[WIDTH]) {
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) values[j] = v ? v[channel + j] : missing;
}

// Body: kWidth, struct Channels, prepare(channel, Channels&), row(element offset, Channels&) for every row.
template <class Body> struct ColumnMap {
  static constexpr int kThreads = kBlockThreads, kPhases = 1;
  using Shared = Nothing;
  using Local = Nothing;
  ColumnGrid grid;
  Body body;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared&, Local&) const {
    const ColumnPlace p = column_place(grid, block, thread);
    if (p.channel >= grid.channels) return;
    typename Body::Channels channels;
    body.prepare(p.channel, channels);
    for (int64_t row = p.first_row; row < p.end_row; row += grid.height)
      body.row(row * grid.channels + p.channel, channels);
  }
};

template <class Body> void map_columns(int64_t rows, int64_t channels, const Body& body) {
  constexpr int64_t kRowsEach = 16;
  const ColumnGrid grid = column_grid(rows, channels, Body::kWidth, kRowsEach);
  launch(ColumnMap<Body>{grid, body}, grid.blocks());
}

// Body: as above, and Value, the sum of one channel, with a Wide form in double: start(Value&),
// row(offset, Channels&, Value (&)[kWidth]), Wide widen(Value), merge(Wide&, Wide).
template <class Body> struct ColumnSlices {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  static constexpr int kWidth = Body::kWidth;
  using Value = typename Body::Value;
  using Wide = typename Body::Wide;
  struct Shared {
    Value values[kBlockThreads * kWidth];  // [height][lane][width]
  };
  using Local = Nothing;
  ColumnGrid grid;
  Body body;
  Wide* partial;  // [slice][channel]

  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    const ColumnPlace p = column_place(grid, block, thread);
    if constexpr (PHASE == 0) {
      Value values[kWidth];
      for (int j = 0; j < kWidth; ++j) body.start(values[j]);
      if (p.channel < grid.channels) {
        typename Body::Channels channels;
        body.prepare(p.channel, channels);
        for (int64_t row = p.first_row; row < p.end_row; row += grid.height)
          body.row(row * grid.channels + p.channel, channels, values);
      }
      for (int j = 0; j < kWidth; ++j) shared.values[thread * kWidth + j] = values[j];
    } else {
      const int across = grid.lanes * kWidth;
      const int64_t channel = block % grid.tiles * across + thread;
      if (thread >= across || channel >= grid.channels) return;
      Wide sum = body.widen(shared.values[thread]);
      for (int h = 1; h < grid.height; ++h) body.merge(sum, body.widen(shared.values[h * across + thread]));
      partial[p.slice * grid.channels + channel] = sum;
    }
  }
};

// Merges the slices of some channels, those of a channel in pairs; finish(channel, sum) stores the result.
template <class Body, class Finish> struct ColumnFinish {
  static constexpr int kChannels = 2, kThreads = kBlockThreads, kLanes = kThreads / kChannels, kPhases = 9;
  static_assert(kLanes == 1 << (kPhases - 2), "a phase for each halving");
  using Wide = typename Body::Wide;
  struct Shared {
    Wide sums[kThreads];
  };
  using Local = Nothing;
  int64_t channels, slices;
  Body body;
  const Wide* partial;
  Finish finish;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    const int64_t channel = block * kChannels + thread % kChannels;
    if (channel >= channels) return;
    const int64_t lane = thread / kChannels;
    if constexpr (PHASE == 0) {
      if (lane >= slices) return;
      Wide sum = partial[lane * channels + channel];
      for (int64_t slice = lane + kLanes; slice < slices; slice += kLanes)
        body.merge(sum, partial[slice * channels + channel]);
      shared.sums[thread] = sum;
    } else if constexpr (PHASE + 1 < kPhases) {
      constexpr int64_t kHalf = kLanes >> PHASE;
      const int64_t used = slices < kLanes ? slices : kLanes;
      if (lane < kHalf && lane + kHalf < used) body.merge(shared.sums[thread], shared.sums[thread + kHalf * kChannels]);
    } else if (lane == 0) {
      finish(channel, shared.sums[thread]);
    }
  }
};

// The sum of no rows.
template <class Body, class Finish> struct ColumnEmpty {
  Body body;
  Finish finish;
  FC_HOST_DEVICE void operator()(int64_t channel) const {
    typename Body::Value value;
    body.start(value);
    finish(channel, body.widen(value));
  }
};

// Rows that a thread of a reduction adds up: at most 64, which bound the rounding error; fewer where that would leave
// multiprocessors idle.
inline int64_t rows_of_a_sum(int64_t rows, int64_t channels, int width) {
  constexpr int64_t kThreadsWanted = 1024 * kBlockThreads;
  return std::clamp<int64_t>(ceil_divide(rows * ceil_divide(channels, width), kThreadsWanted), 8, 64);
}

// finish(channel, sum) with the sum of all rows of each channel.
template <class Body, class Finish>
void reduce_columns(int64_t rows, int64_t channels, const Body& body, const Finish& finish) {
  if (channels == 0) return;
  if (rows == 0) return for_each(channels, ColumnEmpty<Body, Finish>{body, finish});
  const ColumnGrid grid = column_grid(rows, channels, Body::kWidth, rows_of_a_sum(rows, channels, Body::kWidth));
  const Buffer partial(grid.slices * channels * sizeof(typename Body::Wide));
  launch(ColumnSlices<Body>{grid, body, partial.as<typename Body::Wide>()}, grid.blocks());
  using Last = ColumnFinish<Body, Finish>;
  launch(Last{channels, grid.slices, body, partial.as<typename Body::Wide>(), finish},
         ceil_divide(channels, Last::kChannels));
}

}  // namespace fastconv::cuda

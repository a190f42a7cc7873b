// Fused Winograd. 3x3 kernels: F(4x4, 3x3), with tiles of 3 where an image's size leaves a remainder. 5x5: F(2x2, 5x5).
// 7x7: F(3x3, 4x4) of four parts of the kernel, whose products are summed as if the parts were further channels. 1x7:
// F(3, 4) of two parts along the rows; 7x1 is taken as 1x7, with rows and columns exchanged. The pixels that one tap of
// a dilated kernel reaches form a sub-grid of the image; each of these interleaved grids is treated as an image of its
// own, whose strides are larger.
//
// 3x3 at stride 2: the even taps of an axis see every second pixel, the odd one those between. F(5x5, 2x2) of these
// four parts, with tiles of 4 at a remainder: 81 products for 16 outputs, where the direct engine has 144. The input
// gradient has a convolution of stride 1 for each phase of the input's pixels, under 2x2, 2x1, 1x2 and 1x1 taps, with
// as many products; the last is left to the direct engine.
//
// Tiles are evaluated at 36 positions (1x7: 6); at each position the tiles and the weights are multiplied as matrices
// by the register tiles of the direct engine, and the products are turned back into pixels. The forward pass and the
// input gradient are one engine, described by the direct engine's problem; the weight gradient sums the products over
// tiles.
//
// Layouts: v[position][channel block][part][tile][kBlock], u[position][channel block][part][channel][width],
// m[position][tile][width], d[position][panel][tile][width]. `position` strides carry kSkew floats more, so that the 36
// lines of a tile do not share a set of the cache.
//
// Two schedules, because the transformed weights are four times the weights:
//   small  weights transformed once for all; a thread takes a block of tiles through all panels, everything else in L2;
//   large  tiles transformed once for all; a thread takes a panel of weights, transformed for itself, over all tiles.
#include "cpu/kernels/winograd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::winograd {
namespace {

using direct::DirectProblem;
using direct::Panels;
using direct::WeightGradientProblem;
using direct::WeightView;

constexpr int64_t kSkew = 48;
constexpr int64_t kMaxTaps = 7;   // an axis
constexpr int64_t kPartStep = 3;  // taps from the first part of seven to the second
constexpr int64_t kMaxParts = 4;  // of a kernel
constexpr int64_t kStreamedFloats = 2 << 20;
// Transformed weights of so many floats are `small`: forward, and in the weight gradient, which adds to
// as many sums for every few tiles.
constexpr int64_t kSmallWeights = kPositions * 128 * 128;
constexpr int64_t kSmallGradients = kPositions * 64 * 128;
// Floats of v that a thread keeps in L2 beside m and u (small); of v and d beside the sums of a weight gradient.
constexpr int64_t kThreadFloats = 88 * 1024, kGradientFloats = 144 * 1024;
// Floats of v, and of d, that all threads share (large). A weight gradient has as many as so many times dw, from the
// least on.
constexpr int64_t kSharedFloats = 4 * 1024 * 1024, kLeastSharedFloats = 1024 * 1024, kGradientRatio = 8;
// Tiles that pass the transformed weights of a panel at a time (large): a batch.
constexpr int64_t kLargeTiles = 28;
// Channels whose weights are transformed at a time where there are few batches, so that they and the products of the
// batches stay in L2: up to so many batches where packed weights are kept, else one.
constexpr int64_t kLargeChannels = 64, kCachedBatches = 8;
// Tiles of a weight gradient that are multiplied at a time: a panel of d and a block of v then stay in L1.
constexpr int64_t kGradientTiles = 128;
// Channel blocks of a panel whose sums at 36 positions a thread keeps at a time (large).
constexpr int64_t kGradientBlocks = 4;
// Parts of the tiles that a weight gradient sums apart (small), so that many cores find work.
constexpr int64_t kGradientParts = 16;

// An axis of outputs, and the taps in the order of the source: the first reads source pixel (output * stride + first),
// the others follow `dilation` apart. Outputs as far apart form the interleaved grids.
//
// Seven taps are two parts of four: taps 0 to 2 and a zero, which leaves nothing to multiply at infinity, and taps 3
// on. At stride 2 three taps are two parts of two: tap 1 and such a zero, and taps 0 and 2.
struct Axis {
  int64_t outputs, taps, stride, first, dilation;
  int64_t index[kMaxTaps];
  int64_t source;                                 // pixels
  int64_t source_step, output_step, weight_step;  // floats between neighbours

  Axis(const AxisTaps& axis, int64_t source_pixels, int64_t floats, int64_t output_floats, int64_t weight_floats)
      : outputs(axis.outputs),
        taps(static_cast<int64_t>(axis.taps.size())),
        stride(axis.step),
        source(source_pixels),
        source_step(floats),
        output_step(axis.out_step * output_floats),
        weight_step(weight_floats) {
    const int64_t step = taps > 1 ? axis.taps[1].offset - axis.taps[0].offset : 1;
    for (int64_t i = 0; i < taps; ++i) index[i] = axis.taps[step > 0 ? i : taps - 1 - i].index;
    first = axis.taps[step > 0 ? 0 : taps - 1].offset;
    dilation = std::abs(step);
  }
  int64_t grids() const { return std::min(dilation, outputs); }
  int64_t grid_outputs() const { return ceil_divide(outputs, dilation); }  // of the first grids; of others one less
  int64_t larger_grids() const { return outputs % dilation > 0 ? outputs % dilation : dilation; }
  int64_t points() const { return taps == 1 ? 1 : kPoints; }
  int64_t parts() const { return taps == 7 || stride == 2 ? 2 : 1; }
  int64_t part_taps(int64_t part) const { return parts() == 1 ? taps : taps / 2 + part; }
  int64_t most_part_taps() const { return part_taps(parts() - 1); }
  int64_t part_first(int64_t part) const { return stride == 2 ? 1 - part : kPartStep * part; }  // tap
  int64_t part_step() const { return stride; }                    // from a tap of a part to the next
  int64_t window_step() const { return dilation * part_step(); }  // pixels from a point of a window to the next
  // Where the window of a part lies under a tile whose first output is this one.
  int64_t window(int64_t output, int64_t part) const { return output * stride + first + part_first(part) * dilation; }
  bool all_taps() const { return *std::max_element(index, index + taps) < taps; }             // of the kernel
  int64_t first_part(int64_t point) const { return point == kPoints - 1 ? parts() - 1 : 0; }  // that is not zero there
};

int64_t positions(const Axis& rows, const Axis& columns) { return rows.points() * columns.points(); }
int64_t kernel_parts(const Axis& rows, const Axis& columns) { return rows.parts() * columns.parts(); }

// A part of a kernel: the parts of its axes.
struct Part {
  int64_t index, row, column;
};

// The first tap of a part, of all taps of the kernel.
int64_t first_tap(const Axis& rows, const Axis& columns, Part part) {
  return rows.part_first(part.row) * columns.taps + columns.part_first(part.column);
}

// Calls body(Part) for all parts that are not zero at a position; of position 0, for all there are.
template <class Body> void for_parts(const Axis& rows, const Axis& columns, int64_t position, const Body& body) {
  if (kernel_parts(rows, columns) == 1) return body(Part{0, 0, 0});
  for (int64_t row = rows.first_part(position / kPoints); row < rows.parts(); ++row)
    for (int64_t column = columns.first_part(position % kPoints); column < columns.parts(); ++column)
      body(Part{row * columns.parts() + column, row, column});
}

// The outputs of a grid cut along one axis into full tiles (6 points: 4 outputs under 3 taps, 2 under 5, 3 under parts
// of 4, 5 under 2 or parts of 2; a single tap: 1 point), then tiles of one output less (5 points, only under 3 taps and
// 2). The last tile may reach over the end.
struct Cut {
  Filter filter, lesser;
  int64_t parts, full, less;

  explicit Cut(const Axis& axis) : Cut(axis.grid_outputs(), axis.most_part_taps(), axis.parts()) {}
  // taps: of the largest part.
  Cut(int64_t outputs, int64_t taps, int64_t kernel_parts)
      : filter(filter_of(taps)),
        lesser(taps == 2 ? Filter::kF42 : Filter::kF33),
        parts(kernel_parts),
        full(ceil_divide(outputs, outputs_of(filter))),
        less(0) {
    if (taps != 3 && taps != 2) return;
    const int64_t most = full;
    for (int64_t f = most - 1; f >= 0 && most - f <= 4; --f) {
      const int64_t t = ceil_divide(outputs - outputs_of(filter) * f, outputs_of(lesser));
      if (products_of(f, t) < products()) full = f, less = t;
    }
  }
  static Filter filter_of(int64_t taps) {
    switch (taps) {
      case 1: return Filter::kF11;
      case 2: return Filter::kF52;
      case 3: return Filter::kF43;
      case 4: return Filter::kF34;
      default: return Filter::kF25;
    }
  }
  // One a point, and one less than two under two parts.
  int64_t products() const { return products_of(full, less); }
  Filter tile(bool is_full) const { return is_full ? filter : lesser; }
  int64_t tiles(bool is_full) const { return is_full ? full : less; }
  int64_t begin(bool is_full, int64_t i) const {
    return is_full ? outputs_of(filter) * i : outputs_of(filter) * full + outputs_of(lesser) * i;
  }

 private:
  int64_t products_of(int64_t f, int64_t l) const {
    return (parts * points_of(filter) - parts + 1) * f + (parts * points_of(lesser) - parts + 1) * l;
  }
};

// All tiles of all grids of all images, ordered by class so that the tiles that have a position are neighbours:
// (rows, columns) = (full, less), (full, full), (less, full), (less, less). Position (4, *) belongs to the first two,
// (*, 4) to the middle two.
class Tiles {
 public:
  struct Tile {
    WinogradTile size;
    int64_t n, y, x;        // first output
    int64_t rows, columns;  // outputs from there to the end of the grid; none where a grid is smaller than the first
  };

  Tiles(int64_t images, const Axis& rows, const Axis& columns)
      : row_axis_(rows), column_axis_(columns), rows_(rows), columns_(columns) {
    const int64_t grids = images * rows.grids() * columns.grids();
    for (int i = 0; i < 4; ++i)
      ends_[i] = (i ? ends_[i - 1] : 0) + grids * rows_.tiles(full_rows(i)) * columns_.tiles(full_columns(i));
  }
  int64_t count() const { return ends_[3]; }
  // Whether all tiles are full and follow each other like the pixels of the images.
  bool in_order() const {
    const bool exchanged = row_axis_.source_step < column_axis_.source_step;
    return ends_[0] == 0 && ends_[1] == count() && row_axis_.grids() * column_axis_.grids() == 1 && !exchanged;
  }

  // Calls body(index, Tile) for the tiles of a range, in their order. It counts: divisions would cost a tile of a few
  // channels a tenth of its transform.
  template <class Body> void each(Range range, Body body) const {
    const int64_t grids_down = row_axis_.grids(), grids_across = column_axis_.grids();
    const int64_t tall = row_axis_.larger_grids(), wide = column_axis_.larger_grids();
    const int64_t height = row_axis_.grid_outputs(), width = column_axis_.grid_outputs();
    for (int kind = 0; kind < 4; ++kind) {
      const int64_t first = kind > 0 ? ends_[kind - 1] : 0;
      int64_t i = std::max(range.begin, first);
      const int64_t end = std::min(range.end, ends_[kind]);
      if (i >= end) continue;
      const bool fr = full_rows(kind), fc = full_columns(kind);
      const int64_t across = columns_.tiles(fc), down = rows_.tiles(fr);
      int64_t column = (i - first) % across, row = (i - first) / across % down;
      const int64_t grid = (i - first) / (across * down);
      int64_t x = grid % grids_across, y = grid / grids_across % grids_down, n = grid / (grids_across * grids_down);
      for (; i < end; ++i) {
        const int64_t to_row = rows_.begin(fr, row), to_column = columns_.begin(fc, column);
        body(i, Tile{{rows_.tile(fr), columns_.tile(fc)},
                     n,
                     y + to_row * row_axis_.dilation,
                     x + to_column * column_axis_.dilation,
                     height - (y >= tall) - to_row,
                     width - (x >= wide) - to_column});
        if (++column < across) continue;
        column = 0;
        if (++row < down) continue;
        row = 0;
        if (++x < grids_across) continue;
        x = 0;
        if (++y < grids_down) continue;
        y = 0, ++n;
      }
    }
  }

  // The points that some tile has and that are not zero of a part.
  WantedPoints points(Part part) const {
    const auto of = [](const Axis& axis, const Cut& cut, int64_t axis_part) {
      const bool infinity = axis_part >= axis.first_part(kPoints - 1);
      return kAllPoints & ~(cut.full > 0 ? 0u : 1u << 4) & ~(infinity ? 0u : 1u << 5);
    };
    return {of(row_axis_, rows_, part.row), of(column_axis_, columns_, part.column)};
  }

  // Of the tiles [begin, end), those that have this position.
  Range at(int64_t position, Range all) const {
    const bool row = position / kPoints == 4, column = position % kPoints == 4;
    const int64_t begin = column ? ends_[0] : 0, end = row ? ends_[1] : column ? ends_[2] : ends_[3];
    return {std::clamp(begin, all.begin, all.end), std::clamp(end, all.begin, all.end)};
  }

 private:
  static bool full_rows(int kind) { return kind < 2; }
  static bool full_columns(int kind) { return kind == 1 || kind == 2; }
  Axis row_axis_, column_axis_;
  Cut rows_, columns_;
  int64_t ends_[4];
};

// Bit i: pixel begin + i * step of an axis lies inside [0, size).
uint32_t inside(int64_t begin, int64_t step, int64_t size) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kPoints; ++i) {
    const int64_t at = begin + i * step;
    bits |= static_cast<uint32_t>(at >= 0 && at < size) << i;
  }
  return bits;
}

// The caller's arrays, in the type they are stored in; of a DirectProblem beside it only the rest is read.
template <class T> struct Arrays {
  const T* x;
  const T* w;
  const T* residual;  // or null
  T* y;
};

// Where the array v (or d, or m) of some tiles stands.
struct Block {
  float* data;
  Range tiles;
  int64_t position;  // stride
  int64_t size() const { return tiles.end - tiles.begin; }
};

int64_t input_position(const Axis& rows, const Axis& columns, int64_t channels, int64_t tiles) {
  return kernel_parts(rows, columns) * ceil_divide(channels, kBlock) * kBlock * tiles + kSkew;
}

// v of the tiles [mine), for all channels of a group.
template <class T>
void transform_input(const T* x, const SourceImage& source, const Axis& rows, const Axis& columns, const Tiles& tiles,
                     Range mine, const Block& v) {
  WinogradInput<T> t{};
  t.row = rows.window_step() * rows.source_step, t.pixel = columns.window_step() * columns.source_step;
  t.channels = source.channels;
  t.block = kernel_parts(rows, columns) * v.size() * kBlock, t.position = v.position;
  WantedPoints points[kMaxParts];
  for_parts(rows, columns, 0, [&](Part part) { points[part.index] = tiles.points(part); });
  tiles.each(mine, [&](int64_t i, const Tiles::Tile& tile) {
    t.tile = tile.size;
    for_parts(rows, columns, 0, [&](Part part) {
      const int64_t row = rows.window(tile.y, part.row), column = columns.window(tile.x, part.column);
      t.x = x + tile.n * source.h * source.w * source.pixel + row * rows.source_step + column * columns.source_step +
            source.first_channel;
      t.points = points[part.index];
      t.rows_in = inside(row, rows.window_step(), rows.source);
      t.columns_in = inside(column, columns.window_step(), columns.source);
      const bool more = tile.columns > outputs_of(tile.size.columns);
      t.next = more ? kPoints * t.pixel : outputs_of(tile.size.rows) * t.row - column * columns.source_step;
      t.v = v.data + (part.index * v.size() + i - v.tiles.begin) * kBlock;
      kernels().winograd.of<T>().input(t);
    });
  });
}

// Channels whose weights are packed at a time: whole cache lines side by side, for the memory's sake, while all taps
// stay in L2.
constexpr int64_t kChannelsOf3 = 4 * kBlock, kChannelsOfMore = kBlock;
int64_t channels_at_once(const Axis& columns) { return columns.taps <= 3 ? kChannelsOf3 : kChannelsOfMore; }
// Floats from one tap to the next; without the line between them all taps would share a set of L1.
int64_t packed_tap(const Axis& columns, int64_t width) { return channels_at_once(columns) * width + kBlock; }
// Floats of a panel's channels before c, the first of those packed at a time.
int64_t packed_channels(const Axis& rows, const Axis& columns, int64_t c, int64_t width) {
  return ceil_divide(c, channels_at_once(columns)) * rows.taps * columns.taps * packed_tap(columns, width);
}

// Elements of a cache line.
template <class T> constexpr int64_t kLine = 64 / sizeof(T);

// Channels [c, c + count) of one panel: [tap][channels_at_once][width], packed_tap apart.
template <class T>
void pack_taps(const T* weights, const WeightView& w, const Axis& rows, const Axis& columns, const Panels& panels,
               int64_t g, int64_t panel, int64_t c, int64_t count, float* to) {
  const int64_t width = panels.width(panel), tap = packed_tap(columns, width);
  const int64_t taps = rows.taps * columns.taps;
  const T* src = weights + g * w.group + panel * panels.tile_k * w.out + c * w.in;
  const auto& pack = kernels().winograd.of<T>();
  const auto from = [&](int64_t i) {
    return rows.index[i / columns.taps] * rows.weight_step + columns.index[i % columns.taps] * columns.weight_step;
  };
  const bool adjacent = columns.weight_step == 1 && (rows.taps == 1 || rows.weight_step == columns.taps);
  if (adjacent && rows.all_taps() && columns.all_taps()) {  // side by side in memory
    int64_t places[kMaxTaps * kMaxTaps];
    for (int64_t i = 0; i < taps; ++i) places[from(i)] = i * tap;
    pack.pack_taps(src, w.out, w.in, taps, panels.channels(panel), count, width, places, to);
    return;
  }
  // The next tap's weights are fetched meanwhile: so many rows, far apart, are more than the hardware follows.
  const bool turned = w.out == 1;
  const int64_t outs = panels.channels(panel), lines = turned ? count : outs, line = turned ? outs : count;
  for (int64_t i = 0; i < taps; ++i) {
    const T* next = src + (i + 1 < taps ? from(i + 1) : from(0) + count * w.in);
    for (int64_t j = 0; j < lines; ++j)
      for (int64_t k = 0; k < line; k += kLine<T>) __builtin_prefetch(next + j * (turned ? w.in : w.out) + k, 0, 2);
    pack.pack_weights(src + from(i), w.out, w.in, outs, count, width, to + i * tap);
  }
}

// Which of the kernels of winograd.weights.
int taps_kind(const Axis& rows, const Axis& columns) {
  const bool along_one = rows.taps == 1;
  switch (columns.most_part_taps()) {
    case 3: return 0;
    case 5: return 1;
    case 4: return along_one ? 3 : 2;
    default: return along_one ? 5 : 4;
  }
}

// u of some channels of one panel. packed: all its channels as pack_taps leaves them, or null.
template <class T>
void transform_weights(const T* weights, const WeightView& w, const Axis& rows, const Axis& columns, const Tiles& tiles,
                       const Panels& panels, int64_t g, int64_t panel, Range channels, float* u, int64_t position,
                       const float* packed = nullptr) {
  const int64_t at_once = channels_at_once(columns), taps = rows.taps * columns.taps;
  const int64_t parts = kernel_parts(rows, columns);
  const int64_t width = panels.width(panel), tap = packed_tap(columns, width);
  Buffer own;  // more than the stack of a thread may hold
  if (!packed) own = Buffer(taps * tap * sizeof(float));
  for (int64_t c = channels.begin; c < channels.end; c += at_once) {
    const int64_t count = std::min(at_once, channels.end - c);
    if (!packed) pack_taps(weights, w, rows, columns, panels, g, panel, c, count, own.as<float>());
    const float* from = packed ? packed + packed_channels(rows, columns, c, width) : own.as<float>();
    const int64_t block = parts == 1 ? count : std::min(kBlock, count);
    for (int64_t b = 0; b < count; b += block)
      for_parts(rows, columns, 0, [&](Part part) {
        WinogradWeights t{};
        const int64_t here = std::min(block, count - b);
        t.w = from + first_tap(rows, columns, part) * tap + b * width;
        t.row = rows.part_step() * columns.taps * tap, t.column = columns.part_step() * tap;
        t.rows = rows.part_taps(part.row), t.columns = columns.part_taps(part.column);
        t.floats = here * width;
        t.u = u + ((c - channels.begin + b) * parts + part.index * here) * width, t.position = position;
        t.points = tiles.points(part);
        kernels().winograd.weights[taps_kind(rows, columns)](t);
      });
  }
}

// All weights as pack_taps leaves them, panel by panel: a quarter of u (of 5x5 two thirds, of 7x7 a third), which would
// be slower to read from memory than it is to transform. Only float has a cache.
PackedWeights packed_taps(const DirectProblem& d, const Axis& rows, const Axis& columns, const Panels& panels,
                          int64_t panel_floats) {
  const int64_t count = d.groups * panels.count(), at_once = channels_at_once(columns);
  return PackedWeights(d.cache, "winograd", count * panel_floats, [&](float* to) {
    parallel_for(count, [&](int64_t i, int) {
      const int64_t panel = i % panels.count();
      for (int64_t c = 0; c < d.source.channels; c += at_once)
        pack_taps(d.w.data, d.w, rows, columns, panels, i / panels.count(), panel, c,
                  std::min(at_once, d.source.channels - c),
                  to + i * panel_floats + packed_channels(rows, columns, c, panels.width(panel)));
    });
  });
}

// What is fetched into L2 while products are made, a cache line in each step of a register tile: in bursts, or faster
// than memory follows, a processor leaves fetches out.
class Ahead {
 public:
  // So many lines, `step` floats apart.
  void add(const float* from, int64_t step, int64_t lines) {
    if (lines > 0) runs_[count_++] = {from, step, lines};
  }
  // Gives a tile the next lines, which takes so many steps.
  template <class RegisterTile> void give(RegisterTile& t, int64_t steps) {
    t.later = nullptr, t.later_step = 0;
    if (first_ == count_) return;
    Run& run = runs_[first_];
    t.later = run.from, t.later_step = run.step;
    run.from += steps * run.step, run.lines -= steps;
    if (run.lines <= 0) ++first_;
  }

 private:
  struct Run {
    const float* from;
    int64_t step, lines;
  };
  static constexpr int kMaxRuns = 8;
  Run runs_[kMaxRuns];
  int first_ = 0, count_ = 0;
};

// m = v u at every position, for the tiles of v, summed over the channels of u, the first of which begins a block; of
// later channels the sums go on. next_v: of the next position v is fetched into L2, not u.
void multiply(const Axis& rows, const Axis& columns, const Tiles& tiles, const Block& v, Range channels, const float* u,
              int64_t u_position, int64_t width, const Block& m, bool next_v, Ahead ahead) {
  const auto& k = kernels().conv2d;
  const int64_t position_count = positions(rows, columns);
  DirectTile::Tap taps[kMaxParts]{};
  DirectTile t{};
  t.taps = taps;
  t.panel_taps = kernel_parts(rows, columns);
  t.blocks = ceil_divide(channels.end - channels.begin, kBlock);
  t.block_stride = t.panel_taps * v.size() * kBlock;
  t.last_channels = channels.end - channels.begin - (t.blocks - 1) * kBlock;
  t.pixel_stride = t.channels = width;
  t.low = -__builtin_inff(), t.high = __builtin_inff();
  t.accumulate = channels.begin > 0;
  const auto* const tile = k.direct[width / k.lanes - 1][0];
  const float* v_block = v.data + channels.begin * t.panel_taps * v.size();
  // Positions that as many tiles have are cut into the same register tiles: `extra` of them have one tile more.
  int64_t count = -1, parts = 0, each = 0, extra = 0;
  for (int64_t p = 0; p < position_count; ++p) {
    const Range here = tiles.at(p, v.tiles);
    if (here.end - here.begin != count) {
      count = here.end - here.begin, parts = ceil_divide(count, k.tile_pixels);
      each = count / std::max<int64_t>(parts, 1), extra = count - parts * each;
    }
    t.w = u + p * u_position;
    t.tap_count = 0;
    for_parts(rows, columns, p,
              [&](Part part) { taps[t.tap_count++] = {{v_block + part.index * v.size() * kBlock}, part.index}; });
    int64_t first = here.begin - v.tiles.begin;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t size = each + (i < extra ? 1 : 0);
      ahead.give(t, (channels.end - channels.begin) * t.tap_count);
      t.next = i > 0 || p + 1 == position_count ? t.w : next_v ? v_block + v.position : t.w + u_position;
      t.x_offset = first * kBlock;
      t.y = m.data + p * m.position + first * width;
      tile[size - 1](t);
      first += size;
    }
    v_block += v.position;
  }
}

// Floats from the first output of a tile to that of the tile after it, `row` and `pixel` from one output of it to the
// next.
int64_t to_next_tile(const Tiles::Tile& tile, const Axis& columns, int64_t row, int64_t pixel) {
  const int64_t across = outputs_of(tile.size.columns);
  return tile.columns > across ? across * pixel : outputs_of(tile.size.rows) * row - tile.x * columns.output_step;
}

// The outputs of the tiles [mine) for one panel of channels.
template <class T>
void transform_output(const DirectProblem& d, const Arrays<T>& a, const Axis& rows, const Axis& columns,
                      const Tiles& tiles, Range mine, const Panels& panels, int64_t g, int64_t panel, const Block& m) {
  const int64_t channel = g * d.outs + panel * panels.tile_k;
  WinogradOutput<T> t{};
  t.position = m.position;
  t.row = rows.dilation * rows.output_step, t.pixel = columns.dilation * columns.output_step;
  t.channels = panels.channels(panel);
  t.bias = d.epilogue.bias ? d.epilogue.bias + channel : nullptr;
  t.low = d.epilogue.low, t.high = d.epilogue.high;
  t.streaming = d.streaming;
  tiles.each(mine, [&](int64_t i, const Tiles::Tile& tile) {
    const int64_t at =
        tile.n * d.y_h * d.y_w * d.y_pixel + tile.y * rows.output_step + tile.x * columns.output_step + channel;
    t.tile = tile.size;
    t.m = m.data + (i - m.tiles.begin) * panels.width(panel);
    t.y = a.y + at;
    t.residual = a.residual ? a.residual + at : nullptr;
    t.rows = tile.rows, t.columns = tile.columns;
    t.next = to_next_tile(tile, columns, t.row, t.pixel);
    kernels().winograd.of<T>().output(t);
  });
}

// Of so many pixels, cut into tiles in order, those that belong to some of the tiles.
Range pixels_under(const Tiles& tiles, Range some, int64_t pixels) {
  return {some.begin * pixels / tiles.count(), some.end * pixels / tiles.count()};
}

// What transform_input will read for some tiles.
void want_input(const SourceImage& source, int64_t images, const Tiles& tiles, Range some, Ahead& ahead) {
  if (!tiles.in_order() || source.pixel != source.channels) return;
  const Range pixels = pixels_under(tiles, some, images * source.h * source.w);
  // A row further: what lies above, the tiles before have read.
  ahead.add(source.data + (pixels.begin + source.w) * source.pixel, kBlock,
            (pixels.end - pixels.begin) * source.pixel / kBlock);
}

// What transform_gradient will read for some tiles.
void want_gradient(const WeightGradientProblem& a, const Tiles& tiles, Range some, Ahead& ahead) {
  if (!tiles.in_order() || a.groups > 1) return;
  const Range pixels = pixels_under(tiles, some, a.images * a.rows.outputs * a.columns.outputs);
  ahead.add(a.dy + pixels.begin * a.outs, kBlock, (pixels.end - pixels.begin) * a.outs / kBlock);
}

// What transform_output will write through the caches, and read, for a panel of channels.
void want_output(const DirectProblem& d, const Tiles& tiles, Range some, const Panels& panels, int64_t g, int64_t panel,
                 Ahead& ahead) {
  if (!tiles.in_order() || d.rows.out_step * d.columns.out_step != 1) return;
  const Range pixels = pixels_under(tiles, some, d.images * d.y_h * d.y_w);
  const int64_t first = pixels.begin * d.y_pixel + g * d.outs + panel * panels.tile_k;
  for (int64_t k = 0; k < panels.channels(panel); k += kBlock) {
    if (!d.streaming) ahead.add(d.y + first + k, d.y_pixel, pixels.end - pixels.begin);
    if (d.epilogue.residual) ahead.add(d.epilogue.residual + first + k, d.y_pixel, pixels.end - pixels.begin);
  }
}

SourceImage group_source(SourceImage source, int64_t g) {
  source.first_channel += g * source.channels;
  return source;
}

template <class T>
void run_small(const DirectProblem& d, const Arrays<T>& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = d.source.channels, position_count = positions(rows, columns);
  const int64_t u_position = kernel_parts(rows, columns) * channels * panels.tile_k + kSkew;
  const int64_t u_panel = position_count * u_position;

  std::optional<PackedWeights> kept;
  if (d.cache)
    kept.emplace(d.cache, "winograd", d.groups * panels.count() * u_panel, [&](float* u) {
      parallel_for(d.groups * panels.count(), [&](int64_t i, int) {
        transform_weights(a.w, d.w, rows, columns, tiles, panels, i / panels.count(), i % panels.count(), {0, channels},
                          u + i * u_panel, u_position);
      });
    });

  // Whole register tiles that fit L2, but not so many that a thread would find no work.
  const int threads = num_threads();
  const int64_t tile = kernels().conv2d.tile_pixels;
  const int64_t fit = kThreadFloats / input_position(rows, columns, channels, 1) / position_count;
  const int64_t share = tiles.count() * d.groups / (4 * threads);
  const int64_t blocks = ceil_divide(tiles.count(), std::max(std::min(fit, share) / tile, int64_t{1}) * tile);
  const int64_t size = ceil_divide(tiles.count(), blocks);
  const int64_t v_position = input_position(rows, columns, channels, size), m_position = size * panels.tile_k + kSkew;
  const int64_t scratch_floats = position_count * (v_position + m_position);
  // Where none are kept, each thread transforms the weights of its groups for itself: from another core's caches they
  // are slower to fetch than to make.
  const int64_t weight_floats = panels.count() * u_panel;
  Buffer scratch(threads * scratch_floats * sizeof(float)), weights;
  if (!kept) weights = Buffer(threads * weight_floats * sizeof(float));
  std::vector<int64_t> transformed(threads, -1);  // the group whose weights a thread has
  parallel_for(
      d.groups * blocks,
      [&](int64_t i, int thread) {
        const int64_t g = i / blocks;
        const Range mine = split(tiles.count(), blocks, i % blocks);
        float* const own = scratch.as<float>() + thread * scratch_floats;
        const float* u = kept ? kept->data() + g * weight_floats : weights.as<float>() + thread * weight_floats;
        if (!kept && std::exchange(transformed[thread], g) != g)
          for (int64_t panel = 0; panel < panels.count(); ++panel)
            transform_weights(a.w, d.w, rows, columns, tiles, panels, g, panel, {0, channels},
                              weights.as<float>() + thread * weight_floats + panel * u_panel, u_position);
        const Block v{own, mine, v_position}, m{own + position_count * v_position, mine, m_position};
        transform_input(a.x, group_source(d.source, g), rows, columns, tiles, mine, v);
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          Ahead ahead;
          if constexpr (std::is_same_v<T, float>) {
            want_output(d, tiles, mine, panels, g, panel, ahead);
            if (i % blocks + 1 < blocks) {
              const Range next = split(tiles.count(), blocks, i % blocks + 1);
              const Range share = split(next.end - next.begin, panels.count(), panel);
              want_input(d.source, d.images, tiles, {next.begin + share.begin, next.begin + share.end}, ahead);
            }
          }
          multiply(rows, columns, tiles, v, {0, channels}, u + panel * u_panel, u_position, panels.width(panel), m,
                   false, ahead);
          transform_output(d, a, rows, columns, tiles, mine, panels, g, panel, m);
        }
      },
      threads);
}

template <class T>
void run_large(const DirectProblem& d, const Arrays<T>& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = d.source.channels, position_count = positions(rows, columns);
  const int64_t fit =
      std::max(kSharedFloats / input_position(rows, columns, channels, 1) / position_count, kLargeTiles);
  const int64_t sections = ceil_divide(tiles.count(), fit), size = ceil_divide(tiles.count(), sections);
  const int64_t batches = ceil_divide(size, kLargeTiles), batch_size = ceil_divide(size, batches);
  // Channels in parts keep the transformed weights in L2, but each part loads and stores the products of all tiles. The
  // sums have the same bits.
  const bool in_parts = batches <= (d.cache ? kCachedBatches : 1);
  const int64_t step = in_parts ? std::min(channels, kLargeChannels) : channels;
  const int64_t u_position = kernel_parts(rows, columns) * step * panels.tile_k + kSkew;
  const int64_t v_position = input_position(rows, columns, channels, batch_size),
                m_position = batch_size * panels.tile_k + kSkew;
  const int threads = num_threads();
  const int64_t parts = std::clamp<int64_t>(ceil_divide(threads, panels.count()), 1, batches);
  const int64_t u_floats = position_count * u_position, m_floats = position_count * m_position;
  const int64_t scratch_floats = u_floats + (in_parts ? ceil_divide(batches, parts) : 1) * m_floats;
  const int64_t packed_panel = packed_channels(rows, columns, channels, panels.tile_k);
  std::optional<PackedWeights> packed;
  if (d.cache) packed.emplace(packed_taps(d, rows, columns, panels, packed_panel));

  Buffer shared(batches * position_count * v_position * sizeof(float)),
      scratch(threads * scratch_floats * sizeof(float));
  for (int64_t section = 0; section < d.groups * sections; ++section) {
    const int64_t g = section / sections;
    const Range all = split(tiles.count(), sections, section % sections);
    const auto input = [&](int64_t j) {
      const Range batch = split(all.end - all.begin, batches, j);
      return Block{shared.as<float>() + j * position_count * v_position,
                   {all.begin + batch.begin, all.begin + batch.end},
                   v_position};
    };
    constexpr int64_t kShares = kLargeTiles / 4;
    parallel_for(batches * kShares, [&](int64_t i, int) {
      const Block v = input(i / kShares);
      const Range share = split(v.size(), kShares, i % kShares);
      const Range mine{v.tiles.begin + share.begin, v.tiles.begin + share.end};
      transform_input(a.x, group_source(d.source, g), rows, columns, tiles, mine, v);
    });

    parallel_for(
        panels.count() * parts,
        [&](int64_t i, int thread) {
          const int64_t panel = i / parts, width = panels.width(panel);
          const Range mine = split(batches, parts, i % parts);
          float* const u = scratch.as<float>() + thread * scratch_floats;
          const float* weights = packed ? packed->data() + (g * panels.count() + panel) * packed_panel : nullptr;
          for (int64_t c = 0; c < channels; c += step) {
            const Range some{c, std::min(channels, c + step)};
            transform_weights(a.w, d.w, rows, columns, tiles, panels, g, panel, some, u, u_position, weights);
            for (int64_t j = mine.begin; j < mine.end; ++j) {
              const Block v = input(j);
              const Block m{u + u_floats + (in_parts ? j - mine.begin : 0) * m_floats, v.tiles, m_position};
              Ahead ahead;
              if (some.end == channels) {
                if constexpr (std::is_same_v<T, float>) want_output(d, tiles, v.tiles, panels, g, panel, ahead);
              } else if (weights && j == mine.begin) {
                ahead.add(weights + packed_channels(rows, columns, some.end, width), kBlock,
                          packed_channels(rows, columns, std::min(step, channels - some.end), width) / kBlock);
              }
              multiply(rows, columns, tiles, v, some, u, u_position, width, m, in_parts, ahead);
              if (some.end == channels) transform_output(d, a, rows, columns, tiles, v.tiles, panels, g, panel, m);
            }
          }
        },
        threads);
  }
}

template <class T> void convolve(DirectProblem d, Arrays<T> a) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  Axis rows(d.rows, d.source.h, d.source.w * d.source.pixel, d.y_w * d.y_pixel, d.w.row);
  Axis columns(d.columns, d.source.w, d.source.pixel, d.y_pixel, d.w.column);
  if (columns.taps == 1) std::swap(rows, columns);
  const Tiles tiles(d.images, rows, columns);
  a.y += d.output_offset(d.rows, d.columns, 0, 0, 0);
  // The next layer reads y at once: it goes around the caches only where it would not stay in them.
  d.streaming = worth_streaming(d.images * d.y_h * d.y_w, d.y_pixel, kStreamedFloats) && d.outs % k.lanes == 0;
  if (positions(rows, columns) * kernel_parts(rows, columns) * d.source.channels * d.outs <= kSmallWeights)
    run_small(d, a, tiles, rows, columns, panels);
  else
    run_large(d, a, tiles, rows, columns, panels);
}

// d of the tiles [mine), for the channels of a group.
void transform_gradient(const WeightGradientProblem& a, const Axis& rows, const Axis& columns, const Tiles& tiles,
                        Range mine, const Panels& panels, int64_t g, const Block& d) {
  const int64_t pixel = a.groups * a.outs;
  WinogradGradient t{};
  t.row = rows.dilation * rows.output_step, t.pixel = columns.dilation * columns.output_step;
  t.position = d.position;
  tiles.each(mine, [&](int64_t i, const Tiles::Tile& tile) {
    t.tile = tile.size;
    t.rows = tile.rows, t.columns = tile.columns;
    t.next = to_next_tile(tile, columns, t.row, t.pixel);
    const float* dy = a.dy + tile.n * rows.outputs * columns.outputs * pixel + tile.y * rows.output_step +
                      tile.x * columns.output_step + g * a.outs;
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      t.dy = dy + panel * panels.tile_k;
      t.channels = panels.channels(panel), t.width = panels.width(panel);
      t.d = d.data + panel * panels.tile_k * d.size() + (i - d.tiles.begin) * t.width;
      kernels().winograd.gradient(t);
    }
  });
}

// acc[position][part][block - blocks.begin][kBlock][width] = v' d over the tiles, for one panel; or added to that.
void add_products(const Axis& rows, const Axis& columns, const Tiles& tiles, const Block& v, const Block& d,
                  Range blocks, int64_t channels, const Panels& panels, int64_t panel, bool add, float* acc,
                  int64_t acc_position, Ahead ahead = {}) {
  const int64_t width = panels.width(panel);
  const WeightTile::Row row{0, 0};
  WeightTile t{};
  t.row = &row;
  t.rows = 1;
  t.width = width;
  const int64_t block_floats = kernel_parts(rows, columns) * v.size() * kBlock;
  const int64_t sums = kernel_parts(rows, columns) * (blocks.end - blocks.begin) * kBlock * width;
  for (int64_t p = 0; p < positions(rows, columns); ++p) {
    const Range here = tiles.at(p, v.tiles);
    const int64_t parts = ceil_divide(here.end - here.begin, kGradientTiles);
    // Where only tiles of other sections have a position, its sums are read all the same.
    if (parts == 0 && !add) std::fill_n(acc + p * acc_position, sums, 0.0f);
    for (int64_t i = 0; i < parts; ++i) {
      const Range part = split(here.end - here.begin, parts, i);
      const int64_t first = here.begin - v.tiles.begin + part.begin;
      t.columns = part.end - part.begin;
      t.add = add || i > 0;
      t.dy = d.data + p * d.position + panel * panels.tile_k * d.size() + first * width;
      for_parts(rows, columns, p, [&](Part of) {
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
          t.x = v.data + p * v.position + b * block_floats + (of.index * v.size() + first) * kBlock;
          t.channels = std::min(kBlock, channels - b * kBlock);
          t.next = b + 1 < blocks.end ? t.x + block_floats : t.dy + t.columns * width;
          t.acc = acc + p * acc_position + (of.index * (blocks.end - blocks.begin) + b - blocks.begin) * kBlock * width;
          ahead.give(t, t.columns);
          kernels().conv2d.weight_tile(t);
        }
      });
    }
  }
}

// dw[block][tap][kBlock][width] from acc[position][part][block][kBlock][width], of one panel.
void transform_weight_gradient(const Axis& rows, const Axis& columns, const Tiles& tiles, const float* acc,
                               int64_t position, int64_t blocks, int64_t width, float* dw) {
  WinogradWeightGradient t{};
  t.position = position;
  t.floats = kBlock * width;
  t.row = rows.part_step() * columns.taps * t.floats, t.column = columns.part_step() * t.floats;
  for (int64_t b = 0; b < blocks; ++b)
    for_parts(rows, columns, 0, [&](Part part) {
      t.m = acc + (part.index * blocks + b) * t.floats;
      t.dw = dw + (b * rows.taps * columns.taps + first_tap(rows, columns, part)) * t.floats;
      t.rows = rows.part_taps(part.row), t.columns = columns.part_taps(part.column);
      t.points = tiles.points(part);
      kernels().winograd.weight_gradient[taps_kind(rows, columns)](t);
    });
}

// A thread takes blocks of tiles through everything and keeps all of m; parts of the tiles are summed at the end.
void run_small(const WeightGradientProblem& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = a.source.channels, blocks = ceil_divide(channels, kBlock);
  const int64_t outs = panels.count() * panels.tile_k, position_count = positions(rows, columns);
  const int64_t fit = std::max<int64_t>(kGradientFloats / (position_count * (blocks * kBlock + outs)), 16);
  const int64_t parts = std::clamp<int64_t>(tiles.count() / std::min(2 * fit, kGradientTiles), 1, kGradientParts);
  const int64_t v_position = input_position(rows, columns, channels, fit), d_position = outs * fit + kSkew;
  const int64_t m_panel = kernel_parts(rows, columns) * blocks * kBlock * panels.tile_k;
  const int64_t m_position = panels.count() * m_panel + kSkew;
  const int64_t scratch_floats = position_count * (v_position + d_position + m_position);
  const int64_t taps = rows.taps * columns.taps;
  const int64_t slot_floats = taps * blocks * kBlock * panels.tile_k, slots = a.groups * panels.count();
  const int threads = num_threads();

  Buffer scratch(threads * scratch_floats * sizeof(float)), sums(parts * slots * slot_floats * sizeof(float));
  parallel_for(
      a.groups * parts,
      [&](int64_t i, int thread) {
        const int64_t g = i % a.groups, part = i / a.groups;
        const Range all = split(tiles.count(), parts, part);
        float* const own = scratch.as<float>() + thread * scratch_floats;
        float* const m = own + position_count * (v_position + d_position);
        const int64_t steps = ceil_divide(all.end - all.begin, fit);
        for (int64_t j = 0; j < steps; ++j) {
          const Range few = split(all.end - all.begin, steps, j);
          const Range mine{all.begin + few.begin, all.begin + few.end};
          const Block v{own, mine, v_position}, d{own + position_count * v_position, mine, d_position};
          transform_input(a.source.data, group_source(a.source, g), rows, columns, tiles, mine, v);
          transform_gradient(a, rows, columns, tiles, mine, panels, g, d);
          const int64_t left = std::min(mine.end - mine.begin, tiles.count() - mine.end);
          for (int64_t panel = 0; panel < panels.count(); ++panel) {
            Ahead ahead;
            const Range share = split(left, panels.count(), panel), next{mine.end + share.begin, mine.end + share.end};
            want_input(a.source, a.images, tiles, next, ahead);
            want_gradient(a, tiles, next, ahead);
            add_products(rows, columns, tiles, v, d, {0, blocks}, channels, panels, panel, j > 0, m + panel * m_panel,
                         m_position, ahead);
          }
        }
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          float* sum = sums.as<float>() + (part * slots + g * panels.count() + panel) * slot_floats;
          transform_weight_gradient(rows, columns, tiles, m + panel * m_panel, m_position, blocks, panels.width(panel),
                                    sum);
        }
      },
      threads);
  direct::write_gradient(a, sums.as<float>(), parts);
}

// Tiles of a section are transformed for all; a thread takes a panel and a few channel blocks over all of them. Between
// sections dw waits in `sums`, laid out for write_gradient.
void run_large(const WeightGradientProblem& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t position_count = positions(rows, columns);
  const int64_t at_once =
      std::max<int64_t>(kPositions * kGradientBlocks / (position_count * kernel_parts(rows, columns)), 1);
  const int64_t channels = a.source.channels, blocks = ceil_divide(channels, kBlock);
  const int64_t block_parts = ceil_divide(blocks, at_once), outs = panels.count() * panels.tile_k;
  // v and d leave room in the third-level cache, but between sections so few that adding to dw is little of the work.
  const int64_t shared_floats =
      std::clamp(kGradientRatio * rows.taps * columns.taps * channels * a.outs, kLeastSharedFloats, kSharedFloats);
  const int64_t fit =
      std::max<int64_t>(shared_floats / (position_count * (kernel_parts(rows, columns) * blocks * kBlock + outs)), 64);
  const int64_t sections = ceil_divide(tiles.count(), fit), size = ceil_divide(tiles.count(), sections);
  const int64_t v_position = input_position(rows, columns, channels, size), d_position = outs * size + kSkew;
  const int64_t m_position = kernel_parts(rows, columns) * at_once * kBlock * panels.tile_k + kSkew;
  const int64_t taps = rows.taps * columns.taps, block_floats = taps * kBlock * panels.tile_k;
  const int64_t scratch_floats = position_count * m_position + at_once * block_floats;
  const int threads = num_threads();
  Buffer shared(position_count * (v_position + d_position) * sizeof(float)),
      scratch(threads * scratch_floats * sizeof(float));
  Buffer sums;
  if (sections > 1) sums = Buffer(panels.count() * blocks * block_floats * sizeof(float));
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t section = 0; section < sections; ++section) {
      const Range all = split(tiles.count(), sections, section);
      const Block v{shared.as<float>(), all, v_position};
      const Block d{shared.as<float>() + position_count * v_position, all, d_position};
      parallel_ranges(all.end - all.begin, 4, [&](int64_t begin, int64_t end) {
        const Range mine{all.begin + begin, all.begin + end};
        transform_input(a.source.data, group_source(a.source, g), rows, columns, tiles, mine, v);
        transform_gradient(a, rows, columns, tiles, mine, panels, g, d);
      });
      parallel_for(
          panels.count() * block_parts,
          [&](int64_t i, int thread) {
            const int64_t panel = i / block_parts;
            const Range mine = split(blocks, block_parts, i % block_parts);
            const int64_t floats = (mine.end - mine.begin) * taps * kBlock * panels.width(panel);
            float* const m = scratch.as<float>() + thread * scratch_floats;
            float* const dw = m + position_count * m_position;
            float* const sum = sums.as<float>() + (panel * blocks + mine.begin) * block_floats;
            add_products(rows, columns, tiles, v, d, mine, channels, panels, panel, false, m, m_position);
            transform_weight_gradient(rows, columns, tiles, m, m_position, mine.end - mine.begin, panels.width(panel),
                                      dw);
            if (section > 0)
              for (int64_t j = 0; j < floats; ++j) dw[j] = sum[j] + dw[j];
            if (section + 1 == sections)
              direct::write_gradient(a, panels, g, panel, mine, dw);
            else
              std::memcpy(sum, dw, floats * sizeof(float));
          },
          threads);
    }
}

void differentiate(const WeightGradientProblem& a) {
  const auto& k = kernels().conv2d;
  const Panels panels{a.outs, k.tile_k, k.lanes};
  const int64_t pixel = a.groups * a.outs;
  Axis rows(a.rows, a.source.h, a.source.w * a.source.pixel, a.columns.outputs * pixel, a.dw.row);
  Axis columns(a.columns, a.source.w, a.source.pixel, pixel, a.dw.column);
  if (columns.taps == 1) std::swap(rows, columns);
  const Tiles tiles(a.images, rows, columns);
  if (positions(rows, columns) * kernel_parts(rows, columns) * a.source.channels * a.outs <= kSmallGradients)
    run_small(a, tiles, rows, columns, panels);
  else
    run_large(a, tiles, rows, columns, panels);
}

// Multiplications along an axis of outputs, in all its grids.
double axis_products(const AxisTaps& taps) {
  const Axis axis(taps, 0, 0, 0, 0);
  return static_cast<double>(Cut(axis).products() * axis.grids());
}

// What transforming an element of large weights, in every call, costs in multiplications. On one core of Zen 4 512 ->
// 512 channels take one image of 4 x 4 in 0.95 ms by the direct engine, where these are 108, and 1.5 ms by Winograd;
// two images in 1.7 and 1.5 ms. Where FMAs are twice as fast (Zen 5), two images of 4 x 4 take 1.1 and 1.6 ms, one of 7
// x 7, where they are 320, 1.2 and 1.5, one of 8 x 8 (432) 1.7 and 1.6.
//
// At stride 2, on Zen 4, 128 -> 256 channels, one image of 16 x 16 takes 0.44 and 0.67 ms, 256 -> 512, two of them, 4.7
// and 3.9; on Zen 5 512 -> 512, one of 28 x 28 (803), 4.5 and 4.9, 256 -> 256, two of them, 2.1 and 1.9.
double transform_cost(int64_t kernel, bool strided) {
  const bool fast = kernel == 3 && full_width();
  return strided ? (fast ? 1000 : 400) : (fast ? 400 : 160);
}

const char* supports_pass(const Conv2dProblem& a, bool input_gradient) {
  if (strict_precision()) return "strict precision";
  const bool along_one = a.r * a.s == 7;  // 7x1 or 1x7
  if (!along_one && (a.r != a.s || (a.r != 3 && a.r != 5 && a.r != 7)))
    return "the kernel is none of 3x3, 5x5, 7x7, 1x7, 7x1";
  const bool strided = a.stride_h == 2 && a.stride_w == 2 && a.r == 3 && a.dilation_h == 1 && a.dilation_w == 1;
  if (!strided && (a.stride_h != 1 || a.stride_w != 1))
    return "the stride is neither 1 nor, of a 3x3 kernel without dilation, 2";
  if (a.dtype == DType::kBFloat16) return a.empty() ? "there are no channels" : nullptr;  // nothing else takes it
  // Along one axis a transform saves fewer multiplications, but costs less, too; that of parts costs more.
  if (std::min(a.cg(), a.kg()) < (strided ? 32 : along_one ? 24 : 16))
    return "too few channels to repay the transforms";
  // Of an input gradient one for each phase of the stride.
  const auto axes_of = [&](int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride, int64_t pad,
                           int64_t dilation) {
    return input_gradient ? backward_axes(inputs, kernel, stride, pad, dilation)
                          : std::vector<AxisTaps>{forward_axis(outputs, kernel, stride, pad, dilation)};
  };
  const std::vector<AxisTaps> row_axes = axes_of(a.p, a.h, a.r, a.stride_h, a.pad_top, a.dilation_h);
  const std::vector<AxisTaps> column_axes = axes_of(a.q, a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  const auto sum = [](const std::vector<AxisTaps>& axes, auto products_of) {
    double products = 0;
    for (const AxisTaps& axis : axes) products += products_of(axis);
    return products;
  };
  const auto plain = [](const AxisTaps& axis) { return static_cast<double>(axis.outputs * axis.taps.size()); };
  const double products = sum(row_axes, axis_products) * sum(column_axes, axis_products);
  const double plain_products = sum(row_axes, plain) * sum(column_axes, plain);
  if (products > (along_one || strided ? 2.0 / 3 : 5.0 / 9) * plain_products) return "the image is too small for tiles";
  const int64_t position_count = along_one ? kPoints : kPositions;
  if (position_count * a.cg() * a.kg() > kSmallWeights &&
      a.n * (plain_products - products) < transform_cost(std::max(a.r, a.s), strided))
    return "too few tiles to repay transforming the weights";
  return direct::supports(a);
}

// A thread for each million: 16 -> 16 channels at 32 x 32 (2.4 million) take 31 us on one core of Zen 4, 23 on two.
constexpr int64_t kThreadMultiplyAdds = int64_t{1} << 20;

int64_t threads_worth(const Conv2dProblem& a) {
  return a.n * a.p * a.q * a.k * a.cg() * a.r * a.s / kThreadMultiplyAdds;
}

template <class T> void forward_as(const Conv2dProblem& a, const ForwardArguments& args) {
  DirectProblem d = direct::forward_problem(a, args);
  if (a.dtype != DType::kFloat32) d.cache = nullptr;  // which holds weights of float
  Buffer bias;
  if (args.bias && a.dtype == DType::kBFloat16) {
    bias = Buffer(a.k * sizeof(float));
    for (int64_t i = 0; i < a.k; ++i) bias.as<float>()[i] = to_float(static_cast<const T*>(args.bias)[i]);
    d.epilogue.bias = bias.as<float>();
  }
  convolve<T>(d, {static_cast<const T*>(args.x), args.w.as<T>(), static_cast<const T*>(args.residual),
                  static_cast<T*>(args.y)});
}

}  // namespace

const char* supports(const Conv2dProblem& a) { return supports_pass(a, false); }
const char* supports_backward_input(const Conv2dProblem& a) { return supports_pass(a, true); }

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const ThreadLimit limit(threads_worth(a));
  a.dtype == DType::kBFloat16 ? forward_as<BFloat16>(a, args) : forward_as<float>(a, args);
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const ThreadLimit limit(threads_worth(a));
  const auto columns = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  for (const AxisTaps& row : backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h))
    for (const AxisTaps& column : columns) {
      const DirectProblem d = direct::backward_problem(a, args, row, column);
      if (row.taps.size() * column.taps.size() == 1)
        direct::run(d);
      else
        convolve<float>(d, {d.source.data, d.w.data, nullptr, d.y});
    }
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const ThreadLimit limit(threads_worth(a));
  differentiate(direct::weight_gradient_problem(a, args));
}

}  // namespace fastconv::cpu::winograd

// Fused Winograd for 3x3 kernels at stride 1: F(4x4, 3x3), with tiles of 3 where an image's size leaves a remainder.
//
// Tiles are evaluated at 36 positions; at each position the tiles and the weights are multiplied as matrices by the
// register tiles of the direct engine, and the products are turned back into pixels. The forward pass and the input
// gradient are one engine, described by the direct engine's problem; the weight gradient sums the products over tiles.
//
// Layouts: v[position][channel block][tile][kBlock], u[position][channel][width], m[position][tile][width],
// d[position][panel][tile][width]. `position` strides carry kSkew floats more, so that the 36 lines of a tile do not
// share a set of the cache.
//
// Two schedules, because the transformed weights are four times the weights:
//   small  weights transformed once for all; a thread takes a block of tiles through all panels, everything else in L2;
//   large  tiles transformed once for all; a thread takes a panel of weights, transformed for itself, over all tiles.
#include "cpu/kernels/winograd.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

#include <chrono>
#include <cstdio>
namespace fastconv::cpu::winograd {
namespace {

using direct::DirectProblem;
using direct::Panels;
using direct::WeightGradientProblem;
using direct::WeightView;

constexpr int64_t kSkew = 48;
constexpr int64_t kTaps = 9;
constexpr int64_t kStreamedFloats = 2 << 20;
// Weights of so many elements are `small`, forward and in the weight gradient, whose accumulators must fit L2.
constexpr int64_t kSmallWeights = 128 * 128;
constexpr int64_t kSmallGradients = 64 * 128;
// Floats of v that a thread keeps in L2 beside m and a panel of u (small), or of v and d in all (large).
constexpr int64_t kThreadFloats = 144 * 1024;
constexpr int64_t kSharedFloats = 4 * 1024 * 1024;
// Tiles that pass one transformed panel of weights at a time (large).
constexpr int64_t kLargeTiles = 28;
// Tiles of a weight gradient that are multiplied at a time: a panel of d and a block of v then stay in L1.
constexpr int64_t kGradientTiles = 128;
// Parts of the tiles that a weight gradient sums apart (small), so that many cores find work.
constexpr int64_t kGradientParts = 16;

// One axis of outputs cut into tiles of 4, then tiles of 3. The last tile may reach over the end.
struct Cut {
  int64_t outputs, fours, threes;

  explicit Cut(int64_t outputs) : outputs(outputs), fours(ceil_divide(outputs, 4)), threes(0) {
    for (int64_t f = fours - 1; f >= 0 && fours - f <= 4; --f) {
      const int64_t t = ceil_divide(outputs - 4 * f, 3);
      if (6 * f + 5 * t < points()) fours_then(f, t);
    }
  }
  int64_t points() const { return 6 * fours + 5 * threes; }
  int64_t tiles(bool four) const { return four ? fours : threes; }
  int64_t begin(bool four, int64_t i) const { return four ? 4 * i : 4 * fours + 3 * i; }

 private:
  void fours_then(int64_t f, int64_t t) { fours = f, threes = t; }
};

// All tiles of all images, ordered by class so that the tiles that have a position are neighbours:
// (rows, columns) = (4, 3), (4, 4), (3, 4), (3, 3). Position (4, *) belongs to the first two, (*, 4) to the middle two.
class Tiles {
 public:
  struct Tile {
    WinogradTile size;
    int64_t n, y, x;  // first output
  };

  Tiles(int64_t images, int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {
    for (int i = 0; i < 4; ++i)
      ends_[i] = (i ? ends_[i - 1] : 0) + images * rows_.tiles(four_rows(i)) * columns_.tiles(four_columns(i));
  }
  int64_t count() const { return ends_[3]; }

  Tile operator[](int64_t i) const {
    int kind = 0;
    while (i >= ends_[kind]) ++kind;
    if (kind > 0) i -= ends_[kind - 1];
    const bool fr = four_rows(kind), fc = four_columns(kind);
    const int64_t across = columns_.tiles(fc), down = rows_.tiles(fr);
    return {{fr ? 4 : 3, fc ? 4 : 3},
            i / (across * down),
            rows_.begin(fr, i / across % down),
            columns_.begin(fc, i % across)};
  }

  // Of the tiles [begin, end), those that have this position.
  Range at(int64_t position, Range all) const {
    const bool row = position / kPoints == 4, column = position % kPoints == 4;
    const int64_t begin = column ? ends_[0] : 0, end = row ? ends_[1] : column ? ends_[2] : ends_[3];
    return {std::clamp(begin, all.begin, all.end), std::clamp(end, all.begin, all.end)};
  }

 private:
  static bool four_rows(int kind) { return kind < 2; }
  static bool four_columns(int kind) { return kind == 1 || kind == 2; }
  Cut rows_, columns_;
  int64_t ends_[4];
};

// The taps of an axis in the order of the source; the first reads source pixel (output + first).
struct Axis {
  int64_t first;
  int64_t index[3];
  explicit Axis(const AxisTaps& axis) {
    const bool ascending = axis.taps[0].offset < axis.taps[2].offset;
    for (int i = 0; i < 3; ++i) index[i] = axis.taps[ascending ? i : 2 - i].index;
    first = axis.taps[ascending ? 0 : 2].offset;
  }
};

// Bit i: pixel begin + i of an axis lies inside [0, size).
uint32_t inside(int64_t begin, int64_t size) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kPoints; ++i) bits |= static_cast<uint32_t>(begin + i >= 0 && begin + i < size) << i;
  return bits;
}

// Where the array v (or d, or m) of some tiles stands.
struct Block {
  float* data;
  Range tiles;
  int64_t position;  // stride
  int64_t size() const { return tiles.end - tiles.begin; }
};

int64_t input_position(int64_t channels, int64_t tiles) {
  return ceil_divide(channels, kBlock) * kBlock * tiles + kSkew;
}

// v of the tiles [mine), for all channels of a group.
void transform_input(const SourceImage& source, const Axis& rows, const Axis& columns, const Tiles& tiles, Range mine,
                     const Block& v) {
  WinogradInput t{};
  t.row = source.w * source.pixel, t.pixel = source.pixel;
  t.channels = source.channels;
  t.block = v.size() * kBlock, t.position = v.position;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const Tiles::Tile tile = tiles[i];
    const int64_t y = tile.y + rows.first, x = tile.x + columns.first;
    t.tile = tile.size;
    t.x = source.data + ((tile.n * source.h + y) * source.w + x) * source.pixel + source.first_channel;
    t.rows_in = inside(y, source.h), t.columns_in = inside(x, source.w);
    t.next = (x + tile.size.columns + 2 < source.w ? kPoints : tile.size.rows * source.w - x) * source.pixel;
    t.v = v.data + (i - v.tiles.begin) * kBlock;
    kernels().winograd.input(t);
  }
}

// Channels whose weights are packed at a time: whole cache lines side by side, for the memory's sake.
constexpr int64_t kPackedChannels = 4 * kBlock;

// Channels [c, c + count) of one panel: [tap][kPackedChannels][width], with gaps where there are fewer.
void pack_taps(const WeightView& w, const Axis& rows, const Axis& columns, const Panels& panels, int64_t g,
               int64_t panel, int64_t c, int64_t count, float* to) {
  const int64_t width = panels.width(panel);
  const float* src = w.data + g * w.group + panel * panels.tile_k * w.out + c * w.in;
  for (int64_t i = 0; i < kTaps; ++i)
    kernels().conv2d.pack_weights(src + rows.index[i / 3] * w.row + columns.index[i % 3] * w.column, w.out, w.in,
                                  panels.channels(panel), count, width, to + i * kPackedChannels * width);
}

// u of one panel: [position][channel][width]. packed: all its channels as pack_taps leaves them, or null.
void transform_weights(const WeightView& w, const Axis& rows, const Axis& columns, const Panels& panels, int64_t g,
                       int64_t panel, Range channels, float* u, int64_t position, const float* packed = nullptr) {
  const int64_t width = panels.width(panel), tap = kPackedChannels * width;
  alignas(64) float own[kTaps * kPackedChannels * 32];
  for (int64_t c = channels.begin; c < channels.end; c += kPackedChannels) {
    const int64_t count = std::min(kPackedChannels, channels.end - c);
    if (!packed) pack_taps(w, rows, columns, panels, g, panel, c, count, own);
    kernels().winograd.weights(packed ? packed + kTaps * c * width : own, tap, count * width, u + c * width, position);
  }
}

// All weights as pack_taps leaves them, panel by panel: a quarter of u, which would be slower to read from memory than
// it is to transform.
PackedWeights packed_taps(const DirectProblem& d, const Axis& rows, const Axis& columns, const Panels& panels,
                          int64_t panel_floats) {
  const int64_t count = d.groups * panels.count();
  return PackedWeights(d.cache, "winograd", count * panel_floats, [&](float* to) {
    parallel_for(count, [&](int64_t i, int) {
      const int64_t panel = i % panels.count();
      for (int64_t c = 0; c < d.source.channels; c += kPackedChannels)
        pack_taps(d.w, rows, columns, panels, i / panels.count(), panel, c,
                  std::min(kPackedChannels, d.source.channels - c),
                  to + i * panel_floats + kTaps * c * panels.width(panel));
    });
  });
}

// m = v u at every position, for the tiles [mine).
void multiply(const Tiles& tiles, Range mine, const Block& v, int64_t channels, const float* u, int64_t u_position,
              int64_t width, const Block& m) {
  const auto& k = kernels().conv2d;
  DirectTile::Tap tap{};
  DirectTile t{};
  t.taps = &tap;
  t.tap_count = t.panel_taps = 1;
  t.blocks = ceil_divide(channels, kBlock);
  t.block_stride = v.size() * kBlock;
  t.last_channels = channels - (t.blocks - 1) * kBlock;
  t.pixel_stride = t.channels = width;
  t.low = -__builtin_inff(), t.high = __builtin_inff();
  for (int64_t p = 0; p < kPositions; ++p) {
    const Range here = tiles.at(p, mine);
    const int64_t count = here.end - here.begin, parts = ceil_divide(count, k.tile_pixels);
    t.w = u + p * u_position;
    for (int64_t i = 0; i < parts; ++i) {
      const Range part = split(count, parts, i);
      t.next = i == 0 && p + 1 < kPositions ? t.w + u_position : t.w;
      const int64_t first = here.begin + part.begin;
      tap.x[0] = v.data + p * v.position + (first - v.tiles.begin) * kBlock;
      t.y = m.data + p * m.position + (first - m.tiles.begin) * width;
      k.direct[width / k.lanes - 1][0][part.end - part.begin - 1](t);
    }
  }
}

// The outputs of the tiles [mine) for one panel of channels.
void transform_output(const DirectProblem& d, const Tiles& tiles, Range mine, const Panels& panels, int64_t g,
                      int64_t panel, const Block& m) {
  const int64_t channel = g * d.outs + panel * panels.tile_k;
  WinogradOutput t{};
  t.position = m.position;
  t.row = d.y_w * d.y_pixel, t.pixel = d.y_pixel;
  t.channels = panels.channels(panel);
  t.bias = d.epilogue.bias ? d.epilogue.bias + channel : nullptr;
  t.low = d.epilogue.low, t.high = d.epilogue.high;
  t.streaming = d.streaming;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const Tiles::Tile tile = tiles[i];
    const int64_t at = ((tile.n * d.y_h + tile.y) * d.y_w + tile.x) * d.y_pixel + channel;
    t.tile = tile.size;
    t.m = m.data + (i - m.tiles.begin) * panels.width(panel);
    t.y = d.y + at;
    t.residual = d.epilogue.residual ? d.epilogue.residual + at : nullptr;
    t.rows = d.y_h - tile.y, t.columns = d.y_w - tile.x;
    kernels().winograd.output(t);
  }
}

SourceImage group_source(SourceImage source, int64_t g) {
  source.first_channel += g * source.channels;
  return source;
}

void run_small(const DirectProblem& d, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = d.source.channels, u_position = channels * panels.tile_k + kSkew;
  const int64_t u_panel = kPositions * u_position;

  const PackedWeights weights(d.cache, "winograd", d.groups * panels.count() * u_panel, [&](float* u) {
    parallel_for(d.groups * panels.count(), [&](int64_t i, int) {
      transform_weights(d.w, rows, columns, panels, i / panels.count(), i % panels.count(), {0, channels},
                        u + i * u_panel, u_position);
    });
  });

  // Whole register tiles that fit L2, but not so many that a thread would find no work.
  const int threads = num_threads();
  const int64_t tile = kernels().conv2d.tile_pixels;
  const int64_t fit = kThreadFloats / input_position(channels, 1) / kPositions;
  const int64_t share = tiles.count() * d.groups / (4 * threads);
  const int64_t blocks = ceil_divide(tiles.count(), std::max(std::min(fit, share) / tile, int64_t{1}) * tile);
  const int64_t size = ceil_divide(tiles.count(), blocks);
  const int64_t v_position = input_position(channels, size), m_position = size * panels.tile_k + kSkew;
  const int64_t scratch_floats = kPositions * (v_position + m_position);
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      d.groups * blocks,
      [&](int64_t i, int thread) {
        const int64_t g = i / blocks;
        const Range mine = split(tiles.count(), blocks, i % blocks);
        float* const own = scratch.as<float>() + thread * scratch_floats;
        const Block v{own, mine, v_position}, m{own + kPositions * v_position, mine, m_position};
        transform_input(group_source(d.source, g), rows, columns, tiles, mine, v);
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          multiply(tiles, mine, v, channels, weights.data() + (g * panels.count() + panel) * u_panel, u_position,
                   panels.width(panel), m);
          transform_output(d, tiles, mine, panels, g, panel, m);
        }
      },
      threads);
}

void run_large(const DirectProblem& d, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = d.source.channels, u_position = channels * panels.tile_k + kSkew;
  const int64_t fit = std::max(kSharedFloats / input_position(channels, 1) / kPositions, kLargeTiles);
  const int64_t sections = ceil_divide(tiles.count(), fit), size = ceil_divide(tiles.count(), sections);
  const int64_t v_position = input_position(channels, size), m_position = kLargeTiles * panels.tile_k + kSkew;
  const int64_t scratch_floats = kPositions * (u_position + m_position);
  const int threads = num_threads();
  const int64_t packed_panel = kTaps * ceil_divide(channels, kPackedChannels) * kPackedChannels * panels.tile_k;
  std::optional<PackedWeights> packed;
  if (d.cache) packed.emplace(packed_taps(d, rows, columns, panels, packed_panel));

  Buffer shared(kPositions * v_position * sizeof(float)), scratch(threads * scratch_floats * sizeof(float));
  for (int64_t section = 0; section < d.groups * sections; ++section) {
    const int64_t g = section / sections;
    const Range all = split(tiles.count(), sections, section % sections);
    const Block v{shared.as<float>(), all, v_position};
    const int64_t count = all.end - all.begin;
    parallel_ranges(count, 4, [&](int64_t begin, int64_t end) {
      transform_input(group_source(d.source, g), rows, columns, tiles, {all.begin + begin, all.begin + end}, v);
    });

    const int64_t parts = std::clamp<int64_t>(ceil_divide(threads, panels.count()), 1, ceil_divide(count, kLargeTiles));
    parallel_for(
        panels.count() * parts,
        [&](int64_t i, int thread) {
          const int64_t panel = i / parts;
          const Range part = split(count, parts, i % parts);
          float* const u = scratch.as<float>() + thread * scratch_floats;
          transform_weights(d.w, rows, columns, panels, g, panel, {0, channels}, u, u_position,
                            packed ? packed->data() + (g * panels.count() + panel) * packed_panel : nullptr);
          const int64_t groups = ceil_divide(part.end - part.begin, kLargeTiles);
          for (int64_t j = 0; j < groups; ++j) {
            const Range few = split(part.end - part.begin, groups, j);
            const Range mine{all.begin + part.begin + few.begin, all.begin + part.begin + few.end};
            const Block m{u + kPositions * u_position, mine, m_position};
            multiply(tiles, mine, v, channels, u, u_position, panels.width(panel), m);
            transform_output(d, tiles, mine, panels, g, panel, m);
          }
        },
        threads);
  }
}

void convolve(DirectProblem d) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  const Tiles tiles(d.images, d.rows.outputs, d.columns.outputs);
  const Axis rows(d.rows), columns(d.columns);
  // The next layer reads y at once: it goes around the caches only where it would not stay in them.
  d.streaming = worth_streaming(d.images * d.y_h * d.y_w, d.y_pixel, kStreamedFloats) && d.outs % k.lanes == 0;
  if (d.source.channels * d.outs <= kSmallWeights)
    run_small(d, tiles, rows, columns, panels);
  else
    run_large(d, tiles, rows, columns, panels);
}

// d of the tiles [mine), for the channels of a group.
void transform_gradient(const WeightGradientProblem& a, const Tiles& tiles, Range mine, const Panels& panels, int64_t g,
                        const Block& d) {
  const int64_t pixel = a.groups * a.outs;
  WinogradGradient t{};
  t.row = a.columns.outputs * pixel, t.pixel = pixel;
  t.position = d.position;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const Tiles::Tile tile = tiles[i];
    t.tile = tile.size;
    t.rows = a.rows.outputs - tile.y, t.columns = a.columns.outputs - tile.x;
    t.next = t.columns > tile.size.columns ? tile.size.columns * pixel : tile.size.rows * t.row - tile.x * pixel;
    const float* dy = a.dy + ((tile.n * a.rows.outputs + tile.y) * a.columns.outputs + tile.x) * pixel + g * a.outs;
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      t.dy = dy + panel * panels.tile_k;
      t.channels = panels.channels(panel), t.width = panels.width(panel);
      t.d = d.data + panel * panels.tile_k * d.size() + (i - d.tiles.begin) * t.width;
      kernels().winograd.gradient(t);
    }
  }
}

// acc[position][block - blocks.begin][kBlock][width] += v' d over the tiles, for one panel.
void add_products(const Tiles& tiles, const Block& v, const Block& d, Range blocks, int64_t channels,
                  const Panels& panels, int64_t panel, float* acc, int64_t acc_position) {
  const int64_t zero = 0, width = panels.width(panel);
  WeightTile t{};
  t.row_offsets = &zero;
  t.rows = 1;
  t.width = width;
  for (int64_t p = 0; p < kPositions; ++p) {
    const Range here = tiles.at(p, v.tiles);
    const int64_t parts = ceil_divide(here.end - here.begin, kGradientTiles);
    for (int64_t i = 0; i < parts; ++i) {
      const Range part = split(here.end - here.begin, parts, i);
      const int64_t first = here.begin - v.tiles.begin + part.begin;
      t.columns = part.end - part.begin;
      t.dy = d.data + p * d.position + panel * panels.tile_k * d.size() + first * width;
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        t.x = v.data + p * v.position + (b * v.size() + first) * kBlock;
        t.channels = std::min(kBlock, channels - b * kBlock);
        t.next = b + 1 < blocks.end ? t.x + v.size() * kBlock : t.dy + t.columns * width;
        t.acc = acc + p * acc_position + (b - blocks.begin) * kBlock * width;
        kernels().conv2d.weight_tile(t);
      }
    }
  }
}

// A thread takes blocks of tiles through everything and keeps all of m; parts of the tiles are summed at the end.
void run_small(const WeightGradientProblem& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  const int64_t channels = a.source.channels, blocks = ceil_divide(channels, kBlock);
  const int64_t outs = panels.count() * panels.tile_k;
  const int64_t fit = std::max<int64_t>(kThreadFloats / (kPositions * (blocks * kBlock + outs)), 16);
  const int64_t parts = std::clamp<int64_t>(tiles.count() / (2 * fit), 1, kGradientParts);
  const int64_t v_position = input_position(channels, fit), d_position = outs * fit + kSkew;
  const int64_t m_panel = blocks * kBlock * panels.tile_k, m_position = panels.count() * m_panel + kSkew;
  const int64_t scratch_floats = kPositions * (v_position + d_position + m_position);
  const int64_t slot_floats = kTaps * blocks * kBlock * panels.tile_k, slots = a.groups * panels.count();
  const int threads = num_threads();

  Buffer scratch(threads * scratch_floats * sizeof(float)), sums(parts * slots * slot_floats * sizeof(float));
  parallel_for(
      a.groups * parts,
      [&](int64_t i, int thread) {
        const int64_t g = i % a.groups, part = i / a.groups;
        const Range all = split(tiles.count(), parts, part);
        float* const own = scratch.as<float>() + thread * scratch_floats;
        float* const m = own + kPositions * (v_position + d_position);
        std::memset(m, 0, kPositions * m_position * sizeof(float));
        const int64_t steps = ceil_divide(all.end - all.begin, fit);
        for (int64_t j = 0; j < steps; ++j) {
          const Range few = split(all.end - all.begin, steps, j);
          const Range mine{all.begin + few.begin, all.begin + few.end};
          const Block v{own, mine, v_position}, d{own + kPositions * v_position, mine, d_position};
          transform_input(group_source(a.source, g), rows, columns, tiles, mine, v);
          transform_gradient(a, tiles, mine, panels, g, d);
          for (int64_t panel = 0; panel < panels.count(); ++panel)
            add_products(tiles, v, d, {0, blocks}, channels, panels, panel, m + panel * m_panel, m_position);
        }
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          const int64_t floats = kBlock * panels.width(panel);
          float* sum = sums.as<float>() + (part * slots + g * panels.count() + panel) * slot_floats;
          for (int64_t b = 0; b < blocks; ++b)
            kernels().winograd.weight_gradient(m + panel * m_panel + b * floats, m_position, floats,
                                               sum + b * kTaps * floats, floats);
        }
      },
      threads);
  direct::write_gradient(a, sums.as<float>(), parts);
}

// Tiles of a section are transformed for all; a thread takes a panel and a few channel blocks over all of them. Between
// sections dw waits in `sums`, laid out for write_gradient.
void run_large(const WeightGradientProblem& a, const Tiles& tiles, const Axis& rows, const Axis& columns,
               const Panels& panels) {
  constexpr int64_t kBlocks = 4;
  const int64_t channels = a.source.channels, blocks = ceil_divide(channels, kBlock);
  const int64_t block_parts = ceil_divide(blocks, kBlocks), outs = panels.count() * panels.tile_k;
  const int64_t fit = std::max<int64_t>(kSharedFloats / (kPositions * (blocks * kBlock + outs)), 64);
  const int64_t sections = ceil_divide(tiles.count(), fit), size = ceil_divide(tiles.count(), sections);
  const int64_t v_position = input_position(channels, size), d_position = outs * size + kSkew;
  const int64_t m_position = kBlocks * kBlock * panels.tile_k + kSkew;
  const int64_t block_floats = kTaps * kBlock * panels.tile_k;
  const int64_t scratch_floats = kPositions * m_position + kBlocks * block_floats;
  const int threads = num_threads();
  Buffer shared(kPositions * (v_position + d_position) * sizeof(float)),
      scratch(threads * scratch_floats * sizeof(float));
  Buffer sums;
  if (sections > 1) sums = Buffer(panels.count() * blocks * block_floats * sizeof(float));
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t section = 0; section < sections; ++section) {
      const Range all = split(tiles.count(), sections, section);
      const Block v{shared.as<float>(), all, v_position};
      const Block d{shared.as<float>() + kPositions * v_position, all, d_position};
      parallel_ranges(all.end - all.begin, 4, [&](int64_t begin, int64_t end) {
        const Range mine{all.begin + begin, all.begin + end};
        transform_input(group_source(a.source, g), rows, columns, tiles, mine, v);
        transform_gradient(a, tiles, mine, panels, g, d);
      });
      parallel_for(
          panels.count() * block_parts,
          [&](int64_t i, int thread) {
            const int64_t panel = i / block_parts;
            const Range mine = split(blocks, block_parts, i % block_parts);
            const int64_t tap = kBlock * panels.width(panel), floats = (mine.end - mine.begin) * kTaps * tap;
            float* const m = scratch.as<float>() + thread * scratch_floats;
            float* const dw = m + kPositions * m_position;
            float* const sum = sums.as<float>() + (panel * blocks + mine.begin) * block_floats;
            std::memset(m, 0, kPositions * m_position * sizeof(float));
            add_products(tiles, v, d, mine, channels, panels, panel, m, m_position);
            for (int64_t b = 0; b < mine.end - mine.begin; ++b)
              kernels().winograd.weight_gradient(m + b * tap, m_position, tap, dw + b * kTaps * tap, tap);
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
  const Tiles tiles(a.images, a.rows.outputs, a.columns.outputs);
  const Axis rows(a.rows), columns(a.columns);
  if (a.source.channels * a.outs <= kSmallGradients)
    run_small(a, tiles, rows, columns, panels);
  else
    run_large(a, tiles, rows, columns, panels);
}

const char* supports_outputs(const Conv2dProblem& a, int64_t rows, int64_t columns) {
  if (strict_precision()) return "strict precision";
  if (a.r != 3 || a.s != 3) return "the kernel is not 3x3";
  if (a.stride_h != 1 || a.stride_w != 1) return "the stride is not 1";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "the kernel is dilated";
  if (a.cg() < 16 || a.kg() < 16) return "too few channels to repay the transforms";
  // Against 9 multiplications an output.
  if (Cut(rows).points() * Cut(columns).points() > 5 * rows * columns) return "the image is too small for tiles";
  return direct::supports(a);
}

}  // namespace

const char* supports(const Conv2dProblem& a) { return supports_outputs(a, a.p, a.q); }
const char* supports_backward_input(const Conv2dProblem& a) { return supports_outputs(a, a.h, a.w); }

void forward(const Conv2dProblem& a, const ForwardArguments& args) { convolve(direct::forward_problem(a, args)); }

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  convolve(direct::backward_problem(a, args, backward_axes(a.h, 3, 1, a.pad_top, 1)[0],
                                    backward_axes(a.w, 3, 1, a.pad_left, 1)[0]));
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  differentiate(direct::weight_gradient_problem(a, args));
}

}  // namespace fastconv::cpu::winograd

// Direct implicit GEMM: a band of the source is packed once, then register tiles of (pixels x output channels) run over
// all taps and channels with constant strides. One engine serves forward and input gradient: with a stride, the input
// gradient is one ordinary stride-1 convolution of dy for each phase of the input pixels (AxisTaps).
#include "cpu/conv2d_direct.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::direct {
namespace {

// A packed band should stay in L2 beside the weight panel that runs over it.
constexpr int64_t kBandFloats = 48 * 1024;
// Channel blocks of several groups that share a band, so that a pixel is fetched several cache lines at a time.
constexpr int64_t kGroupBlocks = 16;
// Chunks wanted at least, so that many cores find work.
constexpr int64_t kMinChunks = 32;
// Under so few bands the weights come from memory, and are fetched ahead.
constexpr int64_t kFewBands = 4;

// What is left to fetch into L2 of a run of memory.
struct Upcoming {
  const float* at;
  int64_t floats;
};

// The rows of the source under the taps of a range of outputs, of all its channels.
Upcoming source_rows(const SourceImage& source, const AxisTaps& rows, const BandRange& range) {
  const auto [low, high] =
      std::minmax_element(rows.taps.begin(), rows.taps.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
  if (low == rows.taps.end()) return {nullptr, 0};
  const int64_t row_floats = source.w * source.pixel;
  const int64_t begin = std::clamp<int64_t>(range.y0 * rows.step + low->offset, 0, source.h);
  const int64_t end = std::clamp<int64_t>((range.y1 - 1) * rows.step + high->offset + 1, begin, source.h);
  return {source.data + (range.n0 * source.h + begin) * row_floats,
          ((range.n1 - range.n0 - 1) * source.h + end - begin) * row_floats};
}

// Outputs of an axis that share their taps, which begin at `first` in the axis of all taps.
struct Phase {
  AxisTaps axis;
  int64_t first;
};

// The axis of all the phases' taps.
AxisTaps join(const std::vector<AxisTaps>& axes, std::vector<Phase>& phases) {
  AxisTaps all;
  all.step = axes[0].step;
  for (const AxisTaps& axis : axes) {
    phases.push_back({axis, static_cast<int64_t>(all.taps.size())});
    all.outputs = std::max(all.outputs, axis.outputs);
    all.taps.insert(all.taps.end(), axis.taps.begin(), axis.taps.end());
  }
  return all;
}

// Groups of whole channel blocks, of `blocks` each, that may share a band.
int64_t groups_together(const SourceImage& source, int64_t groups, int64_t blocks, int64_t most_blocks) {
  if (source.channels % kBlock != 0) return 1;
  return std::clamp<int64_t>(std::min(most_blocks, kGroupBlocks) / blocks, 1, groups);
}

// Some panels of channels of one band.
struct Work {
  const DirectProblem& d;
  const Band& band;
  BandRange range;
  const float* x;                     // where the group's channels begin in the band
  std::vector<DirectTile::Tap> taps;  // room for them
  Upcoming upcoming;
  const float* next_weights;  // wanted after those of this panel and phase
};

// The outputs of one pair of phases, from `channel` on; `t` has what all tiles of a panel share.
void run_phase(Work& work, const Phase& rows, const Phase& columns, int64_t channel,
               const DirectTileFunction (&tile)[2][16], DirectTile& t, int64_t step_floats) {
  const DirectProblem& d = work.d;
  const BandRange& range = work.range;
  const int64_t tile_pixels = kernels().conv2d.tile_pixels;
  const int64_t row_taps = rows.axis.taps.size(), column_taps = columns.axis.taps.size();
  const int64_t y1 = std::min(range.y1, rows.axis.outputs), width = std::min(range.x1, columns.axis.outputs) - range.x0;
  t.panel_taps = row_taps * column_taps;
  t.row_stride = rows.axis.out_step * d.y_w * d.y_pixel;
  t.pixel_stride = columns.axis.out_step * d.y_pixel;
  for (int64_t n = range.n0; n < range.n1 && width > 0; ++n)
    for (int64_t y = range.y0; y < y1;) {
      const int64_t pair = 2 * width <= tile_pixels && y + 1 < y1 ? 2 : 1;
      t.tap_count = 0;
      for (int64_t r = 0; r < row_taps; ++r)
        for (int64_t s = 0; s < column_taps; ++s) {
          int64_t at[2] = {-1, -1};
          for (int64_t i = 0; i < pair; ++i)
            at[i] = work.band.offset(rows.first + r, columns.first + s, n, y + i, range.x0);
          if (at[0] < 0 && at[1] < 0) continue;  // these rows lie in the padding
          DirectTile::Tap& tap = work.taps[t.tap_count++];
          for (int64_t i = 0; i < pair; ++i)
            tap.x[i] = work.x + (at[i] >= 0 ? at[i] : work.band.zero_offset(columns.first + s, range.x0));
          tap.index = r * column_taps + s;
        }
      const int64_t first = d.output_offset(rows.axis, columns.axis, n, y, range.x0) + channel;
      const int64_t tiles = ceil_divide(width * pair, tile_pixels);
      for (int64_t i = 0; i < tiles; ++i) {
        const Range part = split(width, tiles, i);
        const int64_t at = first + part.begin * t.pixel_stride;
        t.x_offset = part.begin * kBlock;
        t.y = d.y + at;
        t.residual = d.epilogue.residual ? d.epilogue.residual + at : nullptr;
        const bool last = n + 1 == range.n1 && y + pair >= y1 && i + 1 == tiles;
        t.next = work.upcoming.floats > 0 ? work.upcoming.at : last ? work.next_weights : t.w;
        work.upcoming.at += t.tap_count * step_floats, work.upcoming.floats -= t.tap_count * step_floats;
        tile[pair - 1][part.end - part.begin - 1](t);
      }
      y += pair;
    }
}

}  // namespace

PackedPanels pack_weights(const WeightView& w, int64_t groups, int64_t outs, int64_t ins,
                          const std::vector<std::vector<KernelTap>>& phases, WeightCache* cache, const char* name) {
  const auto& k = kernels().conv2d;
  const Panels panels{outs, k.tile_k, k.lanes};
  // Where a tap lies in memory, and in a panel that is one channel wide: the first channel block begins at first * ins.
  struct Tap {
    int64_t from, first, index, of;
  };
  std::vector<Tap> taps;
  for (const auto& phase : phases) {
    const int64_t first = taps.size(), of = phase.size();
    for (int64_t i = 0; i < of; ++i) taps.push_back({phase[i].row * w.row + phase[i].column * w.column, first, i, of});
  }
  // In the order in which they lie in memory, perhaps side by side.
  std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) { return a.from < b.from; });
  const int64_t count = taps.size(), panel_floats = count * ins * k.tile_k;
  bool adjacent = count > 1;
  for (int64_t i = 0; i < count; ++i) adjacent = adjacent && taps[i].from == i;
  const auto pack_panel = [&](int64_t i, float* dst) {
    const int64_t g = i / panels.count(), panel = i % panels.count(), width = panels.width(panel);
    const float* src = w.data + g * w.group + panel * k.tile_k * w.out;
    const auto place = [&](const Tap& tap, int64_t c, int64_t channels) {
      return (tap.first * ins + tap.of * c + tap.index * channels) * width;
    };
    const auto pack = [&](const Tap& tap, int64_t c) {
      const int64_t channels = std::min(kBlock, ins - c);
      k.pack_weights(src + c * w.in + tap.from, w.out, w.in, panels.channels(panel), channels, width,
                     dst + place(tap, c, channels));
    };
    if (w.in < w.column)
      for (const Tap& tap : taps)
        for (int64_t c = 0; c < ins; c += kBlock) pack(tap, c);
    else if (!adjacent)
      for (int64_t c = 0; c < ins; c += kBlock)
        for (const Tap& tap : taps) pack(tap, c);
    else
      for (int64_t c = 0; c < ins; c += kBlock) {
        const int64_t channels = std::min(kBlock, ins - c);
        std::vector<int64_t> places(count);
        for (int64_t j = 0; j < count; ++j) places[j] = place(taps[j], c, channels);
        k.pack_taps(src + c * w.in, w.out, w.in, count, panels.channels(panel), channels, width, places.data(), dst);
      }
  };
  return {PackedWeights(cache, name, groups * panels.count() * panel_floats,
                        [&](float* to) {
                          parallel_for(groups * panels.count(),
                                       [&](int64_t i, int) { pack_panel(i, to + i * panel_floats); });
                        }),
          panel_floats};
}

void run(const DirectProblem& d) { run(d, {d.rows}, {d.columns}); }

void run(const DirectProblem& d, const std::vector<AxisTaps>& row_axes, const std::vector<AxisTaps>& column_axes) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  std::vector<Phase> row_phases, column_phases;
  const AxisTaps rows = join(row_axes, row_phases), columns = join(column_axes, column_phases);
  std::vector<std::vector<KernelTap>> phase_taps;
  for (const AxisTaps& row_axis : row_axes)
    for (const AxisTaps& column_axis : column_axes) {
      phase_taps.emplace_back();
      for (const auto& r : row_axis.taps)
        for (const auto& s : column_axis.taps) phase_taps.back().push_back({r.index, s.index});
    }
  const int64_t ins = d.source.channels;
  const PackedPanels weights = pack_weights(d.w, d.groups, d.outs, ins, phase_taps, d.cache, "direct");
  SourceImage source = d.source;
  const int64_t blocks = ceil_divide(ins, kBlock), together = groups_together(source, d.groups, blocks, kGroupBlocks);
  const int64_t group_parts = ceil_divide(d.groups, together);
  source.channels *= together;
  const Band shape(source, rows, columns);
  const Blocking blocking = choose_blocking(shape, d.images, rows.outputs, columns.outputs, k.tile_pixels, kBandFloats);
  const int64_t bands = blocking.bands() * group_parts;
  const int64_t panel_parts = std::clamp<int64_t>(ceil_divide(kMinChunks, bands), 1, panels.count());
  const int64_t band_floats = shape.max_floats(blocking.images, blocking.rows, blocking.columns);
  const auto range_of = [&](int64_t band) {
    return band_range(blocking, band / group_parts, d.images, rows.outputs, columns.outputs);
  };

  const int threads = num_threads();
  Buffer scratch(std::max<int64_t>(threads * band_floats, 1) * sizeof(float));
  // What a thread has packed, for all the parts of its panels.
  struct Packed {
    Band band;
    int64_t index;
  };
  std::vector<Packed> packed(threads, Packed{shape, -1});
  parallel_for(
      bands * panel_parts,
      [&](int64_t i, int thread) {
        const int64_t index = i / panel_parts, part = i % panel_parts;
        const Range groups = split(d.groups, group_parts, index % group_parts);
        Band& band = packed[thread].band;
        if (std::exchange(packed[thread].index, index) != index) {
          SourceImage mine = d.source;
          mine.first_channel += groups.begin * ins;
          mine.channels = (groups.end - groups.begin) * ins;
          band = Band(mine, rows, columns);
          band.pack(scratch.as<float>() + thread * band_floats, range_of(index));
        }
        Work work{
            d,  band,   range_of(index), nullptr, std::vector<DirectTile::Tap>(rows.taps.size() * columns.taps.size()),
            {}, nullptr};
        // The band that this thread is likely to take next is fetched meanwhile.
        if (d.groups == 1 && part == panel_parts - 1 && index + 1 < bands)
          work.upcoming = source_rows(d.source, rows, range_of(index + 1));
        DirectTile t{};
        t.taps = work.taps.data();
        t.blocks = blocks;
        t.block_stride = band.block_stride();
        t.last_channels = ins - (blocks - 1) * kBlock;
        t.low = d.epilogue.low, t.high = d.epilogue.high;
        t.streaming = d.streaming;
        const Range mine = split(panels.count(), panel_parts, part);
        for (int64_t g = groups.begin; g < groups.end; ++g) {
          work.x = band.data() + (g - groups.begin) * blocks * band.block_stride();
          for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
            const int64_t channel = g * d.outs + panel * panels.tile_k, width = panels.width(panel);
            t.bias = d.epilogue.bias ? d.epilogue.bias + channel : nullptr;
            t.channels = panels.channels(panel);
            t.w = weights.panel(g * panels.count() + panel);
            for (const Phase& row_phase : row_phases)
              for (const Phase& column_phase : column_phases) {
                const int64_t floats = row_phase.axis.taps.size() * column_phase.axis.taps.size() * ins * width;
                work.next_weights = t.w;
                if (bands <= kFewBands) work.next_weights += floats;
                run_phase(work, row_phase, column_phase, channel, k.direct[width / panels.lanes - 1], t, ins * width);
                t.w += floats;
              }
          }
        }
      },
      threads);
}

namespace {

// Pixels of a band of the weight gradient: enough to repay loading and storing the accumulators, few enough that a
// channel block of x and a slice of dy stay in or near L1.
constexpr int64_t kGradientPixels = 256;
// Floats of a chunk's sums, and of its band, at most.
constexpr int64_t kGradientFloats = 80 * 1024;
// Chunks wanted of the weight gradient: each beyond the number of panels costs a partial sum of the size of dw.
constexpr int64_t kGradientChunks = 16;

// Cache lines of pixels that are wanted next, handed out as one line of each of `count` neighbouring pixels at a time.
class UpcomingLines {
 public:
  UpcomingLines(const float* at, int64_t pixels, int64_t pixel, int64_t channels, int64_t count)
      : at_(at),
        pixel_(pixel),
        count_(count),
        parts_(ceil_divide(pixels, count)),
        left_(at ? parts_ * ceil_divide(channels, kBlock) : 0) {}
  bool set_next(WeightTile& t) {
    if (left_ == 0) return false;
    --left_;
    t.next = at_ + left_ % parts_ * count_ * pixel_ + left_ / parts_ * kBlock;
    t.next_step = pixel_;
    return true;
  }

 private:
  const float* at_;
  int64_t pixel_, count_, parts_, left_;
};

// Adds one band's share of dw for one panel of a group's channels, whose blocks in the band begin at first_block:
// acc [channel block][tap][channel][width].
void add_band(const WeightGradientProblem& d, int64_t first_block, int64_t channels, const Band& band,
              const BandRange& range, const Panels& panels, int64_t g, int64_t panel, float* dy, float* acc,
              UpcomingLines (&upcoming)[2]) {
  const auto& k = kernels().conv2d;
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size(), taps = row_taps * column_taps;
  const int64_t dy_pixel = d.groups * d.outs, rows = d.rows.outputs, columns = d.columns.outputs;
  const int64_t width = range.x1 - range.x0;
  WeightTile t{};
  t.width = panels.width(panel);
  t.dy = dy;
  for (int64_t n = range.n0; n < range.n1; ++n)
    for (int64_t y = range.y0; y < range.y1; ++y, dy += width * t.width)
      k.pack_slice(d.dy + ((n * rows + y) * columns + range.x0) * dy_pixel + g * d.outs + panel * panels.tile_k,
                   dy_pixel, width, panels.channels(panel), t.width, dy);
  std::vector<WeightTile::Row> list((range.n1 - range.n0) * (range.y1 - range.y0));
  t.row = list.data();
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t r = tap / column_taps, s = tap % column_taps;
    // Padding adds nothing.
    const Range inside = band.inside_columns(s, range.x0, range.x1);
    t.columns = inside.end - inside.begin;
    if (t.columns == 0) continue;
    t.rows = 0;
    int64_t at = (inside.begin - range.x0) * t.width;
    for (int64_t n = range.n0; n < range.n1; ++n)
      for (int64_t y = range.y0; y < range.y1; ++y, at += width * t.width) {
        const int64_t offset = band.offset(r, s, n, y, inside.begin);
        if (offset >= 0) list[t.rows++] = {offset, at};
      }
    for (int64_t c = 0; c * kBlock < channels; ++c) {
      t.x = band.data() + (first_block + c) * band.block_stride();
      t.channels = std::min(kBlock, channels - c * kBlock);
      if (!upcoming[0].set_next(t) && !upcoming[1].set_next(t)) t.next = t.x, t.next_step = 0;
      t.acc = acc + (c * taps + tap) * kBlock * t.width;
      k.weight_tile(t);
    }
  }
}

}  // namespace

void run(const WeightGradientProblem& d) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size(), taps = row_taps * column_taps;
  const int64_t rows = d.rows.outputs, columns = d.columns.outputs;
  const Band shape(d.source, d.rows, d.columns);

  // Bands of about kGradientPixels output pixels.
  Blocking b{1, 1, columns, d.images, 1, 1};
  if (columns > 2 * kGradientPixels) {
    b.column_bands = ceil_divide(columns, kGradientPixels);
    b.columns = ceil_divide(columns, b.column_bands);
    b.column_bands = ceil_divide(columns, b.columns);
  }
  b.row_bands = ceil_divide(rows, std::clamp<int64_t>(kGradientPixels / b.columns, 1, rows));
  b.rows = ceil_divide(rows, b.row_bands);
  b.row_bands = ceil_divide(rows, b.rows);
  if (b.row_bands == 1 && b.column_bands == 1) {
    b.images = std::clamp<int64_t>(kGradientPixels / (rows * columns), 1, std::max<int64_t>(d.images, 1));
    b.image_bands = ceil_divide(d.images, b.images);
  }

  // A chunk owns the sums of some panels and some channel blocks of one group, or of a few small groups, few enough
  // that they and the blocks' band stay in L2, over one part of the bands; the parts are summed in order at the end.
  const int64_t block_floats = shape.max_floats(b.images, b.rows, b.columns) / shape.blocks();
  const int64_t most_blocks =
      std::max<int64_t>(kGradientFloats / std::max(block_floats, taps * kBlock * panels.tile_k), 1);
  const int64_t block_parts = ceil_divide(shape.blocks(), most_blocks);
  const int64_t together = groups_together(d.source, d.groups, shape.blocks(), most_blocks);
  const int64_t chunk_blocks = ceil_divide(shape.blocks(), block_parts) * together;
  const int64_t group_parts = ceil_divide(d.groups, together);
  int64_t panel_parts = ceil_divide(
      panels.count(), std::max<int64_t>(kGradientFloats / (chunk_blocks * taps * kBlock * panels.tile_k), 1));
  const int64_t slots = group_parts * block_parts;
  const int64_t parts =
      std::clamp<int64_t>(ceil_divide(kGradientChunks, slots * panel_parts), 1, std::min<int64_t>(b.bands(), 16));
  panel_parts = std::clamp(ceil_divide(kGradientChunks, slots * parts), panel_parts, panels.count());
  const int64_t panel_floats = shape.blocks() * taps * kBlock * panels.tile_k;
  const int64_t part_floats = d.groups * panels.count() * panel_floats;
  Buffer sums(parts * part_floats * sizeof(float));

  const int64_t pixels = b.images * b.rows * b.columns;
  const int64_t band_floats = chunk_blocks * block_floats;
  const int64_t scratch_floats = band_floats + pixels * panels.tile_k;
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));

  parallel_for(
      parts * slots * panel_parts,
      [&](int64_t i, int thread) {
        const int64_t part = i / slots / panel_parts;
        const Range groups = split(d.groups, group_parts, i / panel_parts / block_parts % group_parts);
        const Range mine = split(panels.count(), panel_parts, i % panel_parts);
        const Range blocks = split(shape.blocks(), block_parts, i / panel_parts % block_parts);
        const Range my_bands = split(b.bands(), parts, part);
        const int64_t channels = std::min(d.source.channels, blocks.end * kBlock) - blocks.begin * kBlock;
        SourceImage source = d.source;
        source.first_channel += groups.begin * d.source.channels + blocks.begin * kBlock;
        source.channels = (groups.end - groups.begin) * channels;
        Band band(source, d.rows, d.columns);
        const auto sums_of = [&](int64_t g, int64_t panel) {
          return sums.as<float>() + part * part_floats + (g * panels.count() + panel) * panel_floats +
                 blocks.begin * taps * kBlock * panels.width(panel);
        };
        for (int64_t g = groups.begin; g < groups.end; ++g)
          for (int64_t panel = mine.begin; panel < mine.end; ++panel)
            std::memset(sums_of(g, panel), 0,
                        (blocks.end - blocks.begin) * taps * kBlock * panels.width(panel) * sizeof(float));
        float* packed = scratch.as<float>() + thread * scratch_floats;
        const int64_t dy_pixel = d.groups * d.outs, first_out = groups.begin * d.outs + mine.begin * panels.tile_k;
        const int64_t end_out = (groups.end - 1) * d.outs + std::min(d.outs, mine.end * panels.tile_k);
        for (int64_t j = my_bands.begin; j < my_bands.end; ++j) {
          const BandRange range = band_range(b, j, d.images, rows, columns);
          band.pack(packed, range);
          const BandRange next = band_range(b, std::min(j + 1, my_bands.end - 1), d.images, rows, columns);
          const Upcoming x = source_rows(source, d.rows, next);
          const int64_t next_pixels = (next.n1 - next.n0) * (next.y1 - next.y0) * columns;
          const float* dy = d.dy + (next.n0 * rows + next.y0) * columns * dy_pixel + first_out;
          UpcomingLines upcoming[2] = {
              {x.at + source.first_channel, x.floats / source.pixel, source.pixel, source.channels, pixels},
              {dy, next_pixels, dy_pixel, end_out - first_out, pixels}};
          for (int64_t g = groups.begin; g < groups.end; ++g)
            for (int64_t panel = mine.begin; panel < mine.end; ++panel)
              add_band(d, (g - groups.begin) * shape.blocks(), channels, band, range, panels, g, panel,
                       packed + band_floats, sums_of(g, panel), upcoming);
        }
      },
      threads);

  write_gradient(d, sums.as<float>(), parts);
}

void write_gradient(const WeightGradientProblem& d, const Panels& panels, int64_t g, int64_t panel, Range blocks,
                    const float* total) {
  const int64_t column_taps = d.columns.taps.size(), taps = d.rows.taps.size() * column_taps;
  const int64_t width = panels.width(panel), tap_floats = kBlock * width;
  float* dw = const_cast<float*>(d.dw.data) + g * d.dw.group + panel * panels.tile_k * d.dw.out;
  const auto& k = kernels().conv2d;
  const auto ins = [&](int64_t block) { return std::min(kBlock, d.source.channels - block * kBlock); };
  const bool streaming = worth_streaming(d.groups * d.outs * taps, d.source.channels) &&
                         reinterpret_cast<uintptr_t>(dw) % 64 == 0 && d.dw.out % kBlock == 0;
  // Taps side by side in memory are written together.
  if (taps > 1 && (d.dw.column == 1 || column_taps == 1) && (d.dw.row == column_taps || taps == column_taps)) {
    std::vector<int64_t> places(taps);
    for (int64_t tap = 0; tap < taps; ++tap) places[tap] = tap * tap_floats;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const float* from = total + (b - blocks.begin) * taps * tap_floats;
      float* to = dw + b * kBlock * d.dw.in;
      if (streaming && d.dw.in == taps)
        k.stream_taps(from, width, places.data(), taps, panels.channels(panel), ins(b), to, d.dw.out);
      else
        k.unpack_taps(from, width, places.data(), taps, panels.channels(panel), ins(b), to, d.dw.out, d.dw.in);
    }
    return;
  }
  // Blocks in turn, so that neighbouring cache lines of dw are written one after the other.
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t b = blocks.begin; b < blocks.end; ++b)
      k.unpack_weights(total + ((b - blocks.begin) * taps + tap) * tap_floats, width, panels.channels(panel), ins(b),
                       dw + b * kBlock * d.dw.in + d.rows.taps[tap / column_taps].index * d.dw.row +
                           d.columns.taps[tap % column_taps].index * d.dw.column,
                       d.dw.out, d.dw.in, streaming && d.dw.row % kBlock == 0 && d.dw.column % kBlock == 0);
}

void write_gradient(const WeightGradientProblem& d, float* sums, int64_t parts) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  const int64_t taps = d.rows.taps.size() * d.columns.taps.size();
  const int64_t blocks = ceil_divide(d.source.channels, kBlock), slots = d.groups * panels.count();
  const int64_t slot_floats = blocks * taps * kBlock * panels.tile_k, groups = ceil_divide(blocks, 4);
  parallel_for(slots * groups, [&](int64_t i, int) {
    const int64_t slot = i / groups, panel = slot % panels.count(), floats = taps * kBlock * panels.width(panel);
    const Range mine = split(blocks, groups, i % groups);
    float* total = sums + slot * slot_floats + mine.begin * floats;
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = total + part * slots * slot_floats;
      for (int64_t j = 0; j < (mine.end - mine.begin) * floats; ++j) total[j] += more[j];
    }
    write_gradient(d, panels, slot / panels.count(), panel, mine, total);
  });
}

WeightView forward_weights(const Conv2dProblem& a, const TensorView& w) {
  return {w.as<float>(), a.kg() * w.strides[0], w.strides[0], w.strides[1], w.strides[2], w.strides[3]};
}

WeightView backward_weights(const Conv2dProblem& a, const TensorView& w) {
  return {w.as<float>(), a.kg() * w.strides[0], w.strides[1], w.strides[0], w.strides[2], w.strides[3]};
}

const char* supports(const Conv2dProblem& a) {
  if (a.dtype != DType::kFloat32) return "fp32 only";
  // One packed row of padding and phases for all channels must stay a reasonable workspace.
  const int64_t columns = a.w + a.q * a.stride_w + (a.s - 1) * a.dilation_w;
  if (columns > (int64_t{1} << 26) / (a.cg() + a.kg() + kBlock)) return "a padded row is too long to pack";
  if (a.r * a.s > (int64_t{1} << 30) / ((a.cg() + kBlock) * (a.k + kBlock))) return "the kernel is too large to pack";
  return nullptr;
}

DirectProblem forward_problem(const Conv2dProblem& a, const ForwardArguments& args) {
  return {a.n,
          {static_cast<const float*>(args.x), a.h, a.w, a.c, 0, a.cg()},
          forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
          forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w),
          a.groups,
          a.kg(),
          forward_weights(a, args.w),
          static_cast<float*>(args.y),
          a.p,
          a.q,
          a.k,
          make_epilogue(args),
          a.kg() % kBlock == 0 && worth_streaming(a.n * a.p * a.q, a.k),
          args.cache};
}

DirectProblem backward_problem(const Conv2dProblem& a, const BackwardInputArguments& args, const AxisTaps& rows,
                               const AxisTaps& columns) {
  return {a.n,
          {static_cast<const float*>(args.dy), a.p, a.q, a.k, 0, a.kg()},
          rows,
          columns,
          a.groups,
          a.cg(),
          backward_weights(a, args.w),
          static_cast<float*>(args.dx),
          a.h,
          a.w,
          a.c,
          {},
          a.cg() % kBlock == 0 && worth_streaming(a.n * a.h * a.w, a.c)};
}

WeightGradientProblem weight_gradient_problem(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  return {a.n,
          {static_cast<const float*>(args.x), a.h, a.w, a.c, 0, a.cg()},
          forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
          forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w),
          a.groups,
          a.kg(),
          static_cast<const float*>(args.dy),
          forward_weights(a, args.dw)};
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) { run(forward_problem(a, args)); }

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const auto rows = backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h);
  const auto columns = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  run(backward_problem(a, args, rows[0], columns[0]), rows, columns);
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  run(weight_gradient_problem(a, args));
}

}  // namespace fastconv::cpu::direct

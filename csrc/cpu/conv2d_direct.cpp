// Direct implicit GEMM: a band of the source is packed once, then register tiles of (pixels x output channels) run over
// all taps and channels with constant strides. One engine serves forward and input gradient: with a stride, the input
// gradient is one ordinary stride-1 convolution of dy for each phase of the input pixels (AxisTaps).
#include "cpu/conv2d_direct.h"

#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::direct {
namespace {

// A packed band should stay in L2 beside the weight panel that runs over it.
constexpr int64_t kBandFloats = 96 * 1024;
// Chunks wanted at least, so that many cores find work.
constexpr int64_t kMinChunks = 32;

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

// All output pixels of one band for one panel of channels.
void run_panel(const DirectProblem& d, const Band& band, const BandRange& range, const float* w, int64_t g,
               int64_t panel, const Panels& panels, std::vector<DirectTile::Tap>& taps, Upcoming& upcoming) {
  const auto& k = kernels().conv2d;
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size();
  const int64_t channel = g * d.outs + panel * panels.tile_k;
  const int64_t vectors = panels.width(panel) / panels.lanes;
  const int64_t width = range.x1 - range.x0;

  DirectTile t{};
  t.taps = taps.data();
  t.panel_taps = row_taps * column_taps;
  t.blocks = band.blocks();
  t.block_stride = band.block_stride();
  t.last_channels = d.source.channels - (band.blocks() - 1) * kBlock;
  t.w = w;
  const int64_t panel_floats = t.panel_taps * d.source.channels * panels.width(panel);
  t.bias = d.epilogue.bias ? d.epilogue.bias + channel : nullptr;
  t.low = d.epilogue.low, t.high = d.epilogue.high;
  t.row_stride = d.rows.out_step * d.y_w * d.y_pixel;
  t.pixel_stride = d.columns.out_step * d.y_pixel;
  t.channels = panels.channels(panel);
  t.streaming = d.streaming;

  for (int64_t n = range.n0; n < range.n1; ++n)
    for (int64_t y = range.y0; y < range.y1;) {
      const int64_t rows = 2 * width <= k.tile_pixels && y + 1 < range.y1 ? 2 : 1;
      t.tap_count = 0;
      for (int64_t r = 0; r < row_taps; ++r)
        for (int64_t s = 0; s < column_taps; ++s) {
          int64_t at[2] = {-1, -1};
          for (int64_t i = 0; i < rows; ++i) at[i] = band.offset(r, s, n, y + i, range.x0);
          if (at[0] < 0 && at[1] < 0) continue;  // these rows lie in the padding
          DirectTile::Tap& tap = taps[t.tap_count++];
          for (int64_t i = 0; i < rows; ++i)
            tap.x[i] = band.data() + (at[i] >= 0 ? at[i] : band.zero_offset(s, range.x0));
          tap.index = r * column_taps + s;
        }
      const int64_t tiles = ceil_divide(width * rows, k.tile_pixels);
      for (int64_t i = 0; i < tiles; ++i) {
        const Range part = split(width, tiles, i);
        const int64_t at = d.output_offset(n, y, range.x0 + part.begin) + channel;
        t.x_offset = part.begin * kBlock;
        t.y = d.y + at;
        t.residual = d.epilogue.residual ? d.epilogue.residual + at : nullptr;
        t.next = upcoming.floats > 0 ? upcoming.at : w;
        upcoming.at += panel_floats, upcoming.floats -= panel_floats;
        k.direct[vectors - 1][rows - 1][part.end - part.begin - 1](t);
      }
      y += rows;
    }
}

}  // namespace

PackedPanels pack_weights(const WeightView& w, int64_t groups, int64_t outs, int64_t ins,
                          const std::vector<AxisTaps::Tap>& rows, const std::vector<AxisTaps::Tap>& columns,
                          WeightCache* cache, const char* name) {
  const auto& k = kernels().conv2d;
  const Panels panels{outs, k.tile_k, k.lanes};
  const int64_t taps = rows.size() * columns.size(), panel_floats = taps * ins * k.tile_k;
  const auto pack_panel = [&](int64_t i, float* dst) {
    const int64_t g = i / panels.count(), panel = i % panels.count(), width = panels.width(panel);
    const float* src = w.data + g * w.group + panel * k.tile_k * w.out;
    const auto pack = [&](int64_t c, int64_t tap) {
      const int64_t channels = std::min(kBlock, ins - c), row = tap / columns.size(), column = tap % columns.size();
      k.pack_weights(src + c * w.in + rows[row].index * w.row + columns[column].index * w.column, w.out, w.in,
                     panels.channels(panel), channels, width, dst + (c * taps + tap * channels) * width);
    };
    // The order in which the weights lie in memory.
    if (w.in < w.column)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < ins; c += kBlock) pack(c, tap);
    else
      for (int64_t c = 0; c < ins; c += kBlock)
        for (int64_t tap = 0; tap < taps; ++tap) pack(c, tap);
  };
  return {PackedWeights(cache, name, groups * panels.count() * panel_floats,
                        [&](float* to) {
                          parallel_for(groups * panels.count(),
                                       [&](int64_t i, int) { pack_panel(i, to + i * panel_floats); });
                        }),
          panel_floats};
}

void run(const DirectProblem& d) {
  const auto& k = kernels().conv2d;
  const Panels panels{d.outs, k.tile_k, k.lanes};
  const PackedPanels weights =
      pack_weights(d.w, d.groups, d.outs, d.source.channels, d.rows.taps, d.columns.taps, d.cache, "direct");
  const Band shape(d.source, d.rows, d.columns);
  const Blocking blocking =
      choose_blocking(shape, d.images, d.rows.outputs, d.columns.outputs, k.tile_pixels, kBandFloats);
  const int64_t panel_parts =
      std::clamp<int64_t>(ceil_divide(kMinChunks, blocking.bands() * d.groups), 1, panels.count());
  const int64_t band_floats = shape.max_floats(blocking.images, blocking.rows, blocking.columns);

  const int threads = num_threads();
  Buffer scratch(std::max<int64_t>(threads * band_floats, 1) * sizeof(float));
  parallel_for(
      blocking.bands() * d.groups * panel_parts,
      [&](int64_t i, int thread) {
        const int64_t part = i % panel_parts, g = i / panel_parts % d.groups, b = i / panel_parts / d.groups;
        const BandRange range = band_range(blocking, b, d.images, d.rows.outputs, d.columns.outputs);
        SourceImage source = d.source;
        source.first_channel += g * d.source.channels;
        Band band(source, d.rows, d.columns);
        band.pack(scratch.as<float>() + thread * band_floats, range);
        std::vector<DirectTile::Tap> taps(d.rows.taps.size() * d.columns.taps.size());
        const Range mine = split(panels.count(), panel_parts, part);
        // The band that this thread is likely to take next is fetched meanwhile.
        Upcoming upcoming{nullptr, 0};
        if (d.groups == 1 && panel_parts == 1 && b + threads < blocking.bands())
          upcoming = source_rows(d.source, d.rows,
                                 band_range(blocking, b + threads, d.images, d.rows.outputs, d.columns.outputs));
        for (int64_t panel = mine.begin; panel < mine.end; ++panel)
          run_panel(d, band, range, weights.panel(g * panels.count() + panel), g, panel, panels, taps, upcoming);
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

// Adds one band's share of dw for one panel of channels: acc [channel block][tap][channel][width].
void add_band(const WeightGradientProblem& d, int64_t channels, const Band& band, const BandRange& range,
              const Panels& panels, int64_t g, int64_t panel, float* dy, float* acc, UpcomingLines (&upcoming)[2]) {
  const auto& k = kernels().conv2d;
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size(), taps = row_taps * column_taps;
  const int64_t dy_pixel = d.groups * d.outs, rows = d.rows.outputs, columns = d.columns.outputs;
  WeightTile t{};
  t.columns = range.x1 - range.x0;
  t.rows = (range.n1 - range.n0) * (range.y1 - range.y0);
  t.width = panels.width(panel);
  t.dy = dy;
  for (int64_t n = range.n0; n < range.n1; ++n)
    for (int64_t y = range.y0; y < range.y1; ++y, dy += t.columns * t.width)
      k.pack_slice(d.dy + ((n * rows + y) * columns + range.x0) * dy_pixel + g * d.outs + panel * panels.tile_k,
                   dy_pixel, t.columns, panels.channels(panel), t.width, dy);
  std::vector<int64_t> offsets(t.rows);
  t.row_offsets = offsets.data();
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t r = tap / column_taps, s = tap % column_taps;
    int64_t at = 0;
    for (int64_t n = range.n0; n < range.n1; ++n)
      for (int64_t y = range.y0; y < range.y1; ++y) {
        const int64_t offset = band.offset(r, s, n, y, range.x0);
        offsets[at++] = offset >= 0 ? offset : band.zero_offset(s, range.x0);
      }
    for (int64_t c = 0; c < band.blocks(); ++c) {
      t.x = band.data() + c * band.block_stride();
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

  // A chunk owns the sums of some panels and some channel blocks of one group, few enough that they and the blocks'
  // band stay in L2, over one part of the bands; the parts are summed in order at the end.
  const int64_t block_floats = shape.max_floats(b.images, b.rows, b.columns) / shape.blocks();
  const int64_t block_parts = ceil_divide(
      shape.blocks(), std::max<int64_t>(kGradientFloats / std::max(block_floats, taps * kBlock * panels.tile_k), 1));
  const int64_t chunk_blocks = ceil_divide(shape.blocks(), block_parts);
  int64_t panel_parts = ceil_divide(
      panels.count(), std::max<int64_t>(kGradientFloats / (chunk_blocks * taps * kBlock * panels.tile_k), 1));
  const int64_t slots = d.groups * block_parts;
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
        const int64_t part = i / slots / panel_parts, g = i / panel_parts / block_parts % d.groups;
        const Range mine = split(panels.count(), panel_parts, i % panel_parts);
        const Range blocks = split(shape.blocks(), block_parts, i / panel_parts % block_parts);
        const Range my_bands = split(b.bands(), parts, part);
        SourceImage source = d.source;
        source.first_channel += g * d.source.channels + blocks.begin * kBlock;
        source.channels = std::min(d.source.channels, blocks.end * kBlock) - blocks.begin * kBlock;
        Band band(source, d.rows, d.columns);
        const auto sums_of = [&](int64_t panel) {
          return sums.as<float>() + part * part_floats + (g * panels.count() + panel) * panel_floats +
                 blocks.begin * taps * kBlock * panels.width(panel);
        };
        for (int64_t panel = mine.begin; panel < mine.end; ++panel)
          std::memset(sums_of(panel), 0,
                      (blocks.end - blocks.begin) * taps * kBlock * panels.width(panel) * sizeof(float));
        float* packed = scratch.as<float>() + thread * scratch_floats;
        for (int64_t j = my_bands.begin; j < my_bands.end; ++j) {
          const BandRange range = band_range(b, j, d.images, rows, columns);
          band.pack(packed, range);
          const BandRange next = band_range(b, std::min(j + 1, my_bands.end - 1), d.images, rows, columns);
          const Upcoming x = source_rows(source, d.rows, next);
          const int64_t next_pixels = (next.n1 - next.n0) * (next.y1 - next.y0) * columns, dy_pixel = d.groups * d.outs;
          const float* dy =
              d.dy + (next.n0 * rows + next.y0) * columns * dy_pixel + g * d.outs + mine.begin * panels.tile_k;
          UpcomingLines upcoming[2] = {
              {x.at + source.first_channel, x.floats / source.pixel, source.pixel, source.channels, pixels},
              {dy, next_pixels, dy_pixel, std::min(d.outs, mine.end * panels.tile_k) - mine.begin * panels.tile_k,
               pixels}};
          for (int64_t panel = mine.begin; panel < mine.end; ++panel)
            add_band(d, source.channels, band, range, panels, g, panel, packed + band_floats, sums_of(panel), upcoming);
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
  // Blocks in turn, so that neighbouring cache lines of dw are written one after the other.
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t b = blocks.begin; b < blocks.end; ++b)
      kernels().conv2d.unpack_weights(total + ((b - blocks.begin) * taps + tap) * tap_floats, width,
                                      panels.channels(panel), std::min(kBlock, d.source.channels - b * kBlock),
                                      dw + b * kBlock * d.dw.in + d.rows.taps[tap / column_taps].index * d.dw.row +
                                          d.columns.taps[tap % column_taps].index * d.dw.column,
                                      d.dw.out, d.dw.in);
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
  const auto columns = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  for (const AxisTaps& row_axis : backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h))
    for (const AxisTaps& column_axis : columns) run(backward_problem(a, args, row_axis, column_axis));
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  run(weight_gradient_problem(a, args));
}

}  // namespace fastconv::cpu::direct

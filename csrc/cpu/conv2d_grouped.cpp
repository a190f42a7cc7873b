// Groups of so few channels that several share a vector, as in ResNeXt: in the direct engine's tiles most lanes would
// be padding. Here lanes are the output channels of all groups (kernels/grouped.inl.h). Bound: FMA.
#include <algorithm>
#include <cstring>
#include <utility>

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::grouped {
namespace {

// A packed band should stay in L2.
constexpr int64_t kBandFloats = 96 * 1024;
// Chunks wanted of the weight gradient.
constexpr int64_t kGradientChunks = 32;

// All channels of all groups, in vectors, and the blocks of a band that hold them.
struct Vectors {
  int64_t group, channels, lanes;
  std::vector<int32_t> index;  // [group][lanes]
  Vectors(int64_t groups, int64_t group) : group(group), channels(groups * group), lanes(kernels().conv2d.lanes) {
    for (int64_t i = 0; i < group; ++i)
      for (int64_t lane = 0; lane < lanes; ++lane) index.push_back(static_cast<int32_t>(lane - lane % group + i));
  }
  int64_t count() const { return ceil_divide(channels, lanes); }
  int64_t valid(int64_t i) const { return std::min(lanes, channels - i * lanes); }
  int64_t blocks() const { return ceil_divide(channels, kBlock); }
  Range of_blocks(Range blocks) const {
    return {blocks.begin * kBlock / lanes, std::min(count(), blocks.end * kBlock / lanes)};
  }
  // The source of some blocks.
  SourceImage of(SourceImage source, Range blocks) const {
    source.first_channel = blocks.begin * kBlock;
    source.channels = std::min(channels, blocks.end * kBlock) - blocks.begin * kBlock;
    return source;
  }
  // The place of a vector in a band that begins with a block.
  const float* in(const Band& band, int64_t vector, int64_t first_block) const {
    const int64_t channel = vector * lanes - first_block * kBlock;
    return band.data() + channel / kBlock * band.block_stride() + channel % kBlock;
  }
};

// Taps of an axis that read neighbouring packed pixels, as ranges of the axis's taps, which are put into that order.
std::vector<Range> make_runs(AxisTaps& axis) {
  const auto phase = [&](const AxisTaps::Tap& tap) { return (tap.offset % axis.step + axis.step) % axis.step; };
  std::sort(axis.taps.begin(), axis.taps.end(), [&](const auto& a, const auto& b) {
    return std::pair(phase(a), a.offset) < std::pair(phase(b), b.offset);
  });
  std::vector<Range> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(axis.taps.size()); ++i)
    if (i > 0 && axis.taps[i].offset == axis.taps[i - 1].offset + axis.step &&
        runs.back().end - runs.back().begin < kGroupedTaps)
      ++runs.back().end;
    else
      runs.push_back({i, i + 1});
  return runs;
}

// Parts of the blocks of channels; those of one share a band, so that a pixel is fetched several cache lines at a time.
int64_t block_parts(const Vectors& vectors) { return ceil_divide(vectors.blocks(), 4); }

// visit(offset in w, offset in packed) for [vector][row][column][i][lane]: in-channel i of the lane's out-channel.
template <class Visit>
void for_weights(const direct::WeightView& w, const Vectors& vectors, int64_t vector,
                 const std::vector<AxisTaps::Tap>& rows, const std::vector<AxisTaps::Tap>& columns, Visit&& visit) {
  int64_t at = vector * rows.size() * columns.size() * vectors.group * vectors.lanes;
  for (const auto& r : rows)
    for (const auto& s : columns)
      for (int64_t i = 0; i < vectors.group; ++i, at += vectors.lanes)
        for (int64_t lane = 0; lane < vectors.valid(vector); ++lane) {
          const int64_t channel = vector * vectors.lanes + lane;
          visit(channel / vectors.group * w.group + channel % vectors.group * w.out + i * w.in + r.index * w.row +
                    s.index * w.column,
                at + lane);
        }
}

Buffer pack_weights(const direct::DirectProblem& d, const Vectors& vectors) {
  const int64_t floats = d.rows.taps.size() * d.columns.taps.size() * vectors.group * vectors.lanes;
  Buffer packed(std::max<int64_t>(vectors.count() * floats, 1) * sizeof(float));
  parallel_for(vectors.count(), [&](int64_t i, int) {
    std::memset(packed.as<float>() + i * floats, 0, floats * sizeof(float));
    for_weights(d.w, vectors, i, d.rows.taps, d.columns.taps,
                [&](int64_t from, int64_t to) { packed.as<float>()[to] = d.w.data[from]; });
  });
  return packed;
}

// All output pixels of one band for one vector, which lies in the band at `x`.
void run_vector(const direct::DirectProblem& d, const Vectors& vectors, const std::vector<Range>& runs, int64_t vector,
                const Band& band, const BandRange& range, const float* x, const float* w) {
  const auto& k = kernels().conv2d;
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size();
  const int64_t channel = vector * vectors.lanes, width = range.x1 - range.x0;
  std::vector<GroupedTile::Run> list(row_taps * runs.size());
  GroupedTile t{};
  t.runs = list.data();
  t.group = vectors.group, t.index = vectors.index.data();
  t.bias = d.epilogue.bias ? d.epilogue.bias + channel : nullptr;
  t.low = d.epilogue.low, t.high = d.epilogue.high;
  t.pixel_stride = d.columns.out_step * d.y_pixel;
  t.channels = vectors.valid(vector);
  t.streaming = worth_streaming(d.images * d.y_h * d.y_w, d.y_pixel);
  const int64_t tiles = ceil_divide(width, k.tile_pixels);
  for (int64_t n = range.n0; n < range.n1; ++n)
    for (int64_t y = range.y0; y < range.y1; ++y) {
      t.run_count = 0;
      for (int64_t r = 0; r < row_taps; ++r)
        for (const Range& run : runs) {
          const int64_t at = band.offset(r, run.begin, n, y, range.x0);
          if (at < 0) continue;  // in the padding
          list[t.run_count++] = {x + at, w + (r * column_taps + run.begin) * vectors.group * vectors.lanes,
                                 run.end - run.begin};
        }
      for (int64_t i = 0; i < tiles; ++i) {
        const Range part = split(width, tiles, i);
        const int64_t at = d.output_offset(d.rows, d.columns, n, y, range.x0 + part.begin) + channel;
        t.x_offset = part.begin * kBlock;
        t.y = d.y + at;
        t.residual = d.epilogue.residual ? d.epilogue.residual + at : nullptr;
        k.grouped_tile[part.end - part.begin - 1](t);
      }
    }
}

void convolve(direct::DirectProblem d) {
  const std::vector<Range> runs = make_runs(d.columns);
  const Vectors vectors(d.groups, d.outs);
  const Buffer weights = pack_weights(d, vectors);
  const int64_t panel = d.rows.taps.size() * d.columns.taps.size() * vectors.group * vectors.lanes;
  const int64_t parts = block_parts(vectors);
  const Band shape(vectors.of(d.source, split(vectors.blocks(), parts, 0)), d.rows, d.columns);
  const Blocking blocking =
      choose_blocking(shape, d.images, d.rows.outputs, d.columns.outputs, kernels().conv2d.tile_pixels, kBandFloats);
  const int64_t band_floats = shape.max_floats(blocking.images, blocking.rows, blocking.columns);
  const int threads = num_threads();
  Buffer scratch(std::max<int64_t>(threads * band_floats, 1) * sizeof(float));
  parallel_for(
      blocking.bands() * parts,
      [&](int64_t i, int thread) {
        const Range blocks = split(vectors.blocks(), parts, i % parts), mine = vectors.of_blocks(blocks);
        const BandRange range = band_range(blocking, i / parts, d.images, d.rows.outputs, d.columns.outputs);
        Band band(vectors.of(d.source, blocks), d.rows, d.columns);
        band.pack(scratch.as<float>() + thread * band_floats, range);
        for (int64_t v = mine.begin; v < mine.end; ++v)
          run_vector(d, vectors, runs, v, band, range, vectors.in(band, v, blocks.begin),
                     weights.as<float>() + v * panel);
      },
      threads);
}

// Adds one band's share of one vector's dw: acc [row tap][column tap][i][lane].
void add_band(const direct::WeightGradientProblem& d, const Vectors& vectors, const std::vector<Range>& runs,
              int64_t vector, const Band& band, const BandRange& range, const float* x, float* dy, float* acc) {
  const auto& k = kernels().conv2d;
  const int64_t row_taps = d.rows.taps.size(), column_taps = d.columns.taps.size();
  GroupedWeightTile t{};
  t.x = x;
  t.group = vectors.group, t.index = vectors.index.data();
  t.columns = range.x1 - range.x0;
  t.rows = (range.n1 - range.n0) * (range.y1 - range.y0);
  t.dy = dy;
  for (int64_t n = range.n0; n < range.n1; ++n)
    for (int64_t y = range.y0; y < range.y1; ++y, dy += t.columns * vectors.lanes)
      k.pack_slice(
          d.dy + ((n * d.rows.outputs + y) * d.columns.outputs + range.x0) * vectors.channels + vector * vectors.lanes,
          vectors.channels, t.columns, vectors.valid(vector), vectors.lanes, dy);
  std::vector<int64_t> offsets(t.rows);
  t.row_offsets = offsets.data();
  for (int64_t r = 0; r < row_taps; ++r)
    for (const Range& run : runs) {
      int64_t at = 0;
      for (int64_t n = range.n0; n < range.n1; ++n)
        for (int64_t y = range.y0; y < range.y1; ++y) {
          const int64_t offset = band.offset(r, run.begin, n, y, range.x0);
          offsets[at++] = offset >= 0 ? offset : band.zero_offset(run.begin, range.x0);
        }
      t.taps = run.end - run.begin;
      t.acc = acc + (r * column_taps + run.begin) * vectors.group * vectors.lanes;
      k.grouped_weight_tile(t);
    }
}

void weight_gradient(direct::WeightGradientProblem d) {
  const std::vector<Range> runs = make_runs(d.columns);
  const Vectors vectors(d.groups, d.outs);
  const int64_t vector_floats = d.rows.taps.size() * d.columns.taps.size() * vectors.group * vectors.lanes;
  const int64_t channel_parts = block_parts(vectors);
  const Band shape(vectors.of(d.source, split(vectors.blocks(), channel_parts, 0)), d.rows, d.columns);
  const Blocking blocking =
      choose_blocking(shape, d.images, d.rows.outputs, d.columns.outputs, kernels().conv2d.tile_pixels, kBandFloats);
  const int64_t parts = std::clamp<int64_t>(ceil_divide(kGradientChunks, channel_parts), 1, blocking.bands());
  const int64_t part_floats = vectors.count() * vector_floats;
  Buffer sums(parts * part_floats * sizeof(float));
  const int64_t band_floats = shape.max_floats(blocking.images, blocking.rows, blocking.columns);
  const int64_t scratch_floats = band_floats + blocking.images * blocking.rows * blocking.columns * vectors.lanes;
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      parts * channel_parts,
      [&](int64_t i, int thread) {
        const Range blocks = split(vectors.blocks(), channel_parts, i % channel_parts),
                    mine = vectors.of_blocks(blocks);
        const Range bands = split(blocking.bands(), parts, i / channel_parts);
        float* acc = sums.as<float>() + i / channel_parts * part_floats;
        std::memset(acc + mine.begin * vector_floats, 0, (mine.end - mine.begin) * vector_floats * sizeof(float));
        float* packed = scratch.as<float>() + thread * scratch_floats;
        Band band(vectors.of(d.source, blocks), d.rows, d.columns);
        for (int64_t j = bands.begin; j < bands.end; ++j) {
          const BandRange range = band_range(blocking, j, d.images, d.rows.outputs, d.columns.outputs);
          band.pack(packed, range);
          for (int64_t v = mine.begin; v < mine.end; ++v)
            add_band(d, vectors, runs, v, band, range, vectors.in(band, v, blocks.begin), packed + band_floats,
                     acc + v * vector_floats);
        }
      },
      threads);

  parallel_for(vectors.count(), [&](int64_t v, int) {
    float* total = sums.as<float>();
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = v * vector_floats; j < (v + 1) * vector_floats; ++j) total[j] += total[part * part_floats + j];
    for_weights(d.dw, vectors, v, d.rows.taps, d.columns.taps,
                [&](int64_t to, int64_t from) { const_cast<float*>(d.dw.data)[to] = total[from]; });
  });
}

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.groups == 1) return "one group";
  if (a.cg() != a.kg()) return "groups do not read as many channels as they write";
  if (kernels().conv2d.lanes % a.cg() != 0) return "groups do not share a vector evenly";
  // The direct engine then packs whole cache lines, or leaves out none of those that it reads.
  if (a.cg() == kernels().conv2d.lanes && (a.cg() % kBlock == 0 || (a.stride_h == 1 && a.stride_w == 1)))
    return "a group fills a vector";
  if (a.r * a.s == 1) return "one tap";
  return direct::supports(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) { convolve(direct::forward_problem(a, args)); }

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const auto columns = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  for (const AxisTaps& row_axis : backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h))
    for (const AxisTaps& column_axis : columns) convolve(direct::backward_problem(a, args, row_axis, column_axis));
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  weight_gradient(direct::weight_gradient_problem(a, args));
}

}  // namespace fastconv::cpu::grouped

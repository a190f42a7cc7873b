// 1x1 kernels without padding: a GEMM over pixels. x, y and their gradients are read and written where they lie, since
// a pixel is one run of floats; only the weights are packed. Bounds: FMA, and memory where C or K is small.
#include <algorithm>
#include <cstring>
#include <utility>

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::pointwise {
namespace {

// Pixels of a block: few enough that they stay in L2 while the weights run over them.
constexpr int64_t kBlockPixels = 112, kBlockFloats = 96 * 1024;
// Beyond this many channels neighbouring pixels lie so far apart that they compete for the same sets of L1, so a block
// is copied to where they do not.
constexpr int64_t kFarChannels = 512;
// Chunks wanted at least, so that many cores find work; for a few cores so many each, since the chunks of a block read
// its pixels anew.
constexpr int64_t kMinChunks = 32, kThreadChunks = 8;

// Where the pixels of a 1x1 convolution lie, in floats from the first.
struct Pixels {
  int64_t image, row, pixel;
};

// The outputs of a 1x1 convolution in blocks: parts of one row of all pixels at stride 1, else rows of one or all
// images.
struct Blocks {
  int64_t images, rows, columns;  // of outputs
  int64_t block_rows, block_columns;
  Blocks(const Conv2dProblem& a, int64_t pixels) : images(a.n), rows(a.p), columns(a.q) {
    if (a.p * a.stride_h == a.h) rows *= std::exchange(images, 1);  // the rows of all images are equally far apart
    if (is_dense(a)) columns *= std::exchange(rows, 1);             // and so are their pixels
    block_columns = ceil_divide(columns, ceil_divide(columns, pixels));
    block_rows = ceil_divide(rows, ceil_divide(rows, std::max<int64_t>(pixels / block_columns, 1)));
  }
  static bool is_dense(const Conv2dProblem& a) { return a.stride_h == 1 && a.stride_w == 1; }
  int64_t in_row() const { return ceil_divide(columns, block_columns); }
  int64_t in_image() const { return ceil_divide(rows, block_rows) * in_row(); }
  int64_t count() const { return images * in_image(); }
  int64_t image(int64_t i) const { return i / in_image(); }
  // The first pixel of a block.
  int64_t offset(int64_t i, const Pixels& at) const {
    return image(i) * at.image + row_range(i).begin * at.row + column_range(i).begin * at.pixel;
  }
  Range row_range(int64_t i) const {
    const int64_t begin = i % in_image() / in_row() * block_rows;
    return {begin, std::min(rows, begin + block_rows)};
  }
  Range column_range(int64_t i) const {
    const int64_t begin = i % in_row() * block_columns;
    return {begin, std::min(columns, begin + block_columns)};
  }
};

Pixels output_pixels(const Conv2dProblem& a) { return {a.p * a.q * a.k, a.q * a.k, a.k}; }
// Those of x that outputs read.
Pixels input_pixels(const Conv2dProblem& a) { return {a.h * a.w * a.c, a.stride_h * a.w * a.c, a.stride_w * a.c}; }

// y = clamp(sum over `ins` channels of x * w + bias + residual) for every group; y may have gaps between its pixels.
struct Problem {
  const float* x;
  Pixels from;
  float* y;
  Pixels to;
  int64_t groups, ins, outs;
  direct::WeightView w;
  Epilogue epilogue;
  bool streaming;
  WeightCache* cache = nullptr;
};

// fill(image, rows, columns, first channel, channels) writes the gaps of y that belong to some pixels.
template <class Fill> void run(const Conv2dProblem& a, const Problem& d, Fill&& fill) {
  const auto& k = kernels().conv2d;
  const direct::Panels panels{d.outs, k.tile_k, k.lanes};
  const direct::PackedPanels weights =
      direct::pack_weights(d.w, d.groups, d.outs, d.ins, {{{0, 0}}}, d.cache, "pointwise");
  const bool far = d.from.pixel > kFarChannels;
  const Blocks blocks(a,
                      std::clamp<int64_t>(kBlockFloats / std::max<int64_t>(d.ins, 1), 2 * k.tile_pixels, kBlockPixels));
  const int threads = num_threads();
  const int64_t chunks = std::min(kMinChunks, kThreadChunks * threads);
  const int64_t panel_parts = std::clamp<int64_t>(ceil_divide(chunks, blocks.count() * d.groups), 1, panels.count());
  const int64_t far_pixel = ceil_divide(d.ins, kBlock) * kBlock + kBlock;
  const int64_t scratch_floats = far ? blocks.block_rows * blocks.block_columns * far_pixel : 0;
  // Of few pixels: the weights, each used a few times only, may come from memory, and many chunks read a block, so it
  // is copied once for all of them instead of by each.
  const bool few = panel_parts > 2, shared = far && few;
  Buffer scratch(std::max<int64_t>((shared ? blocks.count() * d.groups : threads) * scratch_floats, 1) * sizeof(float));
  const auto block_source = [&](int64_t g, int64_t block) { return d.x + blocks.offset(block, d.from) + g * d.ins; };
  const auto copy_block = [&](int64_t g, int64_t block, float* to) {
    const Range rows = blocks.row_range(block), columns = blocks.column_range(block);
    const float* x = block_source(g, block);
    for (int64_t row = 0; row < rows.end - rows.begin; ++row)
      for (int64_t q = 0; q < columns.end - columns.begin; ++q, to += far_pixel)
        std::memcpy(to, x + row * d.from.row + q * d.from.pixel, d.ins * sizeof(float));
  };
  if (shared)
    parallel_for(blocks.count() * d.groups, [&](int64_t i, int) {
      copy_block(i % d.groups, i / d.groups, scratch.as<float>() + i * scratch_floats);
    });

  parallel_for(
      blocks.count() * d.groups * panel_parts,
      [&](int64_t i, int thread) {
        const int64_t part = i % panel_parts, g = i / panel_parts % d.groups, block = i / panel_parts / d.groups;
        const int64_t n = blocks.image(block);
        const Range mine = split(panels.count(), panel_parts, part);
        const Range rows = blocks.row_range(block), columns = blocks.column_range(block);
        const int64_t width = columns.end - columns.begin;
        const float* x = block_source(g, block);
        const int64_t y = blocks.offset(block, d.to) + g * d.outs;
        StripTile t{};
        t.x_step = far ? far_pixel : d.from.pixel, t.next_step = d.from.pixel;
        t.rows = 1, t.taps = d.ins;
        t.pixel_stride = d.to.pixel;
        t.low = d.epilogue.low, t.high = d.epilogue.high;
        t.streaming = d.streaming;
        float* copy = scratch.as<float>() + (shared ? block * d.groups + g : thread) * scratch_floats;
        const int64_t tiles = ceil_divide(width, k.tile_pixels);
        for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
          const int64_t channel = panel * k.tile_k;
          t.w = weights.panel(g * panels.count() + panel);
          // What this thread wants next is fetched while it uses these.
          const int64_t next_floats = few && panel + 1 < panels.count() ? d.ins * panels.width(panel) : 0;
          t.bias = d.epilogue.bias ? d.epilogue.bias + g * d.outs + channel : nullptr;
          t.channels = panels.channels(panel);
          const auto* tile = k.strip[panels.width(panel) / k.lanes - 1];
          for (int64_t row = 0; row < rows.end - rows.begin; ++row)
            for (int64_t j = 0; j < tiles; ++j) {
              const Range pixels = split(width, tiles, j);
              const int64_t count = pixels.end - pixels.begin;
              const int64_t at = y + row * d.to.row + pixels.begin * d.to.pixel + channel;
              const float* source = x + row * d.from.row + pixels.begin * d.from.pixel;
              float* near = copy + (row * width + pixels.begin) * far_pixel;
              t.x = far ? near : source;
              t.next = nullptr;
              if (panel == mine.begin && !shared) {
                // Memory is read while the first panel runs: this tile has the pixels of the next one fetched. Beyond
                // the block they are those of the next block, most often.
                t.next = j + 1 < tiles || blocks.rows == 1 ? source + count * d.from.pixel : x + (row + 1) * d.from.row;
                for (int64_t q = 0; far && q < count; ++q)
                  std::memcpy(near + q * far_pixel, source + q * d.from.pixel, d.ins * sizeof(float));
              }
              t.y = d.y + at;
              t.residual = d.epilogue.residual ? d.epilogue.residual + at : nullptr;
              const int64_t ahead = (row * tiles + j) * d.ins * kBlock;
              t.next_w = ahead < next_floats ? t.w + weights.panel_floats + ahead : nullptr;
              tile[count - 1](t);
              fill(n, Range{rows.begin + row, rows.begin + row + 1},
                   Range{columns.begin + pixels.begin, columns.begin + pixels.end}, g * d.outs + channel, t.channels);
            }
        }
      },
      threads);
}

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.r != 1 || a.s != 1) return "the kernel is not 1x1";
  if (a.pad_top != 0 || a.pad_left != 0) return "there is padding";
  if ((a.p - 1) * a.stride_h >= a.h || (a.q - 1) * a.stride_w >= a.w) return "there is padding";
  return direct::supports(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  run(a,
      {static_cast<const float*>(args.x), input_pixels(a), static_cast<float*>(args.y), output_pixels(a), a.groups,
       a.cg(), a.kg(), direct::forward_weights(a, args.w), make_epilogue(args),
       a.kg() % kBlock == 0 && worth_streaming(a.n * a.p * a.q, a.k), args.cache},
      [](int64_t, Range, Range, int64_t, int64_t) {});
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  auto* dx = static_cast<float*>(args.dx);
  // With a stride, the zeros that follow these pixels, up to the next ones.
  const bool streaming = a.cg() % kBlock == 0 && worth_streaming(a.n * a.h * a.w, a.c);
  const auto zero_gaps = [&](int64_t n, Range rows, Range columns, int64_t channel, int64_t channels) {
    if (Blocks::is_dense(a)) return;
    const int64_t row_end = rows.end == a.p ? a.h : rows.end * a.stride_h;
    const int64_t begin = columns.begin * a.stride_w, end = columns.end == a.q ? a.w : columns.end * a.stride_w;
    for (int64_t y = rows.begin * a.stride_h; y < row_end; ++y)
      for (int64_t phase = y % a.stride_h == 0 ? 1 : 0; phase < a.stride_w; ++phase)
        kernels().conv2d.zero_pixels(dx + ((n * a.h + y) * a.w + begin + phase) * a.c + channel, a.stride_w * a.c,
                                     ceil_divide(end - begin - phase, a.stride_w), channels, streaming);
  };
  run(a,
      {static_cast<const float*>(args.dy),
       output_pixels(a),
       dx,
       input_pixels(a),
       a.groups,
       a.kg(),
       a.cg(),
       direct::backward_weights(a, args.w),
       {},
       streaming},
      zero_gaps);
}

namespace {

// The weight gradient: pixels of a block, chunks wanted.
constexpr int64_t kGradientPixels = 192, kGradientChunks = 16, kEnoughChunks = 12;

void copy(const float* from, int64_t count, float* to) {
  if (count == kBlock)
    std::memcpy(to, from, kBlock * sizeof(float));  // of a size known to the compiler
  else
    std::memcpy(to, from, count * sizeof(float));
}

// One factor of dw, x or dy.
struct Factor {
  const float* data;
  Pixels at;
  int64_t channels;  // of a group
  int64_t dw_step;   // between those of neighbouring channels in dw
};

// Some channels of a block of pixels of a factor.
struct FactorBlock {
  const float* data;
  Pixels at;
  int64_t height, width, channels;
  int64_t pixels() const { return height * width; }
};

// Fetches a block into L2, some cache lines at a time.
class BlockFetch {
 public:
  explicit BlockFetch(const FactorBlock& block)
      : block_(block), row_(block.data), pixel_(block.data), left_(block.pixels() * lines()) {}
  int64_t left() const { return left_; }
  void fetch(int64_t count) {
    for (left_ -= count; count > 0; --count) {
      __builtin_prefetch(pixel_ + line_ * kBlock, 0, 2);
      if (++line_ < lines()) continue;
      line_ = 0, pixel_ += block_.at.pixel;
      if (++column_ < block_.width) continue;
      column_ = 0, pixel_ = row_ += block_.at.row;
    }
  }

 private:
  int64_t lines() const { return ceil_divide(block_.channels, kBlock); }
  FactorBlock block_;
  const float *row_, *pixel_;
  int64_t left_, line_ = 0, column_ = 0;
};

// dw = sum over pixels of rows^T lanes, where the channels of one factor, `lanes`, are those of vectors. A thread sums
// up blocks of pixels into a block of dw, its slot.
//
// With many registers a register tile reads both factors where they lie. With few it would read lanes again for every
// few rows, a cache line of each pixel, some KiB apart. There both are packed, and multiplied by the register tile of
// the forward pass: lanes in the place of weights, rows, transposed, in that of pixels.
class WeightGradient {
 public:
  WeightGradient(const Conv2dProblem& a, const BackwardWeightArguments& args)
      : pack_(worth_packing(a)),
        blocks_(a, kGradientPixels),
        groups_(a.groups),
        dw_(args.dw.as<float>()),
        dw_group_(a.kg() * args.dw.strides[0]),
        rows_{static_cast<const float*>(args.dy), output_pixels(a), a.kg(), args.dw.strides[0]},
        lanes_{static_cast<const float*>(args.x), input_pixels(a), a.cg(), args.dw.strides[1]} {
    // Transposing costs more than copying, so it is for the one with fewer channels. In place, 24 channels would leave
    // a quarter of their vectors' lanes idle.
    const auto sums = [&](const Factor& rows, const Factor& lanes) {
      return rows.channels * ceil_divide(lanes.channels, k_.lanes);
    };
    if (pack_ ? rows_.channels > lanes_.channels && Blocks::is_dense(a) : sums(rows_, lanes_) > sums(lanes_, rows_))
      std::swap(rows_, lanes_);
    const auto slots_of = [&](int64_t block) {
      return groups_ * ceil_divide(rows_.channels, block) * ceil_divide(lanes_.channels, block);
    };
    block_ = channels_at_once(slots_of);
    slots_ = slots_of(block_);
    // Each part of the pixels beyond the first costs a partial sum of the size of dw; they are added in order.
    parts_ =
        slots_ >= kEnoughChunks ? 1 : std::clamp<int64_t>(ceil_divide(kGradientChunks, slots_), 1, blocks_.count());
  }

  void run() const {
    const int threads = num_threads();
    const Slot largest = slot_of(0);
    const int64_t sum_floats = largest.rows * largest.panels.count() * k_.tile_k;
    const int64_t packed_floats =
        pack_ ? largest.panels.count() * panel_stride() + largest.rows * block_pixels() : block_pixels() * k_.tile_k;
    // The sums of every slot and part, or of what each thread works on.
    Buffer sums((parts_ > 1 ? slots_ * parts_ : threads) * sum_floats * sizeof(float));
    Buffer packed(threads * packed_floats * sizeof(float));
    parallel_for(
        slots_ * parts_,
        [&](int64_t i, int thread) {
          const Slot slot = slot_of(i % slots_);
          float* mine = sums.as<float>() + (parts_ > 1 ? i : thread) * sum_floats;
          add_blocks(slot, split(blocks_.count(), parts_, i / slots_), mine,
                     packed.as<float>() + thread * packed_floats);
          if (parts_ == 1) write(slot, Range{0, slot.rows}, mine);
        },
        threads);
    if (parts_ == 1) return;

    const int64_t tiles = ceil_divide(largest.rows, k_.tile_pixels);
    parallel_for(slots_ * tiles, [&](int64_t i, int) {
      const Slot slot = slot_of(i / tiles);
      const Range rows = split(slot.rows, tiles, i % tiles);
      float* total = sums.as<float>() + i / tiles * sum_floats;
      for (int64_t part = 1; part < parts_; ++part)
        for (int64_t p = 0; p < slot.panels.count(); ++p)
          for (int64_t at = slot.sums_of(p, rows.begin); at < slot.sums_of(p, rows.end); ++at)
            total[at] += total[part * slots_ * sum_floats + at];
      write(slot, rows, total);
    });
  }

 private:
  // A block of dw. Its sums lie in the order [panel of lanes][row][width of the panel], because rows of dw can be so
  // far apart that those of a tile compete for the same sets of L1.
  struct Slot {
    int64_t group, first_row, first_lane, rows;
    direct::Panels panels;
    int64_t sums_of(int64_t panel, int64_t row) const {
      return panel * panels.tile_k * rows + row * panels.width(panel);
    }
  };

  // Channels of a block of dw, of either factor.
  template <class SlotsOf> int64_t channels_at_once(SlotsOf slots_of) const {
    constexpr int64_t kMost = 256, kFewer = 128, kLeast = 64, kFewBlocks = 9;
    if (slots_of(kMost) >= kEnoughChunks) return kMost;
    const bool enough = slots_of(kFewer) >= kEnoughChunks;
    // Every block packs its own, so there are more of them only where that saves all partial sums.
    if (pack_) return enough ? kFewer : kMost;
    // Of many pixels, reading a few cache lines of each takes longer than the partial sums.
    return enough || blocks_.count() > kFewBlocks ? kFewer : kLeast;
  }
  // Packing takes a share of the time that falls with the number of channels; in place, cache lines of pixels that are
  // far apart compete for the same sets.
  bool worth_packing(const Conv2dProblem& a) const {
    constexpr int64_t kManySums = 16, kLeastChannels = 24, kManyChannels = 128, kFar = 1024;
    const int64_t few = std::min(a.kg(), a.cg()), many = std::max(a.kg(), a.cg());
    return k_.strip_sums < kManySums && few >= kLeastChannels && (few >= kManyChannels || many >= kFar);
  }
  int64_t block_pixels() const { return blocks_.block_rows * blocks_.block_columns; }
  // Between packed panels; no multiple of 4 KiB, with which they would compete for the same sets of L1.
  int64_t panel_stride() const { return block_pixels() * k_.tile_k + kBlock; }

  Slot slot_of(int64_t i) const {
    const int64_t lane_blocks = ceil_divide(lanes_.channels, block_), row_blocks = ceil_divide(rows_.channels, block_);
    const int64_t row = i / lane_blocks % row_blocks * block_, lane = i % lane_blocks * block_;
    return {i / lane_blocks / row_blocks,
            row,
            lane,
            std::min(block_, rows_.channels - row),
            {std::min(block_, lanes_.channels - lane), k_.tile_k, k_.lanes}};
  }

  FactorBlock block_of(const Factor& f, const Slot& slot, int64_t first, int64_t channels, int64_t block) const {
    const Range rows = blocks_.row_range(block), columns = blocks_.column_range(block);
    return {f.data + blocks_.offset(block, f.at) + slot.group * f.channels + first, f.at, rows.end - rows.begin,
            columns.end - columns.begin, channels};
  }

  void add_blocks(const Slot& slot, Range blocks, float* sums, float* packed) const {
    const auto rows_of = [&](int64_t i) { return block_of(rows_, slot, slot.first_row, slot.rows, i); };
    const auto lanes_of = [&](int64_t i) { return block_of(lanes_, slot, slot.first_lane, slot.panels.outs, i); };
    if (!pack_) std::memset(sums, 0, slot.sums_of(slot.panels.count(), 0) * sizeof(float));
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      // The next block is fetched meanwhile.
      FactorBlock next_rows = rows_of(std::min(i + 1, blocks.end - 1)),
                  next_lanes = lanes_of(std::min(i + 1, blocks.end - 1));
      if (!pack_) {
        add_in_place(slot, rows_of(i), lanes_of(i), next_rows, next_lanes, sums, packed);
        continue;
      }
      float* turned = packed + slot.panels.count() * panel_stride();
      pack_lanes(slot.panels, lanes_of(i), packed);
      const FactorBlock rows = rows_of(i);
      kernels().layout.transpose(rows.data, rows.at.pixel, rows.pixels(), rows.channels, turned, rows.pixels(), false);
      if (i + 1 == blocks.end) next_rows.height = next_lanes.height = 0;
      add_packed(slot, rows.pixels(), packed, turned, i > blocks.begin, BlockFetch(next_rows), BlockFetch(next_lanes),
                 sums);
    }
  }

  void pack_lanes(const direct::Panels& panels, const FactorBlock& lanes, float* to) const {
    const int64_t whole = lanes.channels / k_.tile_k, tail = lanes.channels - whole * k_.tile_k;
    for (int64_t row = 0; row < lanes.height; ++row) {
      const float* from = lanes.data + row * lanes.at.row;
      const int64_t first = row * lanes.width;
      k_.pack_panels(from, lanes.at.pixel, lanes.width, whole, to + first * k_.tile_k, panel_stride());
      if (tail > 0)
        k_.pack_slice(from + whole * k_.tile_k, lanes.at.pixel, lanes.width, tail, panels.width(whole),
                      to + whole * panel_stride() + first * panels.width(whole));
    }
  }

  void add_packed(const Slot& slot, int64_t pixels, const float* lanes, const float* rows, bool accumulate,
                  BlockFetch next_rows, BlockFetch next_lanes, float* sums) const {
    const int64_t tiles = ceil_divide(slot.rows, k_.tile_pixels), panels = slot.panels.count();
    StripTile t{};
    t.rows = 1, t.taps = t.x_step = pixels;
    t.low = Epilogue{}.low, t.high = Epilogue{}.high;
    for (int64_t p = 0, left = panels * tiles; p < panels; ++p) {
      t.w = lanes + p * panel_stride();
      t.channels = t.pixel_stride = slot.panels.width(p);
      const auto* tile = k_.strip[t.pixel_stride / k_.lanes - 1];
      for (int64_t j = 0; j < tiles; ++j, --left) {
        next_rows.fetch(ceil_divide(next_rows.left(), left));
        next_lanes.fetch(ceil_divide(next_lanes.left(), left));
        const Range outs = split(slot.rows, tiles, j);
        t.x = rows + outs.begin * pixels;
        t.y = sums + slot.sums_of(p, outs.begin);
        t.residual = accumulate ? t.y : nullptr;
        tile[outs.end - outs.begin - 1](t);
      }
    }
  }

  void add_in_place(const Slot& slot, const FactorBlock& rows, const FactorBlock& lanes, const FactorBlock& next_rows,
                    const FactorBlock& next_lanes, float* sums, float* tail) const {
    StripWeightTile t{};
    t.a_step = rows.at.pixel, t.a_row_step = rows.at.row;
    t.rows = rows.height, t.columns = rows.width;
    t.tap_rows = 1;
    // A cache line of each pixel of the next block is fetched with every tile: rows, then lanes.
    const auto set_next = [&](int64_t channel) {
      const bool of_rows = channel < rows.channels, none = channel >= rows.channels + lanes.channels;
      t.next = of_rows ? next_rows.data + channel : next_lanes.data + (none ? 0 : channel - rows.channels);
      t.next_step = of_rows ? rows.at.pixel : none ? 0 : lanes.at.pixel;
      t.next_row_step = of_rows ? rows.at.row : none ? 0 : lanes.at.row;
    };
    // Rows in parts that fit the registers, so that those of a part stay in L1.
    const int64_t most = k_.strip_sums * k_.lanes / slot.panels.width(0);
    const int64_t tiles = ceil_divide(slot.rows, most), panels = slot.panels.count();
    // Lanes that do not fill the last panel are copied to where zeros fill it.
    const int64_t last = panels - 1, last_width = slot.panels.width(last);
    const bool filled = slot.panels.channels(last) < last_width;
    for (int64_t row = 0; filled && row < t.rows; ++row)
      k_.pack_slice(lanes.data + last * k_.tile_k + row * lanes.at.row, lanes.at.pixel, t.columns,
                    slot.panels.channels(last), last_width, tail + row * t.columns * last_width);
    for (int64_t j = 0; j < tiles; ++j) {
      const Range outs = split(slot.rows, tiles, j);
      t.a = rows.data + outs.begin;
      t.taps = outs.end - outs.begin;
      for (int64_t p = 0; p < panels; ++p) {
        t.acc = sums + slot.sums_of(p, outs.begin);
        set_next((j * panels + p) * kBlock);
        const int64_t width = slot.panels.width(p);
        t.acc_step = width;
        const bool copied = filled && p == last;
        t.b = copied ? tail : lanes.data + p * k_.tile_k;
        t.b_step = copied ? width : lanes.at.pixel;
        t.b_row_step = copied ? t.columns * width : t.rows > 1 ? lanes.at.row : 0;
        k_.strip_weight_tile(t);
      }
    }
  }

  void write(const Slot& slot, Range rows, const float* sums) const {
    float* dw =
        dw_ + slot.group * dw_group_ + (slot.first_row + rows.begin) * rows_.dw_step + slot.first_lane * lanes_.dw_step;
    const direct::Panels& panels = slot.panels;
    if (lanes_.dw_step == 1)
      for (int64_t r = rows.begin; r < rows.end; ++r, dw += rows_.dw_step)
        for (int64_t p = 0; p < panels.count(); ++p)
          copy(sums + slot.sums_of(p, r), panels.channels(p), dw + p * panels.tile_k);
    else
      for (int64_t p = 0; p < panels.count(); ++p)
        k_.unpack_weights(sums + slot.sums_of(p, rows.begin), panels.width(p), panels.channels(p),
                          rows.end - rows.begin, dw + p * panels.tile_k * lanes_.dw_step, lanes_.dw_step, rows_.dw_step,
                          false);
  }

  const Conv2dKernels& k_ = kernels().conv2d;
  const bool pack_;
  Blocks blocks_;
  int64_t groups_;
  float* dw_;
  int64_t dw_group_;
  Factor rows_, lanes_;
  int64_t block_, slots_, parts_;  // channels of a slot, of either factor; slots; parts of the pixels
};

}  // namespace

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) { WeightGradient(a, args).run(); }

}  // namespace fastconv::cpu::pointwise

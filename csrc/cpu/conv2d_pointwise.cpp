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
// Chunks wanted at least, so that many cores find work.
constexpr int64_t kMinChunks = 32;

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
  const int64_t panel_parts =
      std::clamp<int64_t>(ceil_divide(kMinChunks, blocks.count() * d.groups), 1, panels.count());
  const int64_t far_pixel = ceil_divide(d.ins, kBlock) * kBlock + kBlock;
  const int64_t scratch_floats = far ? blocks.block_rows * blocks.block_columns * far_pixel : 0;
  const int threads = num_threads();
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
          const int64_t following =
              panel + 1 < mine.end ? panel + 1 : panel + 1 + (threads - 1) * (mine.end - mine.begin);
          const int64_t next_floats = few && following < panels.count() ? d.ins * panels.width(panel) : 0;
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
              t.next_w = ahead < next_floats ? t.w + (following - panel) * weights.panel_floats + ahead : nullptr;
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

// The weight gradient: pixels whose dy and x stay in L2 for a block of K and C, and the chunks wanted.
constexpr int64_t kGradientPixels = 192, kGradientChunks = 16;

// Channels of a block: few where that makes enough chunks without partial sums, and only that does.
int64_t gradient_block(const Conv2dProblem& a) {
  constexpr int64_t kLarge = 256, kSmall = 128;
  const auto enough = [&](int64_t block) {
    return a.groups * ceil_divide(a.kg(), block) * ceil_divide(a.cg(), block) >= kGradientChunks;
  };
  return !enough(kLarge) && enough(kSmall) ? kSmall : kLarge;
}

// The sums of a block of dw lie in the order [tile of outs][vector of ins][out][lanes], because rows of dw can be so
// far apart that those of a tile compete for the same sets of L1. Of one tile: visit(place, out, in, how many ins)
template <class Visit> void for_sums(Range tile, int64_t ins, int64_t block_width, Visit&& visit) {
  const int64_t lanes = kernels().conv2d.lanes;
  for (int64_t o = tile.begin; o < tile.end; ++o)
    for (int64_t c = 0; c < ins; c += lanes)
      visit(tile.begin * block_width + c * (tile.end - tile.begin) + (o - tile.begin) * lanes, o, c,
            std::min(lanes, ins - c));
}

void store(float* to, int64_t step, const float* from, int64_t count) {
  if (step == 1 && count == kBlock)
    std::memcpy(to, from, kBlock * sizeof(float));  // of a size known to the compiler
  else
    for (int64_t i = 0; i < count; ++i) to[i * step] = from[i];
}

}  // namespace

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto& k = kernels().conv2d;
  const auto* x = static_cast<const float*>(args.x);
  const auto* dy = static_cast<const float*>(args.dy);
  const Pixels from = input_pixels(a), to = output_pixels(a);
  const Blocks blocks(a, kGradientPixels);
  const int64_t kg = a.kg(), cg = a.cg();
  const int64_t block_size = gradient_block(a);
  const int64_t k_blocks = ceil_divide(kg, block_size), c_blocks = ceil_divide(cg, block_size);
  const int64_t slots = a.groups * k_blocks * c_blocks;
  // Each part of the pixels beyond the first costs a partial sum of the size of dw; they are added in order.
  const int64_t parts = std::clamp<int64_t>(ceil_divide(kGradientChunks, slots), 1, blocks.count());
  const auto& stride = args.dw.strides;
  const int64_t block_width = ceil_divide(std::min(cg, block_size), k.lanes) * k.lanes;
  const int64_t acc_floats = std::min(kg, block_size) * block_width;
  const int64_t tail_floats = blocks.block_rows * blocks.block_columns * k.lanes;
  const int threads = num_threads();
  // The sums of every slot and part, or of what each thread works on.
  Buffer sums((parts > 1 ? slots * parts : threads) * acc_floats * sizeof(float));
  Buffer tails(threads * tail_floats * sizeof(float));
  const auto outs_of = [&](int64_t slot) {
    const int64_t begin = slot / c_blocks % k_blocks * block_size;
    return Range{begin, std::min(kg, begin + block_size)};
  };
  const auto ins_of = [&](int64_t slot) {
    const int64_t begin = slot % c_blocks * block_size;
    return Range{begin, std::min(cg, begin + block_size)};
  };
  const auto tiles_of = [&](int64_t slot) {
    const Range outs = outs_of(slot);
    return ceil_divide(outs.end - outs.begin, k.strip_sums);
  };
  const auto tile_of = [&](int64_t slot, int64_t j) {
    const Range outs = outs_of(slot);
    return split(outs.end - outs.begin, tiles_of(slot), j);
  };
  const auto write = [&](int64_t slot, int64_t j, const float* total) {
    const Range ins = ins_of(slot);
    const int64_t first = slot / c_blocks / k_blocks * kg + outs_of(slot).begin;
    for_sums(tile_of(slot, j), ins.end - ins.begin, block_width, [&](int64_t at, int64_t o, int64_t c, int64_t count) {
      store(args.dw.as<float>() + (first + o) * stride[0] + (ins.begin + c) * stride[1], stride[1], total + at, count);
    });
  };

  parallel_for(
      slots * parts,
      [&](int64_t i, int thread) {
        const int64_t slot = i % slots, part = i / slots;
        const int64_t c0 = ins_of(slot).begin, c1 = ins_of(slot).end;
        const int64_t k0 = outs_of(slot).begin, k1 = outs_of(slot).end;
        const int64_t g = slot / c_blocks / k_blocks;
        float* acc = sums.as<float>() + (parts > 1 ? i : thread) * acc_floats;
        float* tail = tails.as<float>() + thread * tail_floats;
        std::memset(acc, 0, acc_floats * sizeof(float));
        StripWeightTile t{};
        t.a_step = to.pixel, t.a_row_step = to.row;
        t.tap_rows = 1;
        t.acc_step = k.lanes;
        const Range mine = split(blocks.count(), parts, part);
        for (int64_t block = mine.begin; block < mine.end; ++block) {
          const Range rows = blocks.row_range(block), columns = blocks.column_range(block);
          const float* dy_block = dy + blocks.offset(block, to) + g * kg + k0;
          const float* x_block = x + blocks.offset(block, from) + g * cg;
          t.rows = rows.end - rows.begin, t.columns = columns.end - columns.begin;
          // Rows of the gradient in parts that fit the registers, so that dy of a part stays in L1.
          const int64_t tiles = tiles_of(slot);
          const int64_t vectors = ceil_divide(c1 - c0, k.lanes);
          const int64_t next = std::min(block + 1, mine.end - 1);
          const float* dy_next = dy + blocks.offset(next, to) + g * kg + k0;
          const float* x_next = x + blocks.offset(next, from) + g * cg + c0;
          // The next block is fetched meanwhile, a cache line of each pixel with every tile: dy, then x.
          const auto set_next = [&](StripWeightTile& tile, int64_t channel) {
            const bool of_dy = channel < k1 - k0, none = channel >= k1 - k0 + c1 - c0;
            tile.next = of_dy ? dy_next + channel : none ? x_next : x_next + channel - (k1 - k0);
            tile.next_step = of_dy ? to.pixel : none ? 0 : from.pixel;
            tile.next_row_step = of_dy ? to.row : none ? 0 : from.row;
          };
          for (int64_t j = 0; j < tiles; ++j) {
            const Range outs = tile_of(slot, j);
            t.a = dy_block + outs.begin;
            t.taps = outs.end - outs.begin;
            for (int64_t c = c0; c < c1; c += k.lanes) {
              t.acc = acc + outs.begin * block_width + (c - c0) * t.taps;
              set_next(t, (j * vectors + (c - c0) / k.lanes) * kBlock);
              t.b = x_block + c;
              t.b_step = from.pixel;
              t.b_row_step = t.rows > 1 ? from.row : 0;
              if (c + k.lanes > cg) {
                for (int64_t row = 0; row < t.rows; ++row)
                  k.pack_slice(t.b + row * from.row, from.pixel, t.columns, cg - c, k.lanes,
                               tail + row * t.columns * k.lanes);
                t.b = tail;
                t.b_step = k.lanes, t.b_row_step = t.columns * k.lanes;
              }
              k.strip_weight_tile(t);
            }
          }
        }
        for (int64_t j = 0; parts == 1 && j < tiles_of(slot); ++j) write(slot, j, acc);
      },
      threads);
  if (parts == 1) return;

  const int64_t most_tiles = tiles_of(0);
  parallel_for(slots * most_tiles, [&](int64_t i, int) {
    const int64_t slot = i / most_tiles, j = i % most_tiles;
    if (j >= tiles_of(slot)) return;
    const Range tile = tile_of(slot, j);
    float* total = sums.as<float>() + slot * acc_floats;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t at = tile.begin * block_width; at < tile.end * block_width; ++at)
        total[at] += total[part * slots * acc_floats + at];
    write(slot, j, total);
  });
}

}  // namespace fastconv::cpu::pointwise

// Few input channels (C <= 4), as in the first layer of a network. Bound by the writes of y and the reads of dy.
// Forward is the direct engine with four floats a packed pixel and non-temporal stores; the weight gradient treats the
// (column, channel) pairs of a kernel row as one index, because they are contiguous in a row of the image.
#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::first_layer {
namespace {

// dy of a band of the weight gradient, for one panel of channels: 24 KiB.
constexpr int64_t kSliceFloats = 6 * 1024;

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.groups != 1) return "more than one group";
  if (a.c > kSmallBlock) return "more than 4 input channels";
  return direct::supports(a);
}

const char* supports_backward_weight(const Conv2dProblem& a) {
  if (a.dilation_w != 1) return "dilated columns";
  if (a.dilation_h > 4 || a.stride_h > a.r + 4) return "rows too far apart to pack them all";
  return supports(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  direct::DirectProblem d{a.n,
                          {static_cast<const float*>(args.x), a.h, a.w, a.c, 0, a.c},
                          forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
                          forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w),
                          1,
                          a.k,
                          direct::forward_weights(a, args.w),
                          static_cast<float*>(args.y),
                          a.p,
                          a.q,
                          a.k,
                          make_epilogue(args)};
  d.block = kSmallBlock;
  d.streaming = worth_streaming(a.n * a.p * a.q, a.k);
  direct::run(d);
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto& k = kernels().conv2d;
  const auto* x = static_cast<const float*>(args.x);
  const auto* dy = static_cast<const float*>(args.dy);
  const direct::Panels panels{a.k, k.tile_k, k.lanes};
  const int64_t taps = a.s * a.c, panel_floats = a.r * taps * k.tile_k;
  // A padded image row: pixel -pad_left first, as many as the last output reads.
  const int64_t row_pixels = (a.q - 1) * a.stride_w + a.s, row_floats = row_pixels * a.c;
  // Output rows of a band, whose slice of dy should stay in L1; with one accumulator load for all of them.
  const int64_t band = std::clamp<int64_t>(kSliceFloats / (a.q * k.tile_k), 1, a.p);
  const int64_t bands = ceil_divide(a.p, band), units = a.n * bands;
  const int64_t parts = std::clamp<int64_t>(units / 2, 1, 32);
  const int64_t packed_rows = (band - 1) * a.stride_h + (a.r - 1) * a.dilation_h + 1;
  const int64_t scratch_floats = packed_rows * row_floats + band * a.q * k.tile_k;

  // Image row ih of image n, padded; rows outside the image are zeros.
  const auto pack_row = [&](int64_t n, int64_t ih, float* to) {
    const int64_t begin = std::min(a.pad_left, row_pixels), end = std::clamp(a.pad_left + a.w, begin, row_pixels);
    if (ih < 0 || ih >= a.h) {
      std::memset(to, 0, row_floats * sizeof(float));
      return;
    }
    std::memset(to, 0, begin * a.c * sizeof(float));
    std::memcpy(to + begin * a.c, x + (n * a.h + ih) * a.w * a.c, (end - begin) * a.c * sizeof(float));
    std::memset(to + end * a.c, 0, (row_pixels - end) * a.c * sizeof(float));
  };

  const int64_t part_floats = panels.count() * panel_floats;
  Buffer sums(parts * part_floats * sizeof(float));
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      parts,
      [&](int64_t i, int thread) {
        float* acc = sums.as<float>() + i * part_floats;
        std::memset(acc, 0, part_floats * sizeof(float));
        float* packed = scratch.as<float>() + thread * scratch_floats;
        float* slice = packed + packed_rows * row_floats;
        const Range mine = split(units, parts, i);
        for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
          const int64_t n = unit / bands, p0 = unit % bands * band, rows = std::min(band, a.p - p0);
          for (int64_t j = 0; j < (rows - 1) * a.stride_h + (a.r - 1) * a.dilation_h + 1; ++j)
            pack_row(n, p0 * a.stride_h - a.pad_top + j, packed + j * row_floats);
          for (int64_t panel = 0; panel < panels.count(); ++panel) {
            FirstLayerWeightTile t{};
            t.x_step = a.stride_w * a.c, t.x_row_step = a.stride_h * row_floats;
            t.rows = rows, t.columns = a.q;
            t.dy = slice;
            t.width = panels.width(panel);
            t.taps = taps;
            k.pack_slice(dy + (n * a.p + p0) * a.q * a.k + panel * k.tile_k, a.k, rows * a.q, panels.channels(panel),
                         t.width, slice);
            for (int64_t r = 0; r < a.r; ++r) {
              t.x = packed + r * a.dilation_h * row_floats;
              t.acc = acc + panel * panel_floats + r * taps * t.width;
              k.first_layer_weight_tile(t);
            }
          }
        }
      },
      threads);

  auto* total = sums.as<float>();
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t j = 0; j < part_floats; ++j) total[j] += total[part * part_floats + j];
  const auto& stride = args.dw.strides;
  for (int64_t o = 0; o < a.k; ++o) {
    const int64_t panel = o / k.tile_k, width = panels.width(panel);
    for (int64_t r = 0; r < a.r; ++r)
      for (int64_t s = 0; s < a.s; ++s)
        for (int64_t c = 0; c < a.c; ++c)
          args.dw.as<float>()[o * stride[0] + c * stride[1] + r * stride[2] + s * stride[3]] =
              total[panel * panel_floats + (r * taps + s * a.c + c) * width + o % k.tile_k];
  }
}

}  // namespace fastconv::cpu::first_layer

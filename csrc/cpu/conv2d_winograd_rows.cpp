// First layers (C <= 4) with 3x3 kernels at stride 1 by F(4, 3) along their rows: half the multiplications of a plain
// convolution. Transforming the columns, too, would save little more: with so few channels the transform of the outputs
// already takes a fifth of the time. The weights' gradient turns dy into points in registers, as it is loaded.
// Bounds: FMA, and the writes of y and reads of dy.
#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/conv2d_first_layer.h"
#include "cpu/kernels/winograd.h"
#include "cpu/registry.h"

namespace fastconv::cpu::winograd_rows {
namespace {

using first_layer::Bands;
using first_layer::for_panel;
using first_layer::GradientRows;
using first_layer::PaddedRows;

// Parts of a weight gradient that are summed apart: their sums are larger than those of a plain convolution.
constexpr int64_t kGradientParts = 16;

int64_t row_tiles(const Conv2dProblem& a) { return ceil_divide(a.q, kRowOutputs); }

// The rows of x that a chunk of outputs reads, transformed: v[row][tile][kPoints][kFewChannels].
class TransformedRows {
 public:
  explicit TransformedRows(const Conv2dProblem& a)
      : a_(a), padded_(a, row_tiles(a) * kRowOutputs), row_(row_tiles(a) * kPoints * kFewChannels) {}
  int64_t row() const { return row_; }
  // For `rows` of outputs; the last pixel is read as if it had kFewChannels.
  int64_t floats(int64_t rows) const { return padded_.rows(rows) * row_ + padded_.row_floats() + kFewChannels; }

  void transform(const float* x, int64_t n, Range p, float* v) const {
    const int64_t rows = padded_.rows(p.end - p.begin);
    float* packed = v + rows * row_;
    std::memset(packed + padded_.row_floats(), 0, kFewChannels * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      padded_.pack_row(x, n, p.begin - a_.pad_top + i, packed);
      kernels().winograd.row_input(packed, a_.c, row_tiles(a_), v + i * row_);
    }
  }

 private:
  const Conv2dProblem& a_;
  PaddedRows padded_;
  int64_t row_;
};

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (strict_precision()) return "strict precision";
  if (const char* why = first_layer::supports(a)) return why;
  if (a.r != kRowTaps || a.s != kRowTaps) return "the kernel is not 3x3";
  if (a.stride_h != 1 || a.stride_w != 1 || a.dilation_h != 1) return "there is a stride or dilation";
  if (a.c == 1) return "one input channel does not repay the transforms";
  if (a.q < kRowTaps) return "rows of fewer than 3 outputs";
  return nullptr;
}

const char* supports_forward(const Conv2dProblem& a) {
  if (const char* why = supports(a)) return why;
  if (!kernels().winograd.row_tiles_pay) return "too few registers for tiles along rows to pay";
  return nullptr;
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const auto& k = kernels().winograd;
  const int64_t lanes = kernels().conv2d.lanes, panels = ceil_divide(a.k, lanes);
  const TransformedRows source(a);
  const Bands bands(a.n, a.p, 1, 16);
  const int64_t taps = kRowTaps * kRowTaps * a.c * lanes, panel_floats = kRowTaps * kPoints * a.c * lanes;
  const PackedWeights weights(args.cache, "winograd_rows", panels * panel_floats, [&](float* u) {
    Buffer packed(taps * sizeof(float));
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t channels = std::min(lanes, a.k - i * lanes);
      if (channels < lanes) std::memset(packed.as<float>(), 0, taps * sizeof(float));
      for_panel(a, args.w, i * lanes, channels, lanes,
                [&](int64_t from, int64_t to) { packed.as<float>()[to] = args.w.as<float>()[from]; });
      k.row_weights(packed.as<float>(), a.c, u + i * panel_floats);
    }
  });

  const Epilogue epilogue = make_epilogue(args);
  RowTiles shape{};
  shape.v_row = source.row();
  shape.in_channels = a.c;
  shape.pixel_stride = a.k;
  shape.low = epilogue.low, shape.high = epilogue.high;
  shape.streaming = worth_streaming(a.n * a.p * a.q, a.k);
  const int64_t tiles_at_once = k.row_outputs / kRowOutputs, parts = ceil_divide(row_tiles(a), tiles_at_once);
  const int64_t scratch_floats = source.floats(bands.band);
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      bands.count(),
      [&](int64_t i, int thread) {
        const int64_t n = bands.image(i);
        const Range rows = bands.range(i);
        float* v = scratch.as<float>() + thread * scratch_floats;
        source.transform(static_cast<const float*>(args.x), n, rows, v);
        RowTiles t = shape;
        for (int64_t p = rows.begin; p < rows.end; ++p)
          for (int64_t j = 0; j < parts; ++j) {
            const Range part = split(row_tiles(a), parts, j);
            const int64_t q = part.begin * kRowOutputs;
            t.v = v + (p - rows.begin) * source.row() + part.begin * kPoints * kFewChannels;
            t.outputs = std::min(a.q, part.end * kRowOutputs) - q;
            for (int64_t panel = 0; panel < panels; ++panel) {
              const int64_t channel = panel * lanes, at = ((n * a.p + p) * a.q + q) * a.k + channel;
              t.w = weights.data() + panel * panel_floats;
              t.y = static_cast<float*>(args.y) + at;
              t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
              t.bias = epilogue.bias ? epilogue.bias + channel : nullptr;
              t.channels = std::min(lanes, a.k - channel);
              k.row_tiles(t);
            }
          }
      },
      threads);
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto& k = kernels().winograd;
  const int64_t lanes = kernels().conv2d.lanes, panel_floats = kRowTaps * kPoints * a.c * lanes;
  const TransformedRows source(a);
  RowGradient shape{};
  shape.v_row = source.row();
  shape.in_channels = a.c;
  shape.columns = a.q;
  const Buffer sums = first_layer::sum_gradient(
      a, static_cast<const float*>(args.dy), lanes, panel_floats, kGradientParts,
      [&](int64_t rows) { return source.floats(rows); },
      [&](int64_t n, Range rows, float* v) { source.transform(static_cast<const float*>(args.x), n, rows, v); },
      [&](const float* v, const GradientRows& part, float* acc) {
        RowGradient t = shape;
        t.rows = part.rows;
        t.v = v + part.after * source.row();
        t.dy = part.dy;
        t.dy_pixel = part.dy_pixel, t.dy_row = a.q * part.dy_pixel;
        t.next = part.next;
        t.acc = acc;
        k.row_gradient(t);
      });
  Buffer taps(kRowTaps * kRowTaps * a.c * lanes * sizeof(float));
  for (int64_t o = 0, i = 0; o < a.k; o += lanes, ++i) {
    k.row_weight_gradient(sums.as<float>() + i * panel_floats, a.c, taps.as<float>());
    for_panel(a, args.dw, o, std::min(lanes, a.k - o), lanes,
              [&](int64_t to, int64_t from) { args.dw.as<float>()[to] = taps.as<float>()[from]; });
  }
}

}  // namespace fastconv::cpu::winograd_rows

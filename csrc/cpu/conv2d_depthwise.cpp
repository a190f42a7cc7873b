// Depthwise convolution (groups = C = K): a row of outputs at a time, vectorised over channels. The input gradient is the
// same loop over dy, a phase of the stride at a time.
#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::depthwise {
namespace {

// Outputs larger than this leave the cache before anybody reads them: writing around it saves reading them first.
constexpr int64_t kStreamFloats = int64_t{2} << 20;
// Rows of x and dy of one call of the weight gradient's kernel, which runs over them once for every vector of channels.
constexpr int64_t kGradientFloats = 48 * 1024;

int64_t first_offset(const AxisTaps& axis) { return axis.taps.empty() ? 0 : axis.taps[0].offset; }
int64_t tap_step(const AxisTaps& axis) {
  return axis.taps.size() < 2 ? 1 : axis.taps[1].offset - axis.taps[0].offset;
}

// The taps of one phase of rows and one of columns: weights [row tap][column tap][channel].
struct Phase {
  const AxisTaps* rows;
  const AxisTaps* columns;
  const float* weights;
  int64_t row_taps() const { return columns->taps.empty() ? 0 : rows->taps.size(); }  // none on one axis: none at all
};

struct Image {
  int64_t h, w;
};

// y = correlation of x with w, at the places that the axes name. Row phases alternate from row to row of y, so that all
// column phases of a row are written while it is in cache.
void run(const float* x, Image x_size, int64_t images, int64_t channels, const TensorView& w,
         const std::vector<AxisTaps>& rows, const std::vector<AxisTaps>& columns, float* y, Image y_size,
         const Epilogue& epilogue) {
  size_t taps = 0;
  for (const AxisTaps& row : rows)
    for (const AxisTaps& column : columns) taps += row.taps.size() * column.taps.size();
  Buffer packed(std::max<size_t>(taps * channels, 1) * sizeof(float));
  float* to = packed.as<float>();
  std::vector<Phase> phases;
  for (const AxisTaps& row : rows)
    for (const AxisTaps& column : columns) {
      phases.push_back({&row, &column, to});
      for (const auto& r : row.taps)
        for (const auto& s : column.taps) {
          const float* from = w.as<float>() + r.index * w.strides[2] + s.index * w.strides[3];
          for (int64_t c = 0; c < channels; ++c) *to++ = from[c * w.strides[0]];
        }
    }

  const bool streaming = channels % 16 == 0 && images * y_size.h * y_size.w * channels >= kStreamFloats;
  const int64_t row_phases = rows.size(), column_phases = columns.size();
  parallel_ranges(images * y_size.h, std::max<int64_t>(16384 / (y_size.w * channels), 1),
                  [&](int64_t begin, int64_t end) {
    std::vector<const float*> x_rows;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / y_size.h, y_row = i % y_size.h, row_phase = y_row % row_phases, j = y_row / row_phases;
      for (int64_t column_phase = 0; column_phase < column_phases; ++column_phase) {
        const Phase& phase = phases[row_phase * column_phases + column_phase];
        const AxisTaps& column = *phase.columns;
        x_rows.assign(phase.row_taps(), nullptr);
        for (size_t a = 0; a < x_rows.size(); ++a) {
          const int64_t row = j * phase.rows->step + phase.rows->taps[a].offset;
          if (row >= 0 && row < x_size.h) x_rows[a] = x + (n * x_size.h + row) * x_size.w * channels;
        }
        const int64_t at = (i * y_size.w + column.out_first) * channels;
        DepthwiseRow t{};
        t.x_rows = x_rows.data();
        t.kernel_rows = x_rows.size(), t.kernel_columns = column.taps.size();
        t.x_width = x_size.w;
        t.first = first_offset(column), t.step = column.step, t.tap_step = tap_step(column);
        t.x_pixel = channels, t.y_pixel = column.out_step * channels;
        t.w = phase.weights;
        t.w_stride = channels;
        t.y = y + at;
        t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
        t.bias = epilogue.bias;
        t.outputs = column.outputs;
        t.channels = channels;
        t.low = epilogue.low, t.high = epilogue.high;
        t.streaming = streaming;
        kernels().conv2d.depthwise_row(t);
      }
    }
  });
}

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.dtype != DType::kFloat32) return "fp32 only";
  if (a.groups != a.c || a.groups != a.k) return "not depthwise (groups = C = K)";
  if (a.groups == 1) return "a single channel";
  return nullptr;
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  run(static_cast<const float*>(args.x), {a.h, a.w}, a.n, a.c, args.w,
      {forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h)},
      {forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w)}, static_cast<float*>(args.y), {a.p, a.q},
      make_epilogue(args));
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  run(static_cast<const float*>(args.dy), {a.p, a.q}, a.n, a.c, args.w,
      backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h),
      backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w), static_cast<float*>(args.dx), {a.h, a.w}, {});
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto* x = static_cast<const float*>(args.x);
  const auto* dy = static_cast<const float*>(args.dy);
  const int64_t taps = a.r * a.s, floats = taps * a.c;
  const int64_t band = std::clamp<int64_t>(kGradientFloats / (a.q * a.c), 1, a.p), bands = (a.p + band - 1) / band;
  const int64_t units = a.n * bands;
  const int64_t parts = std::clamp<int64_t>(std::min(units, a.n * a.p * a.q / (4 * taps)), 1, 32);
  Buffer sums(parts * floats * sizeof(float));
  parallel_for(parts, [&](int64_t i, int) {
    float* acc = sums.as<float>() + i * floats;
    std::memset(acc, 0, floats * sizeof(float));
    std::vector<const float*> x_rows(band * a.r), dy_rows(band);
    const Range mine = split(units, parts, i);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t n = unit / bands, p0 = unit % bands * band, p1 = std::min(a.p, p0 + band);
      for (int64_t p = p0; p < p1; ++p) {
        dy_rows[p - p0] = dy + (n * a.p + p) * a.q * a.c;
        for (int64_t r = 0; r < a.r; ++r) {
          const int64_t row = p * a.stride_h - a.pad_top + r * a.dilation_h;
          x_rows[(p - p0) * a.r + r] = row >= 0 && row < a.h ? x + (n * a.h + row) * a.w * a.c : nullptr;
        }
      }
      DepthwiseWeightRow t{};
      t.x_rows = x_rows.data();
      t.dy_rows = dy_rows.data();
      t.output_rows = p1 - p0;
      t.kernel_rows = a.r, t.kernel_columns = a.s;
      t.x_width = a.w;
      t.first = -a.pad_left, t.step = a.stride_w, t.tap_step = a.dilation_w;
      t.pixel = a.c;
      t.dw = acc;
      t.dw_stride = a.c;
      t.outputs = a.q;
      t.channels = a.c;
      kernels().conv2d.depthwise_weight_rows(t);
    }
  });
  const auto* partial = sums.as<float>();
  const auto& stride = args.dw.strides;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < a.c; ++c) {
      float sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * floats + tap * a.c + c];
      args.dw.as<float>()[c * stride[0] + tap / a.s * stride[2] + tap % a.s * stride[3]] = sum;
    }
}

}  // namespace fastconv::cpu::depthwise

// Depthwise convolution (groups = C = K): a row of outputs at a time, vectorised over channels. The input gradient is
// the same loop over dy, a phase of the stride at a time.
#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::depthwise {
namespace {

int64_t first_offset(const AxisTaps& axis) { return axis.taps.empty() ? 0 : axis.taps[0].offset; }
int64_t tap_step(const AxisTaps& axis) { return axis.taps.size() < 2 ? 1 : axis.taps[1].offset - axis.taps[0].offset; }

// The kernels want a tap's source column to grow with its number.
std::vector<AxisTaps> ascending(std::vector<AxisTaps> axes) {
  for (AxisTaps& axis : axes)
    if (tap_step(axis) < 0) std::reverse(axis.taps.begin(), axis.taps.end());
  return axes;
}

// The taps of one phase of rows and one of columns: weights [row tap][vector of channels][column tap][lane].
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
  const int64_t lanes = kernels().conv2d.lanes, vectors = ceil_divide(channels, lanes);
  size_t taps = 0;
  for (const AxisTaps& row : rows)
    for (const AxisTaps& column : columns) taps += row.taps.size() * column.taps.size();
  Buffer packed(std::max<size_t>(taps * vectors * lanes, 1) * sizeof(float));
  float* to = packed.as<float>();
  std::vector<Phase> phases;
  for (const AxisTaps& row : rows)
    for (const AxisTaps& column : columns) {
      phases.push_back({&row, &column, to});
      for (const auto& r : row.taps)
        for (int64_t c = 0; c < vectors * lanes; c += lanes)
          for (const auto& s : column.taps) {
            const float* from = w.as<float>() + r.index * w.strides[2] + s.index * w.strides[3];
            for (int64_t i = c; i < c + lanes; ++i) *to++ = i < channels ? from[i * w.strides[0]] : 0.0f;
          }
    }

  const bool streaming = worth_streaming(images * y_size.h * y_size.w, channels);
  const int64_t row_phases = rows.size(), column_phases = columns.size();
  parallel_ranges(
      images * y_size.h, std::max<int64_t>(16384 / (y_size.w * channels), 1), [&](int64_t begin, int64_t end) {
        std::vector<const float*> x_rows, w_rows;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / y_size.h, y_row = i % y_size.h, row_phase = y_row % row_phases, j = y_row / row_phases;
          for (int64_t column_phase = 0; column_phase < column_phases; ++column_phase) {
            const Phase& phase = phases[row_phase * column_phases + column_phase];
            const AxisTaps& column = *phase.columns;
            x_rows.clear();
            w_rows.clear();
            for (int64_t a = 0; a < phase.row_taps(); ++a) {
              const int64_t row = j * phase.rows->step + phase.rows->taps[a].offset;
              if (row < 0 || row >= x_size.h) continue;
              x_rows.push_back(x + (n * x_size.h + row) * x_size.w * channels);
              w_rows.push_back(phase.weights + a * vectors * static_cast<int64_t>(column.taps.size()) * lanes);
            }
            const int64_t at = (i * y_size.w + column.out_first) * channels;
            DepthwiseRow t{};
            t.x_rows = x_rows.data(), t.w_rows = w_rows.data();
            t.kernel_rows = x_rows.size(), t.kernel_columns = column.taps.size();
            t.x_width = x_size.w;
            t.first = first_offset(column), t.step = column.step, t.tap_step = tap_step(column);
            t.row_step = phase.rows->step;
            t.x_pixel = channels, t.y_pixel = column.out_step * channels;
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
      ascending(backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w)), static_cast<float*>(args.dx),
      {a.h, a.w}, {});
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto* x = static_cast<const float*>(args.x);
  const auto* dy = static_cast<const float*>(args.dy);
  const int64_t lanes = kernels().conv2d.lanes, vectors = ceil_divide(a.c, lanes);
  const int64_t floats = a.r * a.s * vectors * lanes, rows = a.n * a.p;
  const int64_t parts = std::clamp<int64_t>(std::min(rows / 4, rows * a.q / (4 * a.r * a.s)), 1, 32);
  Buffer sums(parts * floats * sizeof(float));
  parallel_for(parts, [&](int64_t i, int) {
    float* acc = sums.as<float>() + i * floats;
    std::memset(acc, 0, floats * sizeof(float));
    std::vector<const float*> x_rows;
    std::vector<float*> dw_rows;
    DepthwiseWeightRow t{};
    t.kernel_columns = a.s;
    t.x_width = a.w;
    t.first = -a.pad_left, t.step = a.stride_w, t.tap_step = a.dilation_w;
    t.row_step = a.stride_h;
    t.pixel = a.c;
    t.outputs = a.q;
    t.channels = a.c;
    const Range mine = split(rows, parts, i);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      x_rows.clear();
      dw_rows.clear();
      for (int64_t r = 0; r < a.r; ++r) {
        const int64_t row = j % a.p * a.stride_h - a.pad_top + r * a.dilation_h;
        if (row < 0 || row >= a.h) continue;
        x_rows.push_back(x + (j / a.p * a.h + row) * a.w * a.c);
        dw_rows.push_back(acc + r * vectors * a.s * lanes);
      }
      if (x_rows.empty()) continue;
      t.x_rows = x_rows.data(), t.dw_rows = dw_rows.data();
      t.kernel_rows = x_rows.size();
      t.dy = dy + j * a.q * a.c;
      kernels().conv2d.depthwise_weight_row(t);
    }
  });
  const auto* partial = sums.as<float>();
  const auto& stride = args.dw.strides;
  for (int64_t c = 0; c < a.c; ++c)
    for (int64_t r = 0; r < a.r; ++r)
      for (int64_t s = 0; s < a.s; ++s) {
        const int64_t at = ((r * vectors + c / lanes) * a.s + s) * lanes + c % lanes;
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partial[part * floats + at];
        args.dw.as<float>()[c * stride[0] + r * stride[2] + s * stride[3]] = sum;
      }
}

}  // namespace fastconv::cpu::depthwise

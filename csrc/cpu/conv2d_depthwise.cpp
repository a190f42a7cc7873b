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
constexpr int64_t kStreamFloats = int64_t{4} << 20;
// Rows of x and dy of one call of the weight gradient's kernel, which runs over them once for every vector of channels.
constexpr int64_t kGradientFloats = 48 * 1024;

// [row tap][column tap][channel]
Buffer pack_weights(const TensorView& w, const AxisTaps& rows, const AxisTaps& columns, int64_t channels) {
  Buffer packed(std::max<size_t>(rows.taps.size() * columns.taps.size() * channels, 1) * sizeof(float));
  float* dst = packed.as<float>();
  for (const auto& row : rows.taps)
    for (const auto& column : columns.taps) {
      const float* src = w.as<float>() + row.index * w.strides[2] + column.index * w.strides[3];
      for (int64_t c = 0; c < channels; ++c) *dst++ = src[c * w.strides[0]];
    }
  return packed;
}

int64_t first_offset(const AxisTaps& axis) { return axis.taps.empty() ? 0 : axis.taps[0].offset; }
int64_t tap_step(const AxisTaps& axis) {
  return axis.taps.size() < 2 ? 1 : axis.taps[1].offset - axis.taps[0].offset;
}

// y (images of y_h x y_w) at the places that the axes name = correlation of x (x_h x x_w) with the axes' taps.
void run(const float* x, int64_t images, int64_t x_h, int64_t x_w, int64_t channels, const TensorView& w,
         const AxisTaps& rows, const AxisTaps& columns, float* y, int64_t y_h, int64_t y_w, const Epilogue& epilogue) {
  // Without taps on one axis (a phase that no kernel element reaches) there are none at all.
  const bool reached = !rows.taps.empty() && !columns.taps.empty();
  const Buffer weights = pack_weights(w, rows, columns, channels);
  const bool streaming = channels % 16 == 0 && images * y_h * y_w * channels >= kStreamFloats;
  parallel_ranges(images * rows.outputs, std::max<int64_t>(16384 / (columns.outputs * channels), 1),
                  [&](int64_t begin, int64_t end) {
    std::vector<const float*> x_rows(reached ? rows.taps.size() : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / rows.outputs, j = i % rows.outputs;
      for (size_t a = 0; a < x_rows.size(); ++a) {
        const int64_t row = j * rows.step + rows.taps[a].offset;
        x_rows[a] = row >= 0 && row < x_h ? x + (n * x_h + row) * x_w * channels : nullptr;
      }
      const int64_t at = ((n * y_h + rows.out_first + j * rows.out_step) * y_w + columns.out_first) * channels;
      DepthwiseRow t{};
      t.x_rows = x_rows.data();
      t.kernel_rows = x_rows.size(), t.kernel_columns = columns.taps.size();
      t.x_width = x_w;
      t.first = first_offset(columns), t.step = columns.step, t.tap_step = tap_step(columns);
      t.x_pixel = channels, t.y_pixel = columns.out_step * channels;
      t.w = weights.as<float>();
      t.w_stride = channels;
      t.y = y + at;
      t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
      t.bias = epilogue.bias;
      t.outputs = columns.outputs;
      t.channels = channels;
      t.low = epilogue.low, t.high = epilogue.high;
      t.streaming = streaming;
      kernels().conv2d.depthwise_row(t);
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
  run(static_cast<const float*>(args.x), a.n, a.h, a.w, a.c, args.w,
      forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
      forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w), static_cast<float*>(args.y), a.p, a.q,
      make_epilogue(args));
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const auto columns = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  for (const AxisTaps& row_axis : backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h))
    for (const AxisTaps& column_axis : columns)
      run(static_cast<const float*>(args.dy), a.n, a.p, a.q, a.c, args.w, row_axis, column_axis,
          static_cast<float*>(args.dx), a.h, a.w, {});
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

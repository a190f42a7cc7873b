// Depthwise convolution (groups = C = K): two rows of outputs at a time, vectorised over channels. The input gradient
// is the same loop over dy, a phase of the stride at a time.
#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu::depthwise {
namespace {

constexpr int64_t kRows = 2;  // rows of outputs that a kernel takes at once
// Outputs beyond L2 are written around the cache. Stores that jump from pixel to pixel wait for every line to be read
// first: that costs more than it costs the next operation to read the outputs from memory.
constexpr int64_t kStreamedFloats = 256 * 1024;

struct Image {
  int64_t h, w, channels;
  int64_t row() const { return w * channels; }
  int64_t size() const { return h * row(); }
};

int64_t tap_step(const AxisTaps& axis) { return axis.taps.size() < 2 ? 1 : axis.taps[1].offset - axis.taps[0].offset; }

// The kernels want a tap's source to grow with its number.
std::vector<AxisTaps> ascending(std::vector<AxisTaps> axes) {
  for (AxisTaps& axis : axes)
    if (tap_step(axis) < 0) std::reverse(axis.taps.begin(), axis.taps.end());
  return axes;
}

// One phase of rows and one of columns: how its outputs read the source.
class Phase {
 public:
  Phase(const AxisTaps& rows, const AxisTaps& columns) : rows_(&rows), columns_(&columns) {
    window_ = taps() > 0 && static_cast<int64_t>(columns.taps.size()) <= kMaxDepthwiseColumns &&
              tap_step(columns) == 1 && columns.step <= kMaxDepthwiseStep;
  }

  const AxisTaps& rows() const { return *rows_; }
  const AxisTaps& columns() const { return *columns_; }
  int64_t taps() const { return rows_->taps.size() * columns_->taps.size(); }
  // What the kernel is told: neighbouring taps that are neighbouring pixels share a window of pixels; of other kernels
  // every tap has its own row of pixels.
  int64_t kernel_rows() const { return window_ ? rows_->taps.size() : taps(); }
  int64_t kernel_columns() const { return window_ ? columns_->taps.size() : 1; }
  int64_t step() const { return window_ ? columns_->step : 1; }
  bool window() const { return window_; }
  // Rows of outputs share rows of pixels where neighbouring taps are neighbouring rows, and leave none out.
  int64_t rows_at_once() const { return window_ && tap_step(*rows_) == 1 && rows_->step <= kernel_rows() ? kRows : 1; }

 private:
  const AxisTaps* rows_;
  const AxisTaps* columns_;
  bool window_;
};

// The pointers to pixels that a kernel reads for some rows of outputs; to zeros beyond the left and right border.
class Pixels {
 public:
  Pixels(const Phase& phase, const Image& size, const float* zeros)
      : phase_(phase),
        size_(size),
        zeros_(zeros),
        columns_(phase.window() ? (phase.columns().outputs - 1) * phase.step() + phase.kernel_columns()
                                : phase.columns().outputs) {
    const int64_t rows = phase.kernel_rows() + (kRows - 1) * phase.rows().step;
    pointers_.resize(rows * columns_);
    rows_.reserve(rows);
  }

  // For outputs rows j .. j + count - 1.
  void place(const float* image, int64_t j, int64_t count) {
    const auto &row_taps = phase_.rows().taps, &column_taps = phase_.columns().taps;
    const int64_t first_row = j * phase_.rows().step;
    rows_.clear();
    if (phase_.rows_at_once() > 1) {
      const int64_t rows = row_taps.size() + (count - 1) * phase_.rows().step;
      for (int64_t i = 0; i < rows; ++i) add(image, first_row + row_taps[0].offset + i, column_taps[0].offset, 1);
    } else if (phase_.window()) {
      for (const auto& tap : row_taps) add(image, first_row + tap.offset, column_taps[0].offset, 1);
    } else {
      for (const auto& tap : row_taps)
        for (const auto& column : column_taps) add(image, first_row + tap.offset, column.offset, phase_.columns().step);
    }
  }

  const float* const* const* rows() const { return rows_.data(); }
  int64_t row_count() const { return rows_.size(); }
  int64_t row_step(int64_t count) const { return count > 1 ? phase_.rows().step : row_count(); }

 private:
  // The pixels first, first + step, ... of a source row.
  void add(const float* image, int64_t row, int64_t first, int64_t step) {
    if (row < 0 || row >= size_.h) return rows_.push_back(nullptr);
    const float** to = pointers_.data() + rows_.size() * columns_;
    const int64_t begin = std::min(columns_, first < 0 ? ceil_divide(-first, step) : 0);
    const int64_t end = std::clamp(first < size_.w ? (size_.w - 1 - first) / step + 1 : 0, begin, columns_);
    const float* const pixels = image + row * size_.row();
    std::fill(to, to + begin, zeros_);
    for (int64_t i = begin; i < end; ++i) to[i] = pixels + (first + i * step) * size_.channels;
    std::fill(to + end, to + columns_, zeros_);
    rows_.push_back(to);
  }

  const Phase& phase_;
  Image size_;
  const float* zeros_;
  int64_t columns_;
  std::vector<const float*> pointers_;
  std::vector<const float* const*> rows_;
};

// Rows [begin, end) of an image, or of the one behind it, shared out among the vectors of so many outputs.
Prefetch prefetch_rows(const float* image, const Image& size, int64_t begin, int64_t end, int64_t outputs) {
  return {image + begin * size.row(), (end - begin) * size.w * kernels().conv2d.lanes / outputs};
}

// The source rows that are read after those of output rows j .. j + count - 1.
Prefetch next_source(const float* image, const Image& size, const Phase& phase, int64_t j, int64_t count) {
  const AxisTaps& rows = phase.rows();
  if (phase.taps() == 0) return {image, 0};
  const auto end = [&](int64_t first) {
    const int64_t last = std::min(first + count, rows.outputs) - 1;
    return std::clamp<int64_t>(last * rows.step + rows.taps.back().offset + 1, 0, size.h);
  };
  const int64_t to = j + count < rows.outputs ? end(j + count) : size.h + end(0);
  return prefetch_rows(image, size, end(j), to, phase.columns().outputs);
}

// w[taps of rows][taps of columns] as [vector of channels][row][column][lane].
void pack_weights(const TensorView& w, const Phase& phase, int64_t channels, int64_t lanes, float* to) {
  for (int64_t c = 0; c < channels; c += lanes)
    for (const auto& r : phase.rows().taps)
      for (const auto& s : phase.columns().taps) {
        const float* from = w.as<float>() + r.index * w.strides[2] + s.index * w.strides[3];
        for (int64_t i = c; i < c + lanes; ++i) *to++ = i < channels ? from[i * w.strides[0]] : 0.0f;
      }
}

std::vector<float> zero_pixel(int64_t channels) { return std::vector<float>(channels, 0.0f); }

// y = correlation of x with w, at the places that the axes name. All phases of some rows of y are written in turn,
// while what they read is in cache.
void run(const float* x, const Image& x_size, int64_t images, const TensorView& w, const std::vector<AxisTaps>& rows,
         const std::vector<AxisTaps>& columns, float* y, const Image& y_size, const Epilogue& epilogue,
         WeightCache* cache = nullptr) {
  const int64_t channels = x_size.channels, lanes = kernels().conv2d.lanes;
  const int64_t width = ceil_divide(channels, lanes) * lanes;
  std::vector<Phase> phases;
  int64_t taps = 0, rows_at_once = kRows, row_outputs = 0;
  for (const AxisTaps& row : rows)
    for (const AxisTaps& column : columns) {
      phases.emplace_back(row, column);
      taps += phases.back().taps();
      rows_at_once = std::min(rows_at_once, phases.back().rows_at_once());
      row_outputs = std::max(row_outputs, row.outputs);
    }
  const PackedWeights packed(cache, "depthwise", taps * width, [&](float* to) {
    for (const Phase& phase : phases) {
      pack_weights(w, phase, channels, lanes, to);
      to += phase.taps() * width;
    }
  });
  std::vector<const float*> weights{packed.data()};
  for (const Phase& phase : phases) weights.push_back(weights.back() + phase.taps() * width);
  const std::vector<float> zeros = zero_pixel(channels);
  const bool streaming = worth_streaming(images * y_size.h * y_size.w, channels, kStreamedFloats);
  const int64_t steps = ceil_divide(row_outputs, rows_at_once);  // of an image
  parallel_ranges(
      images * steps, std::max<int64_t>(65536 * steps / std::max<int64_t>(y_size.size(), 1), 1),
      [&](int64_t begin, int64_t end) {
        std::vector<Pixels> pixels;
        for (const Phase& phase : phases) pixels.emplace_back(phase, x_size, zeros.data());
        for (int64_t i = begin; i < end; ++i) {
          const float* image = x + i / steps * x_size.size();
          const int64_t j = i % steps * rows_at_once;
          for (size_t f = 0; f < phases.size(); ++f) {
            const Phase& phase = phases[f];
            const AxisTaps &row = phase.rows(), &column = phase.columns();
            const int64_t count = std::min(rows_at_once, row.outputs - j);
            if (count <= 0 || column.outputs == 0) continue;
            pixels[f].place(image, j, count);
            const int64_t at = i / steps * y_size.size() + (row.out_first + j * row.out_step) * y_size.row() +
                               column.out_first * channels;
            DepthwiseRows t{};
            t.x_rows = pixels[f].rows(), t.x_row_count = pixels[f].row_count();
            t.row_step = pixels[f].row_step(count);
            t.kernel_rows = phase.kernel_rows(), t.kernel_columns = phase.kernel_columns(), t.step = phase.step();
            t.w = weights[f];
            t.y = y + at;
            t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
            t.bias = epilogue.bias;
            t.rows = count, t.outputs = column.outputs;
            t.y_row = row.out_step * y_size.row(), t.y_pixel = column.out_step * channels;
            t.channels = channels;
            t.low = epilogue.low, t.high = epilogue.high;
            t.streaming = streaming;
            t.next[0] = f == 0 ? next_source(image, x_size, phase, j, count) : Prefetch{x, 0};
            kernels().conv2d.depthwise_rows(t);
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
  run(static_cast<const float*>(args.x), {a.h, a.w, a.c}, a.n, args.w,
      {forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h)},
      {forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w)}, static_cast<float*>(args.y), {a.p, a.q, a.c},
      make_epilogue(args), args.cache);
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  run(static_cast<const float*>(args.dy), {a.p, a.q, a.c}, a.n, args.w,
      ascending(backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h)),
      ascending(backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w)), static_cast<float*>(args.dx),
      {a.h, a.w, a.c}, {});
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto* x = static_cast<const float*>(args.x);
  const auto* dy = static_cast<const float*>(args.dy);
  const AxisTaps rows = forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h);
  const AxisTaps columns = forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w);
  const Phase phase(rows, columns);
  const Image x_size{a.h, a.w, a.c}, y_size{a.p, a.q, a.c};
  const int64_t lanes = kernels().conv2d.lanes, taps = phase.taps();
  const int64_t floats = taps * ceil_divide(a.c, lanes) * lanes;
  const int64_t rows_at_once = phase.rows_at_once(), steps = ceil_divide(a.p, rows_at_once), all = a.n * steps;
  const int64_t parts = std::clamp<int64_t>(std::min(all / 2, all * rows_at_once * a.q / (4 * taps)), 1, 32);
  const std::vector<float> zeros = zero_pixel(a.c);
  Buffer sums(parts * floats * sizeof(float));
  parallel_for(parts, [&](int64_t part, int) {
    float* acc = sums.as<float>() + part * floats;
    std::memset(acc, 0, floats * sizeof(float));
    Pixels pixels(phase, x_size, zeros.data());
    const Range mine = split(all, parts, part);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const float* image = x + i / steps * x_size.size();
      const int64_t j = i % steps * rows_at_once, count = std::min(rows_at_once, a.p - j);
      pixels.place(image, j, count);
      DepthwiseWeightRows t{};
      t.x_rows = pixels.rows(), t.x_row_count = pixels.row_count();
      t.row_step = pixels.row_step(count);
      t.kernel_rows = phase.kernel_rows(), t.kernel_columns = phase.kernel_columns(), t.step = phase.step();
      t.w = acc;
      t.dy = dy + i / steps * y_size.size() + j * y_size.row();
      t.outputs = a.q;
      t.dy_row = count > 1 ? y_size.row() : 0, t.dy_pixel = a.c;
      t.channels = a.c;
      t.next[0] = next_source(image, x_size, phase, j, count);
      t.next[1] = prefetch_rows(t.dy, y_size, count, 2 * count, a.q);
      kernels().conv2d.depthwise_weight_rows(t);
    }
  });
  auto* sum = sums.as<float>();
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < floats; ++i) sum[i] += sum[part * floats + i];
  const auto& stride = args.dw.strides;
  for (int64_t c = 0; c < a.c; ++c)
    for (int64_t r = 0; r < a.r; ++r)
      for (int64_t s = 0; s < a.s; ++s)
        args.dw.as<float>()[c * stride[0] + r * stride[2] + s * stride[3]] =
            sum[(c / lanes * taps + r * a.s + s) * lanes + c % lanes];
}

}  // namespace fastconv::cpu::depthwise

// Few input channels (C <= 4), as in the first layer of a network. The (column, channel) pairs of a kernel row are one
// run of floats in a row of the image, so forward and weight gradient read rows of x as they are, with padding added.
// The input gradient has few outputs instead: its lanes are pixels, of dy laid out in planes, so that none is wasted.
// Bounds: FMA, and the writes of y and reads of dy.
#include "cpu/conv2d_first_layer.h"

#include "core/allocator.h"
#include "cpu/conv2d_direct.h"
#include "cpu/registry.h"

namespace fastconv::cpu::first_layer {
namespace {

// Rows of an input gradient's chunk, where there are as many: its first rows of dy are also those of the chunk above.
constexpr int64_t kInputRows = 16;
// Planes of dy that a row of the input gradient reads must stay a reasonable workspace.
constexpr int64_t kMaxPlaneFloats = 16 * 1024 * 1024;

}  // namespace

const char* supports(const Conv2dProblem& a) {
  if (a.groups != 1) return "more than one group";
  if (a.c > kFewChannels) return "more than 4 input channels";
  if (a.dilation_w != 1) return "dilated columns";
  if (a.dilation_h > 4 || a.stride_h > a.r + 4) return "rows too far apart to pack them all";
  return direct::supports(a);
}

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  const auto& k = kernels().conv2d;
  const direct::Panels panels{a.k, k.tile_k, k.lanes};
  const PaddedRows source(a, a.q);
  const Bands bands(a.n, a.p, 1, 16);
  const int64_t taps = a.s * a.c, panel_floats = a.r * taps * k.tile_k;
  const PackedWeights weights(args.cache, "first_layer", panels.count() * panel_floats, [&](float* packed) {
    std::memset(packed, 0, panels.count() * panel_floats * sizeof(float));
    for (int64_t i = 0; i < panels.count(); ++i)
      for_panel(a, args.w, i * k.tile_k, panels.channels(i), panels.width(i),
                [&](int64_t from, int64_t to) { packed[i * panel_floats + to] = args.w.as<float>()[from]; });
  });

  StripTile shape{};
  const Epilogue epilogue = make_epilogue(args);
  shape.x_step = source.step(), shape.x_row_step = source.tap_row();
  shape.rows = a.r, shape.taps = taps;
  shape.pixel_stride = a.k;
  shape.low = epilogue.low, shape.high = epilogue.high;
  shape.streaming = worth_streaming(a.n * a.p * a.q, a.k);
  const int64_t tiles = ceil_divide(a.q, k.tile_pixels), scratch_floats = source.rows(bands.band) * source.row_floats();
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  parallel_for(
      bands.count(),
      [&](int64_t i, int thread) {
        const int64_t n = bands.image(i);
        const Range rows = bands.range(i);
        float* packed = scratch.as<float>() + thread * scratch_floats;
        source.pack(static_cast<const float*>(args.x), n, rows, packed);
        StripTile t = shape;
        for (int64_t p = rows.begin; p < rows.end; ++p)
          for (int64_t j = 0; j < tiles; ++j) {
            const Range part = split(a.q, tiles, j);
            t.x = packed + (p - rows.begin) * source.output_row() + part.begin * source.step();
            for (int64_t panel = 0; panel < panels.count(); ++panel) {
              const int64_t channel = panel * k.tile_k, at = ((n * a.p + p) * a.q + part.begin) * a.k + channel;
              t.w = weights.data() + panel * panel_floats;
              t.y = static_cast<float*>(args.y) + at;
              t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
              t.bias = epilogue.bias ? epilogue.bias + channel : nullptr;
              t.channels = panels.channels(panel);
              k.strip[panels.width(panel) / k.lanes - 1][part.end - part.begin - 1](t);
            }
          }
      },
      threads);
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  const auto& k = kernels().conv2d;
  const auto* dy = static_cast<const float*>(args.dy);
  const PaddedRows source(a, a.q);
  const int64_t taps = a.s * a.c;
  // Two vectors at once where the taps of a row do not fit the registers with one, and no vector would be idle.
  const int64_t width = taps > k.strip_sums && ceil_divide(a.k, k.lanes) % 2 == 0 ? 2 * k.lanes : k.lanes;
  const int64_t panel_floats = a.r * taps * width;
  StripWeightTile shape{};
  shape.a_step = source.step(), shape.a_row_step = source.output_row(), shape.a_tap_step = source.tap_row();
  shape.columns = a.q;
  shape.tap_rows = a.r, shape.taps = taps;
  shape.acc_step = width;
  shape.next = dy;  // its next row is fetched anyway
  const Buffer sums = sum_gradient(
      a, dy, width, panel_floats, kChunks, [&](int64_t rows) { return source.rows(rows) * source.row_floats(); },
      [&](int64_t n, Range rows, float* packed) { source.pack(static_cast<const float*>(args.x), n, rows, packed); },
      [&](const float* packed, const GradientRows& part, float* acc) {
        StripWeightTile t = shape;
        t.rows = part.rows;
        t.a = packed + part.after * source.output_row();
        t.b = part.dy;
        t.b_step = part.dy_pixel, t.b_row_step = a.q * part.dy_pixel;
        t.acc = acc;
        k.strip_weight_tile(t);
      });
  for (int64_t o = 0, i = 0; o < a.k; o += width, ++i)
    for_panel(a, args.dw, o, std::min(width, a.k - o), width,
              [&](int64_t to, int64_t from) { args.dw.as<float>()[to] = sums.as<float>()[i * panel_floats + from]; });
}

namespace {

// dy as the input gradient reads it: rows of planes [k][pixels], with zeros where a tap reaches outside. Pixels begin
// at whole vectors, because stores across cache lines would cost three times as much, and planes are an odd number of
// vectors apart, so that the rows of a transposed square lie in different sets of the cache.
struct Planes {
  int64_t left, width;  // columns of zeros before the first pixel; floats of a row of one plane
  int64_t row_floats;   // of all planes, and the zeros after the last one
  Planes(const Conv2dProblem& a, const std::vector<AxisTaps>& columns, int64_t lanes) {
    int64_t before = 0, after = a.q;
    for (const AxisTaps& axis : columns)
      for (const auto& tap : axis.taps) {
        before = std::max(before, -tap.offset);
        after = std::max(after, tap.offset + ceil_divide(axis.outputs, lanes) * lanes);
      }
    const int64_t vectors = ceil_divide(before, lanes);
    left = vectors * lanes;
    width = ((vectors + ceil_divide(after, lanes)) | 1) * lanes;
    row_floats = a.k * width + left;
  }
};

// Rows of dy that a row of dx may read: those between its first and its last tap. The last are kept in a ring.
struct RowWindow {
  const Conv2dProblem& a;
  int64_t size() const { return std::min(a.p, (a.r - 1) * a.dilation_h / a.stride_h + 1); }
  int64_t begin(int64_t y) const {
    const int64_t above = (a.r - 1) * a.dilation_h;
    return y + a.pad_top <= above ? 0 : ceil_divide(y + a.pad_top - above, a.stride_h);
  }
  int64_t end(int64_t y) const { return std::min(a.p, (y + a.pad_top) / a.stride_h + 1); }
};

}  // namespace

const char* supports_backward_input(const Conv2dProblem& a) {
  if (const char* why = supports(a)) return why;
  const int64_t width = a.q + a.s + 2 * a.pad_left + a.w + 64;
  if (RowWindow{a}.size() > kMaxPlaneFloats / (a.k * width)) return "the rows of dy under a kernel are too large";
  return nullptr;
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  const auto& k = kernels().conv2d;
  const auto* dy = static_cast<const float*>(args.dy);
  const auto row_axes = backward_axes(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h);
  const auto column_axes = backward_axes(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w);
  const Planes planes(a, column_axes, k.lanes);
  const RowWindow window{a};
  const Bands bands(a.n, a.h, std::min(kInputRows, a.h), a.h);

  // [k][r][s][c], so that a tap is a run of channels
  Buffer weights(a.k * a.r * a.s * a.c * sizeof(float));
  for (int64_t o = 0; o < a.k; ++o)
    for_panel(a, args.w, o, 1, 1, [&](int64_t from, int64_t to) {
      weights.as<float>()[o * a.r * a.s * a.c + to] = args.w.as<float>()[from];
    });

  const int64_t most_vectors = k.planar_vectors[a.c - 1], row_floats = ceil_divide(a.w, k.lanes) * k.lanes;
  const int64_t ring = window.size(), plane_floats = ring * planes.row_floats;
  const int64_t scratch_floats = plane_floats + a.c * row_floats;
  const int threads = num_threads();
  Buffer scratch(threads * scratch_floats * sizeof(float));
  PlanarTile shape{};
  shape.x_step = planes.width, shape.planes = a.k;
  shape.w = weights.as<float>(), shape.w_step = a.r * a.s * a.c;
  shape.channels = a.c;
  shape.y_step = row_floats;

  parallel_for(
      bands.count(),
      [&](int64_t i, int thread) {
        const int64_t n = bands.image(i);
        const Range rows = bands.range(i);
        float *packed = scratch.as<float>() + thread * scratch_floats, *row = packed + plane_floats;
        const auto pack_row = [&](int64_t p) {
          float* to = packed + p % ring * planes.row_floats;
          std::memset(to, 0, planes.left * sizeof(float));
          // Zeros beyond the last pixel reach over the next plane's zeros on the left.
          k.pack_weights(dy + (n * a.p + p) * a.q * a.k, a.k, 1, a.q, a.k, planes.width, to + planes.left);
        };
        int64_t next_row = window.begin(rows.begin);
        std::vector<PlanarTile::Tap> taps(a.r * a.s);
        PlanarTile t = shape;
        t.taps = taps.data();
        for (int64_t y = rows.begin; y < rows.end; ++y) {
          for (; next_row < window.end(y); ++next_row) pack_row(next_row);
          const AxisTaps& row_axis = row_axes[y % a.stride_h];
          float* dx = static_cast<float*>(args.dx) + (n * a.h + y) * a.w * a.c;
          for (const AxisTaps& axis : column_axes) {
            t.tap_count = 0;
            for (const auto& r : row_axis.taps) {
              const int64_t p = y / a.stride_h + r.offset;
              if (p < 0 || p >= a.p) continue;
              for (const auto& s : axis.taps)
                taps[t.tap_count++] = {p % ring * planes.row_floats + planes.left + s.offset,
                                       (r.index * a.s + s.index) * a.c};
            }
            const int64_t vectors = ceil_divide(axis.outputs, k.lanes), tiles = ceil_divide(vectors, most_vectors);
            for (int64_t j = 0; j < tiles; ++j) {
              const Range part = split(vectors, tiles, j);
              t.x = packed + part.begin * k.lanes;
              t.y = row + part.begin * k.lanes;
              t.vectors = part.end - part.begin;
              t.next = dy + ((n * a.p + next_row) * a.q + part.begin * k.lanes) * a.k;
              k.planar_tile(t);
            }
            for (int64_t x = 0; x < axis.outputs; ++x)
              for (int64_t c = 0; c < a.c; ++c)
                dx[(axis.out_first + x * axis.out_step) * a.c + c] = row[c * row_floats + x];
          }
        }
      },
      threads);
}

}  // namespace fastconv::cpu::first_layer

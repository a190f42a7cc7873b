#include "cpu/conv2d_band.h"

#include <algorithm>
#include <cstring>

#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
// Of any sign, unlike ceil_divide.
int64_t ceiling(int64_t a, int64_t b) { return -floor_divide(-a, b); }

}  // namespace

BandAxis::BandAxis(const AxisTaps& axis, int64_t source_size, bool keep_outside)
    : step_(axis.step), source_size_(source_size), keep_outside_(keep_outside) {
  for (const AxisTaps::Tap& tap : axis.taps) {
    const int64_t shift = floor_divide(tap.offset, step_);
    const int64_t phase = tap.offset - shift * step_;
    auto it = std::find(phases_.begin(), phases_.end(), phase);
    if (it == phases_.end()) it = phases_.insert(it, phase);
    first_ = taps_.empty() ? shift : std::min(first_, shift);
    last_ = taps_.empty() ? shift : std::max(last_, shift);
    taps_.push_back({it - phases_.begin(), shift});
  }
}

void BandAxis::place(int64_t begin, int64_t end) {
  low_ = begin + first_;
  high_ = end + last_;
  if (!keep_outside_) {
    low_ = std::max<int64_t>(low_, 0);
    high_ = std::max(low_, std::min(high_, (source_size_ - 1) / step_ + 1));
  }
}

Range BandAxis::inside(int64_t tap, int64_t begin, int64_t end) const {
  const int64_t offset = taps_[tap].shift * step_ + phases_[taps_[tap].phase];
  const int64_t first = std::clamp(ceiling(-offset, step_), begin, end);
  return {first, std::clamp(floor_divide(source_size_ - 1 - offset, step_) + 1, first, end)};
}

Band::Band(const SourceImage& source, const AxisTaps& rows, const AxisTaps& columns)
    : source_(source),
      rows_(rows, source.h, /*keep_outside=*/false),
      columns_(columns, source.w, /*keep_outside=*/true),
      blocks_(ceil_divide(source.channels, kBlock)) {}

int64_t Band::max_floats(int64_t images, int64_t rows, int64_t columns) const {
  const int64_t image_rows = std::min(rows_.max_size(rows), rows_.phases() * ((source_.h - 1) / rows_.step() + 1));
  return blocks_ * ((1 + images * image_rows) * columns_.max_size(columns) * kBlock);
}

void Band::pack(float* dst, const BandRange& range) {
  const auto [n0, n1, y0, y1, x0, x1] = range;
  rows_.place(y0, y1);
  columns_.place(x0, x1);
  data_ = dst;
  n0_ = n0;
  const int64_t row_floats = columns_.size() * kBlock;
  block_stride_ = (1 + (n1 - n0) * rows_.size()) * row_floats;
  for (int64_t b = 0; b < blocks_; ++b) std::memset(dst + b * block_stride_, 0, row_floats * sizeof(float));
  float* out = dst + row_floats;
  for (int64_t n = n0; n < n1; ++n)
    for (int64_t f = 0; f < rows_.phases(); ++f)
      for (int64_t i = 0; i < rows_.per_phase(); ++i, out += row_floats) {
        // The last row of a phase may lie outside although the range of t meets the image; no tap reads it then.
        const int64_t row = (rows_.low() + i) * rows_.step() + rows_.phase(f);
        if (row < source_.h)
          pack_row(source_.data + ((n * source_.h + row) * source_.w) * source_.pixel + source_.first_channel, out);
      }
}

void Band::pack_row(const float* src, float* dst) const {
  const auto& k = kernels().conv2d;
  const int64_t count = columns_.per_phase(), step = columns_.step();
  for (int64_t f = 0; f < columns_.phases(); ++f, dst += count * kBlock) {
    // Packed column j holds source column (low + j) * step + phase; those in [0, w) are j in [begin, end).
    const int64_t phase = columns_.phase(f), low = columns_.low();
    const int64_t begin = std::clamp<int64_t>(ceiling(-phase, step) - low, 0, count);
    const int64_t end = std::clamp<int64_t>(floor_divide(source_.w - 1 - phase, step) + 1 - low, begin, count);
    for (int64_t b = 0; b < blocks_; ++b) {
      float* row = dst + b * block_stride_;
      std::memset(row, 0, begin * kBlock * sizeof(float));
      std::memset(row + end * kBlock, 0, (count - end) * kBlock * sizeof(float));
    }
    if (begin == end) continue;
    const float* s = src + ((low + begin) * step + phase) * source_.pixel;
    k.pack_pixels(s, step * source_.pixel, end - begin, source_.channels, dst + begin * kBlock, block_stride_);
  }
}

Blocking choose_blocking(const Band& band, int64_t images, int64_t rows, int64_t columns, int64_t tile,
                         int64_t floats_wanted) {
  Blocking b{1, rows, columns, images, 1, 1};
  if (band.max_floats(1, 1, columns) > 2 * floats_wanted) {
    // Even one row is too much: split columns, in multiples of the register tile.
    int64_t width = columns;
    while (width > 2 * tile && band.max_floats(1, 1, width) > floats_wanted) width = (width + 1) / 2;
    b.columns = std::min(columns, ceil_divide(width, tile) * tile);
    b.column_bands = ceil_divide(columns, b.columns);
  }
  while (b.rows > 2 && band.max_floats(1, b.rows, b.columns) > floats_wanted) b.rows = (b.rows + 1) / 2;
  if (b.rows > 1 && b.rows % 2 == 1 && b.rows < rows) ++b.rows;  // tiles of two rows
  b.row_bands = ceil_divide(rows, b.rows);
  b.rows = std::min(rows, b.rows);
  if (b.row_bands == 1 && b.column_bands == 1) {
    const int64_t one = std::max<int64_t>(band.max_floats(1, rows, columns), 1);
    b.images = std::clamp<int64_t>(floats_wanted / one, 1, std::max<int64_t>(images / 8, 1));
    b.image_bands = ceil_divide(images, b.images);
  }
  return b;
}

BandRange band_range(const Blocking& b, int64_t i, int64_t images, int64_t rows, int64_t columns) {
  const int64_t column = i % b.column_bands, row = i / b.column_bands % b.row_bands,
                image = i / b.column_bands / b.row_bands;
  return {image * b.images,   std::min(images, (image + 1) * b.images),
          row * b.rows,       std::min(rows, (row + 1) * b.rows),
          column * b.columns, std::min(columns, (column + 1) * b.columns)};
}

}  // namespace fastconv::cpu

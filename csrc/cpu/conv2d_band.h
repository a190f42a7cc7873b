// A band: the part of a source image (or of several whole images) that a block of output pixels reads, packed so that
//   - channels lie in blocks of kBlock floats, pixel after pixel: [channel block][row][column][kBlock];
//   - with a stride, rows and columns are sorted by phase (index mod stride), so that neighbouring outputs always read
//     neighbouring packed pixels; phases that no tap reads are left out;
//   - columns of padding are there as zeros, rows of padding are one shared row of zeros.
#pragma once

#include <vector>

#include "cpu/conv2d.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

struct SourceImage {
  const float* data;  // [n][h][w][pixel]
  int64_t h, w;
  int64_t pixel;          // floats a pixel
  int64_t first_channel;  // of the group
  int64_t channels;       // of the group
};

// One axis of a band: which source indices are packed where.
class BandAxis {
 public:
  BandAxis(const AxisTaps& taps, int64_t source_size, bool keep_outside);
  void place(int64_t begin, int64_t end);  // for outputs [begin, end)

  int64_t phases() const { return static_cast<int64_t>(phases_.size()); }
  int64_t phase(int64_t i) const { return phases_[i]; }  // source index = t * step + phase
  int64_t per_phase() const { return high_ - low_; }     // packed indices of a phase: t = low .. high-1
  int64_t size() const { return phases() * per_phase(); }
  int64_t low() const { return low_; }
  int64_t step() const { return step_; }
  int64_t max_size(int64_t outputs) const { return phases() * (outputs + last_ - first_); }
  // Packed index that output j reads under tap i; -1 where that lies outside the source (rows only).
  int64_t index(int64_t tap, int64_t j) const {
    const int64_t t = j + taps_[tap].shift;
    const int64_t source = t * step_ + phases_[taps_[tap].phase];
    if (!keep_outside_ && (source < 0 || source >= source_size_)) return -1;
    return taps_[tap].phase * per_phase() + t - low_;
  }
  // Of outputs [begin, end), those that read inside the source under a tap.
  Range inside(int64_t tap, int64_t begin, int64_t end) const;

 private:
  struct Tap {
    int64_t phase, shift;  // offset = shift * step + phases_[phase]
  };
  std::vector<Tap> taps_;
  std::vector<int64_t> phases_;
  int64_t step_, source_size_, first_ = 0, last_ = 0, low_ = 0, high_ = 0;
  bool keep_outside_;
};

// Outputs [y0, y1) x [x0, x1) of images [n0, n1).
struct BandRange {
  int64_t n0, n1, y0, y1, x0, x1;
};

class Band {
 public:
  Band(const SourceImage& source, const AxisTaps& rows, const AxisTaps& columns);

  int64_t max_floats(int64_t images, int64_t rows, int64_t columns) const;
  void pack(float* dst, const BandRange&);  // packs what these outputs read

  const float* data() const { return data_; }
  int64_t block_stride() const { return block_stride_; }
  int64_t blocks() const { return blocks_; }
  // Offset of the packed pixel that output (n, y, x) reads under (row tap, column tap), or -1: a row of padding.
  int64_t offset(int64_t row_tap, int64_t column_tap, int64_t n, int64_t y, int64_t x) const {
    const int64_t row = rows_.index(row_tap, y);
    if (row < 0) return -1;
    return ((1 + (n - n0_) * rows_.size() + row) * columns_.size() + columns_.index(column_tap, x)) * kBlock;
  }
  // Of output columns [x0, x1), those that do not read padding under a tap.
  Range inside_columns(int64_t column_tap, int64_t x0, int64_t x1) const { return columns_.inside(column_tap, x0, x1); }
  // The same place in the row of zeros.
  int64_t zero_offset(int64_t column_tap, int64_t x) const { return columns_.index(column_tap, x) * kBlock; }

 private:
  void pack_row(const float* src, float* dst) const;
  SourceImage source_;
  BandAxis rows_, columns_;
  int64_t blocks_;
  const float* data_ = nullptr;
  int64_t block_stride_ = 0, n0_ = 0;
};

// How outputs are cut into bands: whole images while they are small, else rows, else parts of rows.
struct Blocking {
  int64_t images, rows, columns;                 // of a band
  int64_t image_bands, row_bands, column_bands;  // how many
  int64_t bands() const { return image_bands * row_bands * column_bands; }
};

// Bands of about `floats_wanted` packed floats; `tile` is the width of a register tile.
Blocking choose_blocking(const Band&, int64_t images, int64_t rows, int64_t columns, int64_t tile,
                         int64_t floats_wanted);

BandRange band_range(const Blocking&, int64_t i, int64_t images, int64_t rows, int64_t columns);

}  // namespace fastconv::cpu

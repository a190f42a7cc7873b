// Transposing in squares of kLanes x kLanes, each a whole cache line wide with AVX-512. Bound: memory.
#pragma once

#include "cpu/kernels/layout.h"

namespace fastconv::cpu {
namespace {

enum class Stores { kPlain, kStreaming };

// The transpose of a square: rows i and i + L/2 are zipped, log2(L) times.
inline __attribute__((always_inline)) void transpose_rows(Vec (&rows)[kLanes]) {
  typedef int Index __attribute__((vector_size(sizeof(Vec))));
  Index low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  Vec zipped[kLanes];
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

// dst[i * dst_step + j] = src[j * src_step + i] for a square of kLanes, widened to float.
template <Stores STORES, class T>
inline __attribute__((always_inline)) void transpose_square(const T* src, int64_t src_step, float* dst,
                                                            int64_t dst_step) {
  Vec rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = load(src + i * src_step);
    // So many rows at once are more streams than the hardware follows.
    prefetch(src + i * src_step + 4 * kLanes);
    if (STORES == Stores::kPlain) prefetch(dst + i * dst_step + kLanes);
  }
  transpose_rows(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (STORES == Stores::kStreaming)
      stream(dst + i * dst_step, rows[i]);
    else
      store(dst + i * dst_step, rows[i]);
}

// Squares that cover rows x columns, the last of a row or column overlapping its neighbour; false where there is no
// room for one. body(i, j)
template <class Body> inline bool for_squares(int64_t rows, int64_t columns, Body&& body) {
  if (rows < kLanes || columns < kLanes) return false;
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes)
      body(i + kLanes <= rows ? i : rows - kLanes, j + kLanes <= columns ? j : columns - kLanes);
  return true;
}

// Few rows, as of images of 1 to 4 channels, or few columns: one by one, along the longer side.
inline void transpose_narrow(const float* src, int64_t src_step, int64_t rows, int64_t columns, float* dst,
                             int64_t dst_step) {
  if (rows < columns)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) dst[j * dst_step + i] = src[i * src_step + j];
  else
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) dst[j * dst_step + i] = src[i * src_step + j];
}

void transpose(const float* src, int64_t src_step, int64_t rows, int64_t columns, float* dst, int64_t dst_step,
               bool streaming) {
  const bool squares = for_squares(rows, columns, [&](int64_t i, int64_t j) {
    const float* from = src + i * src_step + j;
    float* to = dst + j * dst_step + i;
    if (streaming && i % kLanes == 0)
      transpose_square<Stores::kStreaming>(from, src_step, to, dst_step);
    else
      transpose_square<Stores::kPlain>(from, src_step, to, dst_step);
  });
  if (!squares) transpose_narrow(src, src_step, rows, columns, dst, dst_step);
}

}  // namespace
}  // namespace fastconv::cpu

// What a tensor map says to the copy engine, before it is encoded: a tensor, and the part of it that one copy moves.
// Always with the 128-byte swizzle, so the innermost part of a box is 128 bytes.
#pragma once

#include <initializer_list>

#include "cuda/geometry.h"

namespace fastconv::cuda {

struct TensorMapPlan {
  enum class Numbers { kBFloat16, kFloat16 };
  static constexpr int kNumberBytes = 2, kRowNumbers = 64;

  const void* data = nullptr;
  Numbers numbers = Numbers::kBFloat16;
  int rank = 0;
  int64_t size[4] = {};  // innermost first, dense
  int box[4] = {};       // of a tiled copy
  // Of an im2col copy: size is {C, W, H, N}; a copy takes kRowNumbers channels of `pixels` pixels.
  bool im2col = false;
  Corners w, h;
  int step_w = 1, step_h = 1, pixels = 0;
};

inline TensorMapPlan tiled_map(TensorMapPlan::Numbers numbers, const void* data, std::initializer_list<int64_t> size,
                               std::initializer_list<int> box) {
  TensorMapPlan map;
  map.numbers = numbers;
  map.data = data;
  for (const int64_t s : size) map.size[map.rank++] = s;
  int i = 0;
  for (const int b : box) map.box[i++] = b;
  return map;
}

inline TensorMapPlan im2col_map(TensorMapPlan::Numbers numbers, const void* data, int batch, int height, int width,
                                int channels, const Axis& h, const Axis& w, int pixels) {
  TensorMapPlan map;
  map.numbers = numbers;
  map.data = data;
  map.rank = 4;
  map.size[0] = channels, map.size[1] = width, map.size[2] = height, map.size[3] = batch;
  map.im2col = true;
  map.w = im2col_corners(w, width);
  map.h = im2col_corners(h, height);
  map.step_w = w.source_step, map.step_h = h.source_step;
  map.pixels = pixels;
  return map;
}

}  // namespace fastconv::cuda

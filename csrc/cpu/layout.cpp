#include "cpu/layout.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

template <class T> void copy_as(const TensorView& src, const TensorView& dst) {
  const int64_t n = src.sizes[0], c = src.sizes[1], h = src.sizes[2], w = src.sizes[3];
  const T* from = src.as<T>();
  T* to = dst.as<T>();
  const auto& a = src.strides;
  const auto& b = dst.strides;
  // Small squares of (pixels x channels) keep both sides' cache lines in use.
  constexpr int64_t kSquare = 16;
  parallel_ranges(n * h, std::max<int64_t>(16384 / std::max<int64_t>(w * c, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* s = from + row / h * a[0] + row % h * a[2];
      T* d = to + row / h * b[0] + row % h * b[2];
      for (int64_t w0 = 0; w0 < w; w0 += kSquare)
        for (int64_t c0 = 0; c0 < c; c0 += kSquare)
          for (int64_t i = w0; i < std::min(w, w0 + kSquare); ++i)
            for (int64_t j = c0; j < std::min(c, c0 + kSquare); ++j) d[i * b[3] + j * b[1]] = s[i * a[3] + j * a[1]];
    }
  });
}

// The pixels of an image are one row: h w of them, a stride apart.
bool pixels_in_a_row(const TensorView& v) { return v.sizes[2] == 1 || v.strides[2] == v.sizes[3] * v.strides[3]; }

bool is_planar(const TensorView& v) { return v.strides[3] == 1 && pixels_in_a_row(v); }
bool is_interleaved(const TensorView& v) { return v.strides[1] == 1 && pixels_in_a_row(v); }

// Outputs beyond L2 are written around the caches, where every full vector of a row is aligned.
bool worth_streaming(const TensorView& dst, int64_t step) {
  constexpr int64_t kFloats = int64_t{1} << 19, kLine = 16;
  const bool aligned = reinterpret_cast<uintptr_t>(dst.data) % 64 == 0;
  return aligned && step % kLine == 0 && dst.strides[0] % kLine == 0 && dst.numel() >= kFloats;
}

// Between planes and channels-last: for each image a matrix, pixels x channels, transposed.
void transpose_images(const TensorView& src, const TensorView& dst) {
  const bool from_planes = is_planar(src);
  const int64_t images = src.sizes[0], channels = src.sizes[1], pixels = src.sizes[2] * src.sizes[3];
  const int64_t src_step = src.strides[from_planes ? 1 : 3], dst_step = dst.strides[from_planes ? 3 : 1];
  const float* const from = src.as<float>();
  float* const to = dst.as<float>();
  const bool streaming = worth_streaming(dst, dst_step);
  const int64_t parts = std::clamp<int64_t>(pixels * channels / 32768, 1, std::max<int64_t>(pixels / 64, 1));
  parallel_for(images * parts, [&](int64_t chunk, int) {
    const int64_t image = chunk / parts;
    const Range range = split((pixels + 15) / 16, parts, chunk % parts);  // whole cache lines of a plane
    const int64_t begin = range.begin * 16, count = std::min(range.end * 16, pixels) - begin;
    const float* s = from + image * src.strides[0] + begin * (from_planes ? 1 : src_step);
    float* d = to + image * dst.strides[0] + begin * (from_planes ? dst_step : 1);
    const int64_t rows = from_planes ? channels : count, columns = from_planes ? count : channels;
    kernels().layout.transpose(s, src_step, rows, columns, d, dst_step, streaming);
  });
}

}  // namespace

void copy_strided(const TensorView& src, const TensorView& dst) {
  const bool transposes = (is_planar(src) && is_interleaved(dst)) || (is_interleaved(src) && is_planar(dst));
  switch (itemsize(src.dtype)) {
    case 2: return copy_as<uint16_t>(src, dst);
    case 4: return transposes ? transpose_images(src, dst) : copy_as<uint32_t>(src, dst);
    case 8: return copy_as<uint64_t>(src, dst);
    default: return copy_as<uint8_t>(src, dst);
  }
}

}  // namespace fastconv::cpu

// Joining and splitting are copies, a row after another, so that the joined array is touched once and in order. Gating
// walks blocks of pixels; its sums over pixels are taken in a block, then over blocks in double, then over chunks.
#include "device/channels.h"

#include <algorithm>
#include <cstring>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kChunkBytes = 128 * 1024;    // of the joined array
constexpr int64_t kChunkElements = 32 * 1024;  // of the image, in a chunk of gating
constexpr int64_t kBlockPixels = 256;          // bounds the rounding error of a block's sums

// copy(a slice's bytes, its place in the joined array, count) for every row and slice.
template <class Copy> void for_slices(int64_t outer, const std::vector<Slice>& slices, Copy&& copy) {
  int64_t row_bytes = 0;
  for (const Slice& slice : slices) row_bytes += slice.bytes;
  if (row_bytes == 0) return;
  parallel_ranges(outer, std::max<int64_t>(kChunkBytes / row_bytes, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t at = row * row_bytes;
      for (const Slice& slice : slices) {
        copy(slice.data + row * slice.bytes, at, slice.bytes);
        at += slice.bytes;
      }
    }
  });
}

// Chunks of an image; a function of the shape alone.
int64_t chunks_of(int64_t pixels, int64_t channels) {
  return std::clamp<int64_t>(pixels * channels / kChunkElements, 1,
                             std::max<int64_t>(std::min<int64_t>(pixels, 64), 1));
}

// body(chunk, image, range of its pixels) in parallel over chunks [images][chunks_of].
template <class Body> void parallel_pixels(int64_t images, int64_t pixels, int64_t channels, Body&& body) {
  const int64_t each = chunks_of(pixels, channels);
  parallel_for(images * each,
               [&](int64_t chunk, int) { body(chunk, chunk / each, split(pixels, each, chunk % each)); });
}

}  // namespace

void concatenate(int64_t outer, const std::vector<Slice>& slices, char* joined) {
  for_slices(outer, slices,
             [&](const char* part, int64_t at, int64_t bytes) { std::memcpy(joined + at, part, bytes); });
}

void split(int64_t outer, const char* joined, const std::vector<Slice>& slices) {
  for_slices(outer, slices, [&](char* part, int64_t at, int64_t bytes) { std::memcpy(part, joined + at, bytes); });
}

void channel_gate(DType dtype, int64_t images, int64_t pixels, int64_t channels, const void* x, const void* gate,
                  const void* bias, void* y) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().channels.of<T>().gate;
    const auto *from = static_cast<const T*>(x), *factors = static_cast<const T*>(gate);
    const auto* addends = static_cast<const T*>(bias);
    parallel_pixels(images, pixels, channels, [&](int64_t, int64_t image, Range range) {
      const int64_t at = (image * pixels + range.begin) * channels;
      kernel(from + at, factors + image * channels, addends ? addends + image * channels : nullptr,
             static_cast<T*>(y) + at, range.end - range.begin, channels);
    });
  });
}

void channel_gate_backward(DType dtype, int64_t images, int64_t pixels, int64_t channels, const void* dy, const void* x,
                           const void* gate, void* dx, void* dgate) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().channels.of<T>().gate_backward;
    const auto *g = static_cast<const T*>(dy), *at = static_cast<const T*>(x), *factors = static_cast<const T*>(gate);
    auto* to = static_cast<T*>(dx);
    const int64_t chunks = chunks_of(pixels, channels);
    Buffer sums(images * chunks * channels * sizeof(double));
    auto* partial = sums.as<double>();  // [image][chunk][channel]
    parallel_pixels(images, pixels, channels, [&](int64_t chunk, int64_t image, Range range) {
      double* total = partial + chunk * channels;
      std::fill(total, total + channels, 0.0);
      Buffer scratch(channels * sizeof(T));
      T* block = scratch.as<T>();
      for (int64_t pixel = range.begin; pixel < range.end; pixel += kBlockPixels) {
        const int64_t first = (image * pixels + pixel) * channels;
        kernel(g + first, at + first, factors + image * channels, to ? to + first : nullptr, block,
               std::min(kBlockPixels, range.end - pixel), channels);
        for (int64_t c = 0; c < channels; ++c) total[c] += block[c];
      }
    });
    if (!dgate) return;
    for (int64_t i = 0; i < images; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t j = 0; j < chunks; ++j) total += partial[(i * chunks + j) * channels + c];
        static_cast<T*>(dgate)[i * channels + c] = static_cast<T>(total);
      }
  });
}

}  // namespace fastconv::cpu

// Convolution with mma.sync, for sm_80 and up: any channels, groups, strides and dilation; bfloat16, float16 and
// TensorFloat-32. An implicit GEMM whose tiles are gathered with cp.async into a ring of kStages16 and read with
// ldmatrix.
//
//   forward, input gradient   result[pixel][column] = sum over (tap, c) of source[pixel, tap][c] packed[column][tap][c]
//   weight gradient           partial[column k][tap, c] = sum over a slice of pixels of dy[pixel][k] x[pixel, tap][c]
//
// Kernels in the form of machine.h: they run on the host, too.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/machine.h"

namespace fastconv::cuda::sm80 {

// How a chunk of 16 bytes gets into shared memory.
enum class Gather {
  kChunk,    // one copy: channels a group reads fill whole chunks
  kHalf,     // two copies of 8 bytes: images of 4 channels of 16 bits, two taps a chunk
  kElement,  // number by number: anything
};

// Channels of a group as they count in k: whole chunks, or a packed image of four.
template <class T> FC_INLINE int padded_channels(int channels, Gather gather) {
  return gather == Gather::kHalf ? channels : round_up(channels, 16 / static_cast<int>(sizeof(typename T::Storage)));
}

struct Arguments {
  int batch, h, w, p, q;  // x is h x w, y is p x q
  int c, k, r, s, groups;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  const void* source;  // x, or dy for an input gradient
  const void* other;   // packed weights [groups][columns][r * s][padded channels]; dy for a weight gradient
  void* result;        // y, dx, or float partial sums [splits][groups][k / groups][r * s * padded channels]
  Epilogue epilogue;
  SplitPlan split;
};

// Direction of the pixels: forward's axes, or those of one phase of the input gradient.
struct Axes {
  Axis h, w;
};
FC_INLINE Axes axes_of(const Arguments& a, bool backward, int phase) {
  if (!backward)
    return {forward_axis(a.p, a.r, a.stride_h, a.pad_top, a.dilation_h),
            forward_axis(a.q, a.s, a.stride_w, a.pad_left, a.dilation_w)};
  const int phases_w = backward_phases(a.w, a.stride_w);
  return {backward_axis(a.h, a.r, a.stride_h, a.pad_top, a.dilation_h, phase / phases_w),
          backward_axis(a.w, a.s, a.stride_w, a.pad_left, a.dilation_w, phase % phases_w)};
}
FC_INLINE int phases_of(const Arguments& a, bool backward) {
  return backward ? backward_phases(a.h, a.stride_h) * backward_phases(a.w, a.stride_w) : 1;
}

constexpr int kStages = 4;
constexpr int kRowBytes = 64;  // of k, in a tile's row

template <int kM, int kN> constexpr int shared_bytes() { return kStages * (kM + kN) * kRowBytes; }

// A position in k = (tap, channel), of one chunk or half a chunk.
struct Position {
  int tap_h, tap_w, channel;
};
FC_INLINE Position position_of(int k, int channels, int taps_w) {
  const int tap = k / channels;
  return {tap / taps_w, tap - tap / taps_w * taps_w, k - tap * channels};
}
FC_INLINE void advance(Position& at, int by, int channels, int taps_w) {
  at.channel += by;
  while (at.channel >= channels) {
    at.channel -= channels;
    if (++at.tap_w == taps_w) {
      at.tap_w = 0;
      ++at.tap_h;
    }
  }
}

// The numbers of one image pixel and position; address null outside the image.
struct Image {
  const char* data;
  int h, w, c, first_channel, channels;  // channels: those of the group
};

template <class T, int kNumbers> FC_DEVICE Chunk gather_elements(const char* from, int valid) {
  using Storage = typename T::Storage;
  union {
    Chunk chunk;
    Storage number[kNumbers];
  } u;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i)
    u.number[i] = i < valid ? reinterpret_cast<const Storage*>(from)[i] : Storage(0.0f);
  return u.chunk;
}

// Copies a chunk's part at `at` of pixel (n, h, w) of an image; zeros where there is none.
template <class T, Gather kGather>
FC_DEVICE void gather(uint32_t to, const Image& image, int n, int h, int w, int channel, bool valid) {
  using Storage = typename T::Storage;
  constexpr int kNumbers = 16 / sizeof(Storage);
  valid = valid && static_cast<unsigned>(h) < static_cast<unsigned>(image.h) &&
          static_cast<unsigned>(w) < static_cast<unsigned>(image.w);
  int64_t offset = 0;
  if (valid) offset = ((static_cast<int64_t>(n) * image.h + h) * image.w + w) * image.c + image.first_channel + channel;
  const char* from = image.data + offset * static_cast<int>(sizeof(Storage));
  if constexpr (kGather == Gather::kChunk) {
    copy_async_16(to, from, valid);
  } else if constexpr (kGather == Gather::kHalf) {
    copy_async_8(to, from, valid);
  } else {
    store_shared(to, gather_elements<T, kNumbers>(from, valid ? image.channels - channel : 0));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward and input gradient. Block x: a tile of pixels; y: a tile of columns; z: (group, phase). 256 threads; a warp
// has kM / kWarpsM pixels and kN / kWarpsN columns in its accumulators.

template <class T, int kM, int kN, Gather kGather, bool kBackward>
FC_DEVICE void convolve(const Arguments& a, uint32_t shared) {
  using Storage = typename T::Storage;
  constexpr int kPieces = kGather == Gather::kHalf ? 2 : 1;
  constexpr int kNumbers = 16 / sizeof(Storage), kDepth = 4 * kNumbers, kPieceNumbers = kNumbers / kPieces;
  constexpr int kWarpsM = kM == kN ? 2 : 4, kWarpsN = 8 / kWarpsM;
  constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;
  constexpr int kStageBytes = (kM + kN) * kRowBytes;

  const int phases = phases_of(a, kBackward);
  const int group = block_z() / phases;
  const Axes axes = axes_of(a, kBackward, block_z() - group * phases);
  const int rows = axes.h.results, row_columns = axes.w.results;
  const int pixels = a.batch * rows * row_columns;
  const int m0 = block_x() * kM, n0 = block_y() * kN;
  if (m0 >= pixels) return;  // phases differ in size

  const int source_channels = kBackward ? a.k : a.c, result_channels = kBackward ? a.c : a.k;
  const int channels = source_channels / a.groups, columns = result_channels / a.groups;
  const int padded = padded_channels<T>(channels, kGather);
  const int taps = axes.h.taps * axes.w.taps, steps = divide_up(taps * padded, kDepth);
  const Image source = {static_cast<const char*>(a.source),
                        kBackward ? a.p : a.h,
                        kBackward ? a.q : a.w,
                        source_channels,
                        group * channels,
                        channels};
  const char* weights = static_cast<const char*>(a.other) +
                        static_cast<int64_t>(group) * columns * a.r * a.s * padded * static_cast<int>(sizeof(Storage));

  // This thread fills the chunk `chunk` of the rows tid / 4, tid / 4 + 64, ... of both tiles.
  const int tid = thread_index(), chunk = tid % 4, row0 = tid / 4;
  int image[kM / 64], top[kM / 64], left[kM / 64];
#pragma unroll
  for (int i = 0; i < kM / 64; ++i) {
    const int m = m0 + row0 + i * 64;
    const Pixel at = pixel_of(m, rows, row_columns);
    image[i] = m < pixels ? at.n : -1;
    top[i] = axes.h.source_first + at.i * axes.h.source_step;
    left[i] = axes.w.source_first + at.j * axes.w.source_step;
  }
  Position position[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    position[i] = position_of(chunk * kNumbers + i * kPieceNumbers, padded, larger(axes.w.taps, 1));

  const auto load = [&](int stage) {
    const uint32_t tile_a = shared + stage * kStageBytes, tile_b = tile_a + kM * kRowBytes;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Position& at = position[piece];
      const bool inside = at.tap_h < axes.h.taps;
      const int down = at.tap_h * axes.h.tap_step, right = at.tap_w * axes.w.tap_step;
#pragma unroll
      for (int i = 0; i < kM / 64; ++i)
        gather<T, kGather>(tile_a + swizzle_64b_rows(row0 + i * 64, chunk) + piece * 8, source, image[i], top[i] + down,
                           left[i] + right, at.channel, inside && image[i] >= 0);
      const int tap = (axes.h.weight_first + at.tap_h * axes.h.weight_step) * a.s + axes.w.weight_first +
                      at.tap_w * axes.w.weight_step;
#pragma unroll
      for (int i = 0; i < kN / 64; ++i) {
        const int column = n0 + row0 + i * 64;
        const bool valid = inside && column < columns;
        const int64_t offset = valid ? (static_cast<int64_t>(column) * a.r * a.s + tap) * padded + at.channel : 0;
        const uint32_t to = tile_b + swizzle_64b_rows(row0 + i * 64, chunk) + piece * 8;
        const char* from = weights + offset * static_cast<int>(sizeof(Storage));
        if constexpr (kPieces == 2)
          copy_async_8(to, from, valid);
        else
          copy_async_16(to, from, valid);
      }
      advance(at, kDepth, padded, larger(axes.w.taps, 1));
    }
  };

  const int warp = tid / 32, lane = tid % 32;
  const int warp_m = warp / kWarpsN * (kM / kWarpsM), warp_n = warp % kWarpsN * (kN / kWarpsN);
  float sum[kTilesM][kTilesN][4] = {};
  const auto multiply = [&](int stage) {
    const uint32_t tile_a = shared + stage * kStageBytes, tile_b = tile_a + kM * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fragment_a[kTilesM][4], fragment_b[kTilesN / 2][4];
      const Element of_a = ldmatrix_a(lane), of_b = ldmatrix_b(lane);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
        ldmatrix_x4(fragment_a[i], tile_a + swizzle_64b_rows(warp_m + i * 16 + of_a.row, half * 2 + of_a.column));
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j)
        ldmatrix_x4(fragment_b[j], tile_b + swizzle_64b_rows(warp_n + j * 16 + of_b.row, half * 2 + of_b.column));
      if constexpr (sizeof(Storage) == 4) {
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
          for (int e = 0; e < 4; ++e) fragment_a[i][e] = T::round(fragment_a[i][e]);
#pragma unroll
        for (int j = 0; j < kTilesN / 2; ++j)
          for (int e = 0; e < 4; ++e) fragment_b[j][e] = T::round(fragment_b[j][e]);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
          mma(T(), sum[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2], fragment_b[j / 2][j % 2 * 2 + 1]);
    }
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) load(i);
    copy_async_commit();
  }
  for (int i = 0; i < steps; ++i) {
    copy_async_wait<kStages - 2>();
    block_sync();  // this step's tiles are there for all, and the stage loaded next is free
    if (i + kStages - 1 < steps) load((i + kStages - 1) % kStages);
    copy_async_commit();
    multiply(i % kStages);
  }

  // Epilogue. A thread has columns (0, 1) + 8 j of rows 0 and 8 of each tile of 16.
  auto* result = static_cast<Storage*>(a.result);
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = m0 + warp_m + i * 16 + mma_accumulator(lane, half * 2).row;
      if (m >= pixels) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) sum[i][j][half * 2] = sum[i][j][half * 2 + 1] = 0;
        continue;
      }
      const Pixel at = pixel_of(m, rows, row_columns);
      const int64_t pixel =
          (static_cast<int64_t>(at.n) * (kBackward ? a.h : a.p) + axes.h.result_first + at.i * axes.h.result_step) *
              (kBackward ? a.w : a.q) +
          axes.w.result_first + at.j * axes.w.result_step;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n0 + warp_n + j * 8 + mma_accumulator(lane, e).column;
          if (column >= columns) continue;
          const int channel = group * columns + column;
          const int64_t offset = pixel * result_channels + channel;
          const Storage value = T::store(epilogue_value<T>(a.epilogue, sum[i][j][half * 2 + e], channel, offset));
          result[offset] = value;
          sum[i][j][half * 2 + e] = T::load(value);
        }
    }
  if (a.epilogue.statistics == nullptr) return;

  // Per channel, over this tile's pixels: the sum, then the squared differences from the mean, each first over a warp's
  // rows and then over the warps, in order.
  block_sync();
  const uint32_t scratch = shared;  // [kWarpsM][kN] floats
  const int count = smaller(kM, pixels - m0);
  const auto reduce = [&](auto&& term) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v = 0;
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            v += term(sum[i][j][half * 2 + e], warp_m + i * 16 + mma_accumulator(lane, half * 2).row, j, e);
        v += shuffle_xor(v, 4);
        v += shuffle_xor(v, 8);
        v += shuffle_xor(v, 16);
        if (lane < 4)
          store_shared(scratch + (warp / kWarpsN * kN + warp_n + j * 8 + mma_accumulator(lane, e).column) * 4, v);
      }
    block_sync();
  };
  const auto total = [&](int column) {
    float v = 0;
    for (int i = 0; i < kWarpsM; ++i) v += load_shared_float(scratch + (i * kN + column) * 4);
    return v;
  };
  reduce([](float v, int, int, int) { return v; });
  float mean[kTilesN][2];
#pragma unroll
  for (int j = 0; j < kTilesN; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) mean[j][e] = total(warp_n + j * 8 + mma_accumulator(lane, e).column) / count;
  const float my_mean = tid < kN ? total(tid) / count : 0.0f;
  block_sync();
  reduce([&](float v, int row, int j, int e) {
    const float d = v - mean[j][e];
    return row < count ? d * d : 0.0f;
  });
  if (tid < kN && n0 + tid < columns)
    a.epilogue.statistics[static_cast<int64_t>(block_x()) * a.k + group * columns + n0 + tid] = {my_mean, total(tid)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Weight gradient. Block x: (tile of k, tile of (tap, c)); y: slice of pixels; z: group. 128 threads, tiles of 64 x 64;
// a stage holds 32 pixels of dy and of gathered x as they lie in memory, a row a pixel, so k of the product runs along
// columns: ldmatrix transposes 16-bit numbers, others are read one by one.

constexpr int kGradientTile = 64, kGradientPixels = 32;

template <class T> constexpr int gradient_shared_bytes() {
  return kStages * 2 * kGradientTile * kGradientPixels * static_cast<int>(sizeof(typename T::Storage));
}

// Where chunk `chunk` of a pixel's row lies; rows are cut into panels of 128 bytes. The xor spreads the 8 pixels that
// ldmatrix reads, or the 4 pixels x 8 numbers of single reads, over all banks.
template <class T> FC_INLINE uint32_t gradient_chunk(int pixel, int chunk) {
  constexpr bool kWide = sizeof(typename T::Storage) == 4;
  const int mixed = chunk % 8 ^ (kWide ? pixel % 4 * 2 : pixel % 8);
  return static_cast<uint32_t>((chunk / 8 * kGradientPixels + pixel) * 128 + mixed * 16);
}

template <class T, Gather kGather> FC_DEVICE void weight_gradient(const Arguments& a, uint32_t shared) {
  using Storage = typename T::Storage;
  constexpr int kPieces = kGather == Gather::kHalf ? 2 : 1;
  constexpr int kNumbers = 16 / sizeof(Storage), kPieceNumbers = kNumbers / kPieces;
  constexpr int kChunks = kGradientTile / kNumbers, kRowsAtOnce = 128 / kChunks;
  constexpr int kTileBytes = kGradientTile * kGradientPixels * static_cast<int>(sizeof(Storage));
  constexpr int kDepth = 32 / sizeof(Storage);  // pixels a product adds

  const int group = block_z(), channels = a.c / a.groups, columns = a.k / a.groups;
  const int padded = padded_channels<T>(channels, kGather), width = a.r * a.s * padded;
  const int tiles_n = divide_up(width, kGradientTile);
  const int k0 = block_x() / tiles_n * kGradientTile, n0 = block_x() % tiles_n * kGradientTile;
  const Axes axes = axes_of(a, false, 0);
  const int pixels = a.batch * a.p * a.q;
  const int begin = block_y() * a.split.steps * kGradientPixels;
  const int steps = smaller(a.split.steps, divide_up(pixels - begin, kGradientPixels));

  const int tid = thread_index(), chunk = tid % kChunks, row0 = tid / kChunks;
  Position position[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) position[i] = position_of(n0 + chunk * kNumbers + i * kPieceNumbers, padded, a.s);
  const Image x = {static_cast<const char*>(a.source), a.h, a.w, a.c, group * channels, channels};
  // dy as an image of one row: its pixels lie one after the other. Whether its chunks can be copied whole is its own
  // question.
  const Image dy = {static_cast<const char*>(a.other), 1, pixels, a.k, group * columns, columns};
  const bool whole_dy = columns % kNumbers == 0;

  const auto load = [&](int step, int stage) {
    const uint32_t tile_dy = shared + stage * 2 * kTileBytes, tile_x = tile_dy + kTileBytes;
#pragma unroll
    for (int i = 0; i < kGradientPixels / kRowsAtOnce; ++i) {
      const int row = row0 + i * kRowsAtOnce, m = begin + step * kGradientPixels + row;
      const Pixel at = pixel_of(m, a.p, a.q);
      const uint32_t offset = gradient_chunk<T>(row, chunk);
      const int k = k0 + chunk * kNumbers;
      if (whole_dy)
        gather<T, Gather::kChunk>(tile_dy + offset, dy, 0, 0, m, k, k < columns);
      else
        gather<T, Gather::kElement>(tile_dy + offset, dy, 0, 0, m, k, k < columns);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const Position& to = position[piece];
        gather<T, kGather>(tile_x + offset + piece * 8, x, at.n,
                           axes.h.source_first + at.i * axes.h.source_step + to.tap_h * axes.h.tap_step,
                           axes.w.source_first + at.j * axes.w.source_step + to.tap_w * axes.w.tap_step, to.channel,
                           to.tap_h < a.r && m < pixels);
      }
    }
  };

  const int warp = tid / 32, lane = tid % 32, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  float sum[2][4][4] = {};
  const auto multiply = [&](int stage) {
    const uint32_t tile_dy = shared + stage * 2 * kTileBytes, tile_x = tile_dy + kTileBytes;
#pragma unroll
    for (int depth = 0; depth < kGradientPixels / kDepth; ++depth) {
      uint32_t fragment_a[2][4], fragment_b[2][4];
      if constexpr (sizeof(Storage) == 2) {
        const Element of_a = ldmatrix_a_transposed(lane), of_b = ldmatrix_b_transposed(lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ldmatrix_x4_transposed(fragment_a[i],
                                 tile_dy + gradient_chunk<T>(depth * 16 + of_a.row, warp_m / 8 + i * 2 + of_a.column));
          ldmatrix_x4_transposed(fragment_b[i],
                                 tile_x + gradient_chunk<T>(depth * 16 + of_b.row, warp_n / 8 + i * 2 + of_b.column));
        }
      } else {
        const auto number = [&](uint32_t tile, int pixel, int channel) {
          return T::round(load_shared_word(tile + gradient_chunk<T>(pixel, channel / 4) + channel % 4 * 4));
        };
        const int pixel = depth * 8 + lane % 4, of = lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            fragment_a[i][e] = number(tile_dy, pixel + e / 2 * 4, warp_m + i * 16 + e % 2 * 8 + of);
            fragment_b[i][e] = number(tile_x, pixel + e % 2 * 4, warp_n + i * 16 + e / 2 * 8 + of);
          }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma(T(), sum[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2], fragment_b[j / 2][j % 2 * 2 + 1]);
    }
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) load(i, i);
    copy_async_commit();
  }
  for (int i = 0; i < steps; ++i) {
    copy_async_wait<kStages - 2>();
    block_sync();
    if (i + kStages - 1 < steps) load(i + kStages - 1, (i + kStages - 1) % kStages);
    copy_async_commit();
    multiply(i % kStages);
  }

  float* partial =
      static_cast<float*>(a.result) + (static_cast<int64_t>(block_y()) * a.groups + group) * columns * width;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Element at = mma_accumulator(lane, e);
        const int k = k0 + warp_m + i * 16 + at.row, n = n0 + warp_n + j * 8 + at.column;
        if (k < columns && n < width) partial[static_cast<int64_t>(k) * width + n] = sum[i][j][e];
      }
}

}  // namespace fastconv::cuda::sm80

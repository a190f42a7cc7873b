// Joining and splitting are copies of blocks of bytes; gating is a product, and a sum over the pixels of each image.
#include "device/channels.h"

#include "cuda/columns.h"

namespace fastconv::cuda {
namespace {

// `outer` rows of `count` words between two arrays whose rows are longer.
template <class Word> struct CopyRows {
  const Word* from;
  Word* to;
  int64_t count, from_step, to_step;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t row = i / count, at = i % count;
    to[row * to_step + at] = from[row * from_step + at];
  }
};

template <class Word>
void copy_rows(int64_t outer, const char* from, char* to, int64_t bytes, int64_t from_step, int64_t to_step) {
  constexpr int64_t kSize = sizeof(Word);
  for_each(outer * (bytes / kSize), CopyRows<Word>{reinterpret_cast<const Word*>(from), reinterpret_cast<Word*>(to),
                                                   bytes / kSize, from_step / kSize, to_step / kSize});
}

struct alignas(16) Line {
  uint64_t words[2];
};

// The widest words that every size and address is a multiple of.
void copy_blocks(int64_t outer, const char* from, char* to, int64_t bytes, int64_t from_step, int64_t to_step) {
  if (outer * bytes == 0) return;
  const auto all = static_cast<uintptr_t>(bytes | from_step | to_step) | reinterpret_cast<uintptr_t>(from) |
                   reinterpret_cast<uintptr_t>(to);
  if (all % 16 == 0) return copy_rows<Line>(outer, from, to, bytes, from_step, to_step);
  if (all % 4 == 0) return copy_rows<uint32_t>(outer, from, to, bytes, from_step, to_step);
  if (all % 2 == 0) return copy_rows<uint16_t>(outer, from, to, bytes, from_step, to_step);
  copy_rows<uint8_t>(outer, from, to, bytes, from_step, to_step);
}

int64_t row_bytes(const std::vector<Slice>& slices) {
  int64_t total = 0;
  for (const Slice& slice : slices) total += slice.bytes;
  return total;
}

// A thread takes WIDTH channels of a pixel.
template <class T, int WIDTH> struct Gate {
  int64_t pixels, channels;
  const T *x, *gate, *bias;
  T* y;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t units = channels / WIDTH, at = i / units / pixels * channels + i % units * WIDTH;
    Acc<T> v[WIDTH], factor[WIDTH], addend[WIDTH] = {};
    load_channels<WIDTH>(x, i * WIDTH, v);
    load_channels<WIDTH>(gate, at, factor);
    if (bias) load_channels<WIDTH>(bias, at, addend);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) v[j] = v[j] * factor[j] + addend[j];
    store_channels<WIDTH>(y, i * WIDTH, v);
  }
};

// The sum of dy x over the pixels of one channel of one image: 32 channels a block, eight threads each.
template <class T> struct GateSums {
  static constexpr int kChannels = 32, kThreads = kBlockThreads, kLanes = kThreads / kChannels, kPhases = 2;
  struct Shared {
    double sums[kThreads];
  };
  using Local = Nothing;
  int64_t pixels, channels;
  const T *dy, *x;
  T* dgate;
  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    const int64_t tiles = (channels + kChannels - 1) / kChannels, image = block / tiles;
    const int64_t c = block % tiles * kChannels + thread % kChannels;
    if (c >= channels) return;
    if constexpr (PHASE == 0) {
      double sum = 0;
      for (int64_t pixel = thread / kChannels; pixel < pixels; pixel += kLanes) {
        const int64_t at = (image * pixels + pixel) * channels + c;
        sum += static_cast<double>(static_cast<Acc<T>>(dy[at])) * static_cast<double>(static_cast<Acc<T>>(x[at]));
      }
      shared.sums[thread] = sum;
    } else if (thread < kChannels) {
      double sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += shared.sums[i * kChannels + thread];
      dgate[image * channels + c] = T(sum);
    }
  }
};

}  // namespace

void concatenate(int64_t outer, const std::vector<Slice>& slices, char* joined) {
  const int64_t total = row_bytes(slices);
  int64_t at = 0;
  for (const Slice& slice : slices) {
    copy_blocks(outer, slice.data, joined + at, slice.bytes, slice.bytes, total);
    at += slice.bytes;
  }
}

void split(int64_t outer, const char* joined, const std::vector<Slice>& slices) {
  const int64_t total = row_bytes(slices);
  int64_t at = 0;
  for (const Slice& slice : slices) {
    copy_blocks(outer, joined + at, slice.data, slice.bytes, total, slice.bytes);
    at += slice.bytes;
  }
}

void channel_gate(DType dtype, int64_t images, int64_t pixels, int64_t channels, const void* x, const void* gate,
                  const void* bias, void* y) {
  if (images * pixels * channels == 0) return;
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(
        channels,
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          for_each(images * pixels * channels / kWidth,
                   Gate<T, kWidth>{pixels, channels, static_cast<const T*>(x), static_cast<const T*>(gate),
                                   static_cast<const T*>(bias), static_cast<T*>(y)});
        },
        x, gate, bias, y);
  });
}

void channel_gate_backward(DType dtype, int64_t images, int64_t pixels, int64_t channels, const void* dy, const void* x,
                           const void* gate, void* dx, void* dgate) {
  if (dx) channel_gate(dtype, images, pixels, channels, dy, gate, nullptr, dx);
  if (!dgate) return;
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    using Kernel = GateSums<T>;
    launch(Kernel{pixels, channels, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dgate)},
           images * ceil_divide(channels, Kernel::kChannels));
  });
}

}  // namespace fastconv::cuda

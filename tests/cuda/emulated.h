// What the tests of emulated kernels share: device arrays, grids, comparisons.
#pragma once

#include <cmath>
#include <functional>

#include "cuda/epilogue.h"
#include "cuda/machine.h"
#include "naive.h"

namespace fastconv::cuda {

inline int failures = 0, comparisons = 0;

// Numbers as the device stores them, aligned as its allocator aligns, NaN before they are written.
template <class T> class DeviceArray {
 public:
  using Storage = typename T::Storage;
  explicit DeviceArray(size_t size) : size_(size), memory_(size + 64) {
    for (auto& v : memory_) v = T::store(NAN);
  }
  explicit DeviceArray(const naive::Array& from) : DeviceArray(from.size()) {
    for (size_t i = 0; i < size_; ++i) data()[i] = T::store(from[i]);
  }
  Storage* data() const {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<Storage*>((at + 127) / 128 * 128);
  }
  size_t size() const { return size_; }

 private:
  size_t size_;
  mutable std::vector<Storage> memory_;
};

inline void emulate(int x, int y, int z, int threads, int shared, const emulator::Options& options,
                    const std::function<void()>& kernel) {
  static emulator::Block block;
  block.options = options;
  block.grid = x;
  for (block.z = 0; block.z < z; ++block.z)
    for (block.y = 0; block.y < y; ++block.y)
      for (block.x = 0; block.x < x; ++block.x) emulator::run_block(block, threads, shared, kernel);
}

inline void report(const char* what, const naive::Shape& shape, size_t at, double got, double expected) {
  if (++failures <= 20)
    std::printf("FAILED: %s, %s: element %zu is %g, expected %g\n", what, shape.text().c_str(), at, got, expected);
}

inline void compare(const char* what, const naive::Shape& shape, const naive::Array& got,
                    const naive::Array& expected) {
  ++comparisons;
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(got[i] == expected[i])) return report(what, shape, i, got[i], expected[i]);
}

// Sums are exact, so the result is the exact sum rounded once.
template <class T>
void compare(const char* what, const naive::Shape& shape, const DeviceArray<T>& got, const naive::Array& expected) {
  naive::Array numbers(got.size()), rounded(expected);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = T::load(got.data()[i]);
  for (float& v : rounded) v = T::load(T::store(v));
  compare(what, shape, numbers, rounded);
}

// Mean and m2 of each slice of `rows` pixels of y.
template <class T>
void check_statistics(const naive::Shape& shape, const naive::Array& y, const std::vector<SliceStatistics>& statistics,
                      int slices, int rows) {
  ++comparisons;
  const int channels = shape.k, pixels = static_cast<int>(y.size()) / channels;
  for (int slice = 0; slice < slices; ++slice)
    for (int k = 0; k < channels; ++k) {
      const int end = smaller(pixels, (slice + 1) * rows), count = end - slice * rows;
      double mean = 0, m2 = 0;
      for (int m = slice * rows; m < end; ++m)
        mean += T::load(T::store(y[static_cast<size_t>(m) * channels + k])) / double(count);
      for (int m = slice * rows; m < end; ++m) {
        const double d = T::load(T::store(y[static_cast<size_t>(m) * channels + k])) - mean;
        m2 += d * d;
      }
      const SliceStatistics& got = statistics[static_cast<size_t>(slice) * channels + k];
      if (!(std::fabs(got.mean - mean) <= 1e-5 * (1 + std::fabs(mean))))
        return report("mean", shape, k, got.mean, mean);
      if (!(std::fabs(got.m2 - m2) <= 1e-4 * (1 + m2))) return report("m2", shape, k, got.m2, m2);
    }
}

inline int finish() {
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures ? 1 : 0;
}

}  // namespace fastconv::cuda

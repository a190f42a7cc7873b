// Gating of channels. Bound: memory; the vectors over channels stay in the first-level cache. Sums are taken over four
// rows before they are added to a channel's, which hides the latency and halves the rounding error.
#pragma once

#include "cpu/kernels/channels.h"
#include "cpu/kernels/rows.inl.h"

namespace fastconv::cpu {
namespace {

template <class T> void gate(const T* x, const T* gate, const T* bias, T* y, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row)
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const int64_t at = row * channels + c;
      auto a = load_lanes<tail.value>(x + at, n) * load_lanes<tail.value>(gate + c, n);
      if (bias) a = a + load_lanes<tail.value>(bias + c, n);
      store_lanes<tail.value>(y + at, a, n);
    });
}

template <class T>
void gate_backward(const T* dy, const T* x, const T* gate, T* dx, T* sum, int64_t rows, int64_t channels) {
  using V = typename Lanes<T>::V;
  for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
  const int64_t ahead = rows_ahead<T>(channels) * channels;
  Fetch<T> fetch_dy{dy + ahead}, fetch_x{x + ahead};
  for (int64_t row = 0; row < rows; row += kSumRows) {
    const int64_t end = row + kSumRows < rows ? row + kSumRows : rows;
    for_lanes<T>(channels, [&](auto tail, int64_t c, int64_t n) {
      const V g = load_lanes<tail.value>(gate + c, n);
      V s{};
      const auto step = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t at = i * channels + c;
        fetch_dy(n);
        fetch_x(n);
        const V d = load_lanes<tail.value>(dy + at, n);
        s = fma(d, load_lanes<tail.value>(x + at, n), s);
        if (dx) store_lanes<tail.value>(dx + at, d * g, n);
      };
      if (end - row == kSumRows) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kSumRows; ++i) step(row + i);
      } else {
        for (int64_t i = row; i < end; ++i) step(i);
      }
      store_lanes<tail.value>(sum + c, load_lanes<tail.value>(sum + c, n) + s, n);
    });
  }
}

template <class T> constexpr ChannelKernels<T> channel_kernels() { return {gate<T>, gate_backward<T>}; }

}  // namespace
}  // namespace fastconv::cpu

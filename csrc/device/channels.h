// Joining, splitting and gating of channels.
#pragma once

#include <vector>

#include "core/problem.h"

namespace fastconv::FASTCONV_DEVICE {

// Arrays that differ in one dimension only, seen as [outer][bytes]: an array contributes `bytes` contiguous bytes to
// every one of `outer` rows of the joined array.
struct Slice {
  char* data;
  int64_t bytes;
};

// joined[i] = the i-th rows of all slices, one after another.
void concatenate(int64_t outer, const std::vector<Slice>& slices, char* joined);
// The inverse.
void split(int64_t outer, const char* joined, const std::vector<Slice>& slices);

// y = x gate + bias, with x, y dense [images][pixels][channels], gate and bias [images][channels]; bias null: 0.
void channel_gate(DType, int64_t images, int64_t pixels, int64_t channels, const void* x, const void* gate,
                  const void* bias, void* y);
// dx = dy gate; dgate = sum of dy x over the pixels. Each may be null: not wanted.
void channel_gate_backward(DType, int64_t images, int64_t pixels, int64_t channels, const void* dy, const void* x,
                           const void* gate, void* dx, void* dgate);

}  // namespace fastconv::FASTCONV_DEVICE

// Moving numbers of 32 bits, whatever they mean.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

struct LayoutKernels {
  // dst[j * dst_step + i] = src[i * src_step + j], i < rows, j < columns; past the caches where streaming.
  void (*transpose)(const float* src, int64_t src_step, int64_t rows, int64_t columns, float* dst, int64_t dst_step,
                    bool streaming);
};

}  // namespace fastconv::cpu

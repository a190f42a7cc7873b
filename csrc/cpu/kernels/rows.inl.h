// Sums over the rows of arrays [rows][channels] are taken over four rows at a time. Those are four streams that each
// stop and jump after a row, which the processor does not follow: from memory they run at a third of its bandwidth. So
// such loops fetch what comes next themselves, in the order of memory.
#pragma once

#include "cpu/kernels/lanes.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kSumRows = 4;

// Fetches an array a vector at a time, from the front.
template <class T> struct Fetch {
  const T* next;
  __attribute__((always_inline)) void operator()(int64_t n) {
    prefetch(reinterpret_cast<const float*>(next));
    next += n;
  }
};

// How far ahead of its sums a pass fetches, in rows. Further, into L2 alone, some are left out where the pass is fast.
template <class T> inline int64_t rows_ahead(int64_t channels) {
  constexpr int64_t kBytes = 8 * 1024;
  return kBytes / (channels * static_cast<int64_t>(sizeof(T))) + kSumRows;
}

}  // namespace
}  // namespace fastconv::cpu

// Numbers that change from step to step (learning rates, AdamW's corrections, where the random numbers stand). A kernel
// of a single call has them among its arguments; one of a graph reads them from device memory, which is written before
// each replay. The kernel, and so the bits, are the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/allocator.h"
#include "cuda/scalar.h"

namespace fastconv::cuda {

// N of them, as a kernel has them.
template <int N> struct Numbers {
  double value[N];
  const double* place;  // where they are found instead, or null
  FC_INLINE void fetch() {
    for (int i = 0; place && i < N; ++i) value[i] = place[i];
  }
};

// The numbers of one graph. Their order is that in which the host code asks for them.
class StepNumbers {
 public:
  StepNumbers();
  ~StepNumbers();
  StepNumbers(const StepNumbers&) = delete;
  StepNumbers& operator=(const StepNumbers&) = delete;

  // Until done(): every number that this thread's kernels ask for gets a place here.
  void record();
  // Until done(): the same functions are called with the numbers of the next step and no arrays to work on.
  void collect();
  // Throws if a collection did not ask for as many numbers as were recorded.
  void done();
  // For what the current stream does next. seed and offset are added to those that dropout was recorded with.
  void upload(uint64_t seed, uint64_t offset);

  const double* take(const double* values, size_t count);
  const uint64_t* random_place() const { return place_.as<uint64_t>(); }

 private:
  Buffer place_;
  std::vector<uint64_t> bits_;  // of seed, offset and the numbers
  size_t taken_ = 0;
  bool collecting_ = false;
};

// Of this thread, between record() or collect() and done(); otherwise null.
StepNumbers* current_step_numbers();

// Added to the seed and the offset of what is recorded, or null.
inline const uint64_t* random_place() {
  return current_step_numbers() ? current_step_numbers()->random_place() : nullptr;
}
template <int N> Numbers<N> step_numbers(const double (&values)[N]) {
  Numbers<N> numbers{{}, current_step_numbers() ? current_step_numbers()->take(values, N) : nullptr};
  std::copy(values, values + N, numbers.value);
  return numbers;
}

}  // namespace fastconv::cuda

// Finding what is wrong with an array of the device.
#pragma once

#include "core/allocator.h"
#include "cuda/launch.h"

namespace fastconv::cuda {

template <class Predicate> struct FirstWhere {
  Predicate predicate;
  unsigned long long* first;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    if (!predicate(i)) return;
#ifdef __CUDA_ARCH__
    atomicMin(first, static_cast<unsigned long long>(i));  // of integers: any order gives the same
#else
    if (static_cast<unsigned long long>(i) < *first) *first = static_cast<unsigned long long>(i);
#endif
  }
};

// The smallest i below n for which predicate(i) holds, or n. Waits for the device; while a graph is captured nothing
// may wait, and nothing is looked for.
template <class Predicate> int64_t first_where(int64_t n, const Predicate& predicate) {
  if (n == 0 || capturing()) return n;
  const Buffer first(sizeof(unsigned long long));
  auto result = static_cast<unsigned long long>(n);
  copy_bytes(first.as<void>(), &result, sizeof(result), Copy::kToDevice);
  for_each(n, FirstWhere<Predicate>{predicate, first.as<unsigned long long>()});
  copy_bytes(&result, first.as<void>(), sizeof(result), Copy::kToHost);
  return static_cast<int64_t>(result);
}

}  // namespace fastconv::cuda

// Max pooling for operations that are fused with it.
#pragma once

#include "cpu/kernels/pool2d.h"
#include "cpu/parallel.h"
#include "device/pool2d.h"

namespace fastconv::cpu {

// A band at a time, a row of windows of an image. It keeps a reference to the problem.
template <class T> class PoolBands {
 public:
  explicit PoolBands(const Pool2dProblem&);
  int64_t count() const { return problem_.n * problem_.p(); }
  Range rows(int64_t band) const;  // that its windows cover, among the rows of all images
  int64_t most_rows() const;       // that a band covers
  // x: the rows of the band; y and places: the whole arrays
  void max(int64_t band, const T* x, T* y, uint8_t* places) const;
  // The band for a backward kernel; all are whole arrays
  PoolRow<T> backward_row(int64_t band, const T* x, const T* dy, const uint8_t* places, T* dx) const;

 private:
  const Pool2dProblem& problem_;
  std::vector<PoolWindow> windows_;
};

}  // namespace fastconv::cpu

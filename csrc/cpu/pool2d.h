// Pooling on the CPU. Activations are dense channels-last [n][h][w][c]; indices int64 in the same layout as y.
#pragma once

#include "core/pool_problem.h"
#include "cpu/kernels/pool2d.h"
#include "cpu/parallel.h"

namespace fastconv::cpu {

// indices: of the maxima in the plane; places: their numbers in the windows, row-major over the part inside the image,
// for windows of at most 256 elements. Like y; one or both null.
void max_pool2d(const Pool2dProblem&, const void* x, void* y, int64_t* indices, uint8_t* places);
// The maxima are found again in x.
void max_pool2d_backward(const Pool2dProblem&, const void* dy, const void* x, void* dx);
void max_pool2d_backward_places(const Pool2dProblem&, const void* dy, const uint8_t* places, void* dx);
// ValueError if an index lies outside the plane; nothing is written then.
void max_pool2d_backward_indices(const Pool2dProblem&, const void* dy, const int64_t* indices, void* dx);

// Max pooling a band at a time, a row of windows of an image, for operations that make x in the cache. It keeps a
// reference to the problem.
template <class T> class PoolBands {
 public:
  explicit PoolBands(const Pool2dProblem&);
  int64_t count() const { return problem_.n * problem_.p(); }
  Range rows(int64_t band) const;  // that its windows cover, among the rows of all images
  int64_t most_rows() const;       // that a band covers
  // x: the rows of the band; y and places: the whole arrays
  void max(int64_t band, const T* x, T* y, uint8_t* places) const;

 private:
  const Pool2dProblem& problem_;
  std::vector<PoolWindow> windows_;
};

void avg_pool2d(const Pool2dProblem&, const void* x, void* y);
void avg_pool2d_backward(const Pool2dProblem&, const void* dy, void* dx);

}  // namespace fastconv::cpu

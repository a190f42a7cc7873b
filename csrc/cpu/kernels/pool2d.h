// Pooling kernels that every ISA provides: one row of outputs at a time, vectorised over channels, fp32 and fp64.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

// One output's window within its row of windows.
struct PoolWindow {
  int64_t offset;   // of its first element, from the row's first pixel
  int64_t columns;  // elements inside the image
  int64_t extent;   // of an average's divisor
};

// A row of windows. Element (r, s) of a window lies at x + offset + r * row_step + s * column_step.
template <class T> struct PoolRow {
  const T* x;    // first pixel of the first image row that the windows cover
  T* dx;         // the same place of the gradient
  int64_t rows;  // image rows that the windows cover; 0: all in the padding
  int64_t row_step, column_step;
  int64_t next_row;  // from an element to the same one of the next row of windows
  const PoolWindow* windows;
  int64_t outputs;
  T* y;           // or dy
  int64_t pixel;  // distance of neighbouring outputs, in elements
  int64_t channels;
  int64_t row_extent;  // of an average's divisor
  T divisor;           // 0: row_extent * the window's extent
  uint8_t* place;      // like y: the number of the maximum in its window, row-major
  bool accumulate;     // add to dx, otherwise store
  bool streaming;      // store around the caches: dx aligned, whole vectors of channels
};

template <class T> struct Pool2dKernels {
  // y = maximum. The first one wins a tie, NaN wins over everything.
  void (*max)(const PoolRow<T>&);
  // The same, and index[output * pixel + c] = plane + r * row_step / pixel + s * column_step / pixel + offset / pixel
  void (*max_index)(const PoolRow<T>&, int64_t plane, int64_t* index);
  void (*max_place)(const PoolRow<T>&);
  // dx = dy where the maximum is, 0 elsewhere in the window
  void (*max_backward)(const PoolRow<T>&);
  void (*max_place_backward)(const PoolRow<T>&);  // from the places alone: x is not read
  void (*average)(const PoolRow<T>&);
  void (*average_backward)(const PoolRow<T>&);
};

}  // namespace fastconv::cpu

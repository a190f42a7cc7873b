// Operands that are not images: vectors over channels, and arrays of any rank whose elements may be visited in the
// order of memory.
#pragma once

#include "bindings/convert.h"

namespace fastconv::bindings {

// A 1-D array made dense: itself, or a copy that lives as long as this object.
class Vector {
 public:
  Vector(const TensorView& array, const char* name);
  const void* data() const { return data_; }

 private:
  Buffer copy_;
  const void* data_;
};

// Strides (in elements) of a dense array.
using Strides = std::array<int64_t, kMaxDims>;

// True if the elements fill their memory without gaps or repetition, in whatever order of dimensions.
bool is_dense(const TensorView& v);
// Those of the array where it is dense; otherwise a dense order that resembles it.
Strides dense_strides(const TensorView& v);
Strides row_major_strides(const TensorView& v);
// Channels-last for images laid out so, otherwise row-major: the first dimension is the outermost.
Strides image_strides(const TensorView& v);
Strides strides_of(const TensorView& v, Layout layout);

// An array whose elements lie in memory as the given dense strides say: itself, or a copy.
class Dense {
 public:
  Dense(const TensorView& array, const Strides& strides);
  const void* data() const { return data_; }

 private:
  Buffer copy_;
  const void* data_;
};

// A new array with the shape of a view and these dense strides.
Array new_dense(const TensorView& like, const Strides& strides);

}  // namespace fastconv::bindings

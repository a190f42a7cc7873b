// Between numpy arrays and TensorViews. The only place where layouts are converted: below it every activation is dense
// channels-last, above it the caller's layout comes back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/allocator.h"
#include "core/problem.h"

namespace fastconv::bindings {

namespace py = pybind11;

enum class Layout { kChannelsLast, kNCHW };

// The array as it is, any strides; TypeError for another dtype than float32, float64, int64, uint8 in native byte
// order, or bfloat16, which numpy has not: a structure of one field of that name, of two bytes.
TensorView view(const py::array& array, const char* name);

// The layout that a result computed from this 4-D array should have: dense NCHW arrays are answered in NCHW.
Layout layout_of(const TensorView& v);

py::dtype numpy_dtype(DType dtype);

// A dense array of the given layout in memory from the caching allocator.
py::array new_array(DType dtype, const std::vector<int64_t>& shape, Layout layout = Layout::kNCHW);

// A 4-D array made dense channels-last: itself, or a copy that lives as long as this object.
class ChannelsLast {
 public:
  ChannelsLast(const py::array& array, const char* name);
  const TensorView& view() const { return view_; }
  void* data() const { return view_.data; }
  Layout layout() const { return layout_; }

 private:
  TensorView view_;
  Layout layout_;
  Buffer copy_;
};

// An output computed in channels-last and handed out in the layout wanted.
class Output {
 public:
  Output(DType dtype, const Shape& shape, Layout layout);
  void* data() const { return channels_last_.mutable_data(); }
  py::array finish();  // needs the GIL

 private:
  mutable py::array channels_last_;
  Layout layout_;
};

Shape shape4(const TensorView& v, const char* name);

}  // namespace fastconv::bindings

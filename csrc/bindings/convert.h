// Between arrays and TensorViews. The only place where layouts are converted: below it every activation is dense
// channels-last, above it the caller's layout comes back.
#pragma once

#include "bindings/array.h"
#include "core/allocator.h"
#include "core/problem.h"

namespace fastconv::bindings {

enum class Layout { kChannelsLast, kNCHW };

// The layout that a result computed from this 4-D array should have: dense NCHW arrays are answered in NCHW.
Layout layout_of(const TensorView& v);

// A dense array of the given layout in memory from the caching allocator.
Array new_array(DType dtype, const std::vector<int64_t>& shape, Layout layout = Layout::kNCHW);

// A 4-D array made dense channels-last: itself, or a copy that lives as long as this object.
class ChannelsLast {
 public:
  ChannelsLast(const Array& array, const char* name);
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
  Array finish();  // needs the GIL

 private:
  mutable Array channels_last_;
  Layout layout_;
};

Shape shape4(const TensorView& v, const char* name);

// A convolution as Python writes it down. TypeError for a dtype in which this device has none.
Conv2dProblem describe_conv2d(const Shape& x, const Shape& w, Pair stride, const Padding& padding, Pair dilation,
                              int64_t groups, const std::string& dtype);

}  // namespace fastconv::bindings

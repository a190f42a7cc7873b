// The array of a CUDA device: a view of memory that it shares with other views and, through DLPack, with other
// libraries. Python sees it as fastconv._cuda.Array.
#pragma once

#include <memory>
#include <string>

#include "core/tensor.h"

namespace fastconv::bindings {

class DeviceArray {
 public:
  DeviceArray(const TensorView& view, std::shared_ptr<void> owner) : view_(view), owner_(std::move(owner)) {}

  const TensorView& view() const { return view_; }
  const std::shared_ptr<void>& owner() const { return owner_; }
  const void* data() const { return view_.data; }
  void* mutable_data() const { return view_.data; }

 private:
  TensorView view_;
  std::shared_ptr<void> owner_;  // keeps the memory
};

// The dtype of that name; TypeError for one that a CUDA device does not have here.
DType parse_dtype(const std::string& name);

}  // namespace fastconv::bindings

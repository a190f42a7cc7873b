// The array of a CUDA device: a view of memory that it shares with other views and, through DLPack, with other
// libraries. Python sees it as fastconv._cuda.Array.
#pragma once

#include <memory>

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

}  // namespace fastconv::bindings

// Weights in the forms that the algorithms read, kept between calls that have the same weights.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/allocator.h"
#include "cpu/registry.h"

namespace fastconv::cpu {

// A form belongs to an implementation of convolution, whose name it has, and to an ISA, whose tiles it fits. Whoever
// owns a cache gives it to calls with one set of weights only. Safe to use from several threads.
class WeightCache {
 public:
  bool holds(const char* name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return forms_.count({name, &kernels()}) != 0;
  }

  // `floats` floats, written by fill(float*) the first time.
  template <class Fill> const float* get(const char* name, int64_t floats, Fill&& fill) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key{name, &kernels()};
    const auto found = forms_.find(key);
    if (found != forms_.end()) return found->second.as<float>();
    Buffer made(floats * sizeof(float));
    fill(made.as<float>());
    return forms_.emplace(key, std::move(made)).first->second.as<float>();
  }

 private:
  using Key = std::pair<std::string, const KernelTable*>;
  std::mutex mutex_;
  std::map<Key, Buffer> forms_;
};

// Such a form for the duration of a call: the cache's, or one made now where there is none.
class PackedWeights {
 public:
  template <class Fill> PackedWeights(WeightCache* cache, const char* name, int64_t floats, Fill&& fill) {
    floats = std::max<int64_t>(floats, 1);
    if (cache) {
      data_ = cache->get(name, floats, fill);
    } else {
      own_ = Buffer(floats * sizeof(float));
      fill(own_.as<float>());
      data_ = own_.as<float>();
    }
  }
  const float* data() const { return data_; }

 private:
  Buffer own_;
  const float* data_;
};

}  // namespace fastconv::cpu

#include <map>
#include <mutex>

#include "core/device.h"
#include "cuda/device.h"

namespace fastconv {

bool computes_in(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat64 || t == DType::kFloat16 || t == DType::kBFloat16;
}
const char* floating_dtypes() { return "float32, float64, float16 or bfloat16"; }

}  // namespace fastconv

namespace fastconv::cuda {

const int32_t* constant_table(const std::vector<int32_t>& content) {
  static std::mutex mutex;
  static auto* tables = new std::map<std::vector<int32_t>, const int32_t*>;  // for good, as their memory
  if (content.empty()) return nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  const int32_t*& table = (*tables)[content];
  if (!table) table = static_cast<const int32_t*>(permanent_copy(content.data(), content.size() * sizeof(int32_t)));
  return table;
}

}  // namespace fastconv::cuda

#include "core/device.h"

namespace fastconv {

bool computes_in(DType t) { return t == DType::kFloat32 || t == DType::kFloat64; }
const char* floating_dtypes() { return "float32 or float64"; }

}  // namespace fastconv

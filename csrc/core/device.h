// The floating types that the kernels of this build know; cpu/ and cuda/ define it.
#pragma once

#include "core/dtype.h"

namespace fastconv {

bool computes_in(DType);
const char* floating_dtypes();  // their names, for messages

}  // namespace fastconv

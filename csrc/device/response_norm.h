// Local response normalisation of dense channels-last arrays.
#pragma once

#include "core/response_norm_problem.h"

namespace fastconv::FASTCONV_DEVICE {

void response_norm(const ResponseNormProblem&, const void* x, void* y);
void response_norm_backward(const ResponseNormProblem&, const void* dy, const void* x, void* dx);

}  // namespace fastconv::FASTCONV_DEVICE

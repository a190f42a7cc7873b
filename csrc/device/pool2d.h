// Pooling on the CPU. Activations are dense channels-last [n][h][w][c]; indices int64 in the same layout as y.
#pragma once

#include "core/pool_problem.h"

namespace fastconv::FASTCONV_DEVICE {

// indices: of the maxima in the plane; places: their numbers in the windows, row-major over the part inside the image,
// for windows of at most 256 elements. Like y; one or both null.
void max_pool2d(const Pool2dProblem&, const void* x, void* y, int64_t* indices, uint8_t* places);
// The maxima are found again in x.
void max_pool2d_backward(const Pool2dProblem&, const void* dy, const void* x, void* dx);
void max_pool2d_backward_places(const Pool2dProblem&, const void* dy, const uint8_t* places, void* dx);
// ValueError if an index lies outside the plane; nothing is written then.
void max_pool2d_backward_indices(const Pool2dProblem&, const void* dy, const int64_t* indices, void* dx);

void avg_pool2d(const Pool2dProblem&, const void* x, void* y);
void avg_pool2d_backward(const Pool2dProblem&, const void* dy, void* dx);

}  // namespace fastconv::FASTCONV_DEVICE

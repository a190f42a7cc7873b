// What a step of training does on the device besides the operations: making its batch, and judging its figures.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "device/optimizer.h"

namespace fastconv::cuda {

// A batch of images that lie on the device: x[i][h][w][c] = pixel scale[c] + shift[c] in float32, then in dtype, of
// image pick.index padded with `padding` zero pixels, cropped from (top, left) on and mirrored if asked for.
struct Pick {
  int64_t index, top, left, mirrored;
};
struct BatchProblem {
  int64_t count, height, width, channels, padding;
};
void gather_batch(const BatchProblem&, const uint8_t* images, const int64_t* labels, const Pick* picks,
                  const float* scale, const float* shift, DType dtype, void* x, int64_t* y);

// What is known of a step before it changes the weights.
struct StepFigures {
  double loss, correct;  // summed over the parts of its batch
  double norm;           // of all gradients
  double factor;         // of the gradients where they are clipped; NaN where loss or norm is not finite
};
// Adds weight * loss, and the rows of logits[rows][classes] that are largest at their target.
void add_figures(StepFigures*, DType loss_type, const void* loss, double weight, DType logits_type, const void* logits,
                 const int64_t* target, int64_t rows, int64_t classes);
// The norm that gradient_norm returns, left on the device.
void store_gradient_norm(const std::vector<Parameter>&, double* norm);
// factor from loss and norm; max_norm of infinity does not clip, and does not look at the norm.
void judge(StepFigures*, double max_norm);

}  // namespace fastconv::cuda

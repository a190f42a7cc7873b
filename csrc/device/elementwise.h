// Elementwise operations on dense arrays: n elements in whatever order they lie in memory.
#pragma once

#include "core/elementwise.h"
#include "core/problem.h"

namespace fastconv::FASTCONV_DEVICE {

void elementwise(Elementwise, DType, const void* x, void* y, int64_t n, double parameter);  // y may be x
void elementwise_backward(Elementwise, DType, const void* dy, const void* x, void* dx, int64_t n, double parameter);
void add(DType, const void* a, const void* b, void* y, int64_t n);  // y may be a

// y = activation(y)
void apply_activation(Activation, DType, void* y, int64_t n);
// dx = dy activation'(x)
void apply_activation_backward(Activation, DType, const void* dy, const void* x, void* dx, int64_t n);
// y[row][c] += bias[c]
void add_channel_bias(DType, void* y, int64_t rows, int64_t channels, const void* bias);

// y = x / (1 - p) where element i is kept, else 0; element i is dropped with probability p by word offset + i of the
// random sequence `seed`. y may be x. The backward is the same function of dy. 0 <= p <= 1.
void dropout(DType, const void* x, void* y, int64_t n, double p, uint64_t seed, uint64_t offset);
// The same for rows of `size` elements: row i is kept or dropped whole, by word offset + i.
void stochastic_depth(DType, const void* x, void* y, int64_t rows, int64_t size, double p, uint64_t seed,
                      uint64_t offset);

}  // namespace fastconv::FASTCONV_DEVICE

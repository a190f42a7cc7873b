// All kernels of one ISA. No standard library here: this header is compiled with every ISA's flags, and an inline
// function compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/channels.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/layout.h"
#include "cpu/kernels/loss.h"
#include "cpu/kernels/optimizer.h"
#include "cpu/kernels/pool2d.h"
#include "cpu/kernels/response_norm.h"
#include "cpu/kernels/roofline.h"
#include "cpu/kernels/winograd.h"

namespace fastconv::cpu {

// A family of kernels for both floating-point types.
template <template <class> class Kernels> struct Typed {
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T> const Kernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return f32;
    else
      return f64;
  }
};

struct KernelTable {
  const char* isa;
  Conv2dKernels conv2d;
  WinogradKernels winograd;
  LayoutKernels layout;
  Typed<Pool2dKernels> pool2d;
  Typed<BatchNormKernels> batch_norm;
  Typed<ResponseNormKernels> response_norm;
  Typed<ChannelKernels> channels;
  Typed<ElementwiseKernels> elementwise;
  Typed<LossKernels> loss;
  Typed<OptimizerKernels> optimizer;
  RooflineKernels roofline;
};

}  // namespace fastconv::cpu

// All kernels of one ISA. No standard library here: this header is compiled with every ISA's flags, and an inline
// function compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/roofline.h"

namespace fastconv::cpu {

struct KernelTable {
  const char* isa;
  Conv2dKernels conv2d;
  RooflineKernels roofline;
};

}  // namespace fastconv::cpu

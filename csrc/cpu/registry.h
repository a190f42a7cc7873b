// One table of kernels for each ISA, chosen once by what CPU and operating system support; FASTCONV_ISA overrides.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels/table.h"

namespace fastconv::cpu {

const KernelTable& kernels();               // of the chosen ISA
std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // ValueError unless available
// Whether arithmetic is in 512 bits at once, so that it is twice as fast beside memory as in 256: Zen 4 takes AVX-512
// in halves.
bool full_width();

}  // namespace fastconv::cpu

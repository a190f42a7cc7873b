// One table of kernels for each ISA, chosen once by what CPU and operating system support; FASTCONV_ISA overrides.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels/table.h"

namespace fastconv::cpu {

const KernelTable& kernels();               // of the chosen ISA
std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // ValueError unless available

}  // namespace fastconv::cpu

// The kernels compiled for avx512; exports one symbol.
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/table.inl.h"

namespace fastconv::cpu {
extern const KernelTable table_avx512;
constexpr KernelTable table_avx512 = kernel_table();
}  // namespace fastconv::cpu

// The kernels compiled for avx2; exports one symbol.
#include "cpu/kernels/simd_avx2.h"
#include "cpu/kernels/table.inl.h"

namespace fastconv::cpu {
extern const KernelTable table_avx2;
constexpr KernelTable table_avx2 = kernel_table();
}  // namespace fastconv::cpu

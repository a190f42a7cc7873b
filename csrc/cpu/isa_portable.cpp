// The kernels compiled for portable; exports one symbol.
#include "cpu/kernels/simd_portable.h"
#include "cpu/kernels/table.inl.h"

namespace fastconv::cpu {
extern const KernelTable table_portable;
constexpr KernelTable table_portable = kernel_table();
}  // namespace fastconv::cpu

// How a kernel in the form of machine.h is started: on the device, or block by block in the emulator.
//
//   struct Example {
//     struct Arguments {...};
//     static constexpr int kThreads = 256, kBlocksPerSM = 2, kSharedBytes = 65536;
//     FC_DEVICE static void run(const Arguments&, uint32_t shared);
//   };
//   run_kernel<Example>({x, y, z}, arguments);
#pragma once

#include <atomic>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/machine.h"

namespace fastconv::cuda {

struct Grid {
  int x, y, z;
};

#ifdef __CUDACC__

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSM)
    machine_entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel::run(arguments, shared_address(shared));
}

template <class Kernel> void run_kernel(Grid grid, const typename Kernel::Arguments& arguments) {
  static std::atomic<bool> allowed{false};  // by a call that succeeded: a failure may pass
  if (!allowed) {
    cudaFuncSetAttribute(machine_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
    check_launch("cudaFuncSetAttribute");
    allowed = true;
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  machine_entry<Kernel><<<blocks, Kernel::kThreads, Kernel::kSharedBytes, current_stream()>>>(arguments);
  check_launch(__PRETTY_FUNCTION__);
}

#else

template <class Kernel> void run_kernel(Grid grid, const typename Kernel::Arguments& arguments) {
  do_or_record([grid, arguments] {
    thread_local emulator::Block block;
    block.grid = grid.x;
    for (block.z = 0; block.z < grid.z; ++block.z)
      for (block.y = 0; block.y < grid.y; ++block.y)
        for (block.x = 0; block.x < grid.x; ++block.x)
          emulator::run_block(block, Kernel::kThreads, Kernel::kSharedBytes,
                              [&] { Kernel::run(arguments, emulator::kSharedBase); });
  });
}

#endif

}  // namespace fastconv::cuda

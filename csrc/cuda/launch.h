// How a kernel is written and started. The body of a kernel is a plain function of (block, thread), cut into phases
// where a barrier stands; under nvcc it runs on the device, otherwise on the host in loops over blocks, phases and
// threads. So the very same body is tested without a GPU.
//
//   struct Example {
//     static constexpr int kThreads = 256, kPhases = 2;
//     struct Shared { float sums[kThreads]; };  // of a block; not initialised
//     struct Local { float sum; };              // of a thread, kept from phase to phase
//     template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared&, Local&) const;
//     ... its arguments
//   };
//   launch(Example{...}, blocks);
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/device.h"
#include "cuda/scalar.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace fastconv::cuda {

constexpr int kBlockThreads = 256;

struct Nothing {};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Throws DeviceError if the launch before failed; `kernel` is named in the message.
void check_launch(const char* kernel);

#ifdef __CUDACC__

template <int PHASE, class Kernel>
__device__ __forceinline__ void run_phases(const Kernel& kernel, typename Kernel::Shared& shared,
                                           typename Kernel::Local& local) {
  kernel.template run<PHASE>(blockIdx.x, static_cast<int>(threadIdx.x), shared, local);
  if constexpr (PHASE + 1 < Kernel::kPhases) {
    __syncthreads();
    run_phases<PHASE + 1>(kernel, shared, local);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) entry(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  typename Kernel::Local local;
  run_phases<0>(kernel, shared, local);
}

template <class Kernel> void launch(const Kernel& kernel, int64_t blocks) {
  if (blocks == 0) return;
  entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, current_stream()>>>(kernel);
  check_launch(__PRETTY_FUNCTION__);
}

template <class Function>
__global__ void __launch_bounds__(kBlockThreads, 2) entry_each(int64_t n, const __grid_constant__ Function function) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; i < n; i += step) function(i);
}

// function(i) for 0 <= i < n, in any order.
template <class Function> void for_each(int64_t n, const Function& function) {
  if (n == 0) return;
  constexpr int64_t kBlocksEach = 16;  // of a multiprocessor: two rounds of eight that run at a time
  const int64_t most = kBlocksEach * device_info().multiprocessors;
  const int64_t needed = ceil_divide(n, kBlockThreads);
  const auto blocks = static_cast<unsigned>(needed < most ? needed : most);
  entry_each<Function><<<blocks, kBlockThreads, 0, current_stream()>>>(n, function);
  check_launch(__PRETTY_FUNCTION__);
}

#else

template <int PHASE, class Kernel>
void run_phases(const Kernel& kernel, int64_t block, typename Kernel::Shared& shared,
                std::vector<typename Kernel::Local>& locals) {
  for (int thread = 0; thread < Kernel::kThreads; ++thread)
    kernel.template run<PHASE>(block, thread, shared, locals[thread]);
  if constexpr (PHASE + 1 < Kernel::kPhases) run_phases<PHASE + 1>(kernel, block, shared, locals);
}

// Does the work, or adds it to the graph that this thread records.
void do_or_record(std::function<void()> work);

template <class Kernel> void launch(const Kernel& kernel, int64_t blocks) {
  do_or_record([kernel, blocks] {
    for (int64_t block = 0; block < blocks; ++block) {
      // Poisoned, as shared memory and registers hold anything.
      std::vector<typename Kernel::Local> locals(Kernel::kThreads);
      std::vector<typename Kernel::Shared> shared(1);
      memset(static_cast<void*>(locals.data()), 0xff, locals.size() * sizeof(locals[0]));
      memset(static_cast<void*>(shared.data()), 0xff, sizeof(shared[0]));
      run_phases<0>(kernel, block, shared[0], locals);
    }
  });
}

template <class Function> void for_each(int64_t n, const Function& function) {
  do_or_record([n, function] {
    for (int64_t i = 0; i < n; ++i) function(i);
  });
}

#endif

}  // namespace fastconv::cuda

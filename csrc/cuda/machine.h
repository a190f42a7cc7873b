// What a kernel asks of the machine, each a function of one instruction or two. Shared memory is addressed by 32-bit
// numbers, as the instructions do. Kernels written with nothing else run on the host too: there emulator/machine.h,
// with the same functions, takes this file's place.
#pragma once

#include "cuda/geometry.h"
#include "cuda/numeric.h"

#if !defined(__CUDACC__)
#include "cuda/emulator/machine.h"
#else

#include <cuda.h>

#define FC_DEVICE __device__ __forceinline__

namespace fastconv::cuda {

using TensorMap = CUtensorMap;

struct alignas(16) Chunk {
  uint32_t word[4];
};

FC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FC_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FC_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FC_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
FC_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

FC_DEVICE void block_sync() { __syncthreads(); }
// Barrier of kThreads threads; a number that is not a constant would reserve all sixteen.
template <int kId, int kThreads> FC_DEVICE void group_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
FC_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }

FC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
FC_DEVICE void store_shared(uint32_t at, const Chunk& c) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(c.word[0]), "r"(c.word[1]), "r"(c.word[2]),
               "r"(c.word[3])
               : "memory");
}
FC_DEVICE Chunk load_shared_chunk(uint32_t at) {
  Chunk c;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "r"(at)
               : "memory");
  return c;
}
FC_DEVICE void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
FC_DEVICE float load_shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
FC_DEVICE uint32_t load_shared_word(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

// --- sm_80 -----------------------------------------------------------------------------------------------------------

// Copies 16 (or 8) bytes, or zeros where not valid; then the source is not read, but must be an address.
FC_DEVICE void copy_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
FC_DEVICE void copy_async_8(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 8 : 0)
               : "memory");
}
FC_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> FC_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

FC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
FC_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d += a b: m16n8k16 for 16-bit numbers, m16n8k8 for TensorFloat-32; an operand is 32 bytes of k either way.
FC_DEVICE void mma(BFloat16Numbers, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FC_DEVICE void mma(Float16Numbers, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FC_DEVICE void mma(TensorFloat32Numbers, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FC_DEVICE void store_global(void* to, const Chunk& c) { *static_cast<Chunk*>(to) = c; }
FC_DEVICE void store_global(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

// --- sm_90a ----------------------------------------------------------------------------------------------------------

FC_DEVICE void barrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
FC_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FC_DEVICE void barrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
FC_DEVICE void barrier_arrive_expect(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
FC_DEVICE bool barrier_passed(uint32_t at, uint32_t parity) {
  uint32_t passed;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed)
               : "r"(at), "r"(parity)
               : "memory");
  return passed != 0;
}
// With FASTCONV_CUDA_BOUNDED_WAITS a wait of two seconds ends the kernel with an error instead of hanging the device.
FC_DEVICE void barrier_wait(uint32_t at, uint32_t parity) {
#if defined(FASTCONV_CUDA_BOUNDED_WAITS)
  const auto now = [] {
    uint32_t nanoseconds;
    asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(nanoseconds));
    return nanoseconds;
  };
  if (barrier_passed(at, parity)) return;  // most often: the clock is not read
  const uint32_t start = now();
  while (!barrier_passed(at, parity))
    if (now() - start > 2000000000u) __trap();
#else
  while (!barrier_passed(at, parity)) {
  }
#endif
}

FC_DEVICE void tma_load_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h, int n,
                               int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
}
FC_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
FC_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
FC_DEVICE void tma_store(uint32_t from, const TensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(x), "r"(y)
               : "memory");
}
FC_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read, or until everything has been written.
FC_DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
FC_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Ordinary accesses of this thread to shared memory come before what the copy engine and the tensor cores do next.
FC_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> FC_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kRegisters> FC_DEVICE void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> FC_DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

FC_DEVICE void stmatrix_x4(uint32_t at, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// d (+)= a b, d 64 x N in registers, a and b 16 deep in shared memory. kMajor: k runs along the rows of 128 bytes.
#define FC_REGISTERS_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FC_REGISTERS_1 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FC_REGISTERS_2 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FC_REGISTERS_3 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FC_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FC_SUMS_32(i) FC_SUMS_8(i), FC_SUMS_8(i + 8), FC_SUMS_8(i + 16), FC_SUMS_8(i + 24)
#define FC_WGMMA(columns, type, registers, sums, a, b, add, of_a, of_b) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " add \
               ", 0; " \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " a ", " b \
               ", p, 1, 1, " of_a ", " of_b ";}" \
               : sums \
               : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), "n"(kMajorA ? 0 : 1), \
                 "n"(kMajorB ? 0 : 1))
#define FC_WGMMA_OF(Type, type) \
  template <bool kMajorA, bool kMajorB> \
  FC_DEVICE void wgmma(Type, float (&d)[32], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) { \
    FC_WGMMA("64", type, FC_REGISTERS_0, FC_SUMS_32(0), "%32", "%33", "%34", "%35", "%36"); \
  } \
  template <bool kMajorA, bool kMajorB> \
  FC_DEVICE void wgmma(Type, float (&d)[64], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) { \
    FC_WGMMA("128", type, FC_REGISTERS_0 ", " FC_REGISTERS_1, FC_SUMS_32(0) FC_COMMA FC_SUMS_32(32), "%64", "%65", \
             "%66", "%67", "%68"); \
  } \
  template <bool kMajorA, bool kMajorB> \
  FC_DEVICE void wgmma(Type, float (&d)[128], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) { \
    FC_WGMMA("256", type, FC_REGISTERS_0 ", " FC_REGISTERS_1 ", " FC_REGISTERS_2 ", " FC_REGISTERS_3, \
             FC_SUMS_32(0) FC_COMMA FC_SUMS_32(32) FC_COMMA FC_SUMS_32(64) FC_COMMA FC_SUMS_32(96), "%128", "%129", \
             "%130", "%131", "%132"); \
  }
#define FC_COMMA ,
FC_WGMMA_OF(BFloat16Numbers, "bf16")
FC_WGMMA_OF(Float16Numbers, "f16")
#undef FC_REGISTERS_0
#undef FC_REGISTERS_1
#undef FC_REGISTERS_2
#undef FC_REGISTERS_3
#undef FC_SUMS_8
#undef FC_SUMS_32
#undef FC_WGMMA
#undef FC_WGMMA_OF
#undef FC_COMMA

}  // namespace fastconv::cuda
#endif

// The machine of machine.h on the host: every thread of a block is a coroutine, instructions of a warp or a warpgroup
// take place when the last of their threads arrives, and shared memory is an array that starts as NaN. It shows wrong
// indices, wrong lanes, and waits that are missing or never end; not time, bank conflicts or races inside one
// instruction.
//
// An asynchronous instruction may take effect at once or as late as the program allows. Both are tried: what reads too
// early fails in the one, what overwrites too early in the other.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ucontext.h>

#include "cuda/geometry.h"
#include "cuda/numeric.h"
#include "cuda/tensor_map.h"

#define FC_DEVICE inline

namespace fastconv::cuda {

struct alignas(16) Chunk {
  uint32_t word[4];
};

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::exit(2);
}

struct Options {
  bool late_copies = false;    // cp.async and TMA take effect only when waited for
  bool late_products = false;  // wgmma likewise
  uint32_t order = 1;          // seed of the order in which warps run
};

constexpr uint32_t kSharedBase = 1024;  // not zero, so that an offset taken for an address fails

// A set of threads that must arrive together: a warp's instruction, a named barrier.
struct Meeting {
  int arrived = 0;
  uint64_t round = 0;
  const char* what = nullptr;
  std::vector<void*> slots;
};

// Counts arrivals and bytes, as an mbarrier does.
struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Thread {
  ucontext_t start;
  jmp_buf jump;
  bool started = false, finished = false;
  std::vector<char> stack;
  std::deque<std::vector<std::function<void()>>> copy_groups;   // cp.async
  std::deque<std::vector<std::function<void()>>> store_groups;  // TMA stores: the read of shared memory
};

struct Group {  // a warpgroup's products
  std::deque<std::vector<std::function<void()>>> product_groups;
};

struct Block {
  Options options;
  int threads = 0;
  int x = 0, y = 0, z = 0, grid = 1;
  std::vector<uint8_t> shared;
  std::vector<int> writer;  // per 16 bytes: 1 + the thread whose ordinary store no proxy fence has followed yet
  std::vector<std::unique_ptr<Thread>> thread;
  std::vector<Meeting> warp, warpgroup;
  std::vector<Group> group;
  std::map<int, Meeting> named;
  std::map<uint32_t, Barrier> barrier;
  std::deque<std::function<void()>> late;  // copies that nobody has had to see yet
  uint64_t progress = 0;
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
};

inline Block*& block() {
  thread_local Block* current = nullptr;
  return current;
}
inline Thread& self() { return *block()->thread[block()->current]; }

__attribute__((noinline)) inline void yield() {
  Block& b = *block();
  if (_setjmp(self().jump) == 0) _longjmp(b.scheduler, 1);
}

inline void thread_main() {
  block()->body();
  for (auto& group : self().store_groups)
    if (!group.empty()) fail("a thread ends while the copy engine may still read its block's shared memory");
  self().finished = true;
  ++block()->progress;
  _longjmp(block()->scheduler, 1);
}

inline uint8_t* shared(uint32_t at, uint32_t bytes) {
  Block& b = *block();
  if (at < kSharedBase || at - kSharedBase + bytes > b.shared.size()) fail("access outside shared memory");
  return b.shared.data() + (at - kSharedBase);
}

// The last thread to arrive executes; the others wait for it.
template <class F> void meet(Meeting& m, int threads, int index, const char* what, void* slot, F&& execute) {
  if (m.arrived == 0) {
    m.what = what;
    m.slots.assign(threads, nullptr);
  }
  if (m.what != what && std::strcmp(m.what, what) != 0) fail("threads of one group at different instructions");
  if (index >= 0) m.slots[index] = slot;
  const uint64_t round = m.round;
  if (++m.arrived == threads) {
    execute(m.slots);
    m.arrived = 0;
    ++m.round;
    ++block()->progress;
  } else {
    while (m.round == round) yield();
  }
}
template <class F> void meet_warp(const char* what, void* slot, F&& execute) {
  Block& b = *block();
  meet(b.warp[b.current / 32], 32, b.current % 32, what, slot, execute);
}

inline void run_all(std::vector<std::function<void()>>& actions) {
  for (auto& action : actions) action();
}

// Runs body for every thread of one block to the end.
inline void run_block(Block& b, int threads, size_t shared_bytes, std::function<void()> body) {
  b.threads = threads;
  b.shared.assign(shared_bytes, 0xFF);
  b.writer.assign(shared_bytes / 16 + 1, 0);
  b.warp.assign(threads / 32, {});
  b.warpgroup.assign(threads / 128 + 1, {});
  b.group.assign(threads / 128 + 1, {});
  b.named.clear();
  b.barrier.clear();
  b.late.clear();
  b.body = std::move(body);
  block() = &b;
  if (static_cast<int>(b.thread.size()) != threads) {
    b.thread.clear();
    for (int i = 0; i < threads; ++i) {
      b.thread.push_back(std::make_unique<Thread>());
      b.thread.back()->stack.resize(48 << 10);
    }
  }
  for (auto& t : b.thread) {
    t->started = t->finished = false;
    t->copy_groups.assign(1, {});
    t->store_groups.assign(1, {});
    getcontext(&t->start);
    t->start.uc_stack.ss_sp = t->stack.data();
    t->start.uc_stack.ss_size = t->stack.size();
    t->start.uc_link = nullptr;
    makecontext(&t->start, thread_main, 0);
  }
  for (auto& g : b.group) g.product_groups.assign(1, {});
  volatile uint32_t random = b.options.order;
  volatile int first = 0, at = 0, alive = threads;
  volatile uint64_t before = 0;
  const int warps = threads / 32;
  while (alive > 0) {
    before = b.progress;
    random = random * 1664525u + 1013904223u;
    first = static_cast<int>((random >> 16) % warps) * 32;
    alive = 0;
    for (at = 0; at < threads; at = at + 1) {
      b.current = (first + at) % threads;
      Thread& t = self();
      if (t.finished) continue;
      alive = alive + 1;
      if (_setjmp(b.scheduler) == 0) {
        if (!t.started) {
          t.started = true;
          setcontext(&t.start);
        }
        _longjmp(t.jump, 1);
      }
    }
    if (alive > 0 && b.progress == before) {
      if (b.late.empty()) fail("every thread waits for another: the kernel would hang");
      auto action = std::move(b.late.front());
      b.late.pop_front();
      action();
      ++b.progress;
    }
  }
  for (auto& action : b.late) action();
}

}  // namespace emulator

inline int thread_index() { return emulator::block()->current; }
inline int block_x() { return emulator::block()->x; }
inline int block_y() { return emulator::block()->y; }
inline int block_z() { return emulator::block()->z; }
inline int grid_x() { return emulator::block()->grid; }

inline void block_sync() {
  emulator::Block& b = *emulator::block();
  emulator::meet(b.named[0], b.threads, -1, "barrier", nullptr, [](auto&) {});
}
template <int kId, int kThreads> void group_sync() {
  static_assert(kId > 0 && kId < 16, "barrier 0 belongs to the block");
  emulator::meet(emulator::block()->named[kId], kThreads, -1, "barrier", nullptr, [](auto&) {});
}
inline float shuffle_xor(float v, int mask) {
  float other = 0;
  std::pair<float, float*> mine{v, &other};
  emulator::meet_warp("shuffle", &mine, [mask](std::vector<void*>& slots) {
    for (int lane = 0; lane < 32; ++lane)
      *static_cast<std::pair<float, float*>*>(slots[lane])->second =
          static_cast<std::pair<float, float*>*>(slots[lane ^ mask])->first;
  });
  return other;
}

// Ordinary stores are marked until their thread fences them against the copy engine and the tensor cores.
template <class V> void emulated_store(uint32_t at, const V& v) {
  if (at % sizeof(V) != 0) emulator::fail("unaligned store to shared memory");
  std::memcpy(emulator::shared(at, sizeof(V)), &v, sizeof(V));
  emulator::Block& b = *emulator::block();
  b.writer[(at - emulator::kSharedBase) / 16] = 1 + b.current;
}
template <class V> V emulated_load(uint32_t at) {
  if (at % sizeof(V) != 0) emulator::fail("unaligned load from shared memory");
  V v;
  std::memcpy(&v, emulator::shared(at, sizeof(V)), sizeof(V));
  return v;
}
inline void store_shared(uint32_t at, const Chunk& c) { emulated_store(at, c); }
inline void store_shared(uint32_t at, float v) { emulated_store(at, v); }
inline Chunk load_shared_chunk(uint32_t at) { return emulated_load<Chunk>(at); }
inline float load_shared_float(uint32_t at) { return emulated_load<float>(at); }
inline uint32_t load_shared_word(uint32_t at) { return emulated_load<uint32_t>(at); }

// --- sm_80 -----------------------------------------------------------------------------------------------------------

inline void emulated_copy(uint32_t to, const void* from, uint32_t bytes, bool valid) {
  if (to % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) emulator::fail("unaligned asynchronous copy");
  auto copy = [=] {
    uint8_t* target = emulator::shared(to, bytes);
    if (valid)
      std::memcpy(target, from, bytes);
    else
      std::memset(target, 0, bytes);
  };
  if (emulator::block()->options.late_copies)
    emulator::self().copy_groups.back().push_back(copy);
  else
    copy();
}
inline void copy_async_16(uint32_t to, const void* from, bool valid) { emulated_copy(to, from, 16, valid); }
inline void copy_async_8(uint32_t to, const void* from, bool valid) { emulated_copy(to, from, 8, valid); }
inline void copy_async_commit() { emulator::self().copy_groups.emplace_back(); }
template <int kPending> void copy_async_wait() {
  auto& groups = emulator::self().copy_groups;  // the last is open
  while (groups.size() > kPending + 1) {
    emulator::run_all(groups.front());
    groups.pop_front();
  }
}

template <bool kTransposed> void emulated_ldmatrix(uint32_t (&r)[4], uint32_t at) {
  if (at % 16 != 0) emulator::fail("unaligned ldmatrix");
  std::pair<uint32_t, uint32_t*> mine{at, r};
  emulator::meet_warp(kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](std::vector<void*>& slots) {
    using Slot = std::pair<uint32_t, uint32_t*>;
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t half[2];
        for (int e = 0; e < 2; ++e) {
          const int row = kTransposed ? lane % 4 * 2 + e : lane / 4;
          const int column = kTransposed ? lane / 4 : lane % 4 * 2 + e;
          const uint32_t address = static_cast<Slot*>(slots[i * 8 + row])->first;
          std::memcpy(&half[e], emulator::shared(address, 16) + column * 2, 2);
        }
        static_cast<Slot*>(slots[lane])->second[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
      }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t at) { emulated_ldmatrix<false>(r, at); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t at) { emulated_ldmatrix<true>(r, at); }

// Element `index` (0 .. 32 / sizeof) of an operand's row of 32 bytes, of which a lane holds the columns of lane % 4.
template <class T> float operand_value(const uint32_t* registers, int step, int within) {
  if constexpr (sizeof(typename T::Storage) == 4) {
    const uint32_t v = registers[step];
    if ((v & 0x1FFF) != 0 && (v & 0x7F800000u) != 0x7F800000u)
      emulator::fail("a TensorFloat-32 operand was not rounded");
    return float_of(v);
  } else {
    typename T::Storage v;
    v.bits = static_cast<uint16_t>(registers[step] >> (16 * within));
    return T::load(v);
  }
}

template <class T> void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::meet_warp("mma", &mine, [](std::vector<void*>& slots) {
    constexpr int kPerWord = 4 / sizeof(typename T::Storage), kDepth = 8 * kPerWord;
    float a_tile[16][kDepth], b_tile[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      for (int half = 0; half < 2; ++half)
        for (int e = 0; e < kPerWord; ++e) {
          const int k = half * 4 * kPerWord + lane % 4 * kPerWord + e;
          a_tile[lane / 4][k] = operand_value<T>(s.a, half * 2, e);
          a_tile[lane / 4 + 8][k] = operand_value<T>(s.a, half * 2 + 1, e);
          b_tile[k][lane / 4] = operand_value<T>(s.b, half, e);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const Element at = mma_accumulator(lane, i);
        float& sum = static_cast<Slot*>(slots[lane])->d[i];
        for (int k = 0; k < kDepth; ++k) sum += a_tile[at.row][k] * b_tile[k][at.column];
      }
  });
}

inline void store_global(void* to, const Chunk& c) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("unaligned store of 16 bytes");
  std::memcpy(to, &c, 16);
}

inline void store_global(float* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) emulator::fail("unaligned store of 8 bytes");
  to[0] = first;
  to[1] = second;
}

// --- sm_90a ----------------------------------------------------------------------------------------------------------

using TensorMap = TensorMapPlan;

namespace emulator {

inline Barrier& barrier(uint32_t at) {
  const auto found = block()->barrier.find(at);
  if (found == block()->barrier.end()) fail("no mbarrier there");
  return found->second;
}
inline void settle(Barrier& b) {
  ++block()->progress;
  if (b.pending < 0) fail("an mbarrier got more arrivals than it counts");
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
}

// Visits the numbers of a box in the order in which they lie in shared memory: f(index in memory or -1, index in the
// box).
template <class F> void for_box(const TensorMapPlan& map, const int (&at)[3], F&& f) {
  const int boxes[3] = {map.box[0], map.rank > 1 ? map.box[1] : 1, map.rank > 2 ? map.box[2] : 1};
  int64_t index = 0;
  for (int z = 0; z < boxes[2]; ++z)
    for (int y = 0; y < boxes[1]; ++y)
      for (int x = 0; x < boxes[0]; ++x, ++index) {
        const int64_t i = at[0] + x, j = at[1] + y, k = at[2] + z;
        const bool inside = i >= 0 && i < map.size[0] && j >= 0 && (map.rank < 2 || j < map.size[1]) && k >= 0 &&
                            (map.rank < 3 || k < map.size[2]);
        f(inside ? (k * map.size[1] + j) * map.size[0] + i : -1, index);
      }
}
inline uint8_t* swizzled(uint32_t base, int64_t number) {
  return shared(swizzle_128b(base + static_cast<uint32_t>(number) * 2), 2);
}
inline void check_map(const TensorMapPlan& map, uint32_t shared_at) {
  if (map.rank == 0) fail("an empty tensor map");
  if (shared_at % 1024 != 0) fail("a swizzled box must start at 1024 bytes");
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.size[0] * 2 % 16 != 0) fail("a tensor map's alignment");
  if (!map.im2col && map.box[0] * 2 != 128) fail("a swizzled box has rows of 128 bytes");
}

inline void load(uint32_t to, uint32_t mbarrier, int64_t bytes, const std::function<void()>& copy) {
  const auto action = [=] {
    copy();
    for (int64_t i = 0; i < bytes; i += 16) block()->writer[(to + i - kSharedBase) / 16] = 0;
    Barrier& b = barrier(mbarrier);
    b.bytes -= bytes;
    settle(b);
  };
  if (block()->options.late_copies)
    block()->late.push_back(action);
  else
    action();
}
inline void put(uint32_t to, int64_t index, const TensorMapPlan& map, int64_t from) {
  static const uint16_t zero = 0;
  std::memcpy(swizzled(to, index), from < 0 ? &zero : static_cast<const uint16_t*>(map.data) + from, 2);
}
// What the tensor cores and the copy engine read must not be an ordinary store that no fence has followed.
inline const uint8_t* fenced(uint32_t at) {
  if (block()->writer[(at - kSharedBase) / 16] != 0) fail("an ordinary store is read without a proxy fence");
  return shared(at, 2);
}

}  // namespace emulator

inline void barrier_init(uint32_t at, int count) {
  if (at % 8 != 0) emulator::fail("unaligned mbarrier");
  emulator::block()->barrier[at] = {count, count, 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t at) {
  emulator::Barrier& b = emulator::barrier(at);
  --b.pending;
  emulator::settle(b);
}
inline void barrier_arrive_expect(uint32_t at, int bytes) {
  emulator::barrier(at).bytes += bytes;
  barrier_arrive(at);
}
inline void barrier_wait(uint32_t at, uint32_t parity) {
  emulator::Barrier& b = emulator::barrier(at);
  while ((b.phase & 1) == parity) emulator::yield();
}

// The walk of PTX's im2col mode: base pixels of the box in order; the offset is added where one is read.
inline void tma_load_im2col(uint32_t to, const TensorMap* map, uint32_t mbarrier, int c, int w, int h, int n,
                            int offset_w, int offset_h) {
  const TensorMapPlan& m = *map;
  emulator::check_map(m, to);
  const int64_t last_w = m.size[1] - 1 + m.w.upper, last_h = m.size[2] - 1 + m.h.upper;
  if (!m.im2col) emulator::fail("an im2col copy through a tiled map");
  if (w < m.w.lower || w > last_w || h < m.h.lower || h > last_h || n < 0) emulator::fail("base pixel outside the box");
  if (offset_w < 0 || offset_w > 255 || offset_h < 0 || offset_h > 255) emulator::fail("im2col offset out of range");
  emulator::load(to, mbarrier, int64_t{m.pixels} * 128, [=, &m] {
    int x = w, y = h, image = n;
    for (int pixel = 0; pixel < m.pixels; ++pixel) {
      const int64_t at_w = x + offset_w, at_h = y + offset_h;
      const bool inside = at_w >= 0 && at_w < m.size[1] && at_h >= 0 && at_h < m.size[2] && image < m.size[3];
      for (int i = 0; i < TensorMapPlan::kRowNumbers; ++i) {
        const bool there = inside && c + i < m.size[0];
        emulator::put(to, int64_t{pixel} * TensorMapPlan::kRowNumbers + i, m,
                      there ? ((image * m.size[2] + at_h) * m.size[1] + at_w) * m.size[0] + c + i : -1);
      }
      x += m.step_w;
      if (x <= last_w) continue;
      x = m.w.lower;
      y += m.step_h;
      if (y <= last_h) continue;
      y = m.h.lower;
      ++image;
    }
  });
}
inline void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x, int y, int z = 0) {
  const TensorMapPlan& m = *map;
  emulator::check_map(m, to);
  const int64_t bytes = int64_t{2} * m.box[0] * m.box[1] * (m.rank > 2 ? m.box[2] : 1);
  emulator::load(to, mbarrier, bytes, [=, &m] {
    emulator::for_box(m, {x, y, z}, [&](int64_t from, int64_t index) { emulator::put(to, index, m, from); });
  });
}
inline void tma_store(uint32_t from, const TensorMap* map, int x, int y) {
  const TensorMapPlan& m = *map;
  emulator::check_map(m, from);
  const auto action = [=, &m] {
    emulator::for_box(m, {x, y, 0}, [&](int64_t to, int64_t index) {
      const uint32_t at = swizzle_128b(from + static_cast<uint32_t>(index) * 2);
      if (to >= 0) std::memcpy(static_cast<uint16_t*>(const_cast<void*>(m.data)) + to, emulator::fenced(at), 2);
    });
  };
  if (emulator::block()->options.late_copies)
    emulator::self().store_groups.back().push_back(action);
  else
    action();
}
inline void tma_store_commit() { emulator::self().store_groups.emplace_back(); }
inline void tma_store_wait_read() {
  auto& groups = emulator::self().store_groups;
  while (groups.size() > 1) {
    emulator::run_all(groups.front());
    groups.pop_front();
  }
}
inline void tma_store_wait() { tma_store_wait_read(); }
inline void fence_async_proxy() {
  emulator::Block& b = *emulator::block();
  for (int& writer : b.writer)
    if (writer == 1 + b.current) writer = 0;
}

namespace emulator {
template <class F> void meet_warpgroup(const char* what, void* slot, F&& execute) {
  Block& b = *block();
  meet(b.warpgroup[b.current / 128], 128, b.current % 128, what, slot, execute);
}
inline Group& group() { return block()->group[block()->current / 128]; }

// Number (row of m or n, k) of an operand of wgmma with the 128-byte swizzle, by its descriptor.
template <class T> float operand(uint64_t descriptor, bool k_major, int row, int k) {
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t at = k_major ? start + row / 8 * stride + row % 8 * 128 + k * 2
                              : start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
  typename T::Storage stored;
  std::memcpy(&stored, fenced(swizzle_128b(at)), 2);
  return T::load(stored);
}
}  // namespace emulator

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::meet_warpgroup("wgmma.commit", nullptr, [](auto&) { emulator::group().product_groups.emplace_back(); });
}
template <int kPending> void wgmma_wait() {
  emulator::meet_warpgroup("wgmma.wait", nullptr, [](auto&) {
    auto& groups = emulator::group().product_groups;
    while (groups.size() > kPending + 1) {
      emulator::run_all(groups.front());
      groups.pop_front();
    }
  });
}
template <int kRegisters> void registers_release() {}
template <int kRegisters> void registers_take() {}

inline void stmatrix_x4(uint32_t at, const uint32_t (&r)[4]) {
  if (at % 16 != 0) emulator::fail("unaligned stmatrix");
  std::pair<uint32_t, const uint32_t*> mine{at, r};
  emulator::meet_warp("stmatrix", &mine, [](std::vector<void*>& slots) {
    using Slot = std::pair<uint32_t, const uint32_t*>;
    emulator::Block& b = *emulator::block();
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t row = static_cast<Slot*>(slots[i * 8 + lane / 4])->first;
        std::memcpy(emulator::shared(row, 16) + lane % 4 * 4, &static_cast<Slot*>(slots[lane])->second[i], 4);
        b.writer[(row - emulator::kSharedBase) / 16] = 1 + b.current / 32 * 32 + i * 8 + lane / 4;
      }
  });
}

template <bool kMajorA, bool kMajorB, class T, int kRegisters>
void wgmma(T, float (&d)[kRegisters], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
  struct Slot {
    float* d;
    uint64_t a, b;
    bool accumulate;
  } mine{d, descriptor_a, descriptor_b, accumulate};
  emulator::meet_warpgroup("wgmma", &mine, [](std::vector<void*>& slots) {
    std::vector<Slot> all;
    for (void* slot : slots) all.push_back(*static_cast<Slot*>(slot));
    for (const Slot& s : all)
      if (s.a != all[0].a || s.b != all[0].b || s.accumulate != all[0].accumulate)
        emulator::fail("threads of a warpgroup disagree on a product");
    const auto action = [all] {
      constexpr int kColumns = 2 * kRegisters;
      float a[64][16], b[kColumns][16];
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 64; ++i) a[i][k] = emulator::operand<T>(all[0].a, kMajorA, i, k);
        for (int i = 0; i < kColumns; ++i) b[i][k] = emulator::operand<T>(all[0].b, kMajorB, i, k);
      }
      for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < kRegisters; ++i) {
          const Element at = wgmma_accumulator(thread, i);
          float sum = all[thread].accumulate ? all[thread].d[i] : 0.0f;
          for (int k = 0; k < 16; ++k) sum += a[at.row][k] * b[at.column][k];
          all[thread].d[i] = sum;
        }
    };
    if (emulator::block()->options.late_products)
      emulator::group().product_groups.back().push_back(action);
    else
      action();
  });
}

}  // namespace fastconv::cuda

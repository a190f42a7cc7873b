// The only place with an OpenMP pragma.
//
// Work is cut into a number of chunks that depends on the shape alone; which thread runs a chunk does not matter,
// because a chunk either owns its outputs or writes a partial result that is combined afterwards in the order of the
// chunks. So results have the same bits for every number of threads, whatever size of team OpenMP really gives.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace fastconv::cpu {

int num_threads();            // threads that a parallel_for may use now; 1 in a forked child
void set_num_threads(int n);  // throws unless 1 <= n <= 1024

// While it lives, num_threads() is at most `most`, at least 1, for the thread that made it: for work so small that what
// the threads read of each other's caches costs more than they gain.
class ThreadLimit {
 public:
  explicit ThreadLimit(int64_t most);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  int64_t outer_;
};

// The i-th of `parts` nearly equal ranges of [0, total).
struct Range {
  int64_t begin, end;
};
inline Range split(int64_t total, int64_t parts, int64_t i) {
  const int64_t each = total / parts, extra = total % parts;
  const int64_t begin = i * each + std::min(i, extra);
  return {begin, begin + each + (i < extra ? 1 : 0)};
}

// In which order a thread takes its chunks. Backwards: for a pass over what a pass before has left in its cache.
enum class Order { kForwards, kBackwards };

// Runs body(chunk, thread) for chunk = 0 .. chunks-1, thread < threads. The first exception stops the rest and is
// rethrown to the caller. A caller with one scratch area a thread asks num_threads() once and passes it on, because
// another Python thread may change it in between. Taking the next chunk is a locked instruction, which also makes the
// chunk's non-temporal stores visible.
//
// A thread begins with neighbouring chunks of its own, the same share of the work in every call, so that it finds in
// its own cache what it wrote there in the call before; then it helps the others. Where threads took turns instead, a
// training step on two cores took 1.02 (ResNet-18) to 1.16 (EfficientNet-B0) of the time.
template <class Body>
void parallel_for(int64_t chunks, Body&& body, int threads = num_threads(), Order order = Order::kForwards) {
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks));
  const auto at = [order](Range range, int64_t i) {
    return order == Order::kForwards ? range.begin + i : range.end - 1 - i;
  };
  if (team <= 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < chunks; ++i) body(at({0, chunks}, i), 0);
    return;
  }
  struct alignas(128) Share {  // two cache lines, which the hardware fetches in pairs
    std::atomic<int64_t> taken{0};
  };
  constexpr int kMostShares = 64;
  Share shares[kMostShares];
  const int count = std::min(team, kMostShares);
  std::exception_ptr error;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
    for (int j = 0; j < count; ++j) {
      const int share = (thread + j) % count;
      const Range mine = split(chunks, count, share);
      for (int64_t i;
           !failed.load(std::memory_order_relaxed) && (i = shares[share].taken.fetch_add(1)) < mine.end - mine.begin;) {
        try {
          body(at(mine, i), thread);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

// parallel_for over [0, total) in ranges of about `grain` items: body(begin, end). For items that own their outputs.
template <class Body> void parallel_ranges(int64_t total, int64_t grain, Body&& body, Order order = Order::kForwards) {
  if (total <= 0) return;
  const int64_t chunks = std::clamp<int64_t>(total / std::max<int64_t>(grain, 1), 1, 256);
  const auto chunk = [&](int64_t i, int) {
    const Range r = split(total, chunks, i);
    body(r.begin, r.end);
  };
  parallel_for(chunks, chunk, num_threads(), order);
}

}  // namespace fastconv::cpu

#include "cpu/parallel.h"

#include <pthread.h>

#include "core/error.h"

namespace fastconv::cpu {
namespace {

std::atomic<int> requested{0};  // 0: not set by the user, follow OpenMP (OMP_NUM_THREADS, affinity)
std::atomic<bool> forked_child{false};
constexpr int kMostThreads = 1024;
thread_local int64_t limit = kMostThreads;

// libgomp's pool of threads does not survive fork(): a parallel region in the child waits for threads that are gone.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

}  // namespace

int num_threads() {
  if (forked_child) return 1;
  const int n = requested;
  return static_cast<int>(std::min<int64_t>(n > 0 ? n : omp_get_max_threads(), limit));
}

ThreadLimit::ThreadLimit(int64_t most) : outer_(limit) { limit = std::clamp<int64_t>(most, 1, outer_); }
ThreadLimit::~ThreadLimit() { limit = outer_; }

void set_num_threads(int n) {
  FC_CHECK(n >= 1 && n <= kMostThreads, "the number of threads must be between 1 and 1024, got ", n);
  requested = n;
}

}  // namespace fastconv::cpu

#include "cpu/parallel.h"

#include <pthread.h>

#include "core/error.h"

namespace fastconv::cpu {
namespace {

std::atomic<int> requested{0};  // 0: not set by the user, follow OpenMP (OMP_NUM_THREADS, affinity)
std::atomic<bool> forked_child{false};

// libgomp's pool of threads does not survive fork(): a parallel region in the child waits for threads that are gone.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

}  // namespace

int num_threads() {
  if (forked_child) return 1;
  const int n = requested;
  return n > 0 ? n : omp_get_max_threads();
}

void set_num_threads(int n) {
  FC_CHECK(n >= 1 && n <= 1024, "the number of threads must be between 1 and 1024, got ", n);
  requested = n;
}

}  // namespace fastconv::cpu

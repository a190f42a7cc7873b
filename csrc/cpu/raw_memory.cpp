#include "core/raw_memory.h"

#include <sys/mman.h>

#include <cstdlib>

namespace fastconv {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kAlign = 64;

}  // namespace

void* raw_allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, bytes >= kHuge ? kHuge : kAlign, bytes) != 0) return nullptr;
  if (bytes >= kHuge) madvise(p, bytes, MADV_HUGEPAGE);
  return p;
}

void raw_release(void* p) noexcept { std::free(p); }

uint64_t current_pool() { return 0; }
void leave_pool(uint64_t) {}
bool pool_is_kept(uint64_t) { return false; }

}  // namespace fastconv

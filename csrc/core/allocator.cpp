#include "core/allocator.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#include "core/raw_memory.h"

namespace fastconv {
namespace {

constexpr size_t kLeast = 64;

// Eight steps to each power of two: at most 12.5% waste, and few distinct sizes.
size_t rounded(size_t bytes) {
  bytes = std::max(bytes, kLeast);
  size_t step = kLeast;
  while (step * 16 <= bytes) step *= 2;
  if (bytes > SIZE_MAX - step) throw std::bad_alloc();
  return (bytes + step - 1) / step * step;
}

class Cache {
 public:
  void* allocate(size_t bytes) {
    const size_t size = rounded(bytes);
    const uint64_t pool = current_pool();
    std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.allocations;
    void* p = nullptr;
    size_t got = size;
    auto it = free_.lower_bound({pool, size});
    if (it != free_.end() && it->first.first == pool && it->first.second <= size + size / 4) {
      got = it->first.second;
      p = it->second;
      free_.erase(it);
      stats_.bytes_cached -= got;
      ++stats_.cache_hits;
    } else {
      if (over_limit(size)) drop_cache();
      if (over_limit(size)) throw std::bad_alloc();
      p = raw_allocate(size);
      if (!p) {
        drop_cache();
        p = raw_allocate(size);
      }
      if (!p) throw std::bad_alloc();
    }
    used_.emplace(p, Key{pool, got});
    stats_.bytes_in_use += got;
    stats_.peak_bytes_in_use = std::max(stats_.peak_bytes_in_use, stats_.bytes_in_use);
    return p;
  }

  void release(void* p) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = used_.find(p);
    if (it == used_.end()) return;
    const Key key = it->second;
    used_.erase(it);
    stats_.bytes_in_use -= key.second;
    try {
      leave_pool(key.first);
      // In front of its equals: the next of this size takes what was used last and may still be in a cache.
      free_.emplace_hint(free_.lower_bound(key), key, p);
      stats_.bytes_cached += key.second;
    } catch (...) {
      raw_release(p);  // no memory for the cache's own node: give the block back instead
    }
  }

  MemoryStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }
  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.peak_bytes_in_use = stats_.bytes_in_use;
  }
  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.limit = bytes;
    if (over_limit(0)) drop_cache();
  }
  void empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    drop_cache();
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  bool over_limit(size_t more) const {
    return stats_.limit != 0 && stats_.bytes_in_use + stats_.bytes_cached + more > stats_.limit;
  }
  void drop_cache() {
    for (auto it = free_.begin(); it != free_.end();) {
      if (pool_is_kept(it->first.first)) {
        ++it;
        continue;
      }
      raw_release(it->second);
      stats_.bytes_cached -= it->first.second;
      it = free_.erase(it);
    }
  }

  using Key = std::pair<uint64_t, size_t>;  // pool, size
  std::mutex mutex_;
  std::multimap<Key, void*> free_;
  std::unordered_map<void*, Key> used_;
  MemoryStats stats_;
};

// Never destroyed: arrays may outlive static destructors at interpreter exit.
Cache& cache() {
  static Cache* instance = [] {
    auto* made = new Cache;
    // fork() while another thread holds the lock would leave it locked in the child for ever.
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });
    return made;
  }();
  return *instance;
}

}  // namespace

void* allocate(size_t bytes) { return cache().allocate(bytes); }
void release(void* pointer) noexcept { cache().release(pointer); }
MemoryStats memory_stats() { return cache().stats(); }
void reset_peak_memory_stats() { cache().reset_peak(); }
void set_memory_limit(size_t bytes) { cache().set_limit(bytes); }
void empty_cache() { cache().empty(); }

}  // namespace fastconv

// The caching allocator: every output and every workspace comes from here.
//
// Fresh pages cost as much as a memory-bound kernel, so freed blocks are kept and reused. Blocks of 2 MiB and more are
// aligned to 2 MiB and advised to be huge pages. Sizes are rounded up (powers of two in eighths) so that a block serves
// requests of similar size; a request takes the smallest cached block that fits and wastes at most a quarter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastconv {

struct MemoryStats {
  size_t bytes_in_use = 0;       // handed out now
  size_t bytes_cached = 0;       // kept for reuse
  size_t peak_bytes_in_use = 0;  // since start or reset_peak
  size_t allocations = 0;        // requests served
  size_t cache_hits = 0;         // of which from the cache
  size_t limit = 0;              // cap on in use + cached; 0: none
};

void* allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void release(void* pointer) noexcept;
MemoryStats memory_stats();
void reset_peak_memory_stats();
void set_memory_limit(size_t bytes);
void empty_cache();

// Owns one allocation: a workspace for the duration of a call.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : pointer_(allocate(bytes)) {}
  Buffer(Buffer&& other) noexcept : pointer_(std::exchange(other.pointer_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }
  ~Buffer() {
    if (pointer_) release(pointer_);
  }
  template <class T> T* as() const { return static_cast<T*>(pointer_); }

 private:
  void* pointer_ = nullptr;
};

}  // namespace fastconv

// Where the caching allocator gets its blocks; cpu/ and cuda/ define it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconv {

void* raw_allocate(size_t bytes);  // at least 64-byte aligned; null where there is no memory
void raw_release(void*) noexcept;

// A block is used again only by requests of the pool that it was allocated for: on a CUDA device one for each stream,
// whose work is in order, and one for each graph. The CPU has one pool.
uint64_t current_pool();
// Called before a block of this pool becomes free. Throws if it cannot be made fit for use.
void leave_pool(uint64_t pool);
// Free blocks of this pool must not be given back: a graph still writes to them.
bool pool_is_kept(uint64_t pool);

}  // namespace fastconv

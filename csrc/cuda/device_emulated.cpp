// A device that is none: kernels run on the host in loops, device memory is host memory. For tests of everything above
// the hardware where there is no GPU; slow.
#include <cstdlib>
#include <mutex>
#include <set>

#include "core/error.h"
#include "core/raw_memory.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastconv::cuda {
namespace {

using Work = std::vector<std::function<void()>>;

thread_local Stream stream = nullptr;
thread_local Work* recorded = nullptr;
thread_local uint64_t graph_pool = 0;

std::mutex pools_mutex;
std::set<uint64_t> kept_pools;
uint64_t next_number = 1;

uint64_t new_number() {
  std::lock_guard<std::mutex> lock(pools_mutex);
  return next_number++;
}

}  // namespace

std::string unavailable_reason() { return ""; }

const DeviceInfo& device_info() {
  static const DeviceInfo info{"emulated on the host (no GPU)", 0, 0, 4, size_t{1} << 32, size_t{1} << 20, 48 << 10};
  return info;
}

size_t free_memory() { return device_info().memory; }

Stream current_stream() { return stream; }
void set_current_stream(Stream s) { stream = s; }
bool capturing() { return recorded != nullptr; }
void synchronize() {
  if (capturing()) throw DeviceError("nothing may wait for a stream that is recorded into a graph");
}

void let_wait(Stream) {}

void do_or_record(std::function<void()> work) {
  if (recorded)
    recorded->push_back(std::move(work));
  else
    work();
}

void copy_bytes(void* to, const void* from, size_t bytes, Copy direction) {
  if (bytes == 0) return;
  if (direction != Copy::kOnDevice) {
    if (capturing()) throw DeviceError("nothing can be copied from or to the host while a graph is recorded");
    memcpy(to, from, bytes);
    return;
  }
  do_or_record([=] { memmove(to, from, bytes); });
}

void zero_bytes(void* to, size_t bytes) {
  do_or_record([=] { memset(to, 0, bytes); });
}

void check_launch(const char*) {}

Stream make_stream() { return reinterpret_cast<Stream>(16 * new_number()); }

void* permanent_copy(const void* data, size_t bytes) {
  void* p = raw_allocate(bytes);
  memcpy(p, data, bytes);
  return p;
}

struct Graph::State {
  uint64_t pool = 0;
  Work work;
};

Graph::Graph() : state_(new State) {
  state_->pool = 2 * new_number() + 1;
  std::lock_guard<std::mutex> lock(pools_mutex);
  kept_pools.insert(state_->pool);
}

Graph::~Graph() {
  std::lock_guard<std::mutex> lock(pools_mutex);
  kept_pools.erase(state_->pool);
}

void Graph::begin() {
  FC_CHECK(stream != nullptr, "a graph cannot be recorded on the default stream");
  state_->work.clear();
  recorded = &state_->work;
  graph_pool = state_->pool;
}

void Graph::end() {
  recorded = nullptr;
  graph_pool = 0;
}

void Graph::replay() {
  FC_CHECK(!state_->work.empty(), "the graph has not been recorded");
  for (const auto& work : state_->work) work();
}

}  // namespace fastconv::cuda

namespace fastconv {

void* raw_allocate(size_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, 256, bytes) == 0 ? p : nullptr;
}
void raw_release(void* p) noexcept { std::free(p); }
uint64_t current_pool() {
  return cuda::graph_pool != 0 ? cuda::graph_pool : reinterpret_cast<uint64_t>(cuda::current_stream());
}
void leave_pool(uint64_t) {}
bool pool_is_kept(uint64_t pool) {
  std::lock_guard<std::mutex> lock(cuda::pools_mutex);
  return cuda::kept_pools.count(pool) != 0;
}

}  // namespace fastconv

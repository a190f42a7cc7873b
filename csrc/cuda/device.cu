// The device through the CUDA runtime, which is linked statically.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <set>

#include "core/allocator.h"
#include "core/error.h"
#include "core/raw_memory.h"
#include "cuda/launch.h"

namespace fastconv::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed call must not be reported again by the next
  throw DeviceError(concat(what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")"));
}

thread_local Stream stream = nullptr;
thread_local uint64_t graph_pool = 0;

std::mutex pools_mutex;
std::set<uint64_t> kept_pools;  // of graphs that exist
std::atomic<uint64_t> next_graph{1};

// Pools of graphs are odd numbers; those of streams are their addresses.
bool is_graph_pool(uint64_t pool) { return pool % 2 == 1; }

// Calls that would end a capture by this thread are allowed inside: they do not touch the captured stream.
class AllowDuringCapture {
 public:
  AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

DeviceInfo query() {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
  return {p.name,
          p.major,
          p.minor,
          p.multiProcessorCount,
          p.totalGlobalMem,
          static_cast<size_t>(p.l2CacheSize),
          p.sharedMemPerBlockOptin};
}

}  // namespace

std::string unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    cudaGetLastError();
    return driver == 0 ? "there is no NVIDIA driver" : concat("the NVIDIA driver is too old for CUDA ", CUDART_VERSION);
  }
  if (error == cudaErrorNoDevice) {
    cudaGetLastError();
    return "the NVIDIA driver sees no GPU";
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count > 0 ? "" : "the NVIDIA driver sees no GPU";
}

const DeviceInfo& device_info() {
  static const DeviceInfo info = query();
  return info;
}

size_t free_memory() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

Stream current_stream() { return stream; }
void set_current_stream(Stream s) { stream = s; }

bool capturing() {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void synchronize() { check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

void let_wait(Stream other) {
  if (other == stream) return;
  static thread_local cudaEvent_t event = [] {
    cudaEvent_t made = nullptr;
    check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreate");
    return made;
  }();
  check(cudaEventRecord(event, stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(other, event, 0), "cudaStreamWaitEvent");
}

void copy_bytes(void* to, const void* from, size_t bytes, Copy direction) {
  if (bytes == 0) return;
  if (direction != Copy::kOnDevice && capturing())  // a replay would read host memory that is gone
    throw DeviceError("nothing can be copied from or to the host while a graph is recorded");
  const cudaMemcpyKind kind = direction == Copy::kToDevice ? cudaMemcpyHostToDevice
                              : direction == Copy::kToHost ? cudaMemcpyDeviceToHost
                                                           : cudaMemcpyDeviceToDevice;
  check(cudaMemcpyAsync(to, from, bytes, kind, stream), "cudaMemcpyAsync");
  if (direction == Copy::kToHost) synchronize();
}

void zero_bytes(void* to, size_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(to, 0, bytes, stream), "cudaMemsetAsync");
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

Stream make_stream() {
  Stream made = nullptr;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
  return made;
}

void* permanent_copy(const void* data, size_t bytes) {
  static const Stream upload = make_stream();
  const AllowDuringCapture allow;
  void* p = nullptr;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  check(cudaMemcpyAsync(p, data, bytes, cudaMemcpyHostToDevice, upload), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(upload), "cudaStreamSynchronize");
  return p;
}

struct Graph::State {
  uint64_t pool = 0;
  cudaGraphExec_t exec = nullptr;
};

Graph::Graph() : state_(new State) {
  state_->pool = 2 * next_graph++ + 1;
  std::lock_guard<std::mutex> lock(pools_mutex);
  kept_pools.insert(state_->pool);
}

Graph::~Graph() {
  if (state_->exec) cudaGraphExecDestroy(state_->exec);
  std::lock_guard<std::mutex> lock(pools_mutex);
  kept_pools.erase(state_->pool);
}

void Graph::begin() {
  FC_CHECK(stream != nullptr, "a graph cannot be recorded on the default stream");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  graph_pool = state_->pool;
}

void Graph::end() {
  graph_pool = 0;
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  const cudaError_t error = cudaGraphInstantiate(&state_->exec, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
}

void Graph::replay() {
  FC_CHECK(state_->exec != nullptr, "the graph has not been recorded");
  check(cudaGraphLaunch(state_->exec, stream), "cudaGraphLaunch");
}

}  // namespace fastconv::cuda

namespace fastconv {

void* raw_allocate(size_t bytes) {
  const cuda::AllowDuringCapture allow;
  void* p = nullptr;
  const cudaError_t error = cudaMalloc(&p, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  cuda::check(error, "cudaMalloc");
  return p;
}

void raw_release(void* p) noexcept {
  const cuda::AllowDuringCapture allow;
  cudaFree(p);  // waits for the device
}

uint64_t current_pool() {
  if (cuda::graph_pool != 0) return cuda::graph_pool;
  if (cuda::stream != nullptr && cuda::capturing())
    throw cuda::DeviceError("another library records a CUDA graph here, for which no memory of fastconv would be kept");
  return reinterpret_cast<uint64_t>(cuda::stream);
}

// A block that was last used on another stream than its own: its own waits, so that the next user may write to it.
void leave_pool(uint64_t pool) {
  if (!cuda::is_graph_pool(pool) && cuda::graph_pool == 0) cuda::let_wait(reinterpret_cast<cuda::Stream>(pool));
}

bool pool_is_kept(uint64_t pool) {
  std::lock_guard<std::mutex> lock(cuda::pools_mutex);
  return cuda::kept_pools.count(pool) != 0;
}

}  // namespace fastconv

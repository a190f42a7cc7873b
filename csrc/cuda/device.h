// The CUDA device as the rest of the code sees it: no header of CUDA is needed to include this. device.cu has it for a
// GPU; device_emulated.cpp for a build in which kernels run on the host in loops and device memory is host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct CUstream_st;

namespace fastconv::cuda {

using Stream = CUstream_st*;  // the runtime's cudaStream_t and the driver's CUstream; null: the default stream

// A failed call of CUDA; RuntimeError in Python.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 1;
  size_t memory = 0;  // bytes
  size_t l2_bytes = 0;
  size_t shared_per_block = 0;  // bytes that a block may opt in to
};

constexpr bool emulated() {
#ifdef FASTCONV_CUDA_EMULATED
  return true;
#else
  return false;
#endif
}

// Why there is no usable device ("" where there is one).
std::string unavailable_reason();
// Of device 0, the only one used. DeviceError where there is none.
const DeviceInfo& device_info();
size_t free_memory();  // bytes that can still be allocated, without those that the allocator keeps

// The stream of this thread's calls: the default one unless set.
Stream current_stream();
void set_current_stream(Stream);
// While the current stream is recorded into a graph nothing may wait for it.
bool capturing();
void synchronize();           // waits for the current stream
void let_wait(Stream other);  // what `other` does next waits for what the current stream has been given

enum class Copy { kToDevice, kToHost, kOnDevice };
// In order of the current stream. To the host: returns when the bytes are there.
void copy_bytes(void* to, const void* from, size_t bytes, Copy);
void zero_bytes(void* to, size_t bytes);

// A copy on the device that lives for good; made at once, also while a graph is captured.
void* permanent_copy(const void* data, size_t bytes);
// A small table that lives on the device for good: the same content is uploaded once, so its address may be part of a
// graph.
const int32_t* constant_table(const std::vector<int32_t>&);

// A sequence of kernels and copies that is recorded once and started as one. What it allocates while it is recorded
// stays its own until it is destroyed, so all addresses are fixed.
class Graph {
 public:
  Graph();
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  // Between begin and end this thread's work is recorded, not done. The current stream must not be the default one.
  void begin();
  void end();
  void replay();  // on the current stream

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A stream of our own, which lives for good.
Stream make_stream();

}  // namespace fastconv::cuda

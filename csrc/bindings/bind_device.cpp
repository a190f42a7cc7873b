#include <pybind11/stl.h>

#include "bindings/array.h"
#include "core/allocator.h"
#include "cuda/conv2d.h"
#include "cuda/device.h"

namespace fastconv::bindings {

void bind_device(py::module_& m) {
  using namespace py::literals;
  m.attr("is_emulated") = cuda::emulated();
  m.def("unavailable_reason", &cuda::unavailable_reason);
  m.def("device_info", [] {
    const cuda::DeviceInfo& d = cuda::device_info();
    return py::dict("name"_a = d.name, "compute_capability"_a = py::make_tuple(d.major, d.minor),
                    "multiprocessors"_a = d.multiprocessors, "memory"_a = d.memory, "l2_bytes"_a = d.l2_bytes,
                    "emulated"_a = cuda::emulated());
  });
  m.def("current_stream", [] { return reinterpret_cast<uintptr_t>(cuda::current_stream()); });
  m.def(
      "set_current_stream", [](uintptr_t s) { cuda::set_current_stream(reinterpret_cast<cuda::Stream>(s)); },
      "stream"_a);
  m.def("make_stream", [] { return reinterpret_cast<uintptr_t>(cuda::make_stream()); });
  m.def("let_wait", [](uintptr_t s) { cuda::let_wait(reinterpret_cast<cuda::Stream>(s)); }, "stream"_a);
  m.def("capturing", &cuda::capturing);
  m.def("synchronize", &cuda::synchronize, py::call_guard<py::gil_scoped_release>());
  m.def("allow_tf32", &cuda::allow_tf32, "on"_a);
  m.def("tf32_allowed", &cuda::tf32_allowed);
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    return py::dict("bytes_in_use"_a = s.bytes_in_use, "bytes_cached"_a = s.bytes_cached,
                    "peak_bytes_in_use"_a = s.peak_bytes_in_use, "allocations"_a = s.allocations,
                    "cache_hits"_a = s.cache_hits, "limit"_a = s.limit);
  });
  m.def("reset_peak_memory_stats", &reset_peak_memory_stats);
  m.def("set_memory_limit", &set_memory_limit, "bytes"_a);
  m.def("empty_cache", &empty_cache);
}

}  // namespace fastconv::bindings

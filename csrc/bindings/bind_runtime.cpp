#include <pybind11/stl.h>

#include <chrono>
#include <cstring>

#include "bindings/convert.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"
#include "device/copy.h"

namespace fastconv::bindings {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Floating-point operations a second of dependent-free FMAs on `threads` threads for about `seconds`.
double measure_fma_peak(double seconds, int threads) {
  FC_CHECK(seconds > 0 && seconds < 60, "seconds must be between 0 and 60, got ", seconds);
  FC_CHECK(threads >= 1 && threads <= 1024, "the number of threads must be between 1 and 1024, got ", threads);
  constexpr int64_t kBurst = 100'000;
  const auto& k = cpu::kernels().roofline;
  std::vector<double> rate(threads);
  cpu::parallel_for(
      threads,
      [&](int64_t i, int) {
        double flops = 0;
        const double start = seconds_now();
        double now = start;
        while (now - start < seconds) {
          flops += k.fma_burst(kBurst);
          now = seconds_now();
        }
        rate[i] = flops / (now - start);
      },
      threads);
  double total = 0;
  for (double r : rate) total += r;
  return total;
}

// Bytes a second of copying an array of `bytes` (read and written bytes both count) on `threads` threads: the best of
// several rounds, with ordinary stores, which win in cache, and with non-temporal ones, which win in memory.
double measure_bandwidth(int64_t bytes, int threads) {
  FC_CHECK(bytes >= 1 << 20 && bytes <= int64_t{1} << 34, "bytes must be between 2^20 and 2^34, got ", bytes);
  FC_CHECK(threads >= 1 && threads <= 1024, "the number of threads must be between 1 and 1024, got ", threads);
  constexpr int64_t kLine = 64;
  const int64_t lines = bytes / kLine;
  Buffer a(bytes), b(bytes);
  std::memset(a.as<char>(), 1, bytes);
  std::memset(b.as<char>(), 0, bytes);
  const auto copy_time = [&](bool streaming) {
    const double start = seconds_now();
    cpu::parallel_for(
        threads,
        [&](int64_t i, int) {
          const cpu::Range r = cpu::split(lines, threads, i);
          char* src = a.as<char>() + r.begin * kLine;
          char* dst = b.as<char>() + r.begin * kLine;
          const int64_t size = (r.end - r.begin) * kLine;
          if (streaming)
            cpu::kernels().roofline.stream_copy(reinterpret_cast<float*>(src), reinterpret_cast<float*>(dst), size / 4);
          else
            std::memcpy(dst, src, size);
        },
        threads);
    return seconds_now() - start;
  };
  double best = 0;
  for (int round = 0; round < 5; ++round)
    for (bool streaming : {false, true})
      best = std::max(best, 2.0 * static_cast<double>(lines * kLine) / copy_time(streaming));
  return best;
}

// Whether nothing but attribute `descriptor` of `holder` refers to the array that it is, or to the memory below.
bool sole_owner(py::handle holder, py::handle descriptor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(holder.ptr()));
  const auto get = Py_TYPE(descriptor.ptr())->tp_descr_get;
  FC_CHECK(get != nullptr, "the descriptor of an attribute is wanted");
  const auto top = py::reinterpret_steal<py::object>(get(descriptor.ptr(), holder.ptr(), type));
  if (!top) throw py::error_already_set();
  Py_ssize_t references = 2;  // the attribute's and this one
  for (PyObject* array = top.ptr();; references = 1) {
    if (!py::isinstance<py::array>(array) || Py_REFCNT(array) != references) return false;
    PyObject* base = py::detail::array_proxy(array)->base;
    if (base == nullptr) return (py::detail::array_proxy(array)->flags & py::detail::npy_api::NPY_ARRAY_OWNDATA_) != 0;
    array = base;
  }
}

// Whether all arrays are dense in row-major order and have the bytes of their copies.
bool same_bytes(const std::vector<py::array>& arrays, const std::vector<py::array>& copies) {
  if (arrays.size() != copies.size()) return false;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::array &a = arrays[i], &b = copies[i];
    if (a.nbytes() != b.nbytes() || !(a.flags() & py::array::c_style) || !(b.flags() & py::array::c_style) ||
        std::memcmp(a.data(), b.data(), a.nbytes()) != 0)
      return false;
  }
  return true;
}

Array dense_copy(const Array& x_in, bool channels_last) {
  const TensorView x = view(x_in, "input");
  const Shape shape = shape4(x, "input");
  Array copy = new_array(x.dtype, {shape.begin(), shape.end()}, channels_last ? Layout::kChannelsLast : Layout::kNCHW);
  const TensorView to = view(copy, "copy");
  {
    py::gil_scoped_release nogil;
    cpu::copy_view(x, to);
  }
  return copy;
}

}  // namespace

void bind_runtime(py::module_& m) {
  using namespace py::literals;
  m.def("set_num_threads", &cpu::set_num_threads, "threads"_a);
  m.def("get_num_threads", &cpu::num_threads);
  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("available_isas", &cpu::available_isas);
  m.def("set_isa", &cpu::set_isa, "name"_a);
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    return py::dict("bytes_in_use"_a = s.bytes_in_use, "bytes_cached"_a = s.bytes_cached,
                    "peak_bytes_in_use"_a = s.peak_bytes_in_use, "allocations"_a = s.allocations,
                    "cache_hits"_a = s.cache_hits, "limit"_a = s.limit);
  });
  m.def("reset_peak_memory_stats", &reset_peak_memory_stats);
  m.def("set_memory_limit", &set_memory_limit, "bytes"_a);
  m.def("empty_cache", &empty_cache);
  m.def("sole_owner", &sole_owner, "holder"_a, "descriptor"_a);
  m.def("dense_copy", &dense_copy, "x"_a, "channels_last"_a);
  m.def("same_bytes", &same_bytes, "arrays"_a, "copies"_a);
  m.def("measure_fma_peak", &measure_fma_peak, "seconds"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
  m.def("measure_bandwidth", &measure_bandwidth, "bytes"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastconv::bindings

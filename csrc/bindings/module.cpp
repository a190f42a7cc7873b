#include <pybind11/pybind11.h>

#include "core/error.h"

namespace fastconv::bindings {
void bind_runtime(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_conv2d_batch_norm(pybind11::module_& m);
void bind_pool2d(pybind11::module_& m);
void bind_batch_norm(pybind11::module_& m);
void bind_response_norm(pybind11::module_& m);
void bind_channels(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_loss(pybind11::module_& m);
void bind_optimizer(pybind11::module_& m);
void bind_tuning(pybind11::module_& m);
void bind_weight_cache(pybind11::module_& m);
}  // namespace fastconv::bindings

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The compiled kernels of fastconv. Use the functions of the package fastconv, which check and convert.";
  pybind11::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const fastconv::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  fastconv::bindings::bind_runtime(m);
  fastconv::bindings::bind_conv2d(m);
  fastconv::bindings::bind_conv2d_batch_norm(m);
  fastconv::bindings::bind_pool2d(m);
  fastconv::bindings::bind_batch_norm(m);
  fastconv::bindings::bind_response_norm(m);
  fastconv::bindings::bind_channels(m);
  fastconv::bindings::bind_elementwise(m);
  fastconv::bindings::bind_linear(m);
  fastconv::bindings::bind_loss(m);
  fastconv::bindings::bind_optimizer(m);
  fastconv::bindings::bind_tuning(m);
  fastconv::bindings::bind_weight_cache(m);
}

#include "bindings/convert.h"
#include "core/check.h"
#include "device/response_norm.h"

namespace fastconv::bindings {
namespace {

Array forward(const Array& x_in, int64_t size, double alpha, double beta, double k) {
  const TensorView x_view = view(x_in, "input");
  const ResponseNormProblem problem = make_response_norm(x_view.dtype, shape4(x_view, "input"), size, alpha, beta, k);
  const ChannelsLast x(x_in, "input");
  Output y(problem.dtype, problem.shape, x.layout());
  {
    py::gil_scoped_release nogil;
    device::response_norm(problem, x.data(), y.data());
  }
  return y.finish();
}

Array backward(const Array& dy_in, const Array& x_in, int64_t size, double alpha, double beta, double k) {
  const TensorView x_view = view(x_in, "input"), dy_view = view(dy_in, "dy");
  const ResponseNormProblem problem = make_response_norm(x_view.dtype, shape4(x_view, "input"), size, alpha, beta, k);
  check_dtype("dy", dy_view, problem.dtype);
  check_shape4("dy", dy_view, problem.shape);
  const ChannelsLast x(x_in, "input"), dy(dy_in, "dy");
  Output dx(problem.dtype, problem.shape, x.layout());
  {
    py::gil_scoped_release nogil;
    device::response_norm_backward(problem, dy.data(), x.data(), dx.data());
  }
  return dx.finish();
}

}  // namespace

void bind_response_norm(py::module_& m) {
  using namespace py::literals;
  m.def("local_response_norm", &forward, "x"_a, "size"_a, "alpha"_a, "beta"_a, "k"_a);
  m.def("local_response_norm_backward", &backward, "dy"_a, "x"_a, "size"_a, "alpha"_a, "beta"_a, "k"_a);
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/operands.h"
#include "core/check.h"
#include "device/optimizer.h"

namespace fastconv::bindings {
namespace {

using Arrays = std::vector<Array>;
using MaybeArrays = std::vector<std::optional<Array>>;

// Parameters with a gradient, checked. Gradients in another order of memory than their parameter are copied.
class Parameters {
 public:
  Parameters(const Arrays& values, const MaybeArrays& gradients, const std::vector<const Arrays*>& states,
             const std::vector<double>& weight_decay) {
    const size_t count = values.size();
    FC_CHECK(gradients.size() == count, "got ", count, " parameters and ", gradients.size(), " gradients");
    FC_CHECK(weight_decay.size() == count, "got ", count, " parameters and ", weight_decay.size(),
             " values of weight_decay");
    for (const Arrays* state : states)
      FC_CHECK(state->size() == count, "got ", count, " parameters and ", state->size(), " arrays of state");
    for (size_t i = 0; i < count; ++i) {
      if (!gradients[i]) continue;
      const std::string name = concat("parameter ", i);
      const TensorView value = view(values[i], name.c_str());
      check_float(name.c_str(), value.dtype);
      FC_CHECK(is_dense(value), name, " of shape ", shape_string(value), " must be dense to be updated in place");
      const TensorView gradient = view(*gradients[i], concat("gradient ", i).c_str());
      check_same_shape(concat("gradient ", i).c_str(), gradient, name.c_str(), value);
      gradients_.push_back(std::make_unique<Dense>(gradient, value.strides));
      device::Parameter p{value.dtype, value.numel(), value.data, gradients_.back()->data(), {}, weight_decay[i]};
      for (size_t s = 0; s < states.size(); ++s) p.state[s] = state((*states[s])[i], concat("state ", i), name, value);
      parameters_.push_back(p);
    }
  }
  const std::vector<device::Parameter>& list() const { return parameters_; }

 private:
  static void* state(const Array& array, const std::string& role, const std::string& name, const TensorView& value) {
    const TensorView v = view(array, role.c_str());
    check_same_shape(role.c_str(), v, name.c_str(), value);
    for (int i = 0; i < v.ndim; ++i)
      FC_CHECK(v.numel() == 0 || v.sizes[i] == 1 || v.strides[i] == value.strides[i], role, " of shape ",
               shape_string(v), " must lie in memory in the same order as ", name);
    return v.data;
  }

  std::vector<std::unique_ptr<Dense>> gradients_;
  std::vector<device::Parameter> parameters_;
};

void sgd_step(const Arrays& values, const MaybeArrays& gradients, const std::optional<Arrays>& momenta, double lr,
              double momentum, double dampening, const std::vector<double>& weight_decay, bool nesterov, bool first,
              double gradient_scale) {
  std::vector<const Arrays*> states;
  if (momenta) states.push_back(&*momenta);
  const Parameters parameters(values, gradients, states, weight_decay);
  py::gil_scoped_release nogil;
  device::sgd_step(parameters.list(), {lr, momentum, dampening, gradient_scale, nesterov, first});
}

void adamw_step(const Arrays& values, const MaybeArrays& gradients, const Arrays& mean, const Arrays& square,
                int64_t step, double lr, double beta1, double beta2, double eps,
                const std::vector<double>& weight_decay, double gradient_scale) {
  FC_CHECK(step >= 1, "step must be at least 1, got ", step);
  const Parameters parameters(values, gradients, {&mean, &square}, weight_decay);
  py::gil_scoped_release nogil;
  device::adamw_step(parameters.list(), {step, lr, beta1, beta2, eps, gradient_scale});
}

double gradient_norm(const Arrays& gradients) {
  std::vector<std::unique_ptr<Dense>> dense;
  std::vector<device::Parameter> parameters;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string name = concat("gradient ", i);
    const TensorView gradient = view(gradients[i], name.c_str());
    check_float(name.c_str(), gradient.dtype);
    dense.push_back(std::make_unique<Dense>(gradient, dense_strides(gradient)));
    parameters.push_back({gradient.dtype, gradient.numel(), nullptr, dense.back()->data(), {}, 0});
  }
  py::gil_scoped_release nogil;
  return device::gradient_norm(parameters);
}

void move_towards(const Arrays& averages, const Arrays& values, double share) {
  const MaybeArrays targets(values.begin(), values.end());
  const Parameters parameters(averages, targets, {}, std::vector<double>(averages.size()));
  py::gil_scoped_release nogil;
  device::move_towards(parameters.list(), share);
}

}  // namespace

void bind_optimizer(py::module_& m) {
  using namespace py::literals;
  m.def("sgd_step", &sgd_step, "params"_a, "grads"_a, "momenta"_a, "lr"_a, "momentum"_a, "dampening"_a,
        "weight_decay"_a, "nesterov"_a, "first"_a, "gradient_scale"_a);
  m.def("adamw_step", &adamw_step, "params"_a, "grads"_a, "exp_avg"_a, "exp_avg_sq"_a, "step"_a, "lr"_a, "beta1"_a,
        "beta2"_a, "eps"_a, "weight_decay"_a, "gradient_scale"_a);
  m.def("gradient_norm", &gradient_norm, "grads"_a);
  m.def("move_towards", &move_towards, "averages"_a, "values"_a, "share"_a);
}

}  // namespace fastconv::bindings

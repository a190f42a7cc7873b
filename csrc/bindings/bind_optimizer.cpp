#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/operands.h"
#include "core/check.h"
#include "device/optimizer.h"

#ifdef FASTCONV_CUDA
#include <variant>

#include "cuda/training.h"
#endif

namespace fastconv::bindings {
namespace {

using Arrays = std::vector<Array>;
using MaybeArrays = std::vector<std::optional<Array>>;

// The factor of all gradients: a number; on a CUDA device also an array of one float64, which a kernel reads.
#ifdef FASTCONV_CUDA
using Scale = std::variant<double, Array>;
double value_of(const Scale& scale) { return std::holds_alternative<double>(scale) ? std::get<double>(scale) : 1; }
const double* place_of(const Scale& scale) {
  if (std::holds_alternative<double>(scale)) return nullptr;
  const TensorView v = view(std::get<Array>(scale), "gradient_scale");
  check_dtype("gradient_scale", v, DType::kFloat64);
  FC_CHECK(v.numel() == 1, "gradient_scale must be one number, got shape ", shape_string(v));
  return v.as<double>();
}
#else
using Scale = double;
double value_of(Scale scale) { return scale; }
const double* place_of(Scale) { return nullptr; }
#endif

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
              const Scale& gradient_scale) {
  std::vector<const Arrays*> states;
  if (momenta) states.push_back(&*momenta);
  const Parameters parameters(values, gradients, states, weight_decay);
  py::gil_scoped_release nogil;
  device::sgd_step(parameters.list(),
                   {lr, momentum, dampening, value_of(gradient_scale), nesterov, first, place_of(gradient_scale)});
}

void adamw_step(const Arrays& values, const MaybeArrays& gradients, const Arrays& mean, const Arrays& square,
                int64_t step, double lr, double beta1, double beta2, double eps,
                const std::vector<double>& weight_decay, const Scale& gradient_scale) {
  FC_CHECK(step >= 1, "step must be at least 1, got ", step);
  const Parameters parameters(values, gradients, {&mean, &square}, weight_decay);
  py::gil_scoped_release nogil;
  device::adamw_step(parameters.list(),
                     {step, lr, beta1, beta2, eps, value_of(gradient_scale), place_of(gradient_scale)});
}

// Gradients without their parameters.
class Gradients {
 public:
  explicit Gradients(const Arrays& gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) {
      const std::string name = concat("gradient ", i);
      const TensorView gradient = view(gradients[i], name.c_str());
      check_float(name.c_str(), gradient.dtype);
      dense_.push_back(std::make_unique<Dense>(gradient, dense_strides(gradient)));
      list_.push_back({gradient.dtype, gradient.numel(), nullptr, dense_.back()->data(), {}, 0});
    }
  }
  const std::vector<device::Parameter>& list() const { return list_; }

 private:
  std::vector<std::unique_ptr<Dense>> dense_;
  std::vector<device::Parameter> list_;
};

double gradient_norm(const Arrays& arrays) {
  const Gradients gradients(arrays);
  py::gil_scoped_release nogil;
  return device::gradient_norm(gradients.list());
}

#ifdef FASTCONV_CUDA
void store_gradient_norm(const Arrays& arrays, const Array& norm) {
  const TensorView v = view(norm, "norm");
  check_dtype("norm", v, DType::kFloat64);
  const Gradients gradients(arrays);
  py::gil_scoped_release nogil;
  cuda::store_gradient_norm(gradients.list(), v.as<double>());
}
#endif

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
#ifdef FASTCONV_CUDA
  m.def("store_gradient_norm", &store_gradient_norm, "grads"_a, "norm"_a);
#endif
  m.def("move_towards", &move_towards, "averages"_a, "values"_a, "share"_a);
}

}  // namespace fastconv::bindings

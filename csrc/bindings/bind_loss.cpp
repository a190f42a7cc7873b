#include <pybind11/stl.h>

#include <optional>

#include "bindings/operands.h"
#include "core/check.h"
#include "device/loss.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<Array>;

Array softmax(const Array& x_in, int64_t dim, bool logarithm) {
  const TensorView v = view(x_in, "input");
  const Strides strides = dense_strides(v);
  Array y = new_dense(v, strides);
  const TensorView out = view(y, "output");
  const SoftmaxProblem problem = make_softmax(out, dim);
  {
    py::gil_scoped_release nogil;
    const Dense x(v, strides);
    device::softmax(problem, x.data(), out.data, logarithm);
  }
  return y;
}

Array softmax_backward(const Array& dy_in, const Array& y_in, int64_t dim, bool logarithm) {
  const TensorView v = view(y_in, "y"), dy_view = view(dy_in, "dy");
  check_same_shape("dy", dy_view, "y", v);
  const Strides strides = dense_strides(v);
  Array dx = new_dense(v, strides);
  const TensorView out = view(dx, "dx");
  const SoftmaxProblem problem = make_softmax(out, dim);
  {
    py::gil_scoped_release nogil;
    const Dense y(v, strides), dy(dy_view, strides);
    device::softmax_backward(problem, dy.data(), y.data(), out.data, logarithm);
  }
  return dx;
}

// The arguments of cross entropy, checked and dense.
struct LossInputs {
  LossInputs(const Array& logits_in, const Array& target_in, const MaybeArray& weight_in, int64_t ignore_index,
             const std::string& reduction, double label_smoothing)
      : logits_view(view(logits_in, "logits")) {
    const TensorView target_view = view(target_in, "target");
    TensorView weight_view;
    if (weight_in) weight_view = view(*weight_in, "weight");
    problem = make_cross_entropy(logits_view, target_view, weight_in ? &weight_view : nullptr, ignore_index, reduction,
                                 label_smoothing);
    device::check_targets(problem, target_view);
    logits.emplace(logits_view, row_major_strides(logits_view));
    target.emplace(target_view, "target");
    if (weight_in) weight.emplace(weight_view, "weight");
  }
  const int64_t* targets() const { return static_cast<const int64_t*>(target->data()); }
  const void* weights() const { return weight ? weight->data() : nullptr; }
  std::vector<int64_t> loss_shape() const {
    if (problem.reduction == Reduction::kNone) return {problem.rows};
    return {};
  }

  TensorView logits_view;
  CrossEntropyProblem problem;
  std::optional<Dense> logits;
  std::optional<Vector> target, weight;
};

Array cross_entropy(const Array& logits, const Array& target, const MaybeArray& weight, int64_t ignore_index,
                    const std::string& reduction, double label_smoothing) {
  const LossInputs in(logits, target, weight, ignore_index, reduction, label_smoothing);
  Array loss = new_array(in.problem.dtype, in.loss_shape());
  void* out = loss.mutable_data();
  {
    py::gil_scoped_release nogil;
    device::cross_entropy(in.problem, in.logits->data(), in.targets(), in.weights(), out);
  }
  return loss;
}

Array cross_entropy_backward(const Array& dloss_in, const Array& logits, const Array& target, const MaybeArray& weight,
                             int64_t ignore_index, const std::string& reduction, double label_smoothing) {
  const LossInputs in(logits, target, weight, ignore_index, reduction, label_smoothing);
  const TensorView dloss_view = view(dloss_in, "dloss");
  check_dtype("dloss", dloss_view, in.problem.dtype);
  if (in.problem.reduction == Reduction::kNone)
    check_vector("dloss", dloss_view, in.problem.dtype, in.problem.rows);
  else
    FC_CHECK(dloss_view.ndim == 0, "dloss must be a single number, got shape ", shape_string(dloss_view));
  const Dense dloss(dloss_view, row_major_strides(dloss_view));
  const Strides strides = row_major_strides(in.logits_view);
  Array dlogits = new_dense(in.logits_view, strides);
  void* out = dlogits.mutable_data();
  {
    py::gil_scoped_release nogil;
    device::cross_entropy_backward(in.problem, dloss.data(), in.logits->data(), in.targets(), in.weights(), out);
  }
  return dlogits;
}

}  // namespace

void bind_loss(py::module_& m) {
  using namespace py::literals;
  m.def("softmax", &softmax, "x"_a, "dim"_a, "logarithm"_a);
  m.def("softmax_backward", &softmax_backward, "dy"_a, "y"_a, "dim"_a, "logarithm"_a);
  m.def("cross_entropy", &cross_entropy, "logits"_a, "target"_a, "weight"_a, "ignore_index"_a, "reduction"_a,
        "label_smoothing"_a);
  m.def("cross_entropy_backward", &cross_entropy_backward, "dloss"_a, "logits"_a, "target"_a, "weight"_a,
        "ignore_index"_a, "reduction"_a, "label_smoothing"_a);
}

}  // namespace fastconv::bindings

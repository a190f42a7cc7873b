// Training steps on a CUDA device: batches of resident images, figures that stay on the device, graphs and the numbers
// that change from replay to replay.
#include "cuda/training.h"

#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/operands.h"
#include "core/check.h"
#include "cuda/device.h"
#include "cuda/step_numbers.h"

namespace fastconv::bindings {
namespace {

TensorView dense(const Array& array, const char* name, DType dtype, int ndim) {
  const TensorView v = view(array, name);
  check_dtype(name, v, dtype);
  FC_CHECK(v.ndim == ndim && v.is_contiguous(), name, " must be contiguous and have ", ndim, " dimensions, got shape ",
           shape_string(v));
  return v;
}

// images [N, H, W, C], labels [N], picks [B, 4] -> (x [B, C, H, W] in channels-last memory, y [B]). The indices of the
// picks are the caller's to check.
py::tuple gather_batch(const Array& images_in, const Array& labels_in, const Array& picks_in, const Array& scale_in,
                       const Array& shift_in, int64_t padding, const std::string& dtype) {
  const TensorView images = dense(images_in, "images", DType::kUInt8, 4);
  const TensorView labels = dense(labels_in, "labels", DType::kInt64, 1);
  const TensorView picks = dense(picks_in, "picks", DType::kInt64, 2);
  const TensorView scale = dense(scale_in, "scale", DType::kFloat32, 1);
  const TensorView shift = dense(shift_in, "shift", DType::kFloat32, 1);
  const cuda::BatchProblem problem{picks.sizes[0], images.sizes[1], images.sizes[2], images.sizes[3], padding};
  FC_CHECK(picks.sizes[1] == 4 && labels.sizes[0] == images.sizes[0] && scale.sizes[0] == problem.channels &&
               shift.sizes[0] == problem.channels && padding >= 0,
           "images ", shape_string(images), ", labels ", shape_string(labels), ", picks ", shape_string(picks),
           ", scale ", shape_string(scale), ", shift ", shape_string(shift), " and padding ", padding,
           " do not fit together");
  TensorView form;
  form.dtype = parse_dtype(dtype);
  form.ndim = 4;
  const auto [b, h, w, c, pad] = problem;
  form.sizes = {b, c, h, w};
  form.strides = {h * w * c, 1, w * c, c};
  const Array x = new_strided(form);
  TensorView of_labels = labels;
  of_labels.sizes[0] = b;
  of_labels.strides[0] = 1;
  const Array y = new_strided(of_labels);
  {
    py::gil_scoped_release nogil;
    cuda::gather_batch(problem, images.as<uint8_t>(), labels.as<int64_t>(), picks.as<cuda::Pick>(), scale.as<float>(),
                       shift.as<float>(), form.dtype, x.mutable_data(), static_cast<int64_t*>(y.mutable_data()));
  }
  return py::make_tuple(x, y);
}

cuda::StepFigures* figures_in(const Array& array) {
  const TensorView v = dense(array, "figures", DType::kFloat64, 1);
  FC_CHECK(v.sizes[0] == 4, "figures must be four numbers, got shape ", shape_string(v));
  return v.as<cuda::StepFigures>();
}

void add_figures(const Array& figures, const Array& loss_in, double weight, const Array& logits_in,
                 const Array& target_in) {
  const TensorView loss = view(loss_in, "loss"), logits = view(logits_in, "logits"), target = view(target_in, "target");
  FC_CHECK(loss.numel() == 1 && logits.ndim == 2 && target.ndim == 1 && target.sizes[0] == logits.sizes[0], "loss ",
           shape_string(loss), ", logits ", shape_string(logits), " and target ", shape_string(target),
           " do not fit together");
  check_dtype("target", target, DType::kInt64);
  const Dense rows(logits, row_major_strides(logits));
  const Vector targets(target, "target");
  cuda::add_figures(figures_in(figures), loss.dtype, loss.data, weight, logits.dtype, rows.data(),
                    static_cast<const int64_t*>(targets.data()), logits.sizes[0], logits.sizes[1]);
}

}  // namespace

void bind_training(py::module_& m) {
  using namespace py::literals;
  m.def("gather_batch", &gather_batch, "images"_a, "labels"_a, "picks"_a, "scale"_a, "shift"_a, "padding"_a,
        "dtype_name"_a);
  m.def("add_figures", &add_figures, "figures"_a, "loss"_a, "weight"_a, "logits"_a, "target"_a);
  m.def(
      "judge", [](const Array& figures, double max_norm) { cuda::judge(figures_in(figures), max_norm); }, "figures"_a,
      "max_norm"_a);
  m.def("free_memory", &cuda::free_memory);
  py::class_<cuda::Graph>(m, "Graph", "Work that is recorded once and started as one.")
      .def(py::init<>())
      .def("begin", &cuda::Graph::begin)
      .def("end", &cuda::Graph::end)
      .def("replay", &cuda::Graph::replay, py::call_guard<py::gil_scoped_release>());
  py::class_<cuda::StepNumbers>(m, "StepNumbers", "The numbers of a graph that change from replay to replay.")
      .def(py::init<>())
      .def("record", &cuda::StepNumbers::record)
      .def("collect", &cuda::StepNumbers::collect)
      .def("done", &cuda::StepNumbers::done)
      .def("upload", &cuda::StepNumbers::upload, "seed"_a, "offset"_a);
}

}  // namespace fastconv::bindings

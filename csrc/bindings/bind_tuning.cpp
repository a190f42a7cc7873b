// Tuning files and the records that they are made from: of the CPU alone.
#include <pybind11/stl.h>

#include "bindings/operands.h"
#include "cpu/tuning.h"

namespace fastconv::bindings {
namespace {

// (dtype, x shape, w shape, stride, padding, dilation, groups): a problem as Python writes it down.
using Description = std::tuple<std::string, Shape, Shape, Pair, Padding, Pair, int64_t>;

Conv2dProblem problem_of(const Description& d) {
  const auto& [dtype, x, w, stride, padding, dilation, groups] = d;
  return describe_conv2d(x, w, stride, padding, dilation, groups, dtype);
}

Description description_of(const Conv2dProblem& a) {
  return {name(a.dtype),
          a.x_shape(),
          a.w_shape(),
          {a.stride_h, a.stride_w},
          std::array<int64_t, 4>{a.pad_top, a.pad_bottom, a.pad_left, a.pad_right},
          {a.dilation_h, a.dilation_w},
          a.groups};
}

}  // namespace

void bind_tuning(py::module_& m) {
  using namespace py::literals;
  m.def(
      "set_tuning",
      [](const std::string& source, const std::string& isa,
         const std::vector<std::tuple<Description, std::string, std::string>>& choices) {
        std::vector<cpu::TunedProblem> problems;
        for (const auto& [description, direction, implementation] : choices)
          problems.push_back({problem_of(description), parse_direction(direction), implementation});
        cpu::set_tuning(source, isa, problems);
      },
      "source"_a, "isa"_a, "choices"_a);
  m.def("tuning_source", &cpu::tuning_source);
  m.def("start_recording", &cpu::start_recording);
  m.def("stop_recording", [] {
    std::vector<std::pair<Description, std::string>> problems;
    for (const cpu::Recorded& one : cpu::stop_recording())
      problems.emplace_back(description_of(one.problem), name_of(one.direction));
    return problems;
  });
  m.def(
      "conv2d_candidates",
      [](const Description& problem, const std::string& direction) {
        return cpu::conv2d_candidates(problem_of(problem), parse_direction(direction));
      },
      "problem"_a, "direction"_a);
}

}  // namespace fastconv::bindings

#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <optional>

#include "bindings/operands.h"
#include "core/channels_problem.h"
#include "core/check.h"
#include "device/channels.h"

namespace fastconv::bindings {
namespace {

using MaybeArray = std::optional<Array>;

// Of the largest array: one with a single channel or pixel may lie both ways.
Layout layout_of_all(const std::vector<TensorView>& arrays) {
  const auto largest = std::max_element(arrays.begin(), arrays.end(),
                                        [](const TensorView& a, const TensorView& b) { return a.numel() < b.numel(); });
  return largest->ndim == 4 ? layout_of(*largest) : Layout::kNCHW;
}

// The bytes of an array from one step of dimension `dim` to the end of those inside it in memory.
int64_t contiguous_bytes(const TensorView& v, int dim, const Strides& strides) {
  return v.sizes[dim] * strides[dim] * itemsize(v.dtype);
}

int64_t rows_outside(const TensorView& v, int dim, const Strides& strides) {
  const int64_t inside = v.sizes[dim] * strides[dim];
  return inside == 0 ? 0 : v.numel() / inside;
}

Array cat(const std::vector<Array>& arrays_in, int64_t dim_in) {
  FC_CHECK(!arrays_in.empty(), "cat needs at least one array, got none");
  std::vector<TensorView> views;
  for (const Array& array : arrays_in) views.push_back(view(array, "input"));
  const int dim = normalized_dim(dim_in, views.front().ndim);
  const TensorView joined = make_cat(views, dim);
  const Layout layout = layout_of_all(views);
  const Strides strides = strides_of(joined, layout);
  Array y = new_dense(joined, strides);
  auto* out = static_cast<char*>(y.mutable_data());
  {
    py::gil_scoped_release nogil;
    std::deque<Dense> dense;
    std::vector<device::Slice> slices;
    for (const TensorView& v : views) {
      const Strides own = strides_of(v, layout);
      dense.emplace_back(v, own);
      slices.push_back({static_cast<char*>(const_cast<void*>(dense.back().data())), contiguous_bytes(v, dim, own)});
    }
    device::concatenate(rows_outside(joined, dim, strides), slices, out);
  }
  return y;
}

std::vector<Array> cat_backward(const Array& dy_in, const std::vector<int64_t>& sizes, int64_t dim_in) {
  const TensorView joined = view(dy_in, "dy");
  const int dim = normalized_dim(dim_in, joined.ndim);
  const Strides strides = image_strides(joined);
  const Layout layout = joined.ndim == 4 ? layout_of(joined) : Layout::kNCHW;
  std::vector<Array> parts;
  std::vector<device::Slice> slices;
  for (const TensorView& part : make_split(joined, sizes, dim)) {
    const Strides own = strides_of(part, layout);
    parts.push_back(new_dense(part, own));
    slices.push_back({static_cast<char*>(parts.back().mutable_data()), contiguous_bytes(part, dim, own)});
  }
  {
    py::gil_scoped_release nogil;
    const Dense dy(joined, strides);
    device::split(rows_outside(joined, dim, strides), static_cast<const char*>(dy.data()), slices);
  }
  return parts;
}

Array channel_gate(const Array& x_in, const Array& gate_in, const MaybeArray& bias_in) {
  const TensorView v = view(x_in, "input"), gate_view = view(gate_in, "gate");
  check_channel_gate(v, gate_view);
  std::optional<ChannelsLast> bias;
  if (bias_in) {
    check_same_shape("bias", view(*bias_in, "bias"), "gate", gate_view);
    bias.emplace(*bias_in, "bias");
  }
  const ChannelsLast x(x_in, "input"), gate(gate_in, "gate");
  const Shape shape = shape4(v, "input");
  Output y(v.dtype, shape, x.layout());
  {
    py::gil_scoped_release nogil;
    device::channel_gate(v.dtype, shape[0], shape[2] * shape[3], shape[1], x.data(), gate.data(),
                         bias ? bias->data() : nullptr, y.data());
  }
  return y.finish();
}

std::pair<MaybeArray, MaybeArray> channel_gate_backward(const Array& dy_in, const Array& x_in, const Array& gate_in,
                                                        std::array<bool, 2> needs) {
  const TensorView v = view(x_in, "input"), gate_view = view(gate_in, "gate");
  check_channel_gate(v, gate_view);
  check_same_shape("dy", view(dy_in, "dy"), "the input", v);
  const ChannelsLast dy(dy_in, "dy"), x(x_in, "input"), gate(gate_in, "gate");
  const Shape shape = shape4(v, "input");
  std::optional<Output> dx, dgate;
  if (needs[0]) dx.emplace(v.dtype, shape, x.layout());
  if (needs[1]) dgate.emplace(v.dtype, shape4(gate_view, "gate"), gate.layout());
  {
    py::gil_scoped_release nogil;
    device::channel_gate_backward(v.dtype, shape[0], shape[2] * shape[3], shape[1], dy.data(), x.data(), gate.data(),
                                  dx ? dx->data() : nullptr, dgate ? dgate->data() : nullptr);
  }
  const auto finish = [](std::optional<Output>& output) {
    return output ? MaybeArray(output->finish()) : MaybeArray();
  };
  return {finish(dx), finish(dgate)};
}

}  // namespace

void bind_channels(py::module_& m) {
  using namespace py::literals;
  m.def("cat", &cat, "arrays"_a, "dim"_a);
  m.def("cat_backward", &cat_backward, "dy"_a, "sizes"_a, "dim"_a);
  m.def("channel_gate", &channel_gate, "x"_a, "gate"_a, "bias"_a);
  m.def("channel_gate_backward", &channel_gate_backward, "dy"_a, "x"_a, "gate"_a, "needs"_a);
}

}  // namespace fastconv::bindings

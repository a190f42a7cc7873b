// The arrays that Python passes: numpy's where the kernels run on the CPU, our own where they run on a CUDA device. The
// other files of this folder are compiled once for each.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/tensor.h"

#ifdef FASTCONV_CUDA
#include "bindings/device_array.h"
#endif

namespace fastconv::FASTCONV_DEVICE {}

namespace fastconv::bindings {

namespace py = pybind11;
namespace device = fastconv::FASTCONV_DEVICE;

#ifdef FASTCONV_CUDA
using Array = DeviceArray;
#else
using Array = py::array;
#endif

// The array as it is, any strides. TypeError for a dtype that kernels do not know; numpy's must be in native byte
// order.
TensorView view(const Array& array, const char* name);

// A new array of this shape and these strides, uninitialised, in memory from the caching allocator. The strides are
// dense.
Array new_strided(const TensorView& form);

}  // namespace fastconv::bindings

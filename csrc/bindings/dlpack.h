// DLPack (dmlc.github.io/dlpack): arrays of other libraries as ours and ours as theirs, without a copy.
#pragma once

#include "bindings/array.h"

namespace fastconv::bindings {

// (device type, number) as DLPack has it.
std::pair<int, int> dlpack_device();
// A capsule named "dltensor". stream: the consumer's, which is made to wait for ours; -1: it waits by itself.
py::capsule to_dlpack(const DeviceArray& array, const py::object& stream, const py::object& max_version,
                      const py::object& device, const py::object& copy);
// Consumes a capsule. TypeError for another device or a dtype that kernels do not know.
DeviceArray from_dlpack(const py::capsule& capsule);

}  // namespace fastconv::bindings

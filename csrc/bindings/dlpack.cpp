#include "bindings/dlpack.h"

#include "cuda/device.h"

namespace fastconv::bindings {
namespace {

// DLPack 0.8's structures (include/dlpack/dlpack.h); the names of their members are ours.
struct Device {
  int32_t type, number;
};
struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t *shape, *strides;  // in elements; null strides: row-major
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr int kCpu = 1, kCuda = 2, kCudaManaged = 13;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;

constexpr struct {
  Type dlpack;
  DType ours;
} kTypes[] = {
    {{kFloat, 32, 1}, DType::kFloat32}, {{kFloat, 64, 1}, DType::kFloat64}, {{kInt, 64, 1}, DType::kInt64},
    {{kUInt, 8, 1}, DType::kUInt8},     {{kFloat, 16, 1}, DType::kFloat16}, {{kBFloat, 16, 1}, DType::kBFloat16},
};

struct Exported {
  Managed managed;
  DeviceArray array;
  std::array<int64_t, kMaxDims> shape, strides;
};

}  // namespace

// Memory of an emulated device is the host's, and says so: numpy and torch can then look at it.
std::pair<int, int> dlpack_device() { return {cuda::emulated() ? kCpu : kCuda, 0}; }

py::capsule to_dlpack(const DeviceArray& array, const py::object& stream, const py::object&, const py::object& device,
                      const py::object& copy) {
  const auto [type, number] = dlpack_device();
  if (!device.is_none() && device.cast<std::pair<int, int>>() != std::make_pair(type, number))
    throw py::buffer_error("the array lies on a CUDA device and is not copied elsewhere");
  if (!copy.is_none() && copy.cast<bool>()) throw py::buffer_error("copy=True is not supported: use copy()");
  const TensorView& v = array.view();
  auto* out = new Exported{{}, array, v.sizes, v.strides};
  Type dtype{};
  for (const auto& known : kTypes)
    if (known.ours == v.dtype) dtype = known.dlpack;
  out->managed.tensor = {v.data, {type, number}, v.ndim, dtype, out->shape.data(), out->strides.data(), 0};
  out->managed.context = out;
  out->managed.deleter = [](Managed* m) { delete static_cast<Exported*>(m->context); };
  if (stream.is_none() || stream.cast<int64_t>() != -1) {
    // 1 and 2 stand for the two default streams.
    const int64_t number_of = stream.is_none() ? 0 : stream.cast<int64_t>();
    cuda::let_wait(number_of <= 2 ? nullptr : reinterpret_cast<cuda::Stream>(number_of));
  }
  return py::capsule(&out->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // consumed
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

DeviceArray from_dlpack(const py::capsule& capsule) {
  FC_CHECK_TYPE(PyCapsule_IsValid(capsule.ptr(), "dltensor"), "expected a DLPack capsule that has not been used");
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  const Tensor& t = managed->tensor;
  const bool here = cuda::emulated()
                        ? t.device.type == kCpu
                        : (t.device.type == kCuda || t.device.type == kCudaManaged) && t.device.number == 0;
  FC_CHECK_TYPE(here, "expected an array on CUDA device 0, got DLPack device (", t.device.type, ", ", t.device.number,
                ")");
  FC_CHECK(t.ndim <= kMaxDims, "an array has at most ", kMaxDims, " dimensions, got ", t.ndim);
  TensorView v;
  bool known = false;
  for (const auto& type : kTypes)
    if (type.dlpack.code == t.dtype.code && type.dlpack.bits == t.dtype.bits && t.dtype.lanes == 1) {
      v.dtype = type.ours;
      known = true;
    }
  FC_CHECK_TYPE(known, "DLPack type (code ", int{t.dtype.code}, ", ", int{t.dtype.bits}, " bits) is not supported");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.ndim = t.ndim;
  int64_t expect = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    v.sizes[i] = t.shape[i];
    v.strides[i] = t.strides ? t.strides[i] : expect;
    expect *= t.shape[i];
  }
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  return DeviceArray(v, std::shared_ptr<void>(v.data, [managed](void*) {
                       const py::gil_scoped_acquire gil;  // its library may need it
                       if (managed->deleter) managed->deleter(managed);
                     }));
}

}  // namespace fastconv::bindings

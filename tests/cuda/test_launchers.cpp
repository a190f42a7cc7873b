// The implementations of convolution as they are called: operands packed, kernels chosen and started (in the emulator,
// or in loops where they are plain), partial sums added, in every layout of weights, against plain loops. What they
// need of the device stands in here as host memory.
#define FASTCONV_CUDA_EMULATED
#define FASTCONV_DEVICE cuda
#include "core/batch_norm_problem.cpp"
#include "cuda/batch_norm.cu"
#include "cuda/conv2d_depthwise.cu"
#include "cuda/conv2d_sm80.cu"
#include "cuda/conv2d_sm90.cu"

#include "emulated.h"

namespace fastconv {
void* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128 + 128);
  std::memset(memory, 0xFF, bytes);
  return memory;
}
void release(void* pointer) noexcept { std::free(pointer); }
bool computes_in(DType) { return true; }
const char* floating_dtypes() { return "any"; }

namespace cuda {
const DeviceInfo& device_info() {
  static DeviceInfo info;
  info.multiprocessors = 5;
  return info;
}
bool tf32_allowed() { return true; }
void do_or_record(std::function<void()> work) { work(); }
// Of pooling, which is not called.
const int32_t* constant_table(const std::vector<int32_t>&) { return nullptr; }
void max_pool2d_backward_places(const Pool2dProblem&, const void*, const uint8_t*, void*) {}
void copy_bytes(void* to, const void* from, size_t bytes, Copy) { std::memcpy(to, from, bytes); }
void apply_activation(Activation f, DType dtype, void* y, int64_t n) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < n; ++i) {
      T& v = static_cast<T*>(y)[i];
      v = T(activate(f, static_cast<Acc<T>>(v)));
    }
  });
}
const void* krsc_weights(const Conv2dProblem& a, const TensorView& w, Buffer& copy) {
  if (w.is_channels_last()) return w.data;
  copy = Buffer(static_cast<size_t>(elements(a.w_shape()) * itemsize(a.dtype)));
  auto* to = copy.as<uint16_t>();
  for (int64_t k = 0; k < a.k; ++k)
    for (int64_t r = 0; r < a.r; ++r)
      for (int64_t s = 0; s < a.s; ++s)
        for (int64_t c = 0; c < a.cg(); ++c)
          *to++ = w.as<uint16_t>()[k * w.strides[0] + c * w.strides[1] + r * w.strides[2] + s * w.strides[3]];
  return copy.as<void>();
}
}  // namespace cuda
}  // namespace fastconv

using namespace fastconv;
using namespace fastconv::cuda;
using naive::Array;

namespace {

struct Implementations {
  const char* name;
  const char* (*supports[3])(const Conv2dProblem&);
  void (*forward)(const Conv2dProblem&, const ForwardArguments&);
  void (*backward_input)(const Conv2dProblem&, const BackwardInputArguments&);
  void (*backward_weight)(const Conv2dProblem&, const BackwardWeightArguments&);
};
const Implementations kAll[] = {
    {"depthwise",
     {depthwise::supports, depthwise::supports, depthwise::supports},
     depthwise::forward,
     depthwise::backward_input,
     depthwise::backward_weight},
    {"sm80",
     {sm80::supports, sm80::supports_backward_input, sm80::supports_backward_weight},
     sm80::forward,
     sm80::backward_input,
     sm80::backward_weight},
    {"sm90",
     {sm90::supports, sm90::supports_backward_input, sm90::supports_backward_weight},
     sm90::forward,
     sm90::backward_input,
     sm90::backward_weight},
};

Conv2dProblem problem_of(const naive::Shape& a, DType dtype) {
  Conv2dProblem p;
  p.dtype = dtype;
  p.n = a.n, p.c = a.c, p.h = a.h, p.w = a.w, p.k = a.k, p.r = a.r, p.s = a.s, p.p = a.p(), p.q = a.q();
  p.stride_h = a.stride_h, p.stride_w = a.stride_w, p.dilation_h = a.dilation_h, p.dilation_w = a.dilation_w;
  p.pad_top = a.top, p.pad_bottom = a.bottom, p.pad_left = a.left, p.pad_right = a.right;
  p.groups = a.groups;
  return p;
}

// Weights [k][r][s][c], as they are or as [k][c][r][s].
template <class T> struct Weights {
  Weights(const Conv2dProblem& a, bool channels_last) : a(a), buffer(static_cast<size_t>(elements(a.w_shape()))) {
    view.data = buffer.data();
    view.dtype = a.dtype;
    view.ndim = 4;
    const int64_t cg = a.cg();
    view.sizes = {a.k, cg, a.r, a.s};
    if (channels_last)
      view.strides = {a.r * a.s * cg, 1, a.s * cg, cg};
    else
      view.strides = {cg * a.r * a.s, a.r * a.s, a.s, 1};
  }
  typename T::Storage& at(int64_t krsc) const {
    const int64_t cg = a.cg(), c = krsc % cg, s = krsc / cg % a.s, r = krsc / cg / a.s % a.r, k = krsc / cg / a.s / a.r;
    return buffer.data()[k * view.strides[0] + c * view.strides[1] + r * view.strides[2] + s * view.strides[3]];
  }
  Conv2dProblem a;
  DeviceArray<T> buffer;
  TensorView view;
};

template <class T> void test(const Implementations& by, const naive::Shape& shape, DType dtype, int variant) {
  const Conv2dProblem a = problem_of(shape, dtype);
  const Array x = naive::integers(shape.x_size(), 1), w = naive::integers(shape.w_size(), 2);
  const Array dy = naive::integers(shape.y_size(), 3), bias = naive::integers(shape.k, 4);
  const DeviceArray<T> of_x(x), of_dy(dy), of_bias(bias);
  const Weights<T> weights(a, variant % 2 == 0), gradient(a, variant % 3 == 0);
  for (size_t i = 0; i < w.size(); ++i) weights.at(static_cast<int64_t>(i)) = T::store(w[i]);
  const std::string name = by.name;

  if (!by.supports[0](a)) {
    Array y = naive::forward(shape, x, w);
    for (size_t i = 0; i < y.size(); ++i) y[i] = std::fmax(y[i] + bias[i % shape.k] + dy[i], 0.0f);
    DeviceArray<T> result(y.size());
    by.forward(a, {of_x.data(), weights.view, of_bias.data(), of_dy.data(), Activation::kReLU, result.data()});
    compare<T>((name + " forward").c_str(), shape, result, y);
  }
  if (!by.supports[1](a)) {
    const Array dx = naive::backward_input(shape, dy, w);
    DeviceArray<T> result(dx.size());
    by.backward_input(a, {of_dy.data(), weights.view, result.data()});
    compare<T>((name + " input gradient").c_str(), shape, result, dx);
  }
  if (!by.supports[2](a)) {
    Array dw = naive::backward_weight(shape, dy, x), got(dw.size());
    by.backward_weight(a, {of_dy.data(), of_x.data(), gradient.view});
    for (size_t i = 0; i < dw.size(); ++i) {
      got[i] = T::load(gradient.at(static_cast<int64_t>(i)));
      dw[i] = T::load(T::store(dw[i]));
    }
    compare((name + " weight gradient").c_str(), shape, got, dw);
  }
}

void test_all(const naive::Shape& shape, int variant) {
  for (const Implementations& by : kAll) {
    if (variant % 3 == 0) test<BFloat16Numbers>(by, shape, DType::kBFloat16, variant);
    if (variant % 3 == 1) test<Float16Numbers>(by, shape, DType::kFloat16, variant);
    if (variant % 3 == 2) test<TensorFloat32Numbers>(by, shape, DType::kFloat32, variant);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 300; ++i) {
    naive::Shape a = naive::random_shape(700 + i, 1, false, 14);
    a.groups = a.c = a.k = naive::Random(i).pick({2, 3, 8, 16, 24, 40, 264});
    if (i % 3 == 0) a.stride_w = a.stride_h = 1 + i % 2, a.dilation_w = a.dilation_h = 1, a.s = a.r = i % 4 ? 3 : 5;
    if (!a.valid()) continue;
    for (int dtype = 0; dtype < 3; ++dtype)
      if (dtype == 0)
        test<BFloat16Numbers>(kAll[0], a, DType::kBFloat16, i);
      else if (dtype == 1)
        test<Float16Numbers>(kAll[0], a, DType::kFloat16, i);
      else
        test<TensorFloat32Numbers>(kAll[0], a, DType::kFloat32, i);
  }
  for (int i = 0; i < 12; ++i) {
    test_all(naive::random_shape(800 + i, 8, i % 2 == 0, 8), i);
    naive::Shape first = naive::random_shape(900 + i, 1, false, 10);  // a first layer
    first.c = 1 + i % 4;
    test_all(first, i);
    test_all(naive::random_shape(1000 + i, 1, true, 8), i);
  }
  return finish();
}

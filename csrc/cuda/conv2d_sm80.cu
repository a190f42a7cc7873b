// Starts the kernels of conv2d_sm80.h: which gather, which tile, what is packed before and added up after.
#include "cuda/conv2d_sm80.h"

#include "cuda/conv2d_operands.h"
#include "cuda/run_kernel.h"

namespace fastconv::cuda::sm80 {
namespace {

template <class T, int kM, int kN, Gather kGather, bool kBackward> struct Convolve {
  using Arguments = sm80::Arguments;
  static constexpr int kThreads = 256, kSharedBytes = shared_bytes<kM, kN>();
  static constexpr int kBlocksPerSM = sizeof(typename T::Storage) == 4 && kN == 128 ? 1 : 2;  // registers
  FC_DEVICE static void run(const Arguments& a, uint32_t shared) { convolve<T, kM, kN, kGather, kBackward>(a, shared); }
};

template <class T, Gather kGather> struct WeightGradient {
  using Arguments = sm80::Arguments;
  static constexpr int kThreads = 128, kBlocksPerSM = 2, kSharedBytes = gradient_shared_bytes<T>();
  FC_DEVICE static void run(const Arguments& a, uint32_t shared) { weight_gradient<T, kGather>(a, shared); }
};

Arguments arguments_of(const Conv2dProblem& a) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  Arguments args{};
  args.batch = i(a.n), args.h = i(a.h), args.w = i(a.w), args.p = i(a.p), args.q = i(a.q);
  args.c = i(a.c), args.k = i(a.k), args.r = i(a.r), args.s = i(a.s), args.groups = i(a.groups);
  args.stride_h = i(a.stride_h), args.stride_w = i(a.stride_w);
  args.pad_top = i(a.pad_top), args.pad_left = i(a.pad_left);
  args.dilation_h = i(a.dilation_h), args.dilation_w = i(a.dilation_w);
  return args;
}

constexpr int kM = 128;  // pixels of a tile

// Blocks beside each other share the pixels' tile in L2.
template <class T, int kN, Gather kGather, bool kBackward> void start(const Arguments& a) {
  const int phases = phases_of(a, kBackward);
  // The first phase is the largest.
  const Axes axes = axes_of(a, kBackward, 0);
  const int pixels = a.batch * axes.h.results * axes.w.results;
  const int columns = (kBackward ? a.c : a.k) / a.groups;
  run_kernel<Convolve<T, kM, kN, kGather, kBackward>>(
      {divide_up(pixels, kM), divide_up(columns, kN), a.groups * phases}, a);
}

template <class T, bool kBackward> void start(const Arguments& a, Gather gather) {
  if (gather == Gather::kElement) return start<T, 64, Gather::kElement, kBackward>(a);
  if constexpr (sizeof(typename T::Storage) == 2 && !kBackward)
    if (gather == Gather::kHalf) return start<T, 64, Gather::kHalf, kBackward>(a);
  if ((kBackward ? a.c : a.k) / a.groups > 64) return start<T, 128, Gather::kChunk, kBackward>(a);
  start<T, 64, Gather::kChunk, kBackward>(a);
}

template <class T> void start_gradient(const Arguments& a, Gather gather, const Grid& grid) {
  if (gather == Gather::kElement) return run_kernel<WeightGradient<T, Gather::kElement>>(grid, a);
  if constexpr (sizeof(typename T::Storage) == 2)
    if (gather == Gather::kHalf) return run_kernel<WeightGradient<T, Gather::kHalf>>(grid, a);
  run_kernel<WeightGradient<T, Gather::kChunk>>(grid, a);
}

// The image as it is gathered: of 1 to 3 channels (a first layer) a copy with four, so that a pixel is one copy of 8
// bytes (16 in float) and k has no more zeros than that.
template <class T> struct Image4 {
  using Storage = typename T::Storage;
  Image4(const Conv2dProblem& a, const void* x) {
    const int64_t pixels = a.n * a.h * a.w;
    channels = a.c;
    data = aligned_operand(x, pixels * a.c * sizeof(Storage), copy);
    if (a.groups == 1 && a.c < 4) {
      channels = 4;
      copy = widen_image<Storage>(data, pixels, a.c, channels);
      data = copy.template as<void>();
    }
    const int64_t read = channels / a.groups;
    if (read * sizeof(Storage) % 16 == 0)
      gather = Gather::kChunk;
    else
      gather = a.groups == 1 && channels == 4 ? Gather::kHalf : Gather::kElement;
  }
  int64_t channels;
  const void* data;
  Gather gather;
  Buffer copy;
};

template <class F> void dispatch_numbers(DType t, F&& f) {
  if (t == DType::kBFloat16) return f(BFloat16Numbers());
  if (t == DType::kFloat16) return f(Float16Numbers());
  f(TensorFloat32Numbers());
}

const char* declines(const Conv2dProblem& a) {
  if (!emulated() && device_info().major < 8) return "the device has no bfloat16 tensor cores (compute capability 8.0)";
  if (a.dtype == DType::kFloat32 && !tf32_allowed()) return "float32 without TensorFloat-32 (cuda.allow_tf32)";
  if (a.dtype != DType::kFloat32 && a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16)
    return "not bfloat16, float16 or TensorFloat-32";
  if (a.kg() > 65535 * 64 || a.cg() > 65535 * 64) return "too many channels";
  return too_large(a);
}

}  // namespace

const char* supports(const Conv2dProblem& a) { return a.groups > 65535 ? "too many groups" : declines(a); }
const char* supports_backward_input(const Conv2dProblem& a) {
  const int64_t phases = std::min(a.h, a.stride_h) * std::min(a.w, a.stride_w);
  return phases * a.groups > 65535 ? "too many groups and strides" : declines(a);
}
const char* supports_backward_weight(const Conv2dProblem& a) { return supports(a); }

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  dispatch_numbers(a.dtype, [&](auto numbers) {
    using T = decltype(numbers);
    using Storage = typename T::Storage;
    const Image4<T> image(a, args.x);
    const int padded = padded_channels<T>(static_cast<int>(image.channels / a.groups), image.gather);
    Arguments launch = arguments_of(a);
    launch.c = static_cast<int>(image.channels);
    const bool as_it_is =
        padded == a.cg() && args.w.is_channels_last() && reinterpret_cast<uintptr_t>(args.w.data) % 16 == 0;
    const Buffer packed = as_it_is ? Buffer() : pack_weights<Storage>(a, args.w, false, padded);
    launch.source = image.data;
    launch.other = as_it_is ? args.w.data : packed.as<void>();
    launch.result = args.y;
    const EpilogueStatistics statistics(a, args, kM);
    launch.epilogue = epilogue_of(args);
    launch.epilogue.statistics = statistics.slices();
    start<T, false>(launch, image.gather);
    finish_activation(a, args);
    statistics.merge();
  });
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  dispatch_numbers(a.dtype, [&](auto numbers) {
    using T = decltype(numbers);
    using Storage = typename T::Storage;
    Buffer copy;
    const Gather gather = a.kg() * sizeof(Storage) % 16 == 0 ? Gather::kChunk : Gather::kElement;
    const Buffer packed = pack_weights<Storage>(a, args.w, true, padded_channels<T>(static_cast<int>(a.kg()), gather));
    Arguments launch = arguments_of(a);
    launch.source = aligned_operand(args.dy, elements(a.y_shape()) * sizeof(Storage), copy);
    launch.other = packed.as<void>();
    launch.result = args.dx;
    start<T, true>(launch, gather);
  });
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  dispatch_numbers(a.dtype, [&](auto numbers) {
    using T = decltype(numbers);
    using Storage = typename T::Storage;
    const Image4<T> image(a, args.x);
    Buffer copy;
    Arguments launch = arguments_of(a);
    launch.c = static_cast<int>(image.channels);
    launch.source = image.data;
    launch.other = aligned_operand(args.dy, elements(a.y_shape()) * sizeof(Storage), copy);
    const int padded = padded_channels<T>(launch.c / launch.groups, image.gather);
    const int tiles =
        divide_up(launch.k / launch.groups, kGradientTile) * divide_up(launch.r * launch.s * padded, kGradientTile);
    // Three blocks fit a multiprocessor.
    launch.split = plan_split(tiles * launch.groups, divide_up(launch.batch * launch.p * launch.q, kGradientPixels),
                              3 * device_info().multiprocessors, 6);
    const Buffer partial(static_cast<size_t>(launch.split.splits) * a.k * a.r * a.s * padded * sizeof(float));
    launch.result = partial.as<void>();
    start_gradient<T>(launch, image.gather, {tiles, launch.split.splits, launch.groups});
    sum_partials<Storage>(a, partial.as<float>(), launch.split.splits, padded, args.dw);
  });
}

}  // namespace fastconv::cuda::sm80

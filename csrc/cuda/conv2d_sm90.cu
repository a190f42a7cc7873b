// Starts the kernels of conv2d_sm90.h: tiles by the cost model, tensor maps, partial sums of the weight gradient.
#include "cuda/conv2d_sm90.h"

#include <optional>

#include "cuda/conv2d_operands.h"
#include "cuda/run_kernel.h"

namespace fastconv::cuda::sm90 {
namespace {

// Only code for sm_90a has these instructions; in other code the kernels fail, and `declines` keeps them from running.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FC_ON_HOPPER(...) __VA_ARGS__
#else
#define FC_ON_HOPPER(...) __trap();
#endif

// FASTCONV_CUDA_SM90A: the build has code for sm_90a (cmake/cuda.cmake).
#ifdef FASTCONV_CUDA_SM90A
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif

template <class T, int kM, int kN, int kStages, bool kBackward> struct Convolve {
  using Arguments = sm90::Arguments;
  static constexpr int kThreads = sm90::kThreads, kBlocksPerSM = 1, kSharedBytes = Layout<kM, kN, kStages>::kBytes;
  FC_DEVICE static void run([[maybe_unused]] const Arguments& a, [[maybe_unused]] uint32_t shared) {
    FC_ON_HOPPER(convolve<T, kM, kN, kStages, kBackward>(a, shared);)
  }
};

template <class T, int kM, int kN, int kStages> struct WeightGradient {
  using Arguments = sm90::Arguments;
  static constexpr int kThreads = sm90::kThreads, kBlocksPerSM = 1, kSharedBytes = Layout<kM, kN, kStages>::kBytes;
  FC_DEVICE static void run([[maybe_unused]] const Arguments& a, [[maybe_unused]] uint32_t shared) {
    FC_ON_HOPPER(weight_gradient<T, kM, kN, kStages>(a, shared);)
  }
};

#undef FC_ON_HOPPER

#ifdef __CUDACC__

void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS)
    throw DeviceError(concat(what, " failed: error ", static_cast<int>(result), " of the driver"));
}

// A function of the driver, fetched at run time, so that nothing links to it.
template <class Function> Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &state);
  if (error != cudaSuccess || state != cudaDriverEntryPointSuccess || found == nullptr) {
    cudaGetLastError();  // must not be reported again by the next launch
    throw DeviceError(concat("the CUDA driver has no ", name));
  }
  return reinterpret_cast<Function>(found);
}

CUtensorMap encode(const TensorMapPlan& plan) {
  static const auto tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  CUtensorMap map{};
  if (plan.rank == 0) return map;
  const auto type = plan.numbers == TensorMapPlan::Numbers::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto rank = static_cast<cuuint32_t>(plan.rank);
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  uint64_t bytes = TensorMapPlan::kNumberBytes;
  for (int i = 0; i < plan.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(plan.size[i]);
    box[i] = static_cast<cuuint32_t>(plan.box[i]);
    bytes *= size[i];
    if (i + 1 < plan.rank) stride[i] = bytes;
  }
  void* data = const_cast<void*>(plan.data);
  if (!plan.im2col) {
    check(tiled(&map, type, rank, data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
          "cuTensorMapEncodeTiled");
    return map;
  }
  // The corners in the order of the sizes, width first, whatever the driver's header says.
  const int lower[2] = {plan.w.lower, plan.h.lower}, upper[2] = {plan.w.upper, plan.h.upper};
  step[1] = static_cast<cuuint32_t>(plan.step_w);
  step[2] = static_cast<cuuint32_t>(plan.step_h);
  check(im2col(&map, type, rank, data, size, stride, lower, upper, TensorMapPlan::kRowNumbers,
               static_cast<cuuint32_t>(plan.pixels), step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeIm2col");
  return map;
}

// The driver's functions need a current context, which a thread has from its first call of the runtime on.
void make_context_current() {
  static thread_local bool current = false;
  if (current) return;
  cudaSetDevice(0);
  check_launch("cudaSetDevice");
  current = true;
}

#else

TensorMap encode(const TensorMapPlan& plan) { return plan; }
void make_context_current() {}

#endif

Maps<TensorMap> encode(const Maps<TensorMapPlan>& plans) {
  make_context_current();
  Maps<TensorMap> maps{};
  for (int i = 0; i < kMostPhases; ++i) maps.source[i] = encode(plans.source[i]);
  maps.other = encode(plans.other);
  maps.result = encode(plans.result);
  return maps;
}

sm90::Shape shape_of(const Conv2dProblem& a) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {i(a.n), i(a.c),        i(a.h),        i(a.w),       i(a.k),        i(a.r),          i(a.s),         i(a.p),
          i(a.q), i(a.stride_h), i(a.stride_w), i(a.pad_top), i(a.pad_left), i(a.dilation_h), i(a.dilation_w)};
}

template <class F> void dispatch_numbers(DType t, F&& f) {
  if (t == DType::kBFloat16) return f(BFloat16Numbers(), TensorMapPlan::Numbers::kBFloat16);
  f(Float16Numbers(), TensorMapPlan::Numbers::kFloat16);
}

template <class T, int kIndex, int kStages, bool kBackward> void start(const Arguments& launch, int blocks) {
  run_kernel<Convolve<T, kTiles[kIndex].m, kTiles[kIndex].n, kStages, kBackward>>({blocks, 1, 1}, launch);
}

// args: of a forward pass, for what follows the sums.
template <class T, bool kBackward>
void run(const Conv2dProblem& a, TensorMapPlan::Numbers numbers, const Operands& data,
         const ForwardArguments* args = nullptr) {
  const sm90::Shape shape = shape_of(a);
  const int multiprocessors = device_info().multiprocessors;
  const int depth = static_cast<int>(kBackward ? a.k : a.c), taps = static_cast<int>(a.r * a.s);
  const int phases = kBackward ? static_cast<int>(std::min(a.h, a.stride_h) * std::min(a.w, a.stride_w)) : 1;
  const int tile = cheapest_tile(kBackward ? a.n * a.h * a.w : a.n * a.p * a.q, kBackward ? shape.c : shape.k,
                                 divide_up(taps, phases) * divide_up(depth, kDepth), multiprocessors);
  Arguments launch{};
  Maps<TensorMapPlan> maps;
  launch.plan = plan_convolution(shape, kBackward, kTiles[tile], numbers, data, maps);
  launch.maps = encode(maps);
  launch.result = data.result;
  const int blocks = smaller(launch.plan.tiles, multiprocessors);
  std::optional<EpilogueStatistics> statistics;
  if (args) {
    statistics.emplace(a, *args, kTiles[tile].m / 2);
    launch.epilogue = epilogue_of(*args);
    launch.epilogue.statistics = statistics->slices();
  }
  switch (tile) {
    case 0: start<T, 0, 3, kBackward>(launch, blocks); break;
    case 1: start<T, 1, 3, kBackward>(launch, blocks); break;
    case 2: start<T, 2, 5, kBackward>(launch, blocks); break;
    case 3: start<T, 3, 4, kBackward>(launch, blocks); break;
    default: start<T, 4, 6, kBackward>(launch, blocks);
  }
  if (!args) return;
  finish_activation(a, *args);
  statistics->merge();
}

const char* declines(const Conv2dProblem& a, bool backward_input) {
  if (!emulated() && !kHopperCode) return "built without code for sm_90a";
  if (!emulated() && device_info().major != 9) return "not a Hopper GPU";
  if (a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16) return "not bfloat16 or float16";
  if (a.groups != 1) return "groups";
  if (const char* reason = too_large(a)) return reason;
  return sm90::declines(shape_of(a), backward_input);
}

}  // namespace

const char* supports(const Conv2dProblem& a) { return declines(a, false); }
const char* supports_backward_input(const Conv2dProblem& a) { return declines(a, true); }
const char* supports_backward_weight(const Conv2dProblem& a) { return declines(a, false); }

void forward(const Conv2dProblem& a, const ForwardArguments& args) {
  dispatch_numbers(a.dtype, [&](auto t, auto numbers) {
    Buffer packed, copy_x, copy_w;
    const void* w = krsc_weights(a, args.w, packed);
    run<decltype(t), false>(a, numbers,
                            {aligned_operand(args.x, elements(a.x_shape()) * 2, copy_x),
                             aligned_operand(w, elements(a.w_shape()) * 2, copy_w), args.y},
                            &args);
  });
}

void backward_input(const Conv2dProblem& a, const BackwardInputArguments& args) {
  dispatch_numbers(a.dtype, [&](auto t, auto numbers) {
    Buffer packed, copy_dy, copy_w;
    const void* w = krsc_weights(a, args.w, packed);
    run<decltype(t), true>(a, numbers,
                           {aligned_operand(args.dy, elements(a.y_shape()) * 2, copy_dy),
                            aligned_operand(w, elements(a.w_shape()) * 2, copy_w), args.dx});
  });
}

void backward_weight(const Conv2dProblem& a, const BackwardWeightArguments& args) {
  dispatch_numbers(a.dtype, [&](auto t, auto numbers) {
    using T = decltype(t);
    Buffer copy_x, copy_dy;
    const sm90::Shape shape = shape_of(a);
    const int tile = gradient_tile(shape), multiprocessors = device_info().multiprocessors;
    Arguments launch{};
    Maps<TensorMapPlan> maps;
    launch.plan = plan_weight_gradient(shape, kGradientTiles[tile], numbers, multiprocessors,
                                       aligned_operand(args.x, elements(a.x_shape()) * 2, copy_x),
                                       aligned_operand(args.dy, elements(a.y_shape()) * 2, copy_dy), maps);
    launch.maps = encode(maps);
    const Buffer partial(launch.plan.split.splits * elements(a.w_shape()) * sizeof(float));
    launch.result = partial.as<void>();
    const Grid grid = {smaller(launch.plan.tiles, multiprocessors), 1, 1};
    if (tile == 0)
      run_kernel<WeightGradient<T, kGradientTiles[0].m, kGradientTiles[0].n, 5>>(grid, launch);
    else
      run_kernel<WeightGradient<T, kGradientTiles[1].m, kGradientTiles[1].n, 6>>(grid, launch);
    sum_partials<typename T::Storage>(a, partial.as<float>(), launch.plan.split.splits, a.c, args.dw);
  });
}

}  // namespace fastconv::cuda::sm90

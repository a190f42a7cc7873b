// The kernels of conv2d_sm90.h, run thread by thread by the emulator, against plain loops.
#include "cuda/conv2d_sm90.h"

#include "emulated.h"

using namespace fastconv::cuda;
using naive::Array;
namespace sm90 = fastconv::cuda::sm90;

namespace {

sm90::Shape shape_of(const naive::Shape& a) {
  return {a.n,   a.c,        a.h,        a.w,   a.k,    a.r,          a.s,         a.p(),
          a.q(), a.stride_h, a.stride_w, a.top, a.left, a.dilation_h, a.dilation_w};
}

template <class T> constexpr TensorMapPlan::Numbers numbers_of() {
  return std::is_same_v<T, Float16Numbers> ? TensorMapPlan::Numbers::kFloat16 : TensorMapPlan::Numbers::kBFloat16;
}

template <class T, int kM, int kN, int kStages, bool kBackward>
void test_convolve(const naive::Shape& a, const emulator::Options& options, int blocks, bool with_epilogue) {
  const sm90::Shape shape = shape_of(a);
  if (sm90::declines(shape, kBackward)) return;
  const Array source = naive::integers(kBackward ? a.y_size() : a.x_size(), 1), w = naive::integers(a.w_size(), 2);
  Array expected = kBackward ? naive::backward_input(a, source, w) : naive::forward(a, source, w);
  const DeviceArray<T> source_buffer(source), weights(w);
  DeviceArray<T> result(expected.size());

  sm90::Arguments args{};
  args.result = result.data();
  args.plan = sm90::plan_convolution(shape, kBackward, {kM, kN}, numbers_of<T>(),
                                     {source_buffer.data(), weights.data(), result.data()}, args.maps);
  const int channels = kBackward ? a.c : a.k, pixels = static_cast<int>(expected.size()) / channels;
  const Array bias = naive::integers(channels, 3), residual = naive::integers(static_cast<int64_t>(expected.size()), 4);
  const DeviceArray<T> bias_buffer(bias), residual_buffer(residual);
  const int slices = divide_up(pixels, kM / 2);
  std::vector<SliceStatistics> statistics(static_cast<size_t>(slices) * channels);
  if (with_epilogue) {
    args.epilogue.bias = bias_buffer.data();
    args.epilogue.residual = residual_buffer.data();
    args.epilogue.low = 0;
    args.epilogue.high = 6;
    args.epilogue.statistics = statistics.data();
    for (size_t i = 0; i < expected.size(); ++i)
      expected[i] = std::fmin(std::fmax(expected[i] + bias[i % channels] + residual[i], 0.0f), 6.0f);
  }
  emulate(smaller(blocks, args.plan.tiles), 1, 1, sm90::kThreads, sm90::Layout<kM, kN, kStages>::kBytes, options,
          [&] { sm90::convolve<T, kM, kN, kStages, kBackward>(args, emulator::kSharedBase); });
  compare<T>(kBackward ? "input gradient" : "forward", a, result, expected);
  if (with_epilogue) check_statistics<T>(a, expected, statistics, slices, kM / 2);
}

template <class T, int kM, int kN, int kStages>
void test_gradient(const naive::Shape& a, const emulator::Options& options, int multiprocessors) {
  const sm90::Shape shape = shape_of(a);
  if (sm90::declines(shape, false)) return;
  const Array x = naive::integers(a.x_size(), 1), dy = naive::integers(a.y_size(), 2);
  const DeviceArray<T> x_buffer(x), dy_buffer(dy);
  sm90::Arguments args{};
  args.plan = sm90::plan_weight_gradient(shape, {kM, kN}, numbers_of<T>(), multiprocessors, x_buffer.data(),
                                         dy_buffer.data(), args.maps);
  const size_t size = static_cast<size_t>(a.w_size());
  std::vector<float> partial(size * args.plan.split.splits, NAN);
  args.result = partial.data();
  emulate(smaller(multiprocessors, args.plan.tiles), 1, 1, sm90::kThreads, sm90::Layout<kM, kN, kStages>::kBytes,
          options, [&] { sm90::weight_gradient<T, kM, kN, kStages>(args, emulator::kSharedBase); });
  Array sum(size);
  for (int split = 0; split < args.plan.split.splits; ++split)
    for (size_t i = 0; i < size; ++i) sum[i] += partial[split * size + i];
  compare("weight gradient", a, sum, naive::backward_weight(a, dy, x));
}

template <class T> void test_shape(const naive::Shape& a, int i) {
  const emulator::Options options{i % 2 == 0, i % 3 != 0, static_cast<uint32_t>(i)};
  const int blocks = 1 + i % 4;
  switch (i % 3) {
    case 0:
      test_convolve<T, 128, 64, 6, false>(a, options, blocks, i % 2 == 0);
      test_convolve<T, 128, 64, 6, true>(a, options, blocks, false);
      test_gradient<T, 128, 64, 6>(a, options, 1 + i % 8);
      break;
    case 1:
      test_convolve<T, 256, 64, 4, false>(a, options, blocks, i % 2 == 0);
      test_convolve<T, 256, 128, 3, true>(a, options, blocks, false);
      test_gradient<T, 128, 128, 5>(a, options, 1 + i % 8);
      break;
    default:
      test_convolve<T, 128, 256, 3, false>(a, options, blocks, i % 2 == 0);
      test_convolve<T, 128, 128, 5, true>(a, options, blocks, false);
  }
}

naive::Shape layer(int n, int c, int size, int k, int kernel, int stride, int pad) {
  naive::Shape a{n, c, size, size, k, kernel, kernel};
  a.stride_h = a.stride_w = stride;
  a.top = a.bottom = a.left = a.right = pad;
  return a;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 24;
  for (int i = 0; i < count; ++i) {
    naive::Shape a = naive::random_shape(500 + i, 8, false, 10);
    if (i % 4 == 3) a.stride_h = smaller(a.stride_h, 2), a.stride_w = smaller(a.stride_w, 2);
    test_shape<BFloat16Numbers>(a, i);
    if (i % 4 == 0) test_shape<Float16Numbers>(a, i + 1);
  }
  // Several blocks of channels, several tiles of columns, a stride whose phases are empty, one pixel.
  const naive::Shape layers[] = {layer(1, 136, 7, 200, 3, 1, 1), layer(2, 72, 6, 264, 1, 2, 0),
                                 layer(3, 8, 1, 8, 1, 1, 0), layer(1, 64, 14, 64, 3, 2, 1)};
  int i = 0;
  for (const naive::Shape& a : layers)
    for (int tile = 0; tile < 3; ++tile) test_shape<BFloat16Numbers>(a, i++ * 5 + tile);
  return finish();
}

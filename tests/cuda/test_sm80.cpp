// The kernels of conv2d_sm80.h, run thread by thread by the emulator, against plain loops.
#include "cuda/conv2d_sm80.h"

#include <cmath>

#include "emulated.h"

using namespace fastconv::cuda;
using namespace fastconv::cuda::sm80;
using naive::Array;
using naive::Shape;

namespace {

Arguments arguments_of(const Shape& a) {
  Arguments args{};
  args.batch = a.n, args.h = a.h, args.w = a.w, args.p = a.p(), args.q = a.q();
  args.c = a.c, args.k = a.k, args.r = a.r, args.s = a.s, args.groups = a.groups;
  args.stride_h = a.stride_h, args.stride_w = a.stride_w, args.pad_top = a.top, args.pad_left = a.left;
  args.dilation_h = a.dilation_h, args.dilation_w = a.dilation_w;
  return args;
}

// [group][column][tap][channels, padded]: forward's weights as they lie, or with input and output channels exchanged.
template <class T> DeviceArray<T> pack(const Shape& a, const Array& w, Gather gather, bool backward) {
  const int cg = a.c / a.groups, kg = a.k / a.groups, taps = a.r * a.s;
  const int columns = backward ? cg : kg, channels = backward ? kg : cg, padded = padded_channels<T>(channels, gather);
  Array packed(static_cast<size_t>(a.groups) * columns * taps * padded);
  for (int g = 0; g < a.groups; ++g)
    for (int column = 0; column < columns; ++column)
      for (int tap = 0; tap < taps; ++tap)
        for (int channel = 0; channel < channels; ++channel) {
          const int k = backward ? channel : column, c = backward ? column : channel;
          packed[((static_cast<size_t>(g) * columns + column) * taps + tap) * padded + channel] =
              w[(static_cast<size_t>(g * kg + k) * taps + tap) * cg + c];
        }
  return DeviceArray<T>(packed);
}

template <class T, int kM, int kN, Gather kGather, bool kBackward>
void test_convolve(const Shape& a, const emulator::Options& options, bool with_epilogue) {
  const Array source = naive::integers(kBackward ? a.y_size() : a.x_size(), 1), w = naive::integers(a.w_size(), 2);
  Array expected = kBackward ? naive::backward_input(a, source, w) : naive::forward(a, source, w);
  const DeviceArray<T> source_buffer(source), packed = pack<T>(a, w, kGather, kBackward);
  DeviceArray<T> result(expected.size());
  const int result_channels = kBackward ? a.c : a.k;

  Arguments args = arguments_of(a);
  args.source = source_buffer.data();
  args.other = packed.data();
  args.result = result.data();
  const Array bias = naive::integers(result_channels, 3),
              residual = naive::integers(static_cast<int64_t>(expected.size()), 4);
  const DeviceArray<T> bias_buffer(bias), residual_buffer(residual);
  const int pixels = static_cast<int>(expected.size()) / result_channels, slices = divide_up(pixels, kM);
  std::vector<SliceStatistics> statistics(static_cast<size_t>(slices) * result_channels);
  if (with_epilogue) {
    args.epilogue.bias = bias_buffer.data();
    args.epilogue.residual = residual_buffer.data();
    args.epilogue.low = 0;
    if (!kBackward) args.epilogue.statistics = statistics.data();
    for (size_t i = 0; i < expected.size(); ++i)
      expected[i] = std::fmax(expected[i] + bias[i % result_channels] + residual[i], 0.0f);
  }

  const int phases = phases_of(args, kBackward);
  int largest = 0;
  for (int phase = 0; phase < phases; ++phase) {
    const Axes axes = axes_of(args, kBackward, phase);
    largest = larger(largest, a.n * axes.h.results * axes.w.results);
  }
  emulate(divide_up(largest, kM), divide_up(result_channels / a.groups, kN), a.groups * phases, 256,
          shared_bytes<kM, kN>(), options,
          [&] { convolve<T, kM, kN, kGather, kBackward>(args, emulator::kSharedBase); });
  compare<T>(kBackward ? "input gradient" : "forward", a, result, expected);
  if (with_epilogue && !kBackward) check_statistics<T>(a, expected, statistics, slices, kM);
}

template <class T, Gather kGather>
void test_gradient(const Shape& a, const emulator::Options& options, int multiprocessors) {
  const Array x = naive::integers(a.x_size(), 1), dy = naive::integers(a.y_size(), 2);
  const Array expected = naive::backward_weight(a, dy, x);
  const DeviceArray<T> x_buffer(x), dy_buffer(dy);
  const int cg = a.c / a.groups, kg = a.k / a.groups, padded = padded_channels<T>(cg, kGather);
  const int width = a.r * a.s * padded;
  Arguments args = arguments_of(a);
  args.source = x_buffer.data();
  args.other = dy_buffer.data();
  const int tiles = divide_up(kg, kGradientTile) * divide_up(width, kGradientTile);
  args.split = plan_split(tiles * a.groups, divide_up(a.n * a.p() * a.q(), kGradientPixels), multiprocessors, 2);
  std::vector<float> partial(static_cast<size_t>(args.split.splits) * a.k * width, NAN);
  args.result = partial.data();
  emulate(tiles, args.split.splits, a.groups, 128, gradient_shared_bytes<T>(), options,
          [&] { weight_gradient<T, kGather>(args, emulator::kSharedBase); });
  Array sum(expected.size());
  for (int split = 0; split < args.split.splits; ++split)
    for (int k = 0; k < a.k; ++k)
      for (int tap = 0; tap < a.r * a.s; ++tap)
        for (int c = 0; c < cg; ++c)
          sum[(static_cast<size_t>(k) * a.r * a.s + tap) * cg + c] +=
              partial[(static_cast<size_t>(split) * a.k + k) * width + tap * padded + c];
  compare("weight gradient", a, sum, expected);
}

template <class T> void test_type(int count) {
  constexpr int kChunk = 16 / sizeof(typename T::Storage);
  for (int i = 0; i < count; ++i) {
    const emulator::Options options{i % 2 == 0, false, static_cast<uint32_t>(i)};
    const Shape whole = naive::random_shape(100 + i, kChunk, true, 9), any = naive::random_shape(200 + i, 1, true, 9);
    test_convolve<T, 128, 64, Gather::kChunk, false>(whole, options, i % 3 == 0);
    test_convolve<T, 128, 64, Gather::kChunk, true>(whole, options, false);
    test_gradient<T, Gather::kChunk>(whole, options, i % 3 ? 132 : 4);
    test_convolve<T, 128, 64, Gather::kElement, false>(any, options, i % 3 == 1);
    test_convolve<T, 128, 64, Gather::kElement, true>(any, options, i % 4 == 1);
    test_gradient<T, Gather::kElement>(any, options, 20);
    if (i % 3 == 0) {
      test_convolve<T, 128, 128, Gather::kChunk, false>(whole, options, i % 2 == 0);
      test_convolve<T, 128, 128, Gather::kChunk, true>(whole, options, false);
    }
    if (sizeof(typename T::Storage) == 2 && i % 3 == 1) {
      Shape packed = naive::random_shape(300 + i, 1, false, 9);
      packed.c = 4;
      test_convolve<T, 128, 64, Gather::kHalf, false>(packed, options, false);
      test_gradient<T, Gather::kHalf>(packed, options, 132);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 12;
  test_type<BFloat16Numbers>(count);
  test_type<Float16Numbers>(count);
  test_type<TensorFloat32Numbers>(count);
  return finish();
}

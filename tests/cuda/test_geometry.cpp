// geometry.h and numeric.h against plain loops.
#include "cuda/geometry.h"

#include <array>
#include <cmath>
#include <map>
#include <set>

#include "cuda/numeric.h"
#include "naive.h"

using namespace fastconv::cuda;
using naive::Shape;

namespace {

int failures = 0;
void check(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

Axis forward_h(const Shape& a) { return forward_axis(a.p(), a.r, a.stride_h, a.top, a.dilation_h); }
Axis forward_w(const Shape& a) { return forward_axis(a.q(), a.s, a.stride_w, a.left, a.dilation_w); }

// The (result, source, kernel element) triples of an axis.
using Triples = std::set<std::array<int, 3>>;
void add_triples(Triples& to, const Axis& a, int source_size) {
  for (int i = 0; i < a.results; ++i)
    for (int t = 0; t < a.taps; ++t) {
      const int source = a.source_first + i * a.source_step + t * a.tap_step;
      if (source < 0 || source >= source_size) continue;
      const bool fresh =
          to.insert({a.result_first + i * a.result_step, source, a.weight_first + t * a.weight_step}).second;
      check(fresh, "a product is counted twice");
    }
}

void test_axes(int size, int kernel, int stride, int pad, int pad_after, int dilation) {
  const int outputs = (size + pad + pad_after - (kernel - 1) * dilation - 1) / stride + 1;
  Triples expected;  // (x, y, w)
  for (int p = 0; p < outputs; ++p)
    for (int r = 0; r < kernel; ++r) {
      const int at = p * stride - pad + r * dilation;
      if (at >= 0 && at < size) expected.insert({at, p, r});
    }
  Triples backward, forward, swapped;
  std::vector<int> written(size);
  for (int f = 0; f < backward_phases(size, stride); ++f) {
    const Axis a = backward_axis(size, kernel, stride, pad, dilation, f);
    check(a.taps == 0 || (a.tap_step > 0 && a.source_step == 1), "taps walk forward");
    for (int i = 0; i < a.results; ++i) ++written[a.result_first + i * a.result_step];
    add_triples(backward, a, outputs);
  }
  for (const int count : written) check(count == 1, "every input pixel belongs to one phase");
  check(backward == expected, "backward axis");
  add_triples(forward, forward_axis(outputs, kernel, stride, pad, dilation), size);
  for (const auto& t : forward) swapped.insert({t[1], t[0], t[2]});
  check(swapped == expected, "forward axis");
}

// The definition of im2col's walk, to be compared with tile coordinates: all base pixels of the box in order.
void test_corners(const Axis& a, int source_size) {
  const Corners c = im2col_corners(a, source_size);
  std::vector<int> bases;
  for (int at = c.lower; at <= source_size - 1 + c.upper; at += a.source_step) bases.push_back(at);
  check(static_cast<int>(bases.size()) == a.results, "the box holds one base pixel for each result");
  for (size_t i = 0; i < bases.size(); ++i)
    check(bases[i] == a.source_first + static_cast<int>(i) * a.source_step, "bases are the results' first taps");
}

void test_split(int tiles, int steps, int multiprocessors) {
  const SplitPlan plan = plan_split(tiles, steps, multiprocessors, 6);
  const std::string text = std::to_string(tiles) + " tiles, " + std::to_string(steps) + " steps";
  check(plan.splits >= 1 && plan.steps >= 1, "a split is not empty: " + text);
  check(plan.splits * plan.steps >= steps, "splits cover all steps: " + text);
  check((plan.splits - 1) * plan.steps < larger(steps, 1), "the last split is not empty: " + text);
}

void test_fragments() {
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) seen.insert({mma_accumulator(lane, i).row, mma_accumulator(lane, i).column});
  check(seen.size() == 128 && seen.rbegin()->first == 15, "mma accumulators cover 16 x 8");
  for (const int n : {64, 128, 256}) {
    seen.clear();
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i) {
        const Element e = wgmma_accumulator(t, i);
        check(e.row < 64 && e.column < n, "inside");
        seen.insert({e.row, e.column});
      }
    check(static_cast<int>(seen.size()) == 64 * n, "wgmma accumulators cover 64 x N");
  }
}

// Eight chunks that one phase of ldmatrix reads lie in different groups of four banks.
void test_swizzles() {
  std::set<uint32_t> places;
  for (int row = 0; row < 64; ++row)
    for (int chunk = 0; chunk < 4; ++chunk) places.insert(swizzle_64b_rows(row, chunk));
  check(places.size() == 256 && *places.rbegin() == 4080, "64-byte rows: one to one");
  for (int row = 0; row < 64; row += 8)
    for (int chunk = 0; chunk < 4; ++chunk) {
      std::set<uint32_t> banks;
      for (int i = 0; i < 8; ++i) banks.insert(swizzle_64b_rows(row + i, chunk) % 128);
      check(banks.size() == 8, "64-byte rows: no conflicts");
    }
  places.clear();
  for (uint32_t at = 0; at < 8192; at += 16) places.insert(swizzle_128b(at));
  check(places.size() == 512 && *places.rbegin() == 8176, "128-byte swizzle: one to one");
  check(swizzle_128b(0) == 0 && swizzle_128b(128) == 144 && swizzle_128b(7 * 128 + 112) == 7 * 128, "128-byte swizzle");
}

void test_numbers() {
  for (uint32_t v = 0; v < 0x10000; ++v) {
    bfloat16_t b;
    half_t h;
    b.bits = h.bits = static_cast<uint16_t>(v);
    const float of_b = b, of_h = h;
    check(std::isnan(of_b) ? std::isnan(float(bfloat16_t(of_b))) : bfloat16_t(of_b).bits == v, "bfloat16 round trip");
    check(std::isnan(of_h) ? std::isnan(float(half_t(of_h))) : half_t(of_h).bits == v, "float16 round trip");
  }
  // Halfway between neighbours: to the even one.
  for (uint32_t v = 1; v < 0x7BFF; ++v) {
    half_t low, high;
    low.bits = static_cast<uint16_t>(v), high.bits = static_cast<uint16_t>(v + 1);
    check(half_t((float(low) + float(high)) / 2).bits == (v % 2 ? v + 1 : v), "float16 rounds ties to even");
  }
  for (uint32_t v = 0x3F80; v < 0x4080; ++v)
    check(bfloat16_t(float_of(v << 16 | 0x8000)).bits == (v % 2 ? v + 1 : v), "bfloat16 rounds ties to even");
  check(TensorFloat32Numbers::round(0x3F801000) == 0x3F802000, "TensorFloat-32 rounds ties away");
}

}  // namespace

int main() {
  int axes = 0;
  for (int size = 1; size <= 9; ++size)
    for (int kernel = 1; kernel <= 5; ++kernel)
      for (int stride = 1; stride <= 4; ++stride)
        for (int dilation = 1; dilation <= 4; ++dilation)
          for (int pad = 0; pad <= 2; ++pad)
            for (int after = 0; after <= 2; ++after)
              if (size + pad + after > (kernel - 1) * dilation) {
                test_axes(size, kernel, stride, pad, after, dilation);
                ++axes;
              }
  int shapes = 0;
  for (uint32_t seed = 1; seed <= 1000; ++seed, ++shapes) {
    const Shape a = naive::random_shape(seed, 1, true, 16);
    test_corners(forward_h(a), a.h);
    test_corners(forward_w(a), a.w);
    check(!im2col_expressible(forward_axis(4, 3, 1, 200, 1), 8), "corners that the instruction cannot hold");
    for (int f = 0; f < backward_phases(a.h, a.stride_h); ++f) {
      const Axis axis = backward_axis(a.h, a.r, a.stride_h, a.top, a.dilation_h, f);
      if (axis.taps > 0) test_corners(axis, a.p());
    }
    for (int m = 0; m < a.n * a.p() * a.q(); ++m) {
      const Pixel at = pixel_of(m, a.p(), a.q());
      check((at.n * a.p() + at.i) * a.q() + at.j == m && at.j < a.q() && at.i < a.p(), "pixel_of");
    }
  }
  for (const int tiles : {1, 2, 9, 36, 131, 132, 500})
    for (const int steps : {0, 1, 2, 7, 49, 392, 12544})
      for (const int multiprocessors : {1, 108, 132}) test_split(tiles, steps, multiprocessors);
  test_fragments();
  test_swizzles();
  test_numbers();
  std::printf("%d axes, %d shapes, %d failures\n", axes, shapes, failures);
  return failures ? 1 : 0;
}

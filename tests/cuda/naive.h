// The definition of a convolution and its gradients in plain loops, and shapes to try: what the tests of the device's
// geometry and of its emulated kernels compare with. Numbers are small integers, so every sum is exact in any order.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace naive {

struct Shape {
  int n, c, h, w, k, r, s;
  int stride_h = 1, stride_w = 1, top = 0, bottom = 0, left = 0, right = 0, dilation_h = 1, dilation_w = 1, groups = 1;

  int p() const { return (h + top + bottom - (r - 1) * dilation_h - 1) / stride_h + 1; }
  int q() const { return (w + left + right - (s - 1) * dilation_w - 1) / stride_w + 1; }
  bool valid() const {
    return h + top + bottom > (r - 1) * dilation_h && w + left + right > (s - 1) * dilation_w && c % groups == 0 &&
           k % groups == 0;
  }
  int64_t x_size() const { return int64_t{n} * c * h * w; }
  int64_t w_size() const { return int64_t{k} * (c / groups) * r * s; }
  int64_t y_size() const { return int64_t{n} * k * p() * q(); }
  std::string text() const {
    char line[200];
    std::snprintf(line, sizeof line,
                  "x[%d,%d,%d,%d] w[%d,%d,%d,%d] stride %d,%d pad %d,%d,%d,%d dilation %d,%d groups %d", n, c, h, w, k,
                  c / groups, r, s, stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w, groups);
    return line;
  }
};

using Array = std::vector<float>;  // activations [n][h][w][c], weights [k][r][s][c / groups]

struct Random {
  uint32_t state;
  explicit Random(uint32_t seed) : state(seed * 2654435761u + 1) {}
  int below(int n) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
  }
  int pick(std::initializer_list<int> of) { return of.begin()[below(static_cast<int>(of.size()))]; }
};

inline Array integers(int64_t size, uint32_t seed) {
  Random random(seed);
  Array a(size);
  for (float& v : a) v = static_cast<float>(random.below(7) - 3);
  return a;
}

// Calls f(index in y, index in x, index in w) for every product of the convolution.
template <class F> void for_products(const Shape& a, F&& f) {
  const int cg = a.c / a.groups, kg = a.k / a.groups, p = a.p(), q = a.q();
  for (int n = 0; n < a.n; ++n)
    for (int i = 0; i < p; ++i)
      for (int j = 0; j < q; ++j)
        for (int r = 0; r < a.r; ++r) {
          const int ih = i * a.stride_h - a.top + r * a.dilation_h;
          if (ih < 0 || ih >= a.h) continue;
          for (int s = 0; s < a.s; ++s) {
            const int iw = j * a.stride_w - a.left + s * a.dilation_w;
            if (iw < 0 || iw >= a.w) continue;
            for (int k = 0; k < a.k; ++k) {
              const int64_t y = ((int64_t{n} * p + i) * q + j) * a.k + k;
              const int64_t x = ((int64_t{n} * a.h + ih) * a.w + iw) * a.c + k / kg * cg;
              const int64_t w = ((int64_t{k} * a.r + r) * a.s + s) * cg;
              for (int c = 0; c < cg; ++c) f(y, x + c, w + c);
            }
          }
        }
}

inline Array forward(const Shape& a, const Array& x, const Array& w) {
  Array y(a.y_size());
  for_products(a, [&](int64_t iy, int64_t ix, int64_t iw) { y[iy] += x[ix] * w[iw]; });
  return y;
}
inline Array backward_input(const Shape& a, const Array& dy, const Array& w) {
  Array dx(a.x_size());
  for_products(a, [&](int64_t iy, int64_t ix, int64_t iw) { dx[ix] += dy[iy] * w[iw]; });
  return dx;
}
inline Array backward_weight(const Shape& a, const Array& dy, const Array& x) {
  Array dw(a.w_size());
  for_products(a, [&](int64_t iy, int64_t ix, int64_t iw) { dw[iw] += dy[iy] * x[ix]; });
  return dw;
}

// A random small shape; channels are multiples of `granularity` (of each group).
inline Shape random_shape(uint32_t seed, int granularity, bool grouped, int largest = 12) {
  Random random(seed);
  for (;;) {
    Shape a{};
    a.groups = grouped ? random.pick({1, 1, 2, 3}) : 1;
    a.n = random.pick({1, 2, 3});
    a.c = a.groups * granularity * (1 + random.below(granularity == 1 ? 20 : 10));
    a.k = a.groups * granularity * (1 + random.below(granularity == 1 ? 20 : 10));
    a.h = 1 + random.below(largest);
    a.w = 1 + random.below(largest);
    a.r = random.pick({1, 2, 3, 3, 3, 5});
    a.s = random.pick({1, 2, 3, 3, 3, 5});
    a.stride_h = random.pick({1, 1, 2, 2, 3});
    a.stride_w = random.below(3) ? a.stride_h : random.pick({1, 2, 4});
    a.top = random.below(3);
    a.bottom = random.below(3);
    a.left = random.below(3);
    a.right = random.below(3);
    a.dilation_h = random.pick({1, 1, 1, 2, 3});
    a.dilation_w = random.below(3) ? a.dilation_h : random.pick({1, 2, 4});
    if (a.valid()) return a;
  }
}

}  // namespace naive

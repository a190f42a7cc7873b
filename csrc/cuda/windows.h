// Windows of pooling as kernels see them, and the largest value of each. Units of work are packs of channels.
#pragma once

#include <cmath>
#include <vector>

#include "core/pool_problem.h"
#include "cuda/columns.h"

namespace fastconv::cuda {

// The windows of an axis, as on the device.
struct Window {
  int32_t begin, count, extent;
};
// The windows that may have a pixel: first to last.
struct Reach {
  int32_t first, last;
};

struct WindowAxis {
  int64_t outputs, size;
  int32_t step;  // the dilation
  const Window* windows;
  const Reach* reach;

  // The place of pixel i in window p, or -1.
  FC_INLINE int32_t place(int64_t i, int32_t p) const {
    const int32_t distance = static_cast<int32_t>(i) - windows[p].begin;
    if (distance < 0 || distance % step != 0) return -1;
    return distance / step < windows[p].count ? distance / step : -1;
  }
};

inline WindowAxis make_window_axis(const PoolAxis& axis, int64_t size) {
  static_assert(sizeof(Window) == 12 && sizeof(Reach) == 8, "tables of 32-bit numbers");
  const auto outputs = static_cast<int64_t>(axis.windows.size());
  std::vector<int32_t> windows, reach;
  for (const AxisWindow& w : axis.windows)
    for (int64_t value : {w.begin, w.count, w.extent}) windows.push_back(static_cast<int32_t>(value));
  std::vector<Reach> of(size, Reach{1, 0});
  for (int64_t p = 0; p < outputs; ++p) {
    const AxisWindow& w = axis.windows[p];
    for (int64_t i = w.begin, j = 0; j < w.count; i += axis.step, ++j) {
      if (of[i].first > of[i].last) of[i].first = static_cast<int32_t>(p);
      of[i].last = static_cast<int32_t>(p);
    }
  }
  for (const Reach& r : of) {
    reach.push_back(r.first);
    reach.push_back(r.last);
  }
  return {outputs, size, static_cast<int32_t>(axis.step), reinterpret_cast<const Window*>(constant_table(windows)),
          reinterpret_cast<const Reach*>(constant_table(reach))};
}

struct PoolGeometry {
  int64_t n, c;
  WindowAxis rows, columns;
  int64_t divisor;  // of an average, or 0

  // Of an average over window (p, q).
  template <class A> FC_INLINE A divide(A sum, const Window& row, const Window& column) const {
    if (row.count == 0 || column.count == 0) return sum;
    return sum / static_cast<A>(divisor != 0 ? divisor : static_cast<int64_t>(row.extent) * column.extent);
  }
};

inline PoolGeometry make_pool_geometry(const Pool2dProblem& a) {
  return {a.n, a.c, make_window_axis(a.rows, a.h), make_window_axis(a.columns, a.w), a.divisor.value_or(0)};
}

// A unit of work: WIDTH channels of one output, or of one pixel of the image.
struct Unit {
  int64_t channel, row, column, image;
};
template <int WIDTH> FC_INLINE Unit unit_of(int64_t i, int64_t channels, int64_t rows, int64_t columns) {
  const int64_t units = channels / WIDTH, pixel = i / units, line = pixel / columns, image = line / rows;
  return {(i - pixel * units) * WIDTH, line - image * rows, pixel - line * columns, image};
}

// What a maximum is taken of: an image as it lies in memory.
template <class T, int WIDTH> struct StoredImage {
  struct Channels {};
  const T* x;
  FC_HOST_DEVICE void prepare(int64_t, Channels&) const {}
  FC_HOST_DEVICE void load(int64_t at, const Channels&, Acc<T> (&values)[WIDTH]) const {
    load_channels<WIDTH>(x, at, values);
  }
};

// WIDTH numbers of places, of which as many lie side by side in memory.
template <int WIDTH, class Place> struct alignas(WIDTH * sizeof(Place)) Places {
  Place v[WIDTH];
};

// The largest of each window, NaN being larger than every number and the first of equals winning. Any of y, indices and
// places may be null. A place is the number of the element, row-major over the part of the window inside the image.
template <class T, int WIDTH, class Place, class Image = StoredImage<T, WIDTH>> struct Maximum {
  PoolGeometry g;
  Image image;
  T* y;
  int64_t* indices;
  Place* places;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.outputs, g.columns.outputs);
    const Window row = g.rows.windows[u.row], column = g.columns.windows[u.column];
    typename Image::Channels channels;
    image.prepare(u.channel, channels);
    Acc<T> best[WIDTH];
    int32_t where[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) best[j] = -static_cast<Acc<T>>(INFINITY), where[j] = 0;
    for (int32_t r = 0; r < row.count; ++r)
      for (int32_t s = 0; s < column.count; ++s) {
        const int64_t h = row.begin + r * g.rows.step, w = column.begin + s * g.columns.step;
        Acc<T> v[WIDTH];
        image.load(((u.image * g.rows.size + h) * g.columns.size + w) * g.c + u.channel, channels, v);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
          if (v[j] > best[j] || v[j] != v[j]) best[j] = v[j], where[j] = r * column.count + s;
      }
    const int64_t at = i * WIDTH;
    if (y) store_channels<WIDTH>(y, at, best);
    if (places) {
      Places<WIDTH, Place> found;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) found.v[j] = static_cast<Place>(where[j]);
      *reinterpret_cast<Places<WIDTH, Place>*>(places + at) = found;
    }
    if (!indices) return;
    const bool empty = row.count == 0 || column.count == 0;
    for (int j = 0; j < WIDTH; ++j) {
      const int64_t h = row.begin + (empty ? 0 : where[j] / column.count) * g.rows.step;
      const int64_t w = column.begin + (empty ? 0 : where[j] % column.count) * g.columns.step;
      indices[at + j] = empty ? 0 : h * g.columns.size + w;
    }
  }
};

}  // namespace fastconv::cuda

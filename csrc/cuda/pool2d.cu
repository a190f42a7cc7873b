// Pooling. Forward: a thread computes one output of a pack of channels. Backward gathers: a thread sums, in row-major
// order, what the windows with its pixel give to it, so there is nothing to be added concurrently. The maxima are found
// again in x and kept as their place in the window, a byte each where windows are small. Bound: memory.
#include "device/pool2d.h"

#include <cmath>
#include <limits>

#include "core/allocator.h"
#include "cuda/columns.h"
#include "cuda/first_where.h"

namespace fastconv::cuda {
namespace {

// The windows of an axis, as on the device.
struct Window {
  int32_t begin, count, extent;
};
// The windows that may have a pixel: first to last.
struct Reach {
  int32_t first, last;
};

struct Axis {
  int64_t outputs, size;
  int32_t step, most;  // the dilation; the largest count of a window
  const Window* windows;
  const Reach* reach;

  // The place of pixel i in window p, or -1.
  FC_INLINE int32_t place(int64_t i, int32_t p) const {
    const int32_t distance = static_cast<int32_t>(i) - windows[p].begin;
    if (distance < 0 || distance % step != 0) return -1;
    return distance / step < windows[p].count ? distance / step : -1;
  }
};

Axis make_axis(const PoolAxis& axis, int64_t size) {
  static_assert(sizeof(Window) == 12 && sizeof(Reach) == 8, "tables of 32-bit numbers");
  const auto outputs = static_cast<int64_t>(axis.windows.size());
  std::vector<int32_t> windows, reach;
  int32_t most = 1;
  for (const AxisWindow& w : axis.windows) {
    for (int64_t value : {w.begin, w.count, w.extent}) windows.push_back(static_cast<int32_t>(value));
    most = std::max(most, static_cast<int32_t>(w.count));
  }
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
  return {outputs,
          size,
          static_cast<int32_t>(axis.step),
          most,
          reinterpret_cast<const Window*>(constant_table(windows)),
          reinterpret_cast<const Reach*>(constant_table(reach))};
}

struct Geometry {
  int64_t n, c;
  Axis rows, columns;
  int64_t divisor;  // of an average, or 0

  // Of an average over window (p, q).
  template <class A> FC_INLINE A divide(A sum, const Window& row, const Window& column) const {
    if (row.count == 0 || column.count == 0) return sum;
    return sum / static_cast<A>(divisor != 0 ? divisor : static_cast<int64_t>(row.extent) * column.extent);
  }
};

Geometry make_geometry(const Pool2dProblem& a) {
  return {a.n, a.c, make_axis(a.rows, a.h), make_axis(a.columns, a.w), a.divisor.value_or(0)};
}

// A unit of work: WIDTH channels of one output, or of one pixel of the image.
struct Unit {
  int64_t channel, row, column, image;
};
template <int WIDTH> FC_INLINE Unit unit_of(int64_t i, int64_t channels, int64_t rows, int64_t columns) {
  const int64_t units = channels / WIDTH, pixel = i / units, line = pixel / columns, image = line / rows;
  return {(i - pixel * units) * WIDTH, line - image * rows, pixel - line * columns, image};
}

// The largest of each window, NaN being larger than every number and the first of equals winning. Any of y, indices and
// codes may be null; a code is row * most + column inside the window.
template <class T, int WIDTH, class Code> struct Maximum {
  Geometry g;
  const T* x;
  T* y;
  int64_t* indices;
  Code* codes;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.outputs, g.columns.outputs);
    const Window row = g.rows.windows[u.row], column = g.columns.windows[u.column];
    Acc<T> best[WIDTH];
    int32_t where[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) best[j] = -static_cast<Acc<T>>(INFINITY), where[j] = 0;
    for (int32_t r = 0; r < row.count; ++r)
      for (int32_t s = 0; s < column.count; ++s) {
        const int64_t h = row.begin + r * g.rows.step, w = column.begin + s * g.columns.step;
        Acc<T> v[WIDTH];
        load_channels<WIDTH>(x, ((u.image * g.rows.size + h) * g.columns.size + w) * g.c + u.channel, v);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
          if (v[j] > best[j] || v[j] != v[j]) best[j] = v[j], where[j] = r * g.columns.most + s;
      }
    const int64_t at = i * WIDTH;
    if (y) store_channels<WIDTH>(y, at, best);
    for (int j = 0; j < WIDTH; ++j) {
      if (codes) codes[at + j] = static_cast<Code>(where[j]);
      if (indices) {
        const int64_t h = row.begin + where[j] / g.columns.most * g.rows.step;
        const int64_t w = column.begin + where[j] % g.columns.most * g.columns.step;
        indices[at + j] = row.count == 0 || column.count == 0 ? 0 : h * g.columns.size + w;
      }
    }
  }
};

// body(p, q, place in the window, offset of the output) for the windows that have pixel (h, w).
template <class Body> FC_INLINE void for_windows(const Geometry& g, const Unit& u, Body&& body) {
  const Reach down = g.rows.reach[u.row], across = g.columns.reach[u.column];
  for (int32_t p = down.first; p <= down.last; ++p) {
    const int32_t r = g.rows.place(u.row, p);
    if (r < 0) continue;
    for (int32_t q = across.first; q <= across.last; ++q) {
      const int32_t s = g.columns.place(u.column, q);
      if (s >= 0)
        body(p, q, r * g.columns.most + s, ((u.image * g.rows.outputs + p) * g.columns.outputs + q) * g.c + u.channel);
    }
  }
}

template <class T, int WIDTH, class Code> struct MaximumBackward {
  Geometry g;
  const T* dy;
  const Code* codes;
  T* dx;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.size, g.columns.size);
    Acc<T> sum[WIDTH] = {};
    for_windows(g, u, [&](int32_t, int32_t, int32_t place, int64_t at) {
      Acc<T> v[WIDTH];
      load_channels<WIDTH>(dy, at, v);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (static_cast<int32_t>(codes[at + j]) == place) sum[j] += v[j];
    });
    store_channels<WIDTH>(dx, i * WIDTH, sum);
  }
};

// One channel of one image: the caller's indices may point anywhere, so nothing smaller is independent.
template <class T> struct ScatterPlane {
  Geometry g;
  const T* dy;
  const int64_t* indices;
  T* dx;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % g.c, n = i / g.c, plane = g.rows.size * g.columns.size;
    T* image = dx + n * plane * g.c + c;
    for (int64_t pixel = 0; pixel < plane; ++pixel) image[pixel * g.c] = T(0.0f);
    for (int64_t p = 0; p < g.rows.outputs; ++p)
      for (int64_t q = 0; q < g.columns.outputs; ++q) {
        if (g.rows.windows[p].count == 0 || g.columns.windows[q].count == 0) continue;  // a window without data
        const int64_t at = ((n * g.rows.outputs + p) * g.columns.outputs + q) * g.c + c;
        T& to = image[indices[at] * g.c];
        to = T(static_cast<Acc<T>>(to) + static_cast<Acc<T>>(dy[at]));
      }
  }
};

struct OutsidePlane {
  const int64_t* indices;
  int64_t plane;
  FC_HOST_DEVICE bool operator()(int64_t i) const {
    return static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(plane);
  }
};

// Sums each row of the window before adding it: the error of a sum over an image grows with its side, not its area.
template <class T, int WIDTH> struct Average {
  Geometry g;
  const T* x;
  T* y;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.outputs, g.columns.outputs);
    const Window row = g.rows.windows[u.row], column = g.columns.windows[u.column];
    Acc<T> sum[WIDTH] = {};
    for (int32_t r = 0; r < row.count; ++r) {
      Acc<T> line[WIDTH] = {};
      for (int32_t s = 0; s < column.count; ++s) {
        const int64_t h = row.begin + r * g.rows.step, w = column.begin + s * g.columns.step;
        Acc<T> v[WIDTH];
        load_channels<WIDTH>(x, ((u.image * g.rows.size + h) * g.columns.size + w) * g.c + u.channel, v);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) line[j] += v[j];
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) sum[j] += line[j];
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) sum[j] = g.divide(sum[j], row, column);
    store_channels<WIDTH>(y, i * WIDTH, sum);
  }
};

template <class T, int WIDTH> struct AverageBackward {
  Geometry g;
  const T* dy;
  T* dx;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.size, g.columns.size);
    Acc<T> sum[WIDTH] = {};
    for_windows(g, u, [&](int32_t p, int32_t q, int32_t, int64_t at) {
      Acc<T> v[WIDTH];
      load_channels<WIDTH>(dy, at, v);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) sum[j] += g.divide(v[j], g.rows.windows[p], g.columns.windows[q]);
    });
    store_channels<WIDTH>(dx, i * WIDTH, sum);
  }
};

int64_t outputs_of(const Pool2dProblem& a) { return a.n * a.p() * a.q() * a.c; }
int64_t inputs_of(const Pool2dProblem& a) { return a.n * a.h * a.w * a.c; }

template <class T, int WIDTH, class Code>
void maximum_backward(const Pool2dProblem& a, const Geometry& g, const T* dy, const T* x, T* dx) {
  const Buffer codes(outputs_of(a) * sizeof(Code) + 1);
  for_each(outputs_of(a) / WIDTH, Maximum<T, WIDTH, Code>{g, x, nullptr, nullptr, codes.as<Code>()});
  for_each(inputs_of(a) / WIDTH, MaximumBackward<T, WIDTH, Code>{g, dy, codes.as<Code>(), dx});
}

// f(T{}, width) for the type and the channels of the problem.
template <class F, class... Pointers> void dispatch(const Pool2dProblem& a, F&& f, const Pointers*... pointers) {
  dispatch_real(a.dtype, [&](auto t) { with_width<decltype(t)>(a.c, [&](auto width) { f(t, width); }, pointers...); });
}

}  // namespace

void max_pool2d(const Pool2dProblem& a, const void* x, void* y, int64_t* indices, uint8_t* places) {
  FC_CHECK_TYPE(places == nullptr, "return_places is not supported on a CUDA device: its backward needs x, not places");
  if (outputs_of(a) == 0) return;
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        for_each(outputs_of(a) / kWidth, Maximum<T, kWidth, uint8_t>{make_geometry(a), static_cast<const T*>(x),
                                                                     static_cast<T*>(y), indices, nullptr});
      },
      x, y);
}

void max_pool2d_backward(const Pool2dProblem& a, const void* dy, const void* x, void* dx) {
  if (inputs_of(a) == 0) return;
  const Geometry g = make_geometry(a);
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        const auto *gradient = static_cast<const T*>(dy), *image = static_cast<const T*>(x);
        if (static_cast<int64_t>(g.rows.most) * g.columns.most <= std::numeric_limits<uint8_t>::max() + 1)
          maximum_backward<T, kWidth, uint8_t>(a, g, gradient, image, static_cast<T*>(dx));
        else
          maximum_backward<T, kWidth, int32_t>(a, g, gradient, image, static_cast<T*>(dx));
      },
      dy, x, dx);
}

void max_pool2d_backward_places(const Pool2dProblem&, const void*, const uint8_t*, void*) {
  throw TypeError("places are not supported on a CUDA device: give x, or indices");
}

void max_pool2d_backward_indices(const Pool2dProblem& a, const void* dy, const int64_t* indices, void* dx) {
  if (a.n * a.c == 0) return;
  const int64_t total = outputs_of(a), at = first_where(total, OutsidePlane{indices, a.h * a.w});
  if (at < total) {
    int64_t wrong = 0;
    copy_bytes(&wrong, indices + at, sizeof(wrong), Copy::kToHost);
    FC_CHECK(false, "an index of max pooling is out of range: ", wrong, " is not in a plane of ", a.h, " x ", a.w);
  }
  dispatch_real(a.dtype, [&](auto t) {
    using T = decltype(t);
    for_each(a.n * a.c, ScatterPlane<T>{make_geometry(a), static_cast<const T*>(dy), indices, static_cast<T*>(dx)});
  });
}

void avg_pool2d(const Pool2dProblem& a, const void* x, void* y) {
  if (outputs_of(a) == 0) return;
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        for_each(outputs_of(a) / kWidth,
                 Average<T, kWidth>{make_geometry(a), static_cast<const T*>(x), static_cast<T*>(y)});
      },
      x, y);
}

void avg_pool2d_backward(const Pool2dProblem& a, const void* dy, void* dx) {
  if (inputs_of(a) == 0) return;
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        for_each(inputs_of(a) / kWidth,
                 AverageBackward<T, kWidth>{make_geometry(a), static_cast<const T*>(dy), static_cast<T*>(dx)});
      },
      dy, dx);
}

}  // namespace fastconv::cuda

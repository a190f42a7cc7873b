// Pooling. Forward: a thread computes one output of a pack of channels. Backward gathers: a thread sums, in row-major
// order, what the windows with its pixel give to it, so there is nothing to be added concurrently. The maxima are found
// again in x, where their places in the windows were not kept: a byte each where windows are small. Bound: memory.
#include "device/pool2d.h"

#include <limits>

#include "core/allocator.h"
#include "cuda/first_where.h"
#include "cuda/windows.h"

namespace fastconv::cuda {
namespace {

// body(p, q, place in the window, offset of the output) for the windows that have pixel (h, w).
template <class Body> FC_INLINE void for_windows(const PoolGeometry& g, const Unit& u, Body&& body) {
  const Reach down = g.rows.reach[u.row], across = g.columns.reach[u.column];
  for (int32_t p = down.first; p <= down.last; ++p) {
    const int32_t r = g.rows.place(u.row, p);
    if (r < 0) continue;
    for (int32_t q = across.first; q <= across.last; ++q) {
      const int32_t s = g.columns.place(u.column, q);
      if (s >= 0)
        body(p, q, r * g.columns.windows[q].count + s,
             ((u.image * g.rows.outputs + p) * g.columns.outputs + q) * g.c + u.channel);
    }
  }
}

template <class T, int WIDTH, class Place> struct MaximumBackward {
  PoolGeometry g;
  const T* dy;
  const Place* places;
  T* dx;

  FC_HOST_DEVICE void operator()(int64_t i) const {
    const Unit u = unit_of<WIDTH>(i, g.c, g.rows.size, g.columns.size);
    Acc<T> sum[WIDTH] = {};
    for_windows(g, u, [&](int32_t, int32_t, int32_t place, int64_t at) {
      Acc<T> v[WIDTH];
      load_channels<WIDTH>(dy, at, v);
      const auto found = *reinterpret_cast<const Places<WIDTH, Place>*>(places + at);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (static_cast<int32_t>(found.v[j]) == place) sum[j] += v[j];
    });
    store_channels<WIDTH>(dx, i * WIDTH, sum);
  }
};

// One channel of one image: the caller's indices may point anywhere, so nothing smaller is independent.
template <class T> struct ScatterPlane {
  PoolGeometry g;
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
  PoolGeometry g;
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
  PoolGeometry g;
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

template <class T, int WIDTH, class Place>
void maximum_backward(const Pool2dProblem& a, const PoolGeometry& g, const T* dy, const T* x, T* dx) {
  const Buffer places(outputs_of(a) * sizeof(Place) + 1);
  for_each(outputs_of(a) / WIDTH, Maximum<T, WIDTH, Place>{g, {x}, nullptr, nullptr, places.as<Place>()});
  for_each(inputs_of(a) / WIDTH, MaximumBackward<T, WIDTH, Place>{g, dy, places.as<Place>(), dx});
}

// The most elements of a window that lie inside the image.
int64_t most_elements(const Pool2dProblem& a) {
  const auto most = [](const PoolAxis& axis) {
    int64_t count = 0;
    for (const AxisWindow& w : axis.windows) count = std::max(count, w.count);
    return count;
  };
  return most(a.rows) * most(a.columns);
}

// f(T{}, width) for the type and the channels of the problem.
template <class F, class... Pointers> void dispatch(const Pool2dProblem& a, F&& f, const Pointers*... pointers) {
  dispatch_real(a.dtype, [&](auto t) { with_width<decltype(t)>(a.c, [&](auto width) { f(t, width); }, pointers...); });
}

}  // namespace

void max_pool2d(const Pool2dProblem& a, const void* x, void* y, int64_t* indices, uint8_t* places) {
  if (outputs_of(a) == 0) return;
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        for_each(outputs_of(a) / kWidth,
                 Maximum<T, kWidth, uint8_t>{
                     make_pool_geometry(a), {static_cast<const T*>(x)}, static_cast<T*>(y), indices, places});
      },
      x, y, places);
}

void max_pool2d_backward(const Pool2dProblem& a, const void* dy, const void* x, void* dx) {
  if (inputs_of(a) == 0) return;
  const PoolGeometry g = make_pool_geometry(a);
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        const auto *gradient = static_cast<const T*>(dy), *image = static_cast<const T*>(x);
        if (most_elements(a) <= std::numeric_limits<uint8_t>::max() + 1)
          maximum_backward<T, kWidth, uint8_t>(a, g, gradient, image, static_cast<T*>(dx));
        else
          maximum_backward<T, kWidth, int32_t>(a, g, gradient, image, static_cast<T*>(dx));
      },
      dy, x, dx);
}

void max_pool2d_backward_places(const Pool2dProblem& a, const void* dy, const uint8_t* places, void* dx) {
  if (inputs_of(a) == 0) return;
  dispatch(
      a,
      [&](auto t, auto width) {
        using T = decltype(t);
        constexpr int kWidth = decltype(width)::value;
        for_each(inputs_of(a) / kWidth,
                 MaximumBackward<T, kWidth, uint8_t>{make_pool_geometry(a), static_cast<const T*>(dy), places,
                                                     static_cast<T*>(dx)});
      },
      dy, places, dx);
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
    for_each(a.n * a.c,
             ScatterPlane<T>{make_pool_geometry(a), static_cast<const T*>(dy), indices, static_cast<T*>(dx)});
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
                 Average<T, kWidth>{make_pool_geometry(a), static_cast<const T*>(x), static_cast<T*>(y)});
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
                 AverageBackward<T, kWidth>{make_pool_geometry(a), static_cast<const T*>(dy), static_cast<T*>(dx)});
      },
      dy, dx);
}

}  // namespace fastconv::cuda

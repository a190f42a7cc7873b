// Pooling, vectorised over channels; all elements of a window are visited with the result in registers.
// Bound: memory, each of x and y is touched once.
#pragma once

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/pool2d.h"

namespace fastconv::cpu {
namespace {

template <class T> constexpr T kMinusInfinity = -static_cast<T>(__builtin_inff());

// body(r, s, offset of the element) for the elements of a window in row-major order. R x S is the window's size where
// it is known to the compiler, 0 x 0 otherwise.
template <int R, int S, class T, class Body>
__attribute__((always_inline)) inline void for_window(const PoolRow<T>& t, const PoolWindow& window, Body&& body) {
  if constexpr (R > 0) {
#pragma GCC unroll 3
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int64_t s = 0; s < S; ++s) body(r, s, window.offset + r * t.row_step + s * t.column_step);
  } else {
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t s = 0; s < window.columns; ++s) body(r, s, window.offset + r * t.row_step + s * t.column_step);
  }
}

// body(Size<R, S>, q) for every output of the row: the common windows have loops of their own.
template <int R, int S> struct Size {
  static constexpr int rows = R, columns = S;
};
template <class T, class Body>
__attribute__((always_inline)) inline void for_outputs(const PoolRow<T>& t, Body&& body) {
  for (int64_t q = 0; q < t.outputs; ++q) {
    const int64_t columns = t.windows[q].columns;
    if (t.rows == 2 && columns == 2)
      body(Size<2, 2>{}, q);
    else if (t.rows == 3 && columns == 3)
      body(Size<3, 3>{}, q);
    else
      body(Size<0, 0>{}, q);
  }
}

// Each element fetches the one that the next row of outputs will need in its place: with a few operations on every
// cache line the processor does not look that far ahead itself.
template <class T> inline __attribute__((always_inline)) void prefetch_next(const PoolRow<T>& t, int64_t at) {
  prefetch(reinterpret_cast<const float*>(t.x + at + t.next_row));
}

template <class T> void max_row(const PoolRow<T>& t) {
  using V = typename Lanes<T>::V;
  for_outputs(t, [&](auto size, int64_t q) {
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      V best = set1(kMinusInfinity<T>);
      for_window<size.rows, size.columns>(t, t.windows[q], [&](int64_t, int64_t, int64_t at) {
        const V a = load_lanes<tail.value>(t.x + at + c, n);
        prefetch_next(t, at + c);
        best = a > best ? a : best;
        best = a == a ? best : a;
      });
      store_lanes<tail.value>(t.y + q * t.pixel + c, best, n);
    });
  });
}

template <class T> void max_row_index(const PoolRow<T>& t, int64_t plane, int64_t* index) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  const int64_t row_pixels = t.row_step / t.pixel, column_pixels = t.column_step / t.pixel;
  for (int64_t q = 0; q < t.outputs; ++q)
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      V best = set1(kMinusInfinity<T>);
      I row{}, column{};
      for_window<0, 0>(t, t.windows[q], [&](int64_t r, int64_t s, int64_t at) {
        const V a = load_lanes<tail.value>(t.x + at + c, n);
        const I here_row = I{} + static_cast<Int>(r), here_column = I{} + static_cast<Int>(s);
        const I greater = a > best, number = a == a;
        row = greater ? here_row : row;
        column = greater ? here_column : column;
        best = greater ? a : best;
        row = number ? row : here_row;
        column = number ? column : here_column;
        best = number ? best : a;
      });
      store_lanes<tail.value>(t.y + q * t.pixel + c, best, n);
      const int64_t first = plane + t.windows[q].offset / t.pixel;
      for (int64_t i = 0; i < n; ++i)
        index[q * t.pixel + c + i] = first + row[i] * row_pixels + column[i] * column_pixels;
    });
}

// A maximum and its number in the window.
template <class T> struct Maximum {
  typename Lanes<T>::V value;
  typename Lanes<T>::I place;
};

template <int R, int S, bool TAIL, class T>
__attribute__((always_inline)) inline Maximum<T> maximum_of(const PoolRow<T>& t, const PoolWindow& window, int64_t c,
                                                            int64_t n) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  const int64_t columns = S > 0 ? S : window.columns;
  V best = set1(kMinusInfinity<T>);
  I winner{};
  for_window<R, S>(t, window, [&](int64_t r, int64_t s, int64_t at) {
    const V a = load_lanes<TAIL>(t.x + at + c, n);
    prefetch_next(t, at + c);
    const I here = I{} + static_cast<Int>(r * columns + s);
    const I greater = a > best, number = a == a;
    winner = greater ? here : winner;
    best = greater ? a : best;
    winner = number ? winner : here;
    best = number ? best : a;
  });
  return {best, winner};
}

// A byte a lane.
template <class T> struct Bytes {
  typedef uint8_t V __attribute__((vector_size(Lanes<T>::kCount)));
};
template <bool TAIL, class T> inline typename Lanes<T>::I load_places(const uint8_t* p, int64_t n) {
  uint8_t bytes[Lanes<T>::kCount] = {};
  if constexpr (TAIL) {
    __builtin_memcpy(bytes, p, n);
    p = bytes;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    return reinterpret_cast<typename Lanes<T>::I>(load_bytes(p));
  } else {
    typename Bytes<T>::V vector;
    __builtin_memcpy(&vector, p, sizeof(vector));
    return __builtin_convertvector(vector, typename Lanes<T>::I);
  }
}
template <bool TAIL, class T> inline void store_places(uint8_t* p, typename Lanes<T>::I places, int64_t n) {
  const auto bytes = __builtin_convertvector(places, typename Bytes<T>::V);
  __builtin_memcpy(p, &bytes, TAIL ? n : Lanes<T>::kCount);
}

template <class T> void max_row_place(const PoolRow<T>& t) {
  for_outputs(t, [&](auto size, int64_t q) {
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const auto best = maximum_of<size.rows, size.columns, tail.value>(t, t.windows[q], c, n);
      store_lanes<tail.value>(t.y + q * t.pixel + c, best.value, n);
      store_places<tail.value, T>(t.place + q * t.pixel + c, best.place, n);
    });
  });
}

template <class T, bool PLACES, bool ACCUMULATE> void max_row_backward_as(const PoolRow<T>& t) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  for_outputs(t, [&](auto size, int64_t q) {
    const PoolWindow& window = t.windows[q];
    const int64_t columns = size.columns > 0 ? size.columns : window.columns;
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      I winner;
      if constexpr (PLACES)
        winner = load_places<tail.value, T>(t.place + q * t.pixel + c, n);
      else
        winner = maximum_of<size.rows, size.columns, tail.value>(t, window, c, n).place;
      const V dy = load_lanes<tail.value>(t.y + q * t.pixel + c, n);
      for_window<size.rows, size.columns>(t, window, [&](int64_t r, int64_t s, int64_t at) {
        const I here = I{} + static_cast<Int>(r * columns + s);
        V g = winner == here ? dy : V{};
        if constexpr (ACCUMULATE) g = g + load_lanes<tail.value>(t.dx + at + c, n);
        put_lanes<tail.value>(!ACCUMULATE && t.streaming, t.dx + at + c, g, n);
      });
    });
  });
}

template <class T, bool PLACES> void max_row_backward(const PoolRow<T>& t) {
  if (t.accumulate) return max_row_backward_as<T, PLACES, true>(t);
  return max_row_backward_as<T, PLACES, false>(t);
}

template <class T> T divisor_of(const PoolRow<T>& t, const PoolWindow& window) {
  return t.divisor != 0 ? t.divisor : static_cast<T>(t.row_extent * window.extent);
}

// Sums each row of the window before adding it: the error of a sum over an image grows with its side, not its area.
template <class T> void average_row(const PoolRow<T>& t) {
  using V = typename Lanes<T>::V;
  for (int64_t q = 0; q < t.outputs; ++q) {
    const PoolWindow& window = t.windows[q];
    const bool empty = t.rows == 0 || window.columns == 0;
    const V divisor = set1(empty ? T{1} : divisor_of(t, window));
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      V sum{};
      for (int64_t r = 0; r < t.rows; ++r) {
        const T* x = t.x + window.offset + r * t.row_step + c;
        V row{};
        for (int64_t s = 0; s < window.columns; ++s) row = row + load_lanes<tail.value>(x + s * t.column_step, n);
        sum = sum + row;
      }
      store_lanes<tail.value>(t.y + q * t.pixel + c, sum / divisor, n);
    });
  }
}

template <class T, bool ACCUMULATE> void average_row_backward_as(const PoolRow<T>& t) {
  using V = typename Lanes<T>::V;
  for (int64_t q = 0; q < t.outputs; ++q) {
    const PoolWindow& window = t.windows[q];
    if (t.rows == 0 || window.columns == 0) continue;
    const V divisor = set1(divisor_of(t, window));
    for_lanes<T>(t.channels, [&](auto tail, int64_t c, int64_t n) {
      const V share = load_lanes<tail.value>(t.y + q * t.pixel + c, n) / divisor;
      for_window<0, 0>(t, window, [&](int64_t, int64_t, int64_t at) {
        V g = share;
        if constexpr (ACCUMULATE) g = g + load_lanes<tail.value>(t.dx + at + c, n);
        put_lanes<tail.value>(!ACCUMULATE && t.streaming, t.dx + at + c, g, n);
      });
    });
  }
}

template <class T> void average_row_backward(const PoolRow<T>& t) {
  if (t.accumulate) return average_row_backward_as<T, true>(t);
  return average_row_backward_as<T, false>(t);
}

template <class T> constexpr Pool2dKernels<T> pool2d_kernels() {
  return {
      max_row<T>,     max_row_index<T>,       max_row_place<T>, max_row_backward<T, false>, max_row_backward<T, true>,
      average_row<T>, average_row_backward<T>};
}

}  // namespace
}  // namespace fastconv::cpu

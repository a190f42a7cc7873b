// Winograd's transforms (Lavin and Gray, arXiv 1509.09308) with the points 0, +-a, +-b, infinity, a = 1/sqrt2, b =
// sqrt2. Against 0, +-1, +-2, infinity these keep the same shape of matrices and a largest error several times lower.
//
// F(m, r) is Toom-Cook transposed: y = A'[(G g) * (B' d)], with for the point p of the set P
//   (G g)_p  = sum_j g_j p^j / N_p,  N_p = product over q in P, q != p of (p - q);   infinity: the last g
//   (B' d)_p = the coefficients of the product over q != p of (x - q), applied to d; infinity: product over all q
//   y_k      = sum_p p^k m_p;                                                        infinity: added to the last y
// Tiles of five points, F(3, 3) and F(4, 2), use those without -b. Their B' is scaled by p + b, the factor of N_p that
// is then missing, so that they share the transformed weights of F(4, 3) and F(5, 2); row p of it is (p + b) times the
// product over q of (x - q). The weight gradient is the same bilinear form with dy in the place of g; 1/N_p then stands
// in the inverse. F(2, 5), F(3, 4) and F(5, 2) have the same points and windows, so only what belongs to outputs and
// taps differs from F(4, 3).
#pragma once

#include "cpu/kernels/conv2d.inl.h"
#include "cpu/kernels/winograd.h"

namespace fastconv::cpu {
namespace {

constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;
constexpr double kA2 = 0.5, kB2 = 2.0;
// 1 / N_p for p = +-a and +-b; N_0 = a^2 b^2 = 1. The odd powers of p go with the sign of p.
constexpr double kNormA = 1 / (2 * kA2 * (kA2 - kB2)), kNormB = 1 / (2 * kB2 * (kB2 - kA2));

inline Vec constant(double a) { return set1(static_cast<float>(a)); }
inline Vec scaled(double a, Vec b) { return constant(a) * b; }
template <class V> inline V scaled_add(double a, V b, V c) {
  if constexpr (sizeof(V) == sizeof(Vec))
    return fma(constant(a), b, c);
  else
    return static_cast<float>(a) * b + c;
}

// Where the i-th of so many points stands among the six.
template <int POINTS> constexpr int point(int i) { return POINTS != 5 || i < 4 ? i : 5; }

inline bool wants(uint32_t points, int i) { return (points >> i & 1) != 0; }
inline bool wants_last(uint32_t points) { return wants(points, kPoints - 1); }

// B': the pixels d[0], d[step], ... of a window at its points.
template <int POINTS, class V> inline __attribute__((always_inline)) void input_points(const V* d, int step, V* o) {
  if constexpr (POINTS == 1) {
    o[0] = d[0];
    return;
  }
  const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  if constexpr (POINTS == 6) {
    const V d5 = d[5 * step];
    o[0] = scaled_add(-(kA2 + kB2), d2, d0 + d4);
    o[5] = scaled_add(-(kA2 + kB2), d3, d1 + d5);
    const V e = scaled_add(-kB2, d2, d4), f = scaled_add(-kB2, d1, d3);
    o[1] = scaled_add(kA, f, e);
    o[2] = scaled_add(-kA, f, e);
    const V g = scaled_add(-kA2, d2, d4), h = scaled_add(-kA2, d1, d3);
    o[3] = scaled_add(kB, h, g);
    o[4] = scaled_add(-kB, h, g);
  } else {
    o[0] = scaled_add(kB, d3, scaled_add(-kB2, d2, scaled_add(-kA2 * kB, d1, d0)));
    o[1] = scaled_add(kA + kB, d3, scaled_add((kA + kB) * (kA - kB), d2, scaled(-(kA + kB) * kA * kB, d1)));
    o[2] = scaled_add(kB - kA, d3, scaled_add((kA - kB) * (kA + kB), d2, scaled((kB - kA) * kA * kB, d1)));
    o[3] = scaled(2 * kB, scaled_add(-kA2, d1, d3));
    o[4] = scaled_add(-kB, d3, scaled_add(-kA2, d2, scaled_add(kA2 * kB, d1, d4)));
  }
}

// A': the points m[0], m[step], ... to outputs.
template <Filter F> inline __attribute__((always_inline)) void output_pixels(const Vec* m, int step, Vec* y) {
  if constexpr (F == Filter::kF11) {
    y[0] = m[0];
    return;
  }
  const Vec m1 = m[step], m2 = m[2 * step], sum = m1 + m2, difference = m1 - m2;
  if constexpr (points_of(F) == 5) {
    const Vec m3 = m[3 * step], last = m[4 * step];
    y[0] = m[0] + sum + m3;
    y[1] = scaled_add(kA, difference, scaled(kB, m3));
    if constexpr (F == Filter::kF33) {
      y[2] = scaled_add(kA2, sum, scaled_add(kB2, m3, last));
    } else {
      y[2] = scaled_add(kA2, sum, scaled(kB2, m3));
      y[3] = scaled_add(kA * kA2, difference, scaled_add(kB * kB2, m3, last));
    }
    return;
  }
  const Vec m3 = m[3 * step], m4 = m[4 * step], sum_b = m3 + m4, difference_b = m3 - m4, last = m[5 * step];
  y[0] = m[0] + sum + sum_b;
  if constexpr (F == Filter::kF25) {
    y[1] = scaled_add(kB, difference_b, scaled_add(kA, difference, last));
  } else {
    y[1] = scaled_add(kB, difference_b, scaled(kA, difference));
    if constexpr (F == Filter::kF34) {
      y[2] = scaled_add(kB2, sum_b, scaled_add(kA2, sum, last));
    } else {
      y[2] = scaled_add(kB2, sum_b, scaled(kA2, sum));
      if constexpr (F == Filter::kF43) {
        y[3] = scaled_add(kB * kB2, difference_b, scaled_add(kA * kA2, difference, last));
      } else {
        y[3] = scaled_add(kB * kB2, difference_b, scaled(kA * kA2, difference));
        y[4] = scaled_add(kB2 * kB2, sum_b, scaled_add(kA2 * kA2, sum, last));
      }
    }
  }
}

// A tile's pixels of dy as polynomials at the points, without 1/N_p.
template <Filter F> inline __attribute__((always_inline)) void gradient_points(const Vec* g, int step, Vec* o) {
  o[0] = g[0];
  if constexpr (F == Filter::kF11) return;
  const Vec g0 = g[0], g1 = g[step];
  if constexpr (F == Filter::kF25) {
    o[1] = scaled_add(kA, g1, g0);
    o[2] = scaled_add(-kA, g1, g0);
    o[3] = scaled_add(kB, g1, g0);
    o[4] = scaled_add(-kB, g1, g0);
    o[5] = g1;
  } else {
    const Vec g2 = g[2 * step];
    Vec e = scaled_add(kA2, g2, g0), even = scaled_add(kB2, g2, g0), f = g1, odd = g1;
    if constexpr (outputs_of(F) > 3) f = scaled_add(kA2, g[3 * step], g1), odd = scaled_add(kB2, g[3 * step], g1);
    if constexpr (outputs_of(F) > 4)
      e = scaled_add(kA2 * kA2, g[4 * step], e), even = scaled_add(kB2 * kB2, g[4 * step], even);
    o[1] = scaled_add(kA, f, e);
    o[2] = scaled_add(-kA, f, e);
    o[3] = scaled_add(kB, odd, even);
    if constexpr (points_of(F) == 6) o[4] = scaled_add(-kB, odd, even);
    o[points_of(F) - 1] = g[(outputs_of(F) - 1) * step];
  }
}

// G: TAPS weights at the six points; of a single one, at one.
template <int TAPS> inline __attribute__((always_inline)) void weight_points(const Vec* g, int step, Vec* o) {
  o[0] = g[0];
  if constexpr (TAPS == 1) return;
  const Vec g0 = g[0], g1 = g[step];
  Vec e = scaled(kNormA, g0), f = scaled(kA * kNormA, g1);
  Vec even = scaled(kNormB, g0), odd = scaled(kB * kNormB, g1);
  if constexpr (TAPS > 2) {
    const Vec g2 = g[2 * step];
    e = scaled_add(kA2 * kNormA, g2, e), even = scaled_add(kB2 * kNormB, g2, even);
  }
  if constexpr (TAPS > 3) {
    const Vec g3 = g[3 * step];
    f = scaled_add(kA * kA2 * kNormA, g3, f), odd = scaled_add(kB * kB2 * kNormB, g3, odd);
  }
  if constexpr (TAPS > 4) {
    const Vec g4 = g[4 * step];
    e = scaled_add(kA2 * kA2 * kNormA, g4, e), even = scaled_add(kB2 * kB2 * kNormB, g4, even);
  }
  o[1] = e + f;
  o[2] = e - f;
  o[3] = even + odd;
  o[4] = even - odd;
  o[5] = g[(TAPS - 1) * step];
}

// The points to TAPS weight gradients.
template <int TAPS> inline __attribute__((always_inline)) void weight_gradients(const Vec* m, int step, Vec* dw) {
  if constexpr (TAPS == 1) {
    dw[0] = m[0];
    return;
  }
  const Vec m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step], last = m[5 * step];
  const Vec sum = m1 + m2, difference = m1 - m2, sum_b = m3 + m4, difference_b = m3 - m4;
  dw[0] = scaled_add(kNormA, sum, scaled_add(kNormB, sum_b, m[0]));
  if constexpr (TAPS == 2) {
    dw[1] = scaled_add(kA * kNormA, difference, scaled_add(kB * kNormB, difference_b, last));
    return;
  }
  dw[1] = scaled_add(kA * kNormA, difference, scaled(kB * kNormB, difference_b));
  if constexpr (TAPS == 3) {
    dw[2] = scaled_add(kA2 * kNormA, sum, scaled_add(kB2 * kNormB, sum_b, last));
  } else {
    dw[2] = scaled_add(kA2 * kNormA, sum, scaled(kB2 * kNormB, sum_b));
    const Vec third = scaled(kB * kB2 * kNormB, difference_b);
    if constexpr (TAPS == 4) {
      dw[3] = scaled_add(kA * kA2 * kNormA, difference, third + last);
    } else {
      dw[3] = scaled_add(kA * kA2 * kNormA, difference, third);
      dw[4] = scaled_add(kA2 * kA2 * kNormA, sum, scaled_add(kB2 * kB2 * kNormB, sum_b, last));
    }
  }
}

// Calls body(rows, columns) with the filters of a tile as constants.
template <Filter F> struct FilterConstant {
  static constexpr Filter value = F;
};
template <class Body> inline void with_filters(const WinogradTile& tile, Body body) {
  constexpr FilterConstant<Filter::kF43> f43{};
  constexpr FilterConstant<Filter::kF33> f33{};
  constexpr FilterConstant<Filter::kF25> f25{};
  constexpr FilterConstant<Filter::kF34> f34{};
  constexpr FilterConstant<Filter::kF52> f52{};
  constexpr FilterConstant<Filter::kF42> f42{};
  constexpr FilterConstant<Filter::kF11> f11{};
  const bool six = points_of(tile.columns) == 6;
  switch (tile.rows) {
    case Filter::kF43: return six ? body(f43, f43) : body(f43, f33);
    case Filter::kF33: return six ? body(f33, f43) : body(f33, f33);
    case Filter::kF52: return six ? body(f52, f52) : body(f52, f42);
    case Filter::kF42: return six ? body(f42, f52) : body(f42, f42);
    case Filter::kF25: return body(f25, f25);
    case Filter::kF34: return body(f34, f34);
    case Filter::kF11: break;
  }
  return tile.columns == Filter::kF34 ? body(f11, f34) : six ? body(f11, f52) : body(f11, f42);
}

// Of each row the first n channels, at most a vector, or none: bit i of `rows_in`.
template <int ROWS> inline __attribute__((always_inline)) void row_masks(uint32_t rows_in, int64_t n, Mask* rows) {
  const Mask lanes = first(n < 0 ? 0 : n < kLanes ? n : kLanes);
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) rows[i] = lanes_if((rows_in >> i & 1) != 0, lanes);
}

// One vector of channels of a window of ROWS x COLUMNS points. Registers: the 36 values of the half-transformed window
// exceed every register file; those few that spill stay in L1. Bound: 144 multiply-adds, 36 loads and 36 stores of full
// cache lines. MASKED: `rows` are the lanes of each row that lie inside the image, and are channels.
template <int ROWS, int COLUMNS, bool MASKED, class T>
inline __attribute__((always_inline)) void input_vector(const WinogradInput<T>& t, const T* x, const Mask* rows,
                                                        float* v) {
  Vec half[ROWS][COLUMNS];
#pragma GCC unroll 6
  for (int j = 0; j < COLUMNS; ++j) {
    Vec pixels[ROWS], points[ROWS];
    // The window jumps from row to row and pixel to pixel, which the hardware does not foresee. A column at a time: of
    // a burst of fetches some are left out.
    if (j < COLUMNS - 2)
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) prefetch(x + t.next + i * t.row + j * t.pixel);
    if (MASKED && (t.columns_in >> j & 1) == 0) {
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) half[i][j] = zero();
      continue;
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const T* at = x + i * t.row + j * t.pixel;
      pixels[i] = MASKED ? load_lanes(rows[i], at) : load(at);
    }
    input_points<ROWS>(pixels, 1, points);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    if (ROWS > 1 && i + 1 == ROWS && !wants_last(t.points.rows)) break;
    Vec points[COLUMNS];
    input_points<COLUMNS>(half[i], 1, points);
#pragma GCC unroll 6
    for (int j = 0; j < COLUMNS; ++j) {
      if (j + 1 == COLUMNS && !wants_last(t.points.columns)) break;
      store(v + (point<ROWS>(i) * kPoints + point<COLUMNS>(j)) * t.position, points[j]);
    }
  }
}

template <int ROWS, int COLUMNS, class T> void winograd_input_tile(const WinogradInput<T>& t) {
  constexpr uint32_t kAllRows = (1u << ROWS) - 1, kAllColumns = (1u << COLUMNS) - 1;
  const bool inside = (t.rows_in & kAllRows) == kAllRows && (t.columns_in & kAllColumns) == kAllColumns;
  for (int64_t c = 0; c < t.channels; c += kBlock) {
    float* const v = t.v + c / kBlock * t.block;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const int64_t n = t.channels - c - i;
      if (inside && n >= kLanes) {
        input_vector<ROWS, COLUMNS, false>(t, t.x + c + i, nullptr, v + i);
        continue;
      }
      Mask rows[ROWS];
      row_masks<ROWS>(t.rows_in, n, rows);
      input_vector<ROWS, COLUMNS, true>(t, t.x + c + i, rows, v + i);
    }
  }
}

template <class T> void winograd_input(const WinogradInput<T>& t) {
  const bool six = points_of(t.tile.columns) == 6;
  switch (points_of(t.tile.rows)) {
    case 6: return six ? winograd_input_tile<6, 6>(t) : winograd_input_tile<6, 5>(t);
    case 5: return six ? winograd_input_tile<5, 6>(t) : winograd_input_tile<5, 5>(t);
    default: return six ? winograd_input_tile<1, 6>(t) : winograd_input_tile<1, 5>(t);
  }
}

template <Filter R, Filter S, bool MASKED>
inline __attribute__((always_inline)) void gradient_vector(const WinogradGradient& t, const float* dy, const Mask* rows,
                                                           float* d) {
  constexpr int kTileRows = outputs_of(R), kTileColumns = outputs_of(S), kRows = points_of(R), kColumns = points_of(S);
  Vec half[kRows][kTileColumns];
#pragma GCC unroll 5
  for (int j = 0; j < kTileColumns; ++j) {
    Vec pixels[kTileRows], points[kRows];
    if (MASKED && j >= t.columns) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) half[i][j] = zero();
      continue;
    }
#pragma GCC unroll 5
    for (int i = 0; i < kTileRows; ++i) {
      const float* at = dy + i * t.row + j * t.pixel;
      pixels[i] = MASKED ? load_lanes(rows[i], at) : load(at);
    }
    gradient_points<R>(pixels, 1, points);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    Vec points[kColumns];
    gradient_points<S>(half[i], 1, points);
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j)
      store(d + (point<kRows>(i) * kPoints + point<kColumns>(j)) * t.position, points[j]);
  }
}

template <Filter R, Filter S> void winograd_gradient_tile(const WinogradGradient& t) {
  constexpr int kTileRows = outputs_of(R), kTileColumns = outputs_of(S);
  const bool inside = t.rows >= kTileRows && t.columns >= kTileColumns;
  for (int64_t i = 0; i < t.width; i += kLanes) {
    const int64_t n = t.channels - i;
#pragma GCC unroll 5
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 5
      for (int j = 0; j < kTileColumns; ++j) prefetch(t.dy + t.next + r * t.row + j * t.pixel + i);
    if (inside && n >= kLanes) {
      gradient_vector<R, S, false>(t, t.dy + i, nullptr, t.d + i);
      continue;
    }
    Mask rows[kTileRows];
    row_masks<kTileRows>(t.rows < kTileRows ? (1u << t.rows) - 1 : ~0u, n, rows);
    gradient_vector<R, S, true>(t, t.dy + i, rows, t.d + i);
  }
}

void winograd_gradient(const WinogradGradient& t) {
  with_filters(t.tile, [&](auto rows, auto columns) {
    winograd_gradient_tile<decltype(rows)::value, decltype(columns)::value>(t);
  });
}

inline void store_output(float* y, Vec a, bool streaming) { streaming ? stream(y, a) : store(y, a); }
// A vector of bfloat16 is half a cache line: around the caches it would cost more.
inline void store_output(BFloat16* y, Vec a, bool) { store(y, a); }

// One vector of channels of a tile. WHOLE: all outputs are stored, as full vectors, with no residual.
template <Filter R, Filter S, bool WHOLE, class T>
inline __attribute__((always_inline)) void output_vector(const WinogradOutput<T>& t, int64_t c) {
  constexpr int kTileRows = outputs_of(R), kTileColumns = outputs_of(S), kRows = points_of(R), kColumns = points_of(S);
  Vec half[kTileRows][kColumns];
#pragma GCC unroll 6
  for (int j = 0; j < kColumns; ++j) {
    Vec points[kRows], pixels[kTileRows];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
      points[i] = load(t.m + (point<kRows>(i) * kPoints + point<kColumns>(j)) * t.position + c);
    output_pixels<R>(points, 1, pixels);
#pragma GCC unroll 5
    for (int i = 0; i < kTileRows; ++i) half[i][j] = pixels[i];
  }
  const int64_t n = t.channels - c;
  const bool full = n >= kLanes;
  const Vec bias = !t.bias ? zero() : WHOLE || full ? load(t.bias + c) : load_first(t.bias + c, n);
  const Vec low = set1(t.low), high = set1(t.high);
#pragma GCC unroll 5
  for (int i = 0; i < kTileRows; ++i) {
    if (!WHOLE && i >= t.rows) break;
    Vec pixels[kTileColumns];
    output_pixels<S>(half[i], 1, pixels);
#pragma GCC unroll 5
    for (int j = 0; j < kTileColumns; ++j) {
      if (!WHOLE && j >= t.columns) break;
      const int64_t at = i * t.row + j * t.pixel + c;
      Vec sum = pixels[j] + bias;
      if (!WHOLE && t.residual) {
        prefetch(t.residual + at + t.next);
        sum = sum + (full ? load(t.residual + at) : load_first(t.residual + at, n));
      }
      sum = clamp(sum, low, high);
      if (!WHOLE && !full)
        store_first(t.y + at, sum, n);
      else
        store_output(t.y + at, sum, !WHOLE && t.streaming);
    }
  }
}

template <Filter R, Filter S, class T> void winograd_output_tile(const WinogradOutput<T>& t) {
  const bool whole = t.rows >= outputs_of(R) && t.columns >= outputs_of(S) && !t.residual && !t.streaming;
  for (int64_t c = 0; c < t.channels; c += kLanes)
    if (whole && t.channels - c >= kLanes)
      output_vector<R, S, true>(t, c);
    else
      output_vector<R, S, false>(t, c);
}

template <class T> void winograd_output(const WinogradOutput<T>& t) {
  with_filters(t.tile, [&](auto rows, auto columns) {
    winograd_output_tile<decltype(rows)::value, decltype(columns)::value>(t);
  });
}

template <int ROWS, int COLUMNS> void winograd_weights(const WinogradWeights& t) {
  constexpr int kRows = ROWS > 1 ? kPoints : 1;
  for (int64_t k = 0; k < t.floats; k += kLanes) {
    Vec half[kRows][COLUMNS];
#pragma GCC unroll 5
    for (int j = 0; j < COLUMNS; ++j) {
      Vec taps[ROWS], points[kRows];
#pragma GCC unroll 5
      for (int i = 0; i < ROWS; ++i) {
        const bool there = COLUMNS % 2 != 0 || (i < t.rows && j < t.columns);
        taps[i] = there ? load(t.w + i * t.row + j * t.column + k) : zero();
      }
      weight_points<ROWS>(taps, 1, points);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) half[i][j] = points[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      if (!wants(t.points.rows, i)) continue;
      Vec points[kPoints];
      weight_points<COLUMNS>(half[i], 1, points);
#pragma GCC unroll 6
      for (int j = 0; j < kPoints; ++j)
        if (wants(t.points.columns, j)) store(t.u + (i * kPoints + j) * t.position + k, points[j]);
    }
  }
}

template <int ROWS, int COLUMNS> void winograd_weight_gradient(const WinogradWeightGradient& t) {
  constexpr int kRows = ROWS > 1 ? kPoints : 1;
  for (int64_t k = 0; k < t.floats; k += kLanes) {
    Vec half[ROWS][kPoints];
#pragma GCC unroll 6
    for (int j = 0; j < kPoints; ++j) {
      Vec points[kRows], taps[ROWS];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const bool wanted = wants(t.points.rows, i) && wants(t.points.columns, j);
        points[i] = wanted ? load(t.m + (i * kPoints + j) * t.position + k) : zero();
      }
      weight_gradients<ROWS>(points, 1, taps);
#pragma GCC unroll 5
      for (int i = 0; i < ROWS; ++i) half[i][j] = taps[i];
    }
#pragma GCC unroll 5
    for (int i = 0; i < ROWS; ++i) {
      Vec taps[COLUMNS];
      weight_gradients<COLUMNS>(half[i], 1, taps);
#pragma GCC unroll 5
      for (int j = 0; j < COLUMNS; ++j)
        if (COLUMNS % 2 != 0 || (i < t.rows && j < t.columns)) store(t.dw + i * t.row + j * t.column + k, taps[j]);
    }
  }
}

// One pixel of up to four channels.
typedef float Pixel __attribute__((vector_size(16)));
typedef float UnalignedPixel __attribute__((vector_size(16), aligned(4), may_alias));
static_assert(sizeof(Pixel) == kFewChannels * sizeof(float));

void row_input(const float* x, int64_t channels, int64_t tiles, float* v) {
  for (int64_t i = 0; i < tiles; ++i, x += kRowOutputs * channels) {
    Pixel pixels[kPoints], points[kPoints];
#pragma GCC unroll 6
    for (int j = 0; j < kPoints; ++j) pixels[j] = *reinterpret_cast<const UnalignedPixel*>(x + j * channels);
    input_points<kPoints>(pixels, 1, points);
#pragma GCC unroll 6
    for (int j = 0; j < kPoints; ++j, v += kFewChannels) *reinterpret_cast<UnalignedPixel*>(v) = points[j];
  }
}

void row_weights(const float* w, int64_t channels, float* u) {
  for (int64_t r = 0; r < kRowTaps; ++r, w += kRowTaps * channels * kLanes)
    for (int64_t c = 0; c < channels; ++c) {
      Vec taps[kRowTaps], points[kPoints];
      for (int s = 0; s < kRowTaps; ++s) taps[s] = load(w + (s * channels + c) * kLanes);
      weight_points<kRowTaps>(taps, 1, points);
      for (int p = 0; p < kPoints; ++p, u += kLanes) store(u, points[p]);
    }
}

void row_weight_gradient(const float* m, int64_t channels, float* dw) {
  for (int64_t r = 0; r < kRowTaps; ++r, dw += kRowTaps * channels * kLanes)
    for (int64_t c = 0; c < channels; ++c) {
      Vec taps[kRowTaps], points[kPoints];
      for (int p = 0; p < kPoints; ++p, m += kLanes) points[p] = load(m);
      weight_gradients<kRowTaps>(points, 1, taps);
      for (int s = 0; s < kRowTaps; ++s) store(dw + (s * channels + c) * kLanes, taps[s]);
    }
}

// Outputs `first` to first + P of some tiles, finished and stored.
template <int P> inline __attribute__((always_inline)) void store_row(const Vec* pixels, int64_t first, TileOutput t) {
  Vec sums[P][1];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) sums[p][0] = pixels[p];
  t.y += first * t.pixel_stride;
  if (t.residual) t.residual += first * t.pixel_stride;
  store_tile<1, 1, P>(sums, t);
}

// row_tiles: the points of T tiles are summed over rows of the kernel and channels, then turned into outputs.
// Registers: 6 T accumulators + 1 of the weights + 1 broadcast. Bound: FMA; 6 T FMAs against 6 T + 6 loads a step, 54
// FMAs and 12 sums a tile of three channels, against 108 FMAs of a plain convolution.
constexpr int kRowTiles = kTilePixels / 3;
// Two tiles, all that 16 registers hold, load 18 operands for 12 FMAs, a plain convolution 8. Without FMA
// arithmetic is the bound of both.
#ifdef __FMA__
constexpr bool kRowTilesPay = kRowTiles >= 4;
#else
constexpr bool kRowTilesPay = true;
#endif
template <int T> void row_tiles_of(const RowTiles& t) {
  Vec acc[T][kPoints];
#pragma GCC unroll 4
  for (int i = 0; i < T; ++i)
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) acc[i][p] = zero();
  if (!t.streaming) prefetch_tile<1, 1, T * kRowOutputs>(t, t.y);
  if (t.residual) prefetch_tile<1, 1, T * kRowOutputs>(t, t.residual);
  const float* w = t.w;
  for (int64_t r = 0; r < kRowTaps; ++r) {
    const float* v = t.v + r * t.v_row;
    for (int64_t c = 0; c < t.in_channels; ++c, ++v, w += kPoints * kLanes)
#pragma GCC unroll 6
      for (int p = 0; p < kPoints; ++p) {
        const Vec weights = load(w + p * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) acc[i][p] = fma(set1(v[(i * kPoints + p) * kFewChannels]), weights, acc[i][p]);
      }
  }
#pragma GCC unroll 4
  for (int i = 0; i < T; ++i) {
    Vec pixels[kRowOutputs];
    output_pixels<Filter::kF43>(acc[i], 1, pixels);
    const int64_t first = i * kRowOutputs;
    switch (i + 1 < T ? kRowOutputs : t.outputs - first) {
      case 1: store_row<1>(pixels, first, t); break;
      case 2: store_row<2>(pixels, first, t); break;
      case 3: store_row<3>(pixels, first, t); break;
      default: store_row<4>(pixels, first, t);
    }
  }
}

template <int T = kRowTiles> void row_tiles_dispatch(const RowTiles& t, int64_t tiles) {
  if (tiles == T) return row_tiles_of<T>(t);
  if constexpr (T > 1) row_tiles_dispatch<T - 1>(t, tiles);
}

void row_tiles(const RowTiles& t) { row_tiles_dispatch(t, (t.outputs + kRowOutputs - 1) / kRowOutputs); }

// row_gradient: the sums of some points, over all tiles; dy is turned into points as it is loaded.
// Registers: COUNT * 3 * C accumulators + COUNT points + 1 broadcast. Bound: FMA, as many as there are accumulators
// against as many loads + 4 a tile, and about 4 operations that make the points of dy.
template <int C, int FIRST, int COUNT> void row_gradient_points(const RowGradient& t) {
  constexpr int kSums = kRowTaps * C;
  Vec acc[COUNT][kSums];
  const auto at = [&](int p, int j) { return t.acc + (j * kPoints + FIRST + p) * kLanes; };
#pragma GCC unroll 6
  for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) acc[p][j] = load(at(p, j));
  const auto add_tile = [&](const Vec* dy, const float* v) __attribute__((always_inline)) {
    Vec points[kPoints];
    gradient_points<Filter::kF43>(dy, 1, points);
#pragma GCC unroll 3
    for (int r = 0; r < kRowTaps; ++r, v += t.v_row)
#pragma GCC unroll 6
      for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          acc[p][r * C + c] = fma(set1(v[(FIRST + p) * kFewChannels + c]), points[FIRST + p], acc[p][r * C + c]);
  };
  // Each call fetches its share, evenly.
  constexpr int64_t kNext = kRowOutputs * kLanes * COUNT / kPoints;
  const float* next = t.next + t.rows * (t.columns / kRowOutputs) * kNext * (FIRST / COUNT);
  for (int64_t row = 0; row < t.rows; ++row) {
    const float *dy = t.dy + row * t.dy_row, *v = t.v + row * t.v_row;
    Vec pixels[kRowOutputs];
    int64_t q = 0;
    for (; q + kRowOutputs <= t.columns; q += kRowOutputs) {
#pragma GCC unroll 4
      for (int i = 0; i < kRowOutputs; ++i) pixels[i] = load(dy + i * t.dy_pixel);
      for (int64_t i = 0; i < kNext; i += kBlock) prefetch_l2(next + i);
      next += kNext;
      add_tile(pixels, v);
      dy += kRowOutputs * t.dy_pixel, v += kPoints * kFewChannels;
    }
    if (q == t.columns) continue;
#pragma GCC unroll 4
    for (int i = 0; i < kRowOutputs; ++i) pixels[i] = q + i < t.columns ? load(dy + i * t.dy_pixel) : zero();
    add_tile(pixels, v);
  }
#pragma GCC unroll 6
  for (int p = 0; p < COUNT; ++p)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) store(at(p, j), acc[p][j]);
}

// How many points' sums fit the registers.
template <int C>
constexpr int kPointsAtOnce = 6 * 3 * C <= 2 * kTilePixels   ? 6
                              : 3 * 3 * C <= 2 * kTilePixels ? 3
                              : 2 * 3 * C <= 2 * kTilePixels ? 2
                                                             : 1;

template <int C, int FIRST = 0> void row_gradient_of(const RowGradient& t) {
  row_gradient_points<C, FIRST, kPointsAtOnce<C>>(t);
  if constexpr (FIRST + kPointsAtOnce<C> < kPoints) row_gradient_of<C, FIRST + kPointsAtOnce<C>>(t);
}

void row_gradient(const RowGradient& t) {
  switch (t.in_channels) {
    case 1: return row_gradient_of<1>(t);
    case 2: return row_gradient_of<2>(t);
    case 3: return row_gradient_of<3>(t);
    default: return row_gradient_of<4>(t);
  }
}

constexpr WinogradKernels winograd_kernels() {
  return {{winograd_input<float>, winograd_output<float>, pack_weights<float>, pack_taps<float>},
          {winograd_input<BFloat16>, winograd_output<BFloat16>, pack_weights<BFloat16>, pack_taps<BFloat16>},
          winograd_gradient,
          {winograd_weights<3, 3>, winograd_weights<5, 5>, winograd_weights<4, 4>, winograd_weights<1, 4>,
           winograd_weights<2, 2>, winograd_weights<1, 2>},
          {winograd_weight_gradient<3, 3>, winograd_weight_gradient<5, 5>, winograd_weight_gradient<4, 4>,
           winograd_weight_gradient<1, 4>, winograd_weight_gradient<2, 2>},
          kRowTiles * kRowOutputs,
          kRowTilesPay,
          row_input,
          row_weights,
          row_tiles,
          row_gradient,
          row_weight_gradient};
}

}  // namespace
}  // namespace fastconv::cpu

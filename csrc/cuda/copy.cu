// Copies between layouts and types, and arithmetic on strided arrays.
#include "device/copy.h"

#include <algorithm>
#include <cmath>

#include "cuda/array_math.h"
#include "cuda/launch.h"
#include "cuda/vector.h"

namespace fastconv::cuda {
namespace {

// Where logical element i (row-major) of up to kMaxDims dimensions lies in each of COUNT arrays.
template <int COUNT> struct Places {
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[COUNT][kMaxDims];

  // Whether the elements of every array follow each other.
  bool together() const {
    if (ndim == 0) return true;
    return ndim == 1 && std::all_of(strides, strides + COUNT, [](const int64_t (&s)[kMaxDims]) { return s[0] == 1; });
  }

  FC_HOST_DEVICE void find(int64_t i, int64_t (&at)[COUNT]) const {
    for (int j = 0; j < COUNT; ++j) at[j] = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t position = i % sizes[d];
      i /= sizes[d];
      for (int j = 0; j < COUNT; ++j) at[j] += position * strides[j][d];
    }
  }
};

// The dimensions in the order of the last array's memory, so that neighbouring threads write neighbours; those of one
// element left out and those that lie within one another in every array joined.
template <int COUNT> Places<COUNT> make_places(const TensorView* const (&views)[COUNT]) {
  const TensorView& last = *views[COUNT - 1];
  std::vector<int> order;
  for (int d = 0; d < last.ndim; ++d)
    if (last.sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return std::abs(last.strides[a]) > std::abs(last.strides[b]); });
  Places<COUNT> p{};
  for (int d : order) {
    bool joins = p.ndim > 0;
    for (int j = 0; joins && j < COUNT; ++j) joins = p.strides[j][p.ndim - 1] == views[j]->strides[d] * last.sizes[d];
    if (!joins) p.sizes[p.ndim++] = 1;
    p.sizes[p.ndim - 1] *= last.sizes[d];
    for (int j = 0; j < COUNT; ++j) p.strides[j][p.ndim - 1] = views[j]->strides[d];
  }
  return p;
}

template <class Word> struct CopyStrided {
  Places<2> places;
  const Word* from;
  Word* to;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    int64_t at[2];
    places.find(i, at);
    to[at[1]] = from[at[0]];
  }
};

// [batch][rows][columns] to [batch][columns][rows], a square at a time: both sides in whole lines.
template <class Word> struct Transpose {
  static constexpr int kSide = 32, kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    Word square[kSide][kSide + 1];  // a column more: neighbours in a column lie in different banks
  };
  using Local = Nothing;
  int64_t rows, columns;
  const Word* from;
  Word* to;

  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    const int64_t across = ceil_tiles(columns), down = ceil_tiles(rows);
    const int64_t image = block / (across * down) * rows * columns;
    const int64_t row0 = block / across % down * kSide, column0 = block % across * kSide;
    for (int i = thread; i < kSide * kSide; i += kThreads) {
      const int slow = i / kSide, fast = i % kSide;
      if constexpr (PHASE == 0) {
        if (row0 + slow < rows && column0 + fast < columns)
          shared.square[slow][fast] = from[image + (row0 + slow) * columns + column0 + fast];
      } else {
        if (row0 + fast < rows && column0 + slow < columns)
          to[image + (column0 + slow) * rows + row0 + fast] = shared.square[fast][slow];
      }
    }
  }
  FC_HOST_DEVICE static int64_t ceil_tiles(int64_t n) { return (n + kSide - 1) / kSide; }
  int64_t blocks(int64_t batch) const { return batch * ceil_tiles(columns) * ceil_tiles(rows); }
};

// Three dimensions of which the last two change places.
bool is_transpose(const Places<2>& p) {
  const int d = p.ndim - 2;
  if (d < 0 || p.ndim > 3) return false;
  const int64_t rows = p.sizes[d], columns = p.sizes[d + 1];  // of `to`
  if (p.strides[1][d + 1] != 1 || p.strides[1][d] != columns || p.strides[0][d] != 1 || p.strides[0][d + 1] != rows)
    return false;
  return p.ndim == 2 || (p.strides[0][0] == rows * columns && p.strides[1][0] == rows * columns);
}

template <class Word> void copy_words(const Places<2>& p, int64_t n, const TensorView& src, const TensorView& dst) {
  if (is_transpose(p)) {
    const int64_t rows = p.sizes[p.ndim - 1], columns = p.sizes[p.ndim - 2];  // of `from`
    const Transpose<Word> transpose{rows, columns, src.as<Word>(), dst.as<Word>()};
    return launch(transpose, transpose.blocks(n / (rows * columns)));
  }
  for_each(n, CopyStrided<Word>{p, src.as<Word>(), dst.as<Word>()});
}

FC_INLINE double load_number(const void* data, DType type, int64_t at) {
  switch (type) {
    case DType::kFloat32: return static_cast<const float*>(data)[at];
    case DType::kFloat64: return static_cast<const double*>(data)[at];
    case DType::kInt64: return static_cast<double>(static_cast<const int64_t*>(data)[at]);
    case DType::kUInt8: return static_cast<const uint8_t*>(data)[at];
    case DType::kFloat16: return static_cast<const half_t*>(data)[at];
    case DType::kBFloat16: return static_cast<const bfloat16_t*>(data)[at];
  }
  return 0;
}

FC_INLINE void store_number(void* data, DType type, int64_t at, double value) {
  switch (type) {
    case DType::kFloat32: static_cast<float*>(data)[at] = static_cast<float>(value); break;
    case DType::kFloat64: static_cast<double*>(data)[at] = value; break;
    case DType::kInt64: static_cast<int64_t*>(data)[at] = static_cast<int64_t>(value); break;
    case DType::kUInt8: static_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(value); break;
    case DType::kFloat16: static_cast<half_t*>(data)[at] = half_t(value); break;
    case DType::kBFloat16: static_cast<bfloat16_t*>(data)[at] = bfloat16_t(value); break;
  }
}

struct CastStrided {
  Places<2> places;
  const void* from;
  void* to;
  DType from_type, to_type;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    int64_t at[2];
    places.find(i, at);
    store_number(to, to_type, at[1], load_number(from, from_type, at[0]));
  }
};

struct FillStrided {
  Places<1> places;
  void* to;
  DType type;
  double value;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    int64_t at[1];
    places.find(i, at);
    store_number(to, type, at[0], value);
  }
};

template <class A> FC_INLINE A compute(Arithmetic op, A a, A b) {
  switch (op) {
    case Arithmetic::kAdd: return a + b;
    case Arithmetic::kSubtract: return a - b;
    case Arithmetic::kMultiply: return a * b;
    case Arithmetic::kDivide: return a / b;
  }
  return a;
}

template <class A> struct Binary {
  Arithmetic op;
  FC_INLINE A operator()(A a, A b) const { return compute(op, a, b); }
};

template <class T> struct BinaryStrided {
  Places<3> places;
  Arithmetic op;
  const T *a, *b;
  T* y;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    int64_t at[3];
    places.find(i, at);
    y[at[2]] = T(compute(op, static_cast<Acc<T>>(a[at[0]]), static_cast<Acc<T>>(b[at[1]])));
  }
};

template <class T> struct SquareRoot {
  Places<2> places;
  const T* x;
  T* y;
  FC_HOST_DEVICE void operator()(int64_t i) const {
    int64_t at[2];
    places.find(i, at);
    y[at[1]] = T(static_cast<Acc<T>>(sqrt(static_cast<Acc<T>>(x[at[0]]))));
  }
};

// A block sums one group of `inner` elements: its threads every 256th, then their sums in order.
template <class T> struct SumStrided {
  static constexpr int kThreads = kBlockThreads, kPhases = 2;
  struct Shared {
    double sums[kThreads];
  };
  using Local = Nothing;
  Places<1> kept, reduced;
  int64_t inner;
  const T* x;
  T* y;  // row-major over the kept dimensions
  template <int PHASE> FC_HOST_DEVICE void run(int64_t block, int thread, Shared& shared, Local&) const {
    if constexpr (PHASE == 0) {
      int64_t base[1], at[1];
      kept.find(block, base);
      double sum = 0;
      for (int64_t i = thread; i < inner; i += kThreads) {
        reduced.find(i, at);
        sum += static_cast<double>(static_cast<Acc<T>>(x[base[0] + at[0]]));
      }
      shared.sums[thread] = sum;
    } else if (thread == 0) {
      double sum = 0;
      for (double part : shared.sums) sum += part;
      y[block] = T(sum);
    }
  }
};

}  // namespace

void copy_view(const TensorView& src, const TensorView& dst) {
  const int64_t n = src.numel();
  if (n == 0) return;
  const TensorView* const views[] = {&src, &dst};
  const Places<2> p = make_places(views);
  if (p.together()) return copy_bytes(dst.data, src.data, n * itemsize(src.dtype), Copy::kOnDevice);
  switch (itemsize(src.dtype)) {
    case 2: return copy_words<uint16_t>(p, n, src, dst);
    case 4: return copy_words<uint32_t>(p, n, src, dst);
    case 8: return copy_words<uint64_t>(p, n, src, dst);
    default: return copy_words<uint8_t>(p, n, src, dst);
  }
}

void cast_view(const TensorView& src, const TensorView& dst) {
  const TensorView* const views[] = {&src, &dst};
  for_each(src.numel(), CastStrided{make_places(views), src.data, dst.data, src.dtype, dst.dtype});
}

void fill_view(const TensorView& y, double value) {
  const TensorView* const views[] = {&y};
  for_each(y.numel(), FillStrided{make_places(views), y.data, y.dtype, value});
}

void arithmetic(Arithmetic op, const TensorView& a, const TensorView& b, const TensorView& y) {
  const TensorView* const views[] = {&a, &b, &y};
  const Places<3> p = make_places(views);
  dispatch_real(y.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.together()) return map_two(y.numel(), a.as<T>(), b.as<T>(), y.as<T>(), Binary<Acc<T>>{op});
    for_each(y.numel(), BinaryStrided<T>{p, op, a.as<T>(), b.as<T>(), y.as<T>()});
  });
}

void square_root(const TensorView& x, const TensorView& y) {
  const TensorView* const views[] = {&x, &y};
  dispatch_real(y.dtype, [&](auto t) {
    using T = decltype(t);
    for_each(y.numel(), SquareRoot<T>{make_places(views), x.as<T>(), y.as<T>()});
  });
}

void sum_over(const TensorView& x, const std::vector<bool>& over, void* y) {
  Places<1> kept{}, reduced{};
  int64_t outer = 1, inner = 1;
  for (int d = 0; d < x.ndim; ++d) {
    Places<1>& p = over[d] ? reduced : kept;
    (over[d] ? inner : outer) *= x.sizes[d];
    p.sizes[p.ndim] = x.sizes[d];
    p.strides[0][p.ndim++] = x.strides[d];
  }
  dispatch_real(x.dtype, [&](auto t) {
    using T = decltype(t);
    launch(SumStrided<T>{kept, reduced, inner, x.as<T>(), static_cast<T*>(y)}, outer);
  });
}

}  // namespace fastconv::cuda

// All pooling is one walk over rows of windows; the kernels differ. Forward rows are independent. A backward row owns
// the image rows between its window and the next where windows do not overlap, and then stores every element once;
// where they overlap a chunk is an image (or some channels of it), whose windows are added in row-major order.
#include "cpu/pool2d.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

// Channels of a chunk of an overlapping backward pass, when there are fewer images than this.
constexpr int64_t kChannelBlock = 64;
constexpr int64_t kManyImages = 16;
constexpr int64_t kStreamBytes = 16 << 20;  // a gradient of this size leaves the caches before anybody reads it

std::vector<PoolWindow> column_windows(const Pool2dProblem& a) {
  std::vector<PoolWindow> windows;
  windows.reserve(a.columns.windows.size());
  for (const AxisWindow& w : a.columns.windows) windows.push_back({w.begin * a.c, w.count, w.extent});
  return windows;
}

// The p-th row of windows of an image; the pointers are those of the image and of its plane of outputs.
template <class T>
PoolRow<T> row_of(const Pool2dProblem& a, const std::vector<PoolWindow>& windows, int64_t p, const T* x, T* dx, T* y) {
  const AxisWindow& rows = a.rows.windows[p];
  const int64_t first = rows.begin * a.w * a.c;
  PoolRow<T> row{};
  if (x) row.x = x + first;
  if (dx) row.dx = dx + first;
  row.rows = rows.count;
  row.row_step = a.rows.step * a.w * a.c;
  row.column_step = a.columns.step * a.c;
  row.next_row = p + 1 < a.p() ? (a.rows.windows[p + 1].begin - rows.begin) * a.w * a.c : 0;
  row.windows = windows.data();
  row.outputs = a.q();
  row.y = y + p * a.q() * a.c;
  row.pixel = a.c;
  row.channels = a.c;
  row.row_extent = rows.extent;
  row.divisor = static_cast<T>(a.divisor.value_or(0));
  return row;
}

int64_t rows_per_chunk(const Pool2dProblem& a) {
  const int64_t covered = std::max<int64_t>(a.h / a.p(), 1) * a.w;
  return std::max<int64_t>(16384 / std::max<int64_t>(std::max(covered, a.q()) * a.c, 1), 1);
}

template <class T, class Kernel> void forward(const Pool2dProblem& a, const T* x, T* y, Kernel&& kernel) {
  if (a.n * a.c == 0) return;
  const std::vector<PoolWindow> windows = column_windows(a);
  parallel_ranges(a.n * a.p(), rows_per_chunk(a), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / a.p(), p = i % a.p();
      kernel(row_of<T>(a, windows, p, x + image * a.h * a.w * a.c, nullptr, y + image * a.p() * a.q() * a.c), p, image);
    }
  });
}

template <class T> void zero(T* p, int64_t count) {
  if (count > 0) std::memset(p, 0, count * sizeof(T));
}

// Zeros the elements of the image rows [begin, end) that lie in no window of these columns.
template <class T> void zero_gaps(const Pool2dProblem& a, int64_t begin, int64_t end, T* image) {
  for (int64_t row = begin; row < end; ++row) {
    int64_t done = 0;
    for (const AxisWindow& window : a.columns.windows) {
      if (window.begin > done) zero(image + (row * a.w + done) * a.c, (window.begin - done) * a.c);
      done = std::max(done, window.begin + window.count);
    }
    zero(image + (row * a.w + done) * a.c, (a.w - done) * a.c);
  }
}

template <class T, class Kernel>
void backward_disjoint(const Pool2dProblem& a, const std::vector<PoolWindow>& windows, const T* dy, const T* x, T* dx,
                       Kernel&& kernel) {
  constexpr int64_t kLine = 64;
  const bool streaming = a.c * static_cast<int64_t>(sizeof(T)) % kLine == 0 &&
                         reinterpret_cast<uintptr_t>(dx) % kLine == 0 &&
                         a.n * a.h * a.w * a.c * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  int64_t covered = 0;
  for (const AxisWindow& window : a.columns.windows) covered += window.count;
  parallel_ranges(a.n * a.p(), rows_per_chunk(a), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.p(), p = i % a.p();
      T* image = dx + n * a.h * a.w * a.c;
      const AxisWindow& rows = a.rows.windows[p];
      const int64_t first = p == 0 ? 0 : rows.begin, last = rows.begin + rows.count;
      const int64_t next = p + 1 < a.p() ? a.rows.windows[p + 1].begin : a.h;
      zero(image + first * a.w * a.c, (rows.begin - first) * a.w * a.c);
      if (covered < a.w) zero_gaps(a, rows.begin, last, image);
      PoolRow<T> row = row_of<T>(a, windows, p, x ? x + n * a.h * a.w * a.c : nullptr, image,
                                 const_cast<T*>(dy) + n * a.p() * a.q() * a.c);
      row.streaming = streaming;
      kernel(row);
      zero(image + last * a.w * a.c, (next - last) * a.w * a.c);
    }
  });
}

template <class T, class Kernel>
void backward_overlapping(const Pool2dProblem& a, std::vector<PoolWindow> windows, const T* dy, const T* x, T* dx,
                          Kernel&& kernel) {
  const int64_t blocks = a.n < kManyImages ? (a.c + kChannelBlock - 1) / kChannelBlock : 1;
  parallel_for(a.n * blocks, [&](int64_t i, int) {
    const int64_t n = i / blocks;
    const Range channels = split(a.c, blocks, i % blocks);
    T* image = dx + n * a.h * a.w * a.c;
    int64_t cleared = 0;  // image rows that have been set to zero: just before the first window that adds to them
    const auto clear = [&](int64_t rows) {
      for (int64_t pixel = cleared * a.w; pixel < rows * a.w; ++pixel)
        zero(image + pixel * a.c + channels.begin, channels.end - channels.begin);
      cleared = std::max(cleared, rows);
    };
    for (int64_t p = 0; p < a.p(); ++p) {
      const AxisWindow& rows = a.rows.windows[p];
      if (rows.count > 0) clear(rows.begin + (rows.count - 1) * a.rows.step + 1);
      PoolRow<T> row = row_of<T>(a, windows, p, x ? x + n * a.h * a.w * a.c + channels.begin : nullptr,
                                 image + channels.begin, const_cast<T*>(dy) + n * a.p() * a.q() * a.c + channels.begin);
      row.channels = channels.end - channels.begin;
      row.accumulate = true;
      kernel(row);
    }
    clear(a.h);
  });
}

template <class T, class Kernel>
void backward(const Pool2dProblem& a, const T* dy, const T* x, T* dx, Kernel&& kernel) {
  if (a.n * a.c == 0) return;
  const std::vector<PoolWindow> windows = column_windows(a);
  if (a.rows.disjoint() && a.columns.disjoint())
    backward_disjoint(a, windows, dy, x, dx, kernel);
  else
    backward_overlapping(a, windows, dy, x, dx, kernel);
}

// Names the first index in memory that lies outside the plane.
void check_indices(const Pool2dProblem& a, const int64_t* indices) {
  const int64_t total = a.n * a.p() * a.q() * a.c, plane = a.h * a.w;
  std::atomic<int64_t> worst{std::numeric_limits<int64_t>::max()};
  parallel_ranges(total, 16384, [&](int64_t begin, int64_t end) {
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(plane);
    for (int64_t i = begin; bad && i < end; ++i) {
      if (static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(plane)) continue;
      int64_t seen = worst.load();
      while (i < seen && !worst.compare_exchange_weak(seen, i)) {
      }
      break;
    }
  });
  const int64_t at = worst.load();
  FC_CHECK(at >= total, "an index of max pooling is out of range: ", at < total ? indices[at] : 0,
           " is not in a plane of ", a.h, " x ", a.w);
}

template <class T> void scatter(const Pool2dProblem& a, const T* dy, const int64_t* indices, T* dx) {
  const int64_t blocks = a.n < kManyImages ? (a.c + kChannelBlock - 1) / kChannelBlock : 1;
  parallel_for(a.n * blocks, [&](int64_t i, int) {
    const int64_t n = i / blocks;
    const Range channels = split(a.c, blocks, i % blocks);
    T* image = dx + n * a.h * a.w * a.c;
    for (int64_t pixel = 0; pixel < a.h * a.w; ++pixel)
      zero(image + pixel * a.c + channels.begin, channels.end - channels.begin);
    for (int64_t p = 0; p < a.p(); ++p)
      for (int64_t q = 0; q < a.q(); ++q) {
        if (a.rows.windows[p].count == 0 || a.columns.windows[q].count == 0) continue;  // a window without data
        const int64_t at = ((n * a.p() + p) * a.q() + q) * a.c;
        for (int64_t c = channels.begin; c < channels.end; ++c) image[indices[at + c] * a.c + c] += dy[at + c];
      }
  });
}

}  // namespace

void max_pool2d(const Pool2dProblem& a, const void* x, void* y, int64_t* indices, uint8_t* places) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().pool2d.of<T>();
    forward<T>(a, static_cast<const T*>(x), static_cast<T*>(y), [&](PoolRow<T> row, int64_t p, int64_t image) {
      if (places) {
        row.place = places + (row.y - static_cast<T*>(y));
        return kernel.max_place(row);
      }
      if (!indices) return kernel.max(row);
      const int64_t first_row = a.rows.windows[p].count > 0 ? a.rows.windows[p].begin : 0;
      kernel.max_index(row, first_row * a.w, indices + (image * a.p() + p) * a.q() * a.c);
    });
    if (!indices || a.n * a.c == 0) return;
    // A window without data has no maximum; its index is one that max_pool2d_backward accepts.
    for (int64_t p = 0; p < a.p(); ++p)
      for (int64_t q = 0; q < a.q(); ++q)
        if (a.rows.windows[p].count == 0 || a.columns.windows[q].count == 0)
          for (int64_t n = 0; n < a.n; ++n) {
            int64_t* empty = indices + ((n * a.p() + p) * a.q() + q) * a.c;
            std::fill(empty, empty + a.c, 0);
          }
  });
}

void max_pool2d_backward(const Pool2dProblem& a, const void* dy, const void* x, void* dx) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().pool2d.of<T>();
    backward<T>(a, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
                [&](const PoolRow<T>& row) { kernel.max_backward(row); });
  });
}

void max_pool2d_backward_places(const Pool2dProblem& a, const void* dy, const uint8_t* places, void* dx) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().pool2d.of<T>();
    const auto* first = static_cast<const T*>(dy);
    backward<T>(a, first, nullptr, static_cast<T*>(dx), [&](PoolRow<T> row) {
      row.place = const_cast<uint8_t*>(places) + (row.y - first);
      kernel.max_place_backward(row);
    });
  });
}

void max_pool2d_backward_indices(const Pool2dProblem& a, const void* dy, const int64_t* indices, void* dx) {
  if (a.n * a.c == 0) return;
  check_indices(a, indices);
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    scatter<T>(a, static_cast<const T*>(dy), indices, static_cast<T*>(dx));
  });
}

template <class T> PoolBands<T>::PoolBands(const Pool2dProblem& a) : problem_(a), windows_(column_windows(a)) {}

template <class T> Range PoolBands<T>::rows(int64_t band) const {
  const AxisWindow& window = problem_.rows.windows[band % problem_.p()];
  const int64_t first = band / problem_.p() * problem_.h + window.begin;
  return {first, first + (window.count > 0 ? (window.count - 1) * problem_.rows.step + 1 : 0)};
}

template <class T> int64_t PoolBands<T>::most_rows() const {
  int64_t most = 0;
  for (int64_t p = 0; p < problem_.p(); ++p) most = std::max(most, rows(p).end - rows(p).begin);
  return most;
}

template <class T> void PoolBands<T>::max(int64_t band, const T* x, T* y, uint8_t* places) const {
  const Pool2dProblem& a = problem_;
  PoolRow<T> row = row_of<T>(a, windows_, band % a.p(), nullptr, nullptr, y + band / a.p() * a.p() * a.q() * a.c);
  row.x = x;
  row.next_row = 0;
  row.place = places + (row.y - y);
  kernels().pool2d.of<T>().max_place(row);
}

template <class T>
PoolRow<T> PoolBands<T>::backward_row(int64_t band, const T* x, const T* dy, const uint8_t* places, T* dx) const {
  const Pool2dProblem& a = problem_;
  const int64_t image = band / a.p(), pixels = image * a.h * a.w * a.c;
  PoolRow<T> row = row_of<T>(a, windows_, band % a.p(), x + pixels, dx ? dx + pixels : nullptr,
                             const_cast<T*>(dy) + image * a.p() * a.q() * a.c);
  row.place = const_cast<uint8_t*>(places) + (row.y - dy);
  return row;
}

template class PoolBands<float>;
template class PoolBands<double>;

void avg_pool2d(const Pool2dProblem& a, const void* x, void* y) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().pool2d.of<T>();
    forward<T>(a, static_cast<const T*>(x), static_cast<T*>(y),
               [&](const PoolRow<T>& row, int64_t, int64_t) { kernel.average(row); });
  });
}

void avg_pool2d_backward(const Pool2dProblem& a, const void* dy, void* dx) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& kernel = kernels().pool2d.of<T>();
    backward<T>(a, static_cast<const T*>(dy), nullptr, static_cast<T*>(dx),
                [&](const PoolRow<T>& row) { kernel.average_backward(row); });
  });
}

}  // namespace fastconv::cpu

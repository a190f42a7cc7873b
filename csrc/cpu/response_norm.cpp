// Pixels are independent; a chunk has some of them, and scratch rows for one.
#include "device/response_norm.h"

#include <algorithm>

#include "core/allocator.h"
#include "cpu/parallel.h"
#include "cpu/registry.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kChunkElements = 16384;

// run(rows, first): the rows of a chunk of pixels, and the place of its first element.
template <class T, class Run> void for_chunks(const ResponseNormProblem& a, const void* x, Run&& run) {
  const int64_t channels = a.channels();
  if (channels == 0) return;
  ResponseNormRows<T> rows{};
  rows.channels = channels;
  rows.before = std::min(a.size / 2, channels - 1);
  rows.after = std::min((a.size - 1) / 2, channels - 1);
  rows.scale = static_cast<T>(a.alpha / static_cast<double>(a.size));
  rows.beta = static_cast<T>(a.beta);
  rows.k = static_cast<T>(a.k);
  const int64_t padded = rows.before + channels + rows.after;
  parallel_ranges(a.pixels(), std::max<int64_t>(kChunkElements / channels, 1), [&](int64_t begin, int64_t end) {
    const Buffer scratch((2 * padded + channels) * sizeof(T));
    ResponseNormRows<T> chunk = rows;
    chunk.x = static_cast<const T*>(x) + begin * channels;
    chunk.pixels = end - begin;
    chunk.squares = scratch.as<T>();
    chunk.shares = chunk.squares + padded;
    chunk.sums = chunk.shares + padded;
    run(chunk, begin * channels);
  });
}

}  // namespace

void response_norm(const ResponseNormProblem& a, const void* x, void* y) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().response_norm.of<T>().forward;
    for_chunks<T>(a, x,
                  [&](const ResponseNormRows<T>& rows, int64_t first) { kernel(rows, static_cast<T*>(y) + first); });
  });
}

void response_norm_backward(const ResponseNormProblem& a, const void* dy, const void* x, void* dx) {
  dispatch_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = kernels().response_norm.of<T>().backward;
    for_chunks<T>(a, x, [&](const ResponseNormRows<T>& rows, int64_t first) {
      kernel(rows, static_cast<const T*>(dy) + first, static_cast<T*>(dx) + first);
    });
  });
}

}  // namespace fastconv::cpu

// Sums over the rows of a matrix: the gradient of a bias.
#include "cuda/columns.h"
#include "device/conv2d.h"

namespace fastconv::cuda {
namespace {

template <class T, int WIDTH> struct SumBody {
  static constexpr int kWidth = WIDTH;
  using Value = Acc<T>;
  using Wide = double;
  struct Channels {};
  const T* dy;
  FC_HOST_DEVICE void prepare(int64_t, Channels&) const {}
  FC_HOST_DEVICE void start(Value& v) const { v = 0; }
  FC_HOST_DEVICE void row(int64_t at, Channels&, Value (&sums)[WIDTH]) const {
    Acc<T> g[WIDTH];
    load_channels<WIDTH>(dy, at, g);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) sums[j] += g[j];
  }
  FC_HOST_DEVICE static Wide widen(Value v) { return v; }
  FC_HOST_DEVICE static void merge(Wide& a, Wide b) { a += b; }
};

template <class T> struct StoreSum {
  T* db;
  FC_HOST_DEVICE void operator()(int64_t channel, double sum) const { db[channel] = T(sum); }
};

}  // namespace

void channel_sums(DType dtype, int64_t rows, int64_t channels, const void* dy, void* db) {
  dispatch_real(dtype, [&](auto t) {
    using T = decltype(t);
    with_width<T>(
        channels,
        [&](auto width) {
          reduce_columns(rows, channels, SumBody<T, decltype(width)::value>{static_cast<const T*>(dy)},
                         StoreSum<T>{static_cast<T*>(db)});
        },
        dy);
  });
}

}  // namespace fastconv::cuda

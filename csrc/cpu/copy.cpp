#include "device/copy.h"

#include "cpu/layout.h"

namespace fastconv::cpu {
void copy_view(const TensorView& src, const TensorView& dst) {
  if (src.numel() == 0) return;
  if (src.ndim > 4) {  // one slice of the first dimension after the other
    TensorView a = src, b = dst;
    a.ndim = b.ndim = src.ndim - 1;
    for (int i = 0; i < a.ndim; ++i) {
      a.sizes[i] = b.sizes[i] = src.sizes[i + 1];
      a.strides[i] = src.strides[i + 1];
      b.strides[i] = dst.strides[i + 1];
    }
    const int64_t item = itemsize(src.dtype);
    for (int64_t i = 0; i < src.sizes[0]; ++i) {
      a.data = static_cast<char*>(src.data) + i * src.strides[0] * item;
      b.data = static_cast<char*>(dst.data) + i * dst.strides[0] * item;
      copy_view(a, b);
    }
    return;
  }
  const auto four = [](const TensorView& v) {
    TensorView w = v;
    w.ndim = 4;
    const int missing = 4 - v.ndim;
    for (int i = 0; i < 4; ++i) {
      w.sizes[i] = i < missing ? 1 : v.sizes[i - missing];
      w.strides[i] = i < missing ? 0 : v.strides[i - missing];
    }
    return w;
  };
  copy_strided(four(src), four(dst));
}

}  // namespace fastconv::cpu

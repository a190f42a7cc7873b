// Checks that several problems share: a view has the dtype and the shape of its role.
#pragma once

#include "core/device.h"
#include "core/problem.h"

namespace fastconv {

inline std::string shape_string(const Shape& s) { return concat("(", s[0], ", ", s[1], ", ", s[2], ", ", s[3], ")"); }

inline void check_float(const char* role, DType t) {
  FC_CHECK_TYPE(computes_in(t), role, " must be ", floating_dtypes(), ", got ", name(t));
}

inline void check_dtype(const char* role, const TensorView& view, DType dtype) {
  FC_CHECK_TYPE(view.dtype == dtype, role, " must be ", name(dtype), ", got ", name(view.dtype));
}

inline void check_shape4(const char* role, const TensorView& view, const Shape& expected) {
  bool equal = view.ndim == 4;
  for (int i = 0; equal && i < 4; ++i) equal = view.sizes[i] == expected[i];
  FC_CHECK(equal, role, " must have shape ", shape_string(expected), ", got ", shape_string(view));
}

inline void check_vector(const char* role, const TensorView& view, DType dtype, int64_t length) {
  check_dtype(role, view, dtype);
  FC_CHECK(view.ndim == 1 && view.sizes[0] == length, role, " must have shape (", length, ",), got ",
           shape_string(view));
}

inline void check_same_shape(const char* role, const TensorView& view, const char* model_role,
                             const TensorView& model) {
  check_dtype(role, view, model.dtype);
  bool equal = view.ndim == model.ndim;
  for (int i = 0; equal && i < view.ndim; ++i) equal = view.sizes[i] == model.sizes[i];
  FC_CHECK(equal, role, " must have the shape of ", model_role, ": got ", shape_string(view), " and ",
           shape_string(model));
}

}  // namespace fastconv

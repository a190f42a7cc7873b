// The elementwise functions and their derivatives, of one number: for kernels and for the epilogues of convolutions.
// Definitions and the gradients at the kinks are PyTorch's (ATen/native/cpu/Activation.cpp). Conditions are written so
// that NaN goes to the branch that keeps it.
#pragma once

#include <cmath>

#include "core/elementwise.h"
#include "core/problem.h"
#include "cuda/scalar.h"

namespace fastconv::cuda {

// 1 / (1 + exp(-x)) and its derivative, without cancellation on either side.
template <class A> struct Logistic {
  A value, slope;
};
template <class A> FC_INLINE Logistic<A> logistic(A x) {
  const A e = exp(x > 0 ? -x : x), scale = 1 / (1 + e), small = e * scale;
  return {x > 0 ? scale : small, small * scale};
}

template <class A> FC_INLINE A clamped(A x, A low, A high) {
  const A above = x < low ? low : x;
  return above > high ? high : above;
}

// The normal distribution function. In double: rounding the argument of erfc in float would cost its square in units.
template <class A> FC_INLINE A normal_distribution(A x) {
  return static_cast<A>(0.5 * erfc(static_cast<double>(x) * -0.70710678118654752440));
}

constexpr double kGeluScale = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715;

template <class A> FC_INLINE A gelu_argument(A x) {
  return static_cast<A>(2 * kGeluScale) * (x + static_cast<A>(kGeluCubic) * x * x * x);
}

// parameter: of leaky_relu the slope, of elu alpha.
template <class A> FC_INLINE A activate(Elementwise function, A x, A parameter) {
  switch (function) {
    case Elementwise::kReLU: return x <= 0 ? A(0) : x;
    case Elementwise::kReLU6: return clamped(x, A(0), A(6));
    case Elementwise::kLeakyReLU: return x > 0 ? x : x * parameter;
    case Elementwise::kELU: return x > 0 ? x : parameter * static_cast<A>(expm1(x));
    case Elementwise::kSigmoid: return logistic(x).value;
    case Elementwise::kTanh: return tanh(x);
    case Elementwise::kSiLU: return x * logistic(x).value;
    case Elementwise::kGELU: return x * normal_distribution(x);
    case Elementwise::kGELUTanh: return x * logistic(gelu_argument(x)).value;
    case Elementwise::kHardsigmoid: return clamped(x + 3, A(0), A(6)) / 6;
    case Elementwise::kHardswish: return x * (clamped(x + 3, A(0), A(6)) / 6);
  }
  return x;
}

// dy times the derivative at x.
template <class A> FC_INLINE A activate_gradient(Elementwise function, A dy, A x, A parameter) {
  switch (function) {
    case Elementwise::kReLU: return x <= 0 ? A(0) : dy;
    case Elementwise::kReLU6: return x <= 0 || x >= 6 ? A(0) : dy;
    case Elementwise::kLeakyReLU: return x > 0 ? dy : dy * parameter;
    case Elementwise::kELU: return x > 0 ? dy : dy * parameter * exp(x);
    case Elementwise::kSigmoid: return dy * logistic(x).slope;
    case Elementwise::kTanh: return dy * (4 * logistic(x + x).slope);
    case Elementwise::kSiLU: {
      const Logistic<A> s = logistic(x);
      return dy * (s.value + x * s.slope);
    }
    case Elementwise::kGELU: {
      const A density = static_cast<A>(0.39894228040143267794) * exp(x * x * A(-0.5));
      return dy * (normal_distribution(x) + x * density);
    }
    case Elementwise::kGELUTanh: {
      const Logistic<A> s = logistic(gelu_argument(x));
      const A inner = static_cast<A>(2 * kGeluScale) * (1 + static_cast<A>(3 * kGeluCubic) * x * x);
      // Where the logistic function is flat the inner derivative may be infinite: 0 times it is 0.
      const A bend = s.slope == 0 ? A(0) : x * s.slope * inner;
      return dy * (s.value + bend);
    }
    case Elementwise::kHardsigmoid: return x <= -3 || x >= 3 ? A(0) : dy / 6;
    case Elementwise::kHardswish: return x <= -3 ? A(0) : x >= 3 ? dy : dy * (x / 3 + A(0.5));
  }
  return dy;
}

// Of the activations that convolution and batch norm fuse; not for kNone.
FC_INLINE Elementwise function_of(Activation activation) {
  switch (activation) {
    case Activation::kReLU6: return Elementwise::kReLU6;
    case Activation::kSiLU: return Elementwise::kSiLU;
    case Activation::kSigmoid: return Elementwise::kSigmoid;
    case Activation::kTanh: return Elementwise::kTanh;
    case Activation::kHardswish: return Elementwise::kHardswish;
    default: return Elementwise::kReLU;
  }
}

template <class A> FC_INLINE A activate(Activation activation, A x) {
  return activation == Activation::kNone ? x : activate(function_of(activation), x, A(0));
}

template <class A> FC_INLINE A activate_gradient(Activation activation, A dy, A x) {
  return activation == Activation::kNone ? dy : activate_gradient(function_of(activation), dy, x, A(0));
}

}  // namespace fastconv::cuda

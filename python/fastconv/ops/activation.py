"""Elementwise operations: activations with their gradients, and sums.

Arrays of any shape, float32 or float64. A dense array, in whatever order of dimensions, is answered
in the same order of memory; anything else is copied first. Each <name>_backward(dy, x, ...) returns
dy times the derivative at x, shaped and laid out like x; the derivatives at the kinks are
PyTorch's. NaN stays NaN.

All raise TypeError for other dtypes and ValueError for shapes that differ; the message has the
values.
"""

from __future__ import annotations

from ._arrays import Array, kernels, like, operand
from ._inplace import writable


def _forward(name: str, x: Array, parameter: float = 0.0) -> Array:
    return like(kernels.elementwise(name, operand(x, "input"), float(parameter)), x)


def _backward(name: str, dy: Array, x: Array, parameter: float = 0.0) -> Array:
    dx = kernels.elementwise_backward(
        name, operand(dy, "dy"), operand(x, "input"), float(parameter)
    )
    return like(dx, dy)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return _forward("relu", x)


def relu_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`relu`. x may also be the output: its sign is the same."""
    return _backward("relu", dy, x)


def relu6(x: Array) -> Array:
    """min(max(x, 0), 6)."""
    return _forward("relu6", x)


def relu6_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`relu6`. x may also be the output: it lies on the same side of 0 and 6."""
    return _backward("relu6", dy, x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return _forward("sigmoid", x)


def sigmoid_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`sigmoid`."""
    return _backward("sigmoid", dy, x)


def tanh(x: Array) -> Array:
    """Hyperbolic tangent."""
    return _forward("tanh", x)


def tanh_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`tanh`."""
    return _backward("tanh", dy, x)


def silu(x: Array) -> Array:
    """x * sigmoid(x) (Elfwing et al., arXiv 1702.03118)."""
    return _forward("silu", x)


def silu_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`silu`."""
    return _backward("silu", dy, x)


def hardsigmoid(x: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    return _forward("hardsigmoid", x)


def hardsigmoid_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`hardsigmoid`."""
    return _backward("hardsigmoid", dy, x)


def hardswish(x: Array) -> Array:
    """x * hardsigmoid(x) (Howard et al., arXiv 1905.02244, section 5.2)."""
    return _forward("hardswish", x)


def hardswish_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`hardswish`."""
    return _backward("hardswish", dy, x)


def leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    """x where positive, else negative_slope * x."""
    return _forward("leaky_relu", x, negative_slope)


def leaky_relu_backward(dy: Array, x: Array, negative_slope: float = 0.01) -> Array:
    """dx of :func:`leaky_relu`."""
    return _backward("leaky_relu", dy, x, negative_slope)


def elu(x: Array, alpha: float = 1.0) -> Array:
    """x where positive, else alpha * (exp(x) - 1) (Clevert et al., arXiv 1511.07289)."""
    return _forward("elu", x, alpha)


def elu_backward(dy: Array, x: Array, alpha: float = 1.0) -> Array:
    """dx of :func:`elu`."""
    return _backward("elu", dy, x, alpha)


def _gelu_name(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def gelu(x: Array, approximate: str = "none") -> Array:
    """x times the normal distribution function (1 + erf(x / sqrt 2)) / 2.

    Hendrycks and Gimpel, arXiv 1606.08415.
    approximate="tanh": 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    """
    return _forward(_gelu_name(approximate), x)


def gelu_backward(dy: Array, x: Array, approximate: str = "none") -> Array:
    """dx of :func:`gelu`."""
    return _backward(_gelu_name(approximate), dy, x)


def add(a: Array, b: Array) -> Array:
    """a + b, same shape and dtype, laid out like a. There is no broadcasting."""
    return like(kernels.add(operand(a, "a"), operand(b, "b")), a)


def add_to(a: Array, b: Array) -> None:
    """a += b, same shape and dtype, in place. ValueError also unless a is dense and writable."""
    kernels.add_to(writable(a, "a"), operand(b, "b"))

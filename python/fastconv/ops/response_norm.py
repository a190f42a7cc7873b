"""Local response normalisation and its gradient (Krizhevsky, Sutskever, Hinton 2012, section 3.3).

Shapes: x (N, C, H, W). Dtype float32 or float64. Any strides; channels-last memory is the native
layout and is answered in channels-last, dense NCHW in NCHW.

Both raise ValueError for shapes that do not fit and a size below 1 (the message has the values) and
TypeError for wrong dtypes and a size that is no integer.
"""

from __future__ import annotations

from ._arrays import Array, integer, kernels, like, operand


def local_response_norm(
    x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """x / (k + alpha / size * sum of x^2)^beta, as torch.nn.functional.local_response_norm.

    The sum for channel c runs over the channels c - size // 2 to c + (size - 1) // 2 of the same
    pixel, as far as they exist. The paper's alpha is not divided by the size.
    """
    settings = (integer(size, "size"), float(alpha), float(beta), float(k))
    return like(kernels.local_response_norm(operand(x, "input"), *settings), x)


def local_response_norm_backward(
    dy: Array, x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """dx of :func:`local_response_norm`, laid out like x; the sums are computed again from x."""
    settings = (integer(size, "size"), float(alpha), float(beta), float(k))
    dx = kernels.local_response_norm_backward(operand(dy, "dy"), operand(x, "input"), *settings)
    return like(dx, dy)

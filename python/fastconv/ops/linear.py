"""The dense layer y = x w^T + b and its gradients.

Shapes: x (..., in), w (out, in), b (out,), y (..., out).
float32 or float64, any strides; results are row-major. Raises ValueError for shapes that do not fit
(the message has the values) and TypeError for wrong dtypes.
"""

from __future__ import annotations

from typing import Any

from ._arrays import Array, kernels, like, operand


def linear(x: Array, w: Array, bias: Array | None = None) -> Array:
    """x w^T + bias, as torch.nn.functional.linear."""
    y = kernels.linear(
        operand(x, "input"),
        operand(w, "weight"),
        None if bias is None else operand(bias, "bias"),
    )
    return like(y, x)


def linear_backward(
    dy: Array, x: Array, w: Array, *, needs: Any = (True, True, True)
) -> tuple[Array, Array, Array]:
    """(dx, dw, db) = (dy w, dy^T x, dy summed over all but its last axis); None: not needed."""
    flags = [bool(flag) for flag in needs]
    if len(flags) != 3:
        raise ValueError(f"needs must have 3 flags, got {needs!r}")
    gradients = kernels.linear_backward(
        operand(dy, "dy"), operand(x, "input"), operand(w, "weight"), flags
    )
    dx, dw, db = (None if g is None else like(g, dy) for g in gradients)
    return dx, dw, db

"""The dense layer y = x w^T + b and its gradients.

Shapes: x (..., in), w (out, in), b (out,), y (..., out).

float32 or float64, any strides; results are row-major. Raises ValueError for shapes that do not fit
(the message has the values) and TypeError for wrong dtypes.
"""

from __future__ import annotations

from typing import Any

from .. import _C
from ._arrays import Array, like, to_numpy


def linear(x: Array, w: Array, bias: Array | None = None) -> Array:
    """x w^T + bias, as torch.nn.functional.linear."""
    y = _C.linear(
        to_numpy(x, "input"),
        to_numpy(w, "weight"),
        None if bias is None else to_numpy(bias, "bias"),
    )
    return like(y, x)


def linear_backward(
    dy: Array, x: Array, w: Array, *, needs: Any = (True, True, True)
) -> tuple[Array | None, Array | None, Array | None]:
    """(dx, dw, db) of :func:`linear`; None where `needs` says so.

    dx = dy w, dw = dy^T x, db = the sum of dy over all but its last dimension.
    """
    flags = [bool(flag) for flag in needs]
    if len(flags) != 3:
        raise ValueError(f"needs must have 3 flags, got {needs!r}")
    gradients = _C.linear_backward(
        to_numpy(dy, "dy"), to_numpy(x, "input"), to_numpy(w, "weight"), flags
    )
    dx, dw, db = (None if g is None else like(g, dy) for g in gradients)
    return dx, dw, db

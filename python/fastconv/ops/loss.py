"""Softmax, its logarithm, cross entropy, and their gradients.

float32 or float64. Raises ValueError for shapes, options and targets that do not fit (the message
has the values) and TypeError for wrong dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import cuda
from ._arrays import Array, integer, kernels, like, operand


def _along(kernel: Any, arrays: tuple[np.ndarray, ...], dim: int, logarithm: bool) -> np.ndarray:
    """A number is a vector of one element."""
    axis = integer(dim, "dim")
    if arrays[0].ndim == 0:
        return kernel(*(a.reshape(1) for a in arrays), axis, logarithm).reshape(())
    return kernel(*arrays, axis, logarithm)


def softmax(x: Array, dim: int = -1) -> Array:
    """exp(x) scaled to sum 1 along `dim`. Any shape; a dense array's order of memory is kept."""
    return like(_along(kernels.softmax, (operand(x, "input"),), dim, False), x)


def softmax_backward(dy: Array, y: Array, dim: int = -1) -> Array:
    """dx = y (dy - sum of dy y along dim), from the output y of :func:`softmax`."""
    arrays = operand(dy, "dy"), operand(y, "y")
    return like(_along(kernels.softmax_backward, arrays, dim, False), dy)


def log_softmax(x: Array, dim: int = -1) -> Array:
    """Logarithm of :func:`softmax`: x - max - log(sum of exp(x - max)) along `dim`."""
    return like(_along(kernels.softmax, (operand(x, "input"),), dim, True), x)


def log_softmax_backward(dy: Array, y: Array, dim: int = -1) -> Array:
    """dx = dy - exp(y) (sum of dy along dim), from the output y of :func:`log_softmax`."""
    arrays = operand(dy, "dy"), operand(y, "y")
    return like(_along(kernels.softmax_backward, arrays, dim, True), dy)


def _targets(target: Array) -> Any:
    classes = operand(target, "target")
    if classes.dtype.kind not in "iu":
        raise TypeError(f"target must hold integers, got dtype {classes.dtype}")
    if cuda.is_device_array(classes):
        return cuda.cast(classes, np.int64)
    if classes.dtype == np.uint64 and classes.size and classes.max() >= 2**63:
        raise ValueError(f"target is out of range: {classes.max()}")
    return classes.astype(np.int64, copy=False)


def cross_entropy(
    logits: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """-log softmax(logits)[target], as torch.nn.functional.cross_entropy for class numbers.

    With weights w and label smoothing s over C classes (Szegedy et al., arXiv 1512.00567, section
    7), row i has -(1 - s) w[t] log p[t] - s / C (sum over c of w[c] log p[c]), and 0 where t is
    ignore_index. "mean" divides the sum by that of w[t] over the rows that are not ignored (NaN if
    there is none). Sums are taken in double, in order.

    Args:
        logits: (N, C). target: (N,) integers in [0, C), or ignore_index. weight: (C,).
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, of shape (), or (N,) with "none".
    """
    loss = kernels.cross_entropy(
        operand(logits, "logits"),
        _targets(target),
        None if weight is None else operand(weight, "weight"),
        integer(ignore_index, "ignore_index"),
        reduction,
        float(label_smoothing),
    )
    return like(loss, logits)


def cross_entropy_backward(
    dloss: Any,
    logits: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """dlogits of :func:`cross_entropy`. dloss: a number, or (N,) with reduction "none"."""
    array = operand(logits, "logits")
    if isinstance(dloss, (int, float, np.generic)):
        gradient = cuda.scalar_like(dloss, array)
    else:
        gradient = operand(dloss, "dloss")
    dlogits = kernels.cross_entropy_backward(
        gradient,
        array,
        _targets(target),
        None if weight is None else operand(weight, "weight"),
        integer(ignore_index, "ignore_index"),
        reduction,
        float(label_smoothing),
    )
    return like(dlogits, logits)

"""Operations on whole channels: joining arrays, splitting their gradient, gating.

Any strides; channels-last memory is the native layout and is answered in channels-last, dense NCHW
in NCHW. All raise ValueError for shapes that do not fit (the message has them) and TypeError for
wrong dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._arrays import Array, integer, kernels, like, operand


def cat(arrays: Sequence[Array], dim: int = 1) -> Array:
    """The arrays one after another along `dim` (the channels by default), as torch.cat.

    arrays: one or more of the same dtype (float32, float64, int64 or uint8) and, but for `dim`, the
    same shape, of any rank. The result has the layout of the largest, and the kind of the first.
    """
    if not arrays:
        raise ValueError("cat needs at least one array, got none")
    joined = kernels.cat([operand(a, "input") for a in arrays], integer(dim, "dim"))
    return like(joined, arrays[0])


def cat_backward(dy: Array, sizes: Sequence[int], dim: int = 1) -> tuple[Array, ...]:
    """dy split along `dim` into new arrays of these sizes, the inverse of :func:`cat`.

    Raises ValueError unless the sizes add up to the size of dy.
    """
    numbers = [integer(size, "sizes") for size in sizes]
    parts = kernels.cat_backward(operand(dy, "dy"), numbers, integer(dim, "dim"))
    return tuple(like(part, dy) for part in parts)


def channel_gate(x: Array, gate: Array, bias: Array | None = None) -> Array:
    """x * gate + bias: x (N, C, H, W), gate and bias (N, C, 1, 1), float32 or float64.

    Laid out like x. The scaling step of squeeze and excitation (Hu et al., arXiv 1709.01507,
    equation 4), and with a bias its gradient: through the gate, and through the mean.
    """
    addend = None if bias is None else operand(bias, "bias")
    return like(kernels.channel_gate(operand(x, "input"), operand(gate, "gate"), addend), x)


def channel_gate_backward(
    dy: Array, x: Array, gate: Array, *, needs: Any = (True, True)
) -> tuple[Array | None, Array | None]:
    """(dx, dgate) of :func:`channel_gate` in one pass; None where `needs` says so.

    dgate is the sum of dy * x over each channel's plane.
    """
    flags = [bool(flag) for flag in needs]
    if len(flags) != 2:
        raise ValueError(f"needs must have 2 flags, got {needs!r}")
    dx, dgate = kernels.channel_gate_backward(
        operand(dy, "dy"), operand(x, "input"), operand(gate, "gate"), flags
    )
    return None if dx is None else like(dx, dy), None if dgate is None else like(dgate, dy)

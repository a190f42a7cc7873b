"""Dropout of elements (Srivastava et al., JMLR 15, 2014) and of whole rows (stochastic depth: Huang
et al., arXiv 1603.09382), with a mask that is computed, not stored.

Element i, counted in logical row-major order whatever the layout, is dropped if word offset + i of
the sequence `seed` falls below p. The words come from the counter-based generator Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so the backward draws the
same mask again and the bits do not depend on threads, ISA or layout.
"""

from __future__ import annotations

import operator
from typing import Any

from ._arrays import Array, kernels, like, operand


def _word(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64), got {number}")
    return number


def check_probability(name: str, p: Any) -> float:
    """p as a float; ValueError unless it is in [0, 1]."""
    probability = float(p)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name} probability must be in [0, 1], got {p}")
    return probability


def check_mode(mode: str) -> None:
    """ValueError unless `mode` is one of stochastic_depth."""
    if mode not in ("row", "batch"):
        raise ValueError(f"mode must be 'row' or 'batch', got {mode!r}")


def dropout(
    x: Array, p: float = 0.5, training: bool = True, *, seed: int, offset: int = 0
) -> Array:
    """Each element 0 with probability p, else x / (1 - p); a copy of x unless training.

    x: any shape, float32 or float64; the result has its layout. Two calls with the same seed are
    independent if the second has offset >= the first's offset + x.size.

    Raises ValueError unless 0 <= p <= 1, and unless seed and offset are in [0, 2**64).
    """
    probability = check_probability("dropout", p)
    y = kernels.dropout(
        operand(x, "input"),
        probability if training else 0.0,
        _word(seed, "seed"),
        _word(offset, "offset"),
    )
    return like(y, x)


def dropout_backward(dy: Array, p: float, *, seed: int, offset: int = 0) -> Array:
    """dx of :func:`dropout` in training, from the same p, seed and offset; laid out like dy."""
    return dropout(dy, p, seed=seed, offset=offset)


def stochastic_depth(
    x: Array, p: float, mode: str, training: bool = True, *, seed: int, offset: int = 0
) -> Array:
    """As torchvision.ops.stochastic_depth: with probability p a row is 0, else x / (1 - p).

    mode: "row" draws for each x[i], by word offset + i; "batch" once for all of x, by word offset.
    Unless training, a copy of x. x: any shape, float32 or float64.

    Raises ValueError unless 0 <= p <= 1, for another mode, and unless seed and offset are in
    [0, 2**64).
    """
    check_mode(mode)
    probability = check_probability("drop", p)
    y = kernels.stochastic_depth(
        operand(x, "input"),
        probability if training else 0.0,
        mode == "row",
        _word(seed, "seed"),
        _word(offset, "offset"),
    )
    return like(y, x)


def stochastic_depth_backward(
    dy: Array, p: float, mode: str, *, seed: int, offset: int = 0
) -> Array:
    """dx of :func:`stochastic_depth` in training, from the same settings; laid out like dy."""
    return stochastic_depth(dy, p, mode, seed=seed, offset=offset)

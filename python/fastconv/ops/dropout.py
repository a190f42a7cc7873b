"""Dropout (Srivastava et al., JMLR 15, 2014) with a mask that is computed, not stored.

Element i, counted in logical row-major order whatever the layout, is dropped if word offset + i of
the sequence `seed` falls below p. The words come from the counter-based generator Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so the backward draws the
same mask again and the bits do not depend on threads, ISA or layout.
"""

from __future__ import annotations

import operator
from typing import Any

from .. import _C
from ._arrays import Array, like, to_numpy


def _word(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64), got {number}")
    return number


def dropout(
    x: Array, p: float = 0.5, training: bool = True, *, seed: int, offset: int = 0
) -> Array:
    """Each element 0 with probability p, else x / (1 - p); a copy of x unless training.

    x: any shape, float32 or float64; the result has its layout. Two calls with the same seed are
    independent if the second has offset >= the first's offset + x.size.

    Raises ValueError unless 0 <= p <= 1, and unless seed and offset are in [0, 2**64).
    """
    probability = float(p)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    y = _C.dropout(
        to_numpy(x, "input"),
        probability if training else 0.0,
        _word(seed, "seed"),
        _word(offset, "offset"),
    )
    return like(y, x)


def dropout_backward(dy: Array, p: float, *, seed: int, offset: int = 0) -> Array:
    """dx of :func:`dropout` in training, from the same p, seed and offset; laid out like dy."""
    return dropout(dy, p, seed=seed, offset=offset)

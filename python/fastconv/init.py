"""The library's random numbers: dropout masks and initial weights from one seed and one offset.

Every draw of n numbers takes the n positions at the offset and moves the offset by n, so the pair
(seed, offset) is the whole state: save it, set it again, and the same numbers follow. Positions
become random bits with a counter-based generator (Philox: Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from fastconv.tensor import Array

RngState = tuple[int, int]


class Share(NamedTuple):
    """The rows start to stop of a batch that has `total` rows, all processes together."""

    start: int
    stop: int
    total: int


class Generator:
    """A seed and an offset; safe to use from several threads."""

    def __init__(self, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._share: Share | None = None
        self.set_state((seed, 0))

    def state(self) -> RngState:
        """(seed, offset)."""
        with self._lock:
            return self._seed, self._offset

    def set_state(self, state: RngState) -> None:
        """ValueError unless both numbers are in [0, 2**64)."""
        seed, offset = (int(n) for n in state)
        if not (0 <= seed < 2**64 and 0 <= offset < 2**64):
            raise ValueError(f"seed and offset must be in [0, 2**64), got {seed} and {offset}")
        with self._lock:
            self._seed, self._offset = seed, offset

    def reserve(self, count: int) -> RngState:
        """(seed, offset) of `count` positions that nobody else will get."""
        with self._lock:
            start = self._offset
            self._offset = (start + count) % 2**64
            return self._seed, start

    def reserve_rows(self, shape: tuple[int, ...]) -> RngState:
        """(seed, offset) of a number for each element of an array whose first dimension is the
        batch.

        Inside `batch_share` the positions are those that these rows have in the whole batch. An
        array whose first dimension is not the share's gets the same numbers in every process.
        """
        count = math.prod(shape)
        share = self._share
        if share is None or not shape or shape[0] != share.stop - share.start:
            return self.reserve(count)
        of_row = math.prod(shape[1:])
        seed, offset = self.reserve(share.total * of_row)
        return seed, (offset + share.start * of_row) % 2**64

    @contextmanager
    def batch_share(self, share: Share) -> Iterator[None]:
        """Inside it `reserve_rows` knows that this process has only these rows of the batch."""
        outer, self._share = self._share, share
        try:
            yield
        finally:
            self._share = outer


default_generator = Generator()


def manual_seed(seed: int) -> None:
    """Starts the library's random numbers again from `seed` in [0, 2**64); it is 0 at import."""
    default_generator.set_state((seed, 0))


def get_rng_state() -> RngState:
    """The whole state of the library's random numbers: (seed, offset)."""
    return default_generator.state()


def set_rng_state(state: RngState) -> None:
    """Continues from a state that `get_rng_state` returned."""
    default_generator.set_state(state)


def _numpy_generator(count: int) -> np.random.Generator:
    seed, offset = default_generator.reserve(count)
    # The second half of the key keeps these numbers apart from the dropout masks of the same seed.
    return np.random.Generator(np.random.Philox(key=seed + (1 << 64), counter=offset))


def uniform(shape: tuple[int, ...], bound: float) -> Array:
    """float32 numbers, uniform in [-bound, bound]."""
    return _numpy_generator(math.prod(shape)).uniform(-bound, bound, shape).astype(np.float32)


def normal(shape: tuple[int, ...], std: float) -> Array:
    """float32 numbers, normal with mean 0."""
    return _numpy_generator(math.prod(shape)).normal(0.0, std, shape).astype(np.float32)


def fan_in_and_out(shape: tuple[int, ...]) -> tuple[int, int]:
    """Connections into and out of one unit of a weight [out, in, *kernel], as PyTorch counts."""
    if len(shape) < 2:
        raise ValueError(f"fan in and out need a weight of 2 or more dimensions, got shape {shape}")
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def kaiming_uniform(shape: tuple[int, ...], a: float = 0.0) -> Array:
    """Uniform with variance 2 / ((1 + a^2) fan_in): He et al. 2015, "Delving deep into rectifiers",
    section 2.2.

    With a = sqrt(5), PyTorch's default for convolutions and linear layers, the bound is 1 /
    sqrt(fan_in).
    """
    fan_in, _ = fan_in_and_out(shape)
    return uniform(shape, math.sqrt(6.0 / ((1.0 + a * a) * fan_in)) if fan_in else 0.0)


def kaiming_normal_fan_in(shape: tuple[int, ...]) -> Array:
    """Normal with variance 2 / fan_in: He et al. 2015, section 2.2, forward case."""
    fan_in, _ = fan_in_and_out(shape)
    return normal(shape, math.sqrt(2.0 / fan_in))


def kaiming_normal_fan_out(shape: tuple[int, ...]) -> Array:
    """Normal with variance 2 / fan_out: He et al. 2015, section 2.2, backward case."""
    _, fan_out = fan_in_and_out(shape)
    return normal(shape, math.sqrt(2.0 / fan_out))

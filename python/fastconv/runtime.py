"""Threads, precision, instruction sets, memory."""

from __future__ import annotations

from . import _C, cuda
from .ops._arrays import integer


def set_num_threads(threads: int) -> None:
    """Use this many threads from now on, in the whole process; results keep their bits.

    Raises ValueError unless 1 <= threads <= 1024.
    """
    _C.set_num_threads(integer(threads, "threads"))


def get_num_threads() -> int:
    """The threads in use: as set, else OpenMP's (OMP_NUM_THREADS, affinity); 1 after fork."""
    return _C.get_num_threads()


def set_precision(precision: str) -> None:
    """How much error float32 convolutions may have, in the whole process.

    "default": algorithms whose error is of the size of a plain sum's, among them Winograd F(4x4,
    3x3). Against exact arithmetic a 3x3 convolution then has a relative L2 error of at most
    2 u (sqrt K + 4), u = 2^-24, K products in a sum: about twice that of a plain sum. A NaN or an
    infinity reaches the outputs of its whole tile, up to three pixels beyond its windows.
    "strict": plain sums only, u (1 + sqrt K); integers with exact sums give exact results.

    Raises ValueError for any other name.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS}, got {precision!r}")
    _C.set_strict_precision(precision == "strict")
    if cuda.is_available():
        cuda.kernels().set_strict_precision(precision == "strict")


def get_precision() -> str:
    """The precision in use: "default" or "strict"."""
    return "strict" if _C.strict_precision() else "default"


_PRECISIONS = ("default", "strict")


def isa() -> str:
    """The kernels' instruction set, "avx512", "avx2" or "portable"; FASTCONV_ISA overrides it."""
    return _C.isa()


def available_isas() -> list[str]:
    """What this machine can run, best first."""
    return _C.available_isas()


def memory_stats() -> dict[str, int]:
    """Of the caching allocator: bytes_in_use, bytes_cached, peak_bytes_in_use, allocations,
    cache_hits, limit (0: none)."""
    return _C.memory_stats()


def reset_peak_memory_stats() -> None:
    """Let peak_bytes_in_use start from what is in use now."""
    _C.reset_peak_memory_stats()


def set_memory_limit(limit: int | None) -> None:
    """Cap arrays and workspaces at this many bytes: beyond it MemoryError. None: no cap."""
    limit = 0 if limit is None else integer(limit, "limit")
    if limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    _C.set_memory_limit(limit)


def empty_cache() -> None:
    """Give cached memory back to the system."""
    _C.empty_cache()

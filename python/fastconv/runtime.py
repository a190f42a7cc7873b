"""Threads, instruction sets, memory."""

from __future__ import annotations

from . import _C
from .ops._arrays import integer


def set_num_threads(threads: int) -> None:
    """Use this many threads from now on, in the whole process; results keep their bits.

    Raises ValueError unless 1 <= threads <= 1024.
    """
    _C.set_num_threads(integer(threads, "threads"))


def get_num_threads() -> int:
    """The threads in use: as set, else OpenMP's (OMP_NUM_THREADS, affinity); 1 after fork."""
    return _C.get_num_threads()


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

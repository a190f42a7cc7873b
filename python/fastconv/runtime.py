"""Threads, instruction sets, memory."""

from __future__ import annotations

from . import _C
from .ops._arrays import integer


def set_num_threads(threads: int) -> None:
    """Use this many threads from now on, in the whole process. Results have the same bits for every number.

    Raises ValueError unless 1 <= threads <= 1024.
    """
    _C.set_num_threads(integer(threads, "threads"))


def get_num_threads() -> int:
    """The threads in use: as set, else what OpenMP gives (OMP_NUM_THREADS, CPU affinity); 1 in a forked child."""
    return _C.get_num_threads()


def isa() -> str:
    """The instruction set that the kernels use: "avx512", "avx2" or "portable"; FASTCONV_ISA overrides the choice."""
    return _C.isa()


def available_isas() -> list[str]:
    """What this machine can run, best first."""
    return _C.available_isas()


def memory_stats() -> dict[str, int]:
    """The caching allocator: bytes_in_use, bytes_cached, peak_bytes_in_use, allocations, cache_hits, limit (0: none)."""
    return _C.memory_stats()


def reset_peak_memory_stats() -> None:
    """Let peak_bytes_in_use start from what is in use now."""
    _C.reset_peak_memory_stats()


def set_memory_limit(limit: int | None) -> None:
    """Cap the memory of arrays and workspaces, in bytes; a call that needs more raises MemoryError. None: no cap."""
    limit = 0 if limit is None else integer(limit, "limit")
    if limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    _C.set_memory_limit(limit)


def empty_cache() -> None:
    """Give cached memory back to the system."""
    _C.empty_cache()

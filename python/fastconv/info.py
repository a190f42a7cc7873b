"""What runs here: version, instruction sets, threads, OpenMP runtimes, GPU, memory."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, cuda, runtime, tuning


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def openmp_runtimes() -> list[str]:
    """Paths of this process's OpenMP runtimes; with more than one, threads may oversubscribe."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    names = ("libgomp", "libiomp", "libomp")
    paths = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    return sorted(p for p in paths if os.path.basename(p).startswith(names))


def _gpu() -> str:
    try:
        device = cuda.device_info()
    except RuntimeError as error:
        return f"none: {str(error).removeprefix('no CUDA device: ')}"
    return (
        f"{device['name']}, compute capability {'.'.join(map(str, device['compute_capability']))}"
    )


def collect() -> dict[str, Any]:
    """Everything `fastconv info` shows, as plain values."""
    return {
        "fastconv": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "isa": runtime.isa(),
        "isas_available": runtime.available_isas(),
        "threads": runtime.get_num_threads(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "openmp_runtimes": openmp_runtimes(),
        "tuning": tuning.loaded_tuning() or "none",
        "gpu": _gpu(),
        "allocator": runtime.memory_stats(),
        "executable": sys.executable,
    }


def report() -> str:
    """The same as text, a line an entry."""
    lines = []
    for key, value in collect().items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        lines.append(f"{key:<16} {value}")
    return "\n".join(lines)

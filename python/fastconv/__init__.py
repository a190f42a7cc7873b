"""fastconv: convolutional networks on handwritten kernels, with numpy as the only dependency.

Every operation and its backward is a function here (``fastconv.conv2d``,
``fastconv.conv2d_backward``, ...), taking numpy arrays, torch tensors or anything with DLPack.
``fastconv.nn``, ``optim``, ``data``, ``models`` and ``train`` build on them.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from . import _C, ops
from .ops import *  # noqa: F403
from .runtime import (
    available_isas,
    empty_cache,
    get_num_threads,
    get_precision,
    isa,
    memory_stats,
    reset_peak_memory_stats,
    set_memory_limit,
    set_num_threads,
    set_precision,
)

__version__ = "0.1.0"

# Loaded when first used, so that embedding the kernels costs only the kernels.
_MODULES = (
    "augment",
    "checkpoint",
    "cli",
    "cuda",
    "data",
    "distributed",
    "freezing",
    "functional",
    "info",
    "models",
    "nn",
    "optim",
    "show",
    "summary",
    "tensor",
    "train",
    "tuning",
    "weights",
)
_NAMES = {
    "Frozen": "freezing",
    "Tensor": "tensor",
    "freeze": "freezing",
    "no_grad": "tensor",
    "load_tuning": "tuning",
    "loaded_tuning": "tuning",
    "manual_seed": "nn",
    "read_weights": "weights",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})


__all__ = [
    *ops.__all__,
    *_MODULES,
    *_NAMES,
    "__version__",
    "_C",
    "available_isas",
    "empty_cache",
    "get_num_threads",
    "get_precision",
    "isa",
    "memory_stats",
    "ops",
    "reset_peak_memory_stats",
    "set_memory_limit",
    "set_num_threads",
    "set_precision",
]

if os.environ.get("FASTCONV_TUNING"):
    from .tuning import load_tuning

    load_tuning(os.environ["FASTCONV_TUNING"])

"""Arrays that an operation writes into: running statistics, parameters, optimiser state."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import cuda
from ._arrays import Array, operand


def writable(x: Array, name: str) -> Any:
    """The view of `x` through which it can be written. ValueError where that cannot be:
    read-only memory, or bytes (unaligned, foreign byte order) that kernels would have to copy."""
    if type(x) is np.ndarray and x.dtype.isbuiltin == 1 and x.flags.behaved:
        return x  # the usual case
    array = operand(x, name)
    if cuda.is_device_array(array):
        return array
    if isinstance(x, np.ndarray) and array is not x:
        raise ValueError(f"{name} must be aligned and in native byte order to be updated in place")
    # torch's tensors can always be written; its older versions export them with a flag that numpy
    # takes for read-only.
    if not array.flags.writeable and type(x).__module__.partition(".")[0] != "torch":
        raise ValueError(f"{name} is read-only and cannot be updated in place")
    return array

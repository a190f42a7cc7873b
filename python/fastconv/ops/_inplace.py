"""Arrays that an operation writes into: running statistics, parameters, optimiser state."""

from __future__ import annotations

import numpy as np

from ._arrays import Array, to_numpy


def writable(x: Array, name: str) -> np.ndarray:
    """The numpy view of `x` through which it can be written.

    ValueError where that cannot be: read-only memory, or bytes (unaligned, foreign byte order) that
    the kernels would have to copy.
    """
    array = to_numpy(x, name)
    if isinstance(x, np.ndarray) and array is not x:
        raise ValueError(f"{name} must be aligned and in native byte order to be updated in place")
    # torch's tensors can always be written; its older versions export them with a flag that numpy
    # takes for read-only.
    if not array.flags.writeable and type(x).__module__.partition(".")[0] != "torch":
        raise ValueError(f"{name} is read-only and cannot be updated in place")
    return array

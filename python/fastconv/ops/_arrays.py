"""Arrays in and out: numpy, torch, CuPy, and everything that speaks DLPack.

The kernels see numpy arrays, or arrays of a CUDA device. A function converts its arguments with
:func:`operand` (sharing memory), calls the device's kernels through :data:`kernels`, and hands its
results back with :func:`like`, in the kind of its first argument, again sharing memory.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _C, cuda

Array = Any  # numpy.ndarray, torch.Tensor, fastconv.cuda.Array, or any object with __dlpack__

# numpy has no bfloat16: its bits under a name that the CPU's kernels know.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])


def _on_device(x: Any) -> bool | None:
    """Whether `x` is, or holds, an array of a CUDA device; None where it is no array."""
    if isinstance(x, (list, tuple)):
        return next((found for found in map(_on_device, x) if found is not None), None)
    if isinstance(x, np.ndarray):
        return False
    return True if cuda.is_device_array(x) else None


_CUDA = (2, 13)  # DLPack's device types: memory of a GPU, and managed memory


class _Kernels:
    """The functions of the compiled modules: of the one for the device that the operands lie on.

    Those of the CPU themselves in a build without CUDA.
    """

    def __getattr__(self, name: str) -> Any:
        on_cpu = getattr(_C, name)

        def call(*operands: Any) -> Any:
            if not cuda.in_use():
                return on_cpu(*operands)
            places = {place for place in map(_on_device, operands) if place is not None}
            if places == {True}:
                return getattr(cuda.kernels(), name)(*operands)
            if len(places) == 2:
                raise TypeError(f"{name}: some arrays are on the CPU and some on a CUDA device")
            return on_cpu(*operands)

        function = call if cuda.is_built() else on_cpu
        setattr(self, name, function)
        return function


kernels = _Kernels()


def operand(x: Array, name: str) -> Any:
    """An array that shares memory with `x` if its bytes are fit for the kernels, else a copy.

    A numpy array, or one of a CUDA device for an operand that lies there. TypeError for anything
    else, and for bfloat16 on the CPU; RuntimeError for an operand on a CUDA device that this
    library cannot use.
    """
    if type(x) is np.ndarray and x.dtype.isbuiltin == 1 and x.flags.aligned:
        return x
    array = to_stored(x, name)
    if isinstance(array, np.ndarray) and array.dtype == BFLOAT16:
        raise TypeError(
            f"{name} is bfloat16, which is supported by the forward pass of conv2d alone "
            "(3x3, 5x5, 7x7, 1x7 and 7x1 kernels at stride 1): use float32"
        )
    return array


def to_stored(x: Array, name: str) -> Any:
    """As :func:`operand`; bfloat16, of torch or of the package ml_dtypes, becomes BFLOAT16."""
    if type(x) is np.ndarray and x.dtype.isbuiltin == 1 and x.flags.aligned:
        return x  # the usual case
    if cuda.is_device_array(x):
        return x
    if not isinstance(x, np.ndarray):
        x = _from_dlpack(x, name)
        if cuda.is_device_array(x):
            return x
    if x.dtype.isbuiltin != 1 and x.dtype.name == "bfloat16":  # numpy makes up a name in Python
        x = x.view(BFLOAT16)
    if x.dtype.isnative and x.flags.aligned:
        return x
    if x.dtype.kind not in "fiu" and x.dtype != BFLOAT16:
        raise TypeError(f"{name} must hold numbers, got dtype {x.dtype}")
    return x.astype(x.dtype.newbyteorder("="), order="K", copy=True)


def _from_dlpack(x: Array, name: str) -> Any:
    if hasattr(x, "__cuda_array_interface__") and not hasattr(x, "__dlpack__"):
        return cuda.from_foreign(x, name)
    if isinstance(x, np.generic) or not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name} must be a numpy array, a torch tensor or another DLPack exporter, "
            f"got {type(x).__name__}"
        )
    if getattr(x, "requires_grad", False) and type(x).__module__.partition(".")[0] == "torch":
        if sys.modules["torch"].is_grad_enabled():
            raise TypeError(
                f"{name} requires grad: these operations do not record torch's autograd; "
                "pass x.detach(), or wrap them in a torch.autograd.Function"
            )
        x = x.detach()  # inside a torch.autograd.Function, or under no_grad: nothing is recorded
    device = x.__dlpack_device__()
    if int(device[0]) in _CUDA:
        return cuda.from_foreign(x, name)
    if int(device[0]) != 1:
        place = tuple(map(int, device))
        raise TypeError(f"{name} must be on the CPU or a CUDA device, got DLPack device {place}")
    try:
        if str(getattr(x, "dtype", None)) == "torch.bfloat16":
            return np.from_dlpack(x.view(sys.modules["torch"].int16)).view(BFLOAT16)
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} cannot be read through DLPack: {error}") from error


def like(y: Any, x: Array) -> Array:
    """`y` as the kind of array that `x` is, sharing memory."""
    if isinstance(x, np.ndarray):
        return y if y.dtype.isbuiltin == 1 or y.dtype != BFLOAT16 else y.view(x.dtype)
    if cuda.is_device_array(x):
        return y
    top = type(x).__module__.partition(".")[0]
    if top == "torch":
        torch = sys.modules["torch"]
        if y.dtype == BFLOAT16:
            return torch.from_dlpack(y.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(y)
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
    convert = getattr(namespace, "from_dlpack", None)
    if convert is None:
        convert = getattr(type(x), "from_dlpack", None)
    return convert(y) if convert is not None else y


def integer(value: Any, name: str) -> int:
    """An int; TypeError for anything that is not an integer (also for 1.0 and True)."""
    if type(value) is int and -(2**63) <= value < 2**63:  # the usual case
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} does not fit 64 bits: {number}")
    return number


def pair(value: Any, name: str) -> tuple[int, int]:
    """(height, width) from an int or a sequence of one or two ints."""
    if type(value) is tuple and len(value) == 2:  # the usual case
        return integer(value[0], name), integer(value[1], name)
    if type(value) is int:
        return integer(value, name), value
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be an integer or a pair of integers, got {value!r}")
    if isinstance(value, (Sequence, np.ndarray)) and np.ndim(value) == 1:
        if len(value) not in (1, 2):
            raise ValueError(f"{name} must be an integer or a pair of integers, got {value!r}")
        numbers = [integer(v, name) for v in value]
        return numbers[0], numbers[-1]
    number = integer(value, name)
    return number, number

"""The same tests on a CUDA device: FASTCONV_TEST_DEVICE=cuda.

Every function of `fastconv.ops` is wrapped: numpy arrays go to the device as they lie in memory,
results come back as they lie there, and what a function writes in place is copied back. So a test
that calls the library with numpy arrays tests the device without knowing it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv import cuda
from fastconv.ops._arrays import operand

DEVICE = os.environ.get("FASTCONV_TEST_DEVICE", "cpu")
ON_CUDA = DEVICE == "cuda"

# The arguments that a function writes into.
WRITTEN = {
    "sgd_step": ("params", "momenta"),
    "adamw_step": ("params", "exp_avg", "exp_avg_sq"),
    "move_towards": ("averages",),
    "add_to": ("a",),
    "batch_norm": ("running_mean", "running_var"),
    "batch_norm_train": ("running_mean", "running_var"),
    "batch_norm_max_pool_train": ("running_mean", "running_var"),
}
# These take shapes, no arrays.
OF_SHAPES = {"conv2d_output_shape", "explain"}


def upload(array: np.ndarray) -> Any:
    """The array on the device, with the same strides: its bytes from the first to the last."""
    if not array.size:
        return cuda.array(array)
    low, high = np.lib.array_utils.byte_bounds(array)
    owner: Any = array
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    if isinstance(owner, np.ndarray) and owner.nbytes < high - low:  # a form without memory
        array = np.zeros_like(array)
        low, high = np.lib.array_utils.byte_bounds(array)
    base = np.lib.stride_tricks.as_strided(np.empty(0, np.uint8), (high - low,), (1,))
    interface = dict(base.__array_interface__, data=(low, True))

    class Bytes:
        __array_interface__ = interface

    module = cuda.kernels()
    memory = module.from_numpy(np.asarray(Bytes()))
    start = memory.data_ptr + array.__array_interface__["data"][0] - low
    strides = [stride // array.itemsize for stride in array.strides]
    return module.from_pointer(start, list(array.shape), strides, array.dtype.name, memory)


def _arrays_in(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in _arrays_in(item)]
    return []


def _movable(array: np.ndarray) -> bool:
    """Whether the device has such arrays; what it does not have is refused before any kernel."""
    known = array.dtype.name in ("float32", "float64", "int64", "uint8")
    strides = all(s % array.itemsize == 0 for s in array.strides)
    small = array.nbytes < 2**26 and array.ndim <= 8
    return known and strides and small


def _updatable(array: np.ndarray) -> bool:
    return array.flags.writeable and array.flags.aligned and array.dtype.isnative


def _move(value: Any, moved: list[tuple[np.ndarray, Any]]) -> Any:
    if isinstance(value, np.ndarray):
        moved.append((value, upload(operand(value, "operand"))))
        return moved[-1][1]
    if isinstance(value, (list, tuple)) and _arrays_in(value):
        return type(value)(_move(item, moved) for item in value)
    return value


def _back(value: Any) -> Any:
    if cuda.is_device_array(value):
        return value.numpy()
    return tuple(_back(item) for item in value) if isinstance(value, tuple) else value


def _foreign(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_foreign, value))
    return not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__")


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its numpy arrays on the device."""

    signature = inspect.signature(function)
    written_names = WRITTEN.get(function.__name__, ())

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        arrays = _arrays_in(given)
        if not arrays or any(map(_foreign, given)) or not all(map(_movable, arrays)):
            return function(*args, **kwargs)
        written: list[np.ndarray] = []
        if written_names:
            arguments = signature.bind(*args, **kwargs).arguments
            written = _arrays_in([arguments.get(name) for name in written_names])
            if not all(map(_updatable, written)):
                return function(*args, **kwargs)  # which refuses them
        moved: list[tuple[np.ndarray, Any]] = []
        moved_args = [_move(value, moved) for value in args]
        options = {name: _move(value, moved) for name, value in kwargs.items()}
        try:
            result = function(*moved_args, **options)
        except TypeError as error:
            if "not supported on a CUDA device" in str(error):
                pytest.skip(str(error))  # of the CPU alone
            raise
        for host, device in moved:
            if any(host is array for array in written):
                host[...] = device.numpy()
        return _back(result)

    return call


def install() -> None:
    """Wraps the library's functions, and sends the settings of tests to the device's kernels."""
    for name in fastconv.ops.__all__:
        function = getattr(fastconv.ops, name)
        if name in OF_SHAPES:
            wrapped = functools.partial(function, device="cuda") if name == "explain" else function
        else:
            wrapped = wrap(function)
        setattr(fastconv.ops, name, wrapped)
        setattr(fastconv, name, wrapped)


def set_algorithm(name: str) -> None:
    """Forces a convolution algorithm of the device under test; "" lets the library choose."""
    (cuda.kernels() if ON_CUDA else fastconv._C).set_algorithm(name)

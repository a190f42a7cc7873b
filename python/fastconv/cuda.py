"""CUDA devices: whether there is one, its memory and streams, and the arrays that lie on it.

The functions of ``fastconv`` take an array of a device (:class:`Array`, a torch CUDA tensor, a CuPy
array) as they take a numpy array, and answer in kind, without a copy. All operands of a call lie on
the same device, cuda:0. Its floating types are float32, float64, float16 and bfloat16; sums are
taken in float32 (float64 for float64).

Work is given to the current stream: the one that :func:`stream` sets, else that of torch's
operands, else the default one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np


class BFloat16:
    """The dtype bfloat16, which numpy does not have: its one instance is `bfloat16`."""

    name = "bfloat16"
    kind = "f"
    itemsize = 2

    def __eq__(self, other: object) -> bool:
        return other is self or other == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return "fastconv.bfloat16"


bfloat16 = BFloat16()
_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "int64", "uint8")}


def dtype_of(name: str) -> Any:
    """numpy's dtype of that name, or `bfloat16`."""
    return _DTYPES.get(name, bfloat16)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype: numpy's, torch's, a name, or `bfloat16`."""
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    return (
        name if name == "bfloat16" else str(np.dtype(dtype if not isinstance(dtype, str) else name))
    )


_module: ModuleType | None = None
_reason: str | None = None


def _load() -> None:
    global _module, _reason
    if _reason is not None:
        return
    try:
        module = importlib.import_module("fastconv._cuda")
    except ModuleNotFoundError:
        _reason = "fastconv was built without CUDA (build it where nvcc is, with FASTCONV_CUDA=ON)"
    except ImportError as error:
        _reason = f"fastconv's CUDA extension cannot be loaded: {error}"
    else:
        _reason = module.unavailable_reason()
        _module = None if _reason else module


def is_built() -> bool:
    """Whether this build has the CUDA extension at all; it may still find no device."""
    return importlib.util.find_spec("fastconv._cuda") is not None


def is_available() -> bool:
    """Whether arrays can be put on a CUDA device here."""
    _load()
    return _module is not None


def kernels() -> Any:
    """The module of the device's kernels. RuntimeError, saying why, where there is no device."""
    _load()
    if _module is None:
        raise RuntimeError(f"no CUDA device: {_reason}")
    return _module


def is_emulated() -> bool:
    """Whether the device is none: kernels run on the host, for tests where there is no GPU."""
    return is_available() and bool(kernels().is_emulated)


def device_info() -> dict[str, Any]:
    """Name, compute capability, multiprocessors and memory of the device, and `emulated`."""
    info: dict[str, Any] = kernels().device_info()
    return info


def in_use() -> bool:
    """Whether arrays of a CUDA device can exist: the device has been asked for, and is there."""
    return _module is not None


def is_device_array(x: Any) -> bool:
    """Whether `x` is this library's array of a CUDA device."""
    return _module is not None and isinstance(x, _module.Array)


def array(x: Any, dtype: Any = None) -> Any:
    """A new array on the device with the numbers and the order of memory of `x`.

    x: a numpy array, or anything that becomes one. dtype: that of the result (numpy's, or
    "bfloat16"). RuntimeError where there is no CUDA device.
    """
    module = kernels()
    if not is_device_array(x):
        x = module.from_numpy(np.asarray(x))
    return x if dtype is None else cast(x, dtype)


def cast(x: Any, dtype: Any) -> Any:
    """The array `x` of the device in another floating dtype; itself where it has it."""
    name = dtype_name(dtype)
    return x if x.dtype_name == name else x.cast(name)


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    """A numpy array with the numbers and the order of memory of `x`; float32 for bfloat16."""
    array: np.ndarray[Any, Any] = x.numpy()
    return array


def in_order(x: Any, order: list[int], dtype: Any) -> Any:
    """A copy of `x` in another dtype; its dimensions lie in memory in `order`, outermost first."""
    places = [order.index(d) for d in range(x.ndim)]
    empty = kernels().full([x.shape[d] for d in order], 0.0, dtype_name(dtype))
    result = empty.transpose(places) if order else empty
    result[...] = x
    return result


def from_foreign(x: Any, name: str) -> Any:
    """A device array sharing the memory of a torch CUDA tensor, a CuPy array or the like.

    TypeError for anything else. Work follows torch's current stream from here on in this thread.
    """
    module = kernels()
    if type(x).__module__.partition(".")[0] == "torch":
        follow = sys.modules["torch"].cuda
        if follow.is_available() and not _explicit_stream:
            module.set_current_stream(follow.current_stream().cuda_stream)
    current = module.current_stream()
    if hasattr(x, "__dlpack__"):
        number = None if module.is_emulated else (current or 1)
        return module.from_dlpack(x.__dlpack__(stream=number))
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None:
        raise TypeError(f"{name} must be an array of a CUDA device, got {type(x).__name__}")
    return _from_interface(module, x, interface)


def _from_interface(module: Any, x: Any, interface: dict[str, Any]) -> Any:
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    steps = [step // dtype.itemsize for step in strides]
    # Version 3: the consumer waits for the producer's stream; 1 is the default one, 0 here.
    current, producer = module.current_stream(), interface.get("stream")
    if producer is not None and (0 if producer == 1 else producer) != current:
        module.set_current_stream(0 if producer == 1 else producer)
        try:
            module.let_wait(current)
        finally:
            module.set_current_stream(current)
    return module.from_pointer(interface["data"][0], list(shape), steps, dtype.name, x)


def loss_operand(x: Any) -> Any:
    """A 16-bit array of the device as float32 under :func:`autocast`."""
    small = _compute_dtype is not None and is_device_array(x) and x.itemsize == 2
    return cast(x, np.float32) if small else x


_explicit_stream = False


@contextlib.contextmanager
def stream(number: int) -> Iterator[None]:
    """Work of this thread goes to this stream (its address as an integer; 0: the default one)."""
    global _explicit_stream
    module = kernels()
    previous, before = module.current_stream(), _explicit_stream
    module.set_current_stream(int(number))
    _explicit_stream = True
    try:
        yield
    finally:
        module.set_current_stream(previous)
        _explicit_stream = before


_compute_dtype: Any = None


@contextlib.contextmanager
def autocast(dtype: Any = "bfloat16") -> Iterator[None]:
    """Convolutions and linear layers of this block compute in a 16-bit dtype on the device.

    Parameters and their gradients stay float32; activations follow the operands. As in PyTorch,
    cross entropy is taken in float32. Not for several threads at a time.
    """
    global _compute_dtype
    before, _compute_dtype = _compute_dtype, dtype_name(dtype)
    try:
        yield
    finally:
        _compute_dtype = before


def compute_operands(*operands: Any) -> tuple[Any, ...]:
    """The arrays (or None) in the dtype that :func:`autocast` asks for; as they are without it."""
    if _compute_dtype is None:
        return operands
    return tuple(cast(x, _compute_dtype) if is_device_array(x) else x for x in operands)


def synchronize() -> None:
    """Waits until the current stream's work is done."""
    kernels().synchronize()


def allow_tf32(on: bool = True) -> None:
    """Whether float32 convolutions may round their operands to tf32 (10 bits of fraction).

    Off unless asked for; `set_precision("strict")` refuses it.
    """
    kernels().allow_tf32(bool(on))


def memory_stats() -> dict[str, int]:
    """Bytes and requests of the device's caching allocator, as `fastconv.memory_stats`."""
    stats: dict[str, int] = kernels().memory_stats()
    return stats


def empty_cache() -> None:
    """Gives the device memory that is kept for reuse back to the system."""
    kernels().empty_cache()


# numpy's functions on arrays of the device: what the tape and the optimisers use.


def _operand(value: Any, like: Any) -> Any:
    """`value` as an array of the device with the dtype of `like`."""
    if is_device_array(value):
        return value
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise TypeError(
            "an operation on an array of a CUDA device and a numpy array: move one of them"
        )
    return kernels().full([], float(value), like.dtype_name)


def scalar_like(value: Any, x: Any) -> Any:
    """The number as an array without dimensions, of the dtype of `x` and where that lies."""
    return _operand(value, x) if is_device_array(x) else np.asarray(value, x.dtype)


_ARITHMETIC = {"add": "add", "subtract": "subtract", "multiply": "multiply", "divide": "divide"}


def array_ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """numpy's ufuncs: + - * / (also in place), negation and square root."""
    out = options.pop("out", None)
    options.pop("dtype", None)  # results have the dtype of the operands
    if method != "__call__" or options or (out is not None and out[0] is not inputs[0]):
        return NotImplemented
    module = kernels()
    name = "divide" if ufunc.__name__ == "true_divide" else ufunc.__name__
    if name == "negative":
        return module.binary("multiply", self, _operand(-1.0, self))
    if name == "sqrt":
        return self.square_root()
    if name not in _ARITHMETIC:
        raise TypeError(f"numpy.{ufunc.__name__} is not available on a CUDA device")
    a, b = (_operand(value, self) for value in inputs)
    if out is None:
        return module.binary(name, a, b)
    module.binary_in_place(name, a, b)
    return a


def _full_like(x: Any, value: float) -> Any:
    result = kernels().empty_like(x)
    result[...] = value
    return result


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.zeros_like: lambda x: _full_like(x, 0.0),
    np.ones_like: lambda x: _full_like(x, 1.0),
    np.empty_like: lambda x: kernels().empty_like(x),
    np.broadcast_to: lambda x, shape: x.broadcast_to(list(shape)),
    np.may_share_memory: lambda a, b: (
        is_device_array(a) and is_device_array(b) and kernels().may_share_memory(a, b)
    ),
}


def array_function(self: Any, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """numpy's functions that look at the form of an array, or fill one like it."""
    if function not in _FUNCTIONS:
        return NotImplemented
    return _FUNCTIONS[function](*args, **kwargs)

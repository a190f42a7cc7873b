"""Reverse-mode automatic differentiation: a small tape over numpy arrays.

A `Tensor` holds an array. When an operation has an input that requires a gradient, `apply` attaches
to its output a node: the sources of the inputs, and a function that maps the gradient of the output
to gradients of the inputs. Nodes are numbered as they are created, so an input's number is always
below its output's: `Tensor.backward` visits them from the highest number down, without recursion,
in the same order on every run, and releases what a node saved as soon as the node has been used.

Adding an operation takes a forward, a backward, and one call::

    def square(x: Tensor) -> Tensor:
        values = x.data  # what the backward needs: arrays, not tensors

        def backward(dy, needs):  # needs[i]: does input i require a gradient?
            return (2 * values * dy,)  # one gradient, or None, for each input

        return apply(values * values, (x,), backward)
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
import numpy.typing as npt

from fastconv import _C, cuda, ops
from fastconv._recording import recorded
from fastconv.ops._arrays import operand

Array: TypeAlias = npt.NDArray[Any]
Needs: TypeAlias = tuple[bool, ...]
Backward: TypeAlias = Callable[[Array, Needs], Sequence["Array | None"]]
LeafHook: TypeAlias = "Callable[[Tensor], object]"

_node_numbers = itertools.count()


class _GradMode(threading.local):
    enabled = True


_grad_mode = _GradMode()


class no_grad(contextlib.ContextDecorator):
    """Context manager and decorator: operations of this thread record nothing inside it."""

    def __init__(self) -> None:
        self._outer: list[bool] = []  # one entry for each time it was entered and not yet left

    def __enter__(self) -> None:
        self._outer.append(_grad_mode.enabled)
        _grad_mode.enabled = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _grad_mode.enabled = self._outer.pop()

    def _recreate_cm(self) -> no_grad:
        return no_grad()  # a decorated function may run in several threads: a stack for each


def is_grad_enabled() -> bool:
    """False inside `no_grad`, in the thread that asks."""
    return _grad_mode.enabled


class _Node:
    """One recorded operation: where gradients go, how to compute them, the form of the output."""

    __slots__ = ("backward", "dtype", "number", "shape", "sources", "strides")

    def __init__(
        self, sources: tuple[_Node | Tensor | None, ...], backward: Backward, output: Array
    ) -> None:
        self.number = next(_node_numbers)
        self.sources = sources
        self.backward: Backward | None = backward
        self.shape, self.dtype, self.strides = output.shape, output.dtype, output.strides

    def run(self, dy: Array) -> list[tuple[_Node | Tensor, Array]]:
        """Calls the backward function, frees what it saved, and pairs sources with gradients."""
        if self.backward is None:
            raise RuntimeError(
                "backward a second time through the same operation: its saved arrays were freed by "
                "the first backward; run the forward pass again"
            )
        sources = self.sources
        gradients = self.backward(dy, tuple([source is not None for source in sources]))
        if len(gradients) != len(sources):
            raise RuntimeError(
                f"a backward function returned {len(gradients)} gradients for {len(sources)} inputs"
            )
        self.backward, self.sources = None, ()
        return [
            (source, dx)
            for source, dx in zip(sources, gradients, strict=True)
            if source is not None and dx is not None
        ]


class Tensor:
    """An array that remembers how it was computed.

    data: the numpy array (any strides; channels-last memory is the fast layout for images). Lists
        and Python floats become float32; arrays, torch tensors and anything with DLPack keep their
        dtype and share memory.
    requires_grad: record operations on this tensor; needs a floating dtype, else TypeError.

    `grad` is None or a numpy array with the shape, dtype and memory order of `data`. As in PyTorch,
    `backward` adds to the `grad` of the tensors that were not computed by an operation (the
    leaves), and to no other.
    """

    __slots__ = ("__weakref__", "_hooks", "_node", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # ndarray + Tensor asks Tensor; a ufunc is an error, no lost gradient

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Array = to_numpy(data)
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(
                f"only floating tensors can require a gradient, got dtype {self.data.dtype}"
            )
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: _Node | None = None
        self._hooks: tuple[LeafHook, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return device_of(self.data)

    def to(self, device: str) -> Tensor:
        """The tensor on "cpu" or "cuda": itself where it is there, else a copy.

        The gradient of the copy flows back to this tensor. RuntimeError, saying why, where "cuda"
        is asked for and there is no CUDA device.
        """
        if device == self.device:
            return self
        here = self.device
        moved = move(self.data, device)
        return apply(moved, (self,), lambda dy, _: (move(dy, here),))

    def cpu(self) -> Tensor:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self) -> Tensor:
        """`to("cuda")`."""
        return self.to("cuda")

    @property
    def is_leaf(self) -> bool:
        """True when no recorded operation computed this tensor."""
        return self._node is None

    def item(self) -> float:
        """The value of a tensor with one element, as a Python number."""
        value: float = self.data.item()
        return value

    def detach(self) -> Tensor:
        """The same memory, without the history."""
        return Tensor(self.data)

    def numpy(self) -> Array:
        """The array itself. RuntimeError when the tensor requires a gradient."""
        self._refuse_gradient(RuntimeError, "numpy()")
        return self.data

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"converting {array.dtype} to {np.dtype(dtype)} needs a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options: Any) -> Any:
        """DLPack capsule of the memory. BufferError when the tensor requires a gradient."""
        self._refuse_gradient(BufferError, "__dlpack__()")
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def _refuse_gradient(self, error: type[Exception], what: str) -> None:
        if self.requires_grad:
            raise error(f"{what} on a tensor that requires a gradient: use .detach() or .data")

    def backward(self, grad: Any = None) -> None:
        """Adds d(self)/d(leaf), weighted by `grad`, to `leaf.grad` of every leaf that needs one.

        grad: the gradient of self, same shape; may be left out when self has one element (then 1).
        RuntimeError: self requires no gradient, or part of its history was used by an earlier
        backward and is freed.
        ValueError: `grad` is missing for a tensor of several elements, or its shape differs.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that requires no gradient")
        seed = self._first_gradient(grad)
        if self._node is None:
            self._accumulate(seed.copy(order="K"))
            self._run_hooks()
        else:
            _run_tape(self._node, seed)

    def _first_gradient(self, grad: Any) -> Array:
        if grad is None:
            if self.data.size != 1:
                raise ValueError(
                    f"backward() without grad needs one element, this tensor has shape {self.shape}"
                )
            return np.ones_like(self.data)
        seed = move(to_numpy(grad), self.device)
        if seed.shape != self.shape:
            raise ValueError(f"grad has shape {seed.shape}, the tensor has shape {self.shape}")
        return in_form(seed, self.data)

    def _accumulate(self, grad: Array) -> None:
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad

    def register_post_accumulate_grad_hook(self, hook: LeafHook) -> Callable[[], None]:
        """Calls hook(self) in each backward as soon as it will not change `grad` any more.

        That is while the backward pass of what was computed before the first use of this tensor is
        still to come. Returns a function that removes the hook. RuntimeError for a tensor that an
        operation computed.
        """
        if self._node is not None:
            raise RuntimeError("a post-accumulate hook on a tensor that is no leaf")
        global _hooks_exist
        _hooks_exist = True
        self._hooks = (*self._hooks, hook)

        def remove() -> None:
            self._hooks = tuple(other for other in self._hooks if other is not hook)

        return remove

    def _run_hooks(self) -> None:
        for hook in self._hooks:
            hook(self)

    def __repr__(self) -> str:
        note = ", requires_grad=True" if self.requires_grad else ""
        on_device = self.device != "cpu"
        numbers = move(self.data, "cpu") if on_device else self.data
        note = (", device='cuda'" if on_device else "") + note
        return f"Tensor({np.array2string(numbers, separator=', ', prefix='Tensor(')}{note})"

    # Arithmetic. Shapes broadcast as in numpy.

    def _operand(self, value: Any) -> Tensor:
        if isinstance(value, (int, float, np.generic)):
            return Tensor(cuda.scalar_like(value, self.data))  # a number never changes the dtype
        return as_tensor(value)

    def __add__(self, other: Any) -> Tensor:
        return _add(self, self._operand(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return _subtract(self, self._operand(other))

    def __rsub__(self, other: Any) -> Tensor:
        return _subtract(self._operand(other), self)

    def __mul__(self, other: Any) -> Tensor:
        return _multiply(self, self._operand(other))

    __rmul__ = __mul__

    @recorded
    def __neg__(self) -> Tensor:
        return apply(-self.data, (self,), lambda dy, _: (-dy,))

    @recorded
    def __truediv__(self, scalar: SupportsFloat) -> Tensor:
        """Division by a number."""
        divisor = float(scalar)
        quotient = np.divide(self.data, divisor, dtype=self.dtype)
        return apply(quotient, (self,), lambda dy, _: (np.divide(dy, divisor, dtype=dy.dtype),))

    @recorded
    def sum(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Sum over `dim` (all dimensions when None)."""
        shape = self.shape
        total = self.data.sum(axis=dim, keepdims=True)
        kept = total.shape

        def backward(dy: Array, _: Needs) -> tuple[Array]:
            return (np.broadcast_to(dy.reshape(kept), shape),)

        return apply(total if keepdim else _squeeze(total, dim), (self,), backward)

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Mean over `dim` (all dimensions when None)."""
        total = self.sum(dim, keepdim)
        return total / (self.data.size / max(total.data.size, 1))

    @recorded
    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """The elements in logical order under another shape; a view where the memory allows it."""
        old = self.shape
        return apply(self.data.reshape(*shape), (self,), lambda dy, _: (dy.reshape(old),))

    @recorded
    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """A view of the same memory with two dimensions exchanged."""
        return apply(
            self.data.swapaxes(dim0, dim1), (self,), lambda dy, _: (dy.swapaxes(dim0, dim1),)
        )

    @recorded
    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Joins the dimensions start_dim..end_dim (inclusive) into one."""
        first, last = start_dim % max(self.ndim, 1), end_dim % max(self.ndim, 1)
        if first > last:
            raise ValueError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
        joined = math.prod(self.shape[first : last + 1])
        shape, old = (*self.shape[:first], joined, *self.shape[last + 1 :]), self.shape
        if (first, last) == (1, 3) and self.ndim == 4 and _is_channels_last(self.data):
            rows = _C.dense_copy(self.data, False).reshape(shape)
            return apply(rows, (self,), lambda dy, _: (dy.reshape(old),))
        return self.reshape(shape)


# The array of a tensor, to be read. Of a parameter it does not count as a use of `data`.
array_of: Callable[[Tensor], Array] = vars(Tensor)["data"].__get__

_hooks_exist = False  # whether a tensor ever had one


def to_numpy(value: Any) -> Array:
    """The numpy array that shares the memory of `value`.

    value: a Tensor, an array, a torch tensor, anything with DLPack. Python numbers and lists are
        copied, and their floats become float32.
    """
    if isinstance(value, np.ndarray) or cuda.is_device_array(value):
        return value
    if isinstance(value, Tensor):
        return value.data
    if isinstance(value, np.generic):
        return np.asarray(value)
    if hasattr(value, "detach"):
        value = value.detach()  # a torch parameter refuses DLPack while it requires a gradient
    if hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__"):
        return operand(value, "value")
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def device_of(array: Array) -> str:
    """Where an array lies: "cpu" or "cuda"."""
    return "cuda" if cuda.is_device_array(array) else "cpu"


def move(array: Array, device: str) -> Array:
    """The array on "cpu" or "cuda", in the same order of memory; itself where it is there."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == device_of(array):
        return array
    moved: Array = cuda.array(array) if device == "cuda" else cuda.to_numpy(array)
    return moved


def as_tensor(value: Any) -> Tensor:
    """`value` itself when it is a Tensor, else a Tensor that shares its memory."""
    return value if isinstance(value, Tensor) else Tensor(value)


def records(inputs: Iterable[Tensor | None]) -> bool:
    """Whether an operation on `inputs` is recorded now."""
    if _grad_mode.enabled:
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    return False


def is_computed_from(tensor: Tensor, source: Tensor) -> bool:
    """Whether a gradient of `tensor` reaches `source`, which an operation computed."""
    stack, seen = [tensor._node], {tensor._node}
    while stack:
        node = stack.pop()
        if node is not None and node is source._node:
            return True
        # What was recorded before `source` cannot depend on it.
        if node is not None and source._node is not None and node.number > source._node.number:
            found = {s for s in node.sources if isinstance(s, _Node)} - seen
            seen |= found
            stack += found
    return False


def apply(output: Any, inputs: Sequence[Tensor | None], backward: Backward) -> Tensor:
    """Wraps the array `output`, computed from `inputs`, and records how its gradient flows back.

    backward(dy, needs): dy has the shape, dtype and memory order of `output`; needs[i] says whether
        inputs[i] requires a gradient. Returns one gradient for each input, with that input's shape,
        or None where it is not needed or
        zero. It must not write to dy, and every array it returns must be new, or dy itself or a
        view of it: later gradients of the same input are added to a new array in place.

    Whatever `backward` has captured stays alive until it has run, and not at all when no input
    requires a gradient.
    """
    if type(output) is not np.ndarray and not cuda.is_device_array(output):
        output = np.asarray(output)
    result = Tensor(output)
    if records(inputs):
        sources = [
            None if t is None or not t.requires_grad else t if t._node is None else t._node
            for t in inputs
        ]
        result.requires_grad = True
        result._node = _Node(tuple(sources), backward, output)
    return result


def _run_tape(root: _Node, seed: Array) -> None:
    """Visits the history of `root`, each operation once and after all that used its output."""
    hooked = _hooked_leaves(root) if _hooks_exist else []
    pending: dict[_Node, Array] = {root: seed}
    shared: set[_Node] = set()  # those whose pending gradient may belong to others too
    queue = [(-root.number, root)]

    def receive(source: _Node | Tensor, dx: Array, alone: bool) -> None:
        if isinstance(source, Tensor):
            dx = in_form(dx, array_of(source))
            source._accumulate(dx if alone else dx.copy(order="K"))
            return
        dx = in_form(dx, source)
        if source not in pending:
            pending[source] = dx
            heapq.heappush(queue, (-source.number, source))
            if not alone:
                shared.add(source)
        elif source in shared:
            pending[source] = _plus(pending[source], dx)
            shared.remove(source)
        else:
            _add_to(pending[source], dx)

    while queue:
        node = heapq.heappop(queue)[1]
        dy = pending.pop(node)
        gradients = node.run(dy)
        alone = _are_alone([dx for _, dx in gradients], dy)
        while gradients:  # emptied as it is read, so that no gradient outlives its use
            receive(*gradients.pop(0), alone.pop(0))
        while hooked and (not queue or hooked[-1][0] > -queue[0][0]):
            hooked.pop()[1]._run_hooks()


def _are_alone(gradients: list[Array], dy: Array) -> list[bool]:
    """Of each gradient, whether its memory is its own: neither that of dy nor another one's."""
    for dx in gradients:
        if type(dx) is not np.ndarray or type(dx.base) is np.ndarray or np.may_share_memory(dx, dy):
            break
    else:  # the usual case: new arrays, as backward functions return them, and no views
        if len({id(dx) for dx in gradients}) == len(gradients):
            return [dx.flags.writeable for dx in gradients]
    if any(map(cuda.is_device_array, (dy, *gradients))):
        arrays = [dy, *gradients]
        return [
            not any(j != i and np.may_share_memory(dx, other) for j, other in enumerate(arrays))
            for i, dx in enumerate(arrays)
        ][1:]
    owners = [id(dx.base if isinstance(dx.base, np.ndarray) else dx) for dx in gradients]
    return [
        dx.flags.writeable and owners.count(owner) == 1 and not np.may_share_memory(dx, dy)
        for dx, owner in zip(gradients, owners, strict=True)
    ]


def _hooked_leaves(root: _Node) -> list[tuple[int, Tensor]]:
    """The leaves with hooks in the history of `root`, each with the number of its first use.

    Ascending: `_run_tape` visits numbers from the highest down, so the last ones are final first.
    """
    first_use: dict[Tensor, int] = {}
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        for source in node.sources:
            if isinstance(source, _Node):
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
            elif source is not None and source._hooks:
                first_use[source] = min(node.number, first_use.get(source, node.number))
    return sorted(((number, leaf) for leaf, number in first_use.items()), key=lambda use: use[0])


def in_form(grad: Array, like: Array | _Node) -> Array:
    """`grad` with the dtype and the memory order of `like`; itself when it has them."""
    if grad.shape == like.shape and grad.strides == like.strides and grad.dtype == like.dtype:
        return grad
    if grad.shape != like.shape:
        raise RuntimeError(
            f"a gradient of shape {grad.shape} arrived for an array of shape {like.shape}"
        )
    if grad.dtype == like.dtype and _lies_as(grad.shape, grad.strides, grad.itemsize, like.strides):
        return grad
    order = memory_order(like.shape, like.strides)
    if cuda.is_device_array(grad):
        return cuda.in_order(grad, order, like.dtype)
    if order in ([0, 1, 2, 3], [0, 2, 3, 1]) and grad.dtype == like.dtype in _COPIED:
        return _C.dense_copy(grad, order[1] == 2)
    result = empty_in_order(like.shape, order, like.dtype)
    result[...] = grad
    return result


# Numbers of images that the library copies from one layout to another, in threads.
_COPIED = (np.dtype(np.float32), np.dtype(np.float64))


def _is_channels_last(image: Array) -> bool:
    """Whether a numpy image [N,C,H,W] of real numbers lies so that its rows [N,C*H*W] do not."""
    return (
        isinstance(image, np.ndarray)
        and image.dtype in _COPIED
        and not image.flags.c_contiguous
        and image.transpose(0, 2, 3, 1).flags.c_contiguous
    )


def form_of(array: Array) -> Array:
    """An array of the shape, dtype and memory order of `array` with no memory behind it.

    For backward functions that take an input for its form alone: its elements cannot be read. On a
    CUDA device it is the array itself.
    """
    if cuda.is_device_array(array):
        return array
    dtype = array.dtype.newbyteorder("=")
    strides, step = [0] * array.ndim, dtype.itemsize
    for d in reversed(memory_order(array.shape, array.strides)):
        strides[d] = step
        step *= max(array.shape[d], 1)
    return np.lib.stride_tricks.as_strided(
        np.empty((), dtype), array.shape, strides, writeable=False
    )


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The dimensions from the one with the largest stride to the one with the smallest."""
    return sorted(range(len(shape)), key=lambda d: -abs(strides[d]) if shape[d] != 1 else 0)


def empty_in_order(shape: tuple[int, ...], order: list[int], dtype: npt.DTypeLike) -> Array:
    """An uninitialised dense array whose dimensions lie in memory in `order`, outermost first."""
    array = np.empty([shape[d] for d in order], dtype)
    return array.transpose(np.argsort(order)) if order else array


@functools.lru_cache(maxsize=4096)
def _lies_as(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, like: tuple[int, ...]
) -> bool:
    """Whether these are the strides of a dense array in the memory order of strides `like`."""
    expected = itemsize
    for d in reversed(memory_order(shape, like)):
        if shape[d] != 1 and strides[d] != expected:
            return math.prod(shape) == 0
        expected *= shape[d]
    return True


def _sum_to(grad: Array, shape: tuple[int, ...]) -> Array:
    """Undoes broadcasting: sums over the dimensions along which an operand was repeated."""
    if grad.shape == shape:
        return grad
    extra = grad.ndim - len(shape)
    stretched = [extra + d for d, n in enumerate(shape) if n == 1 and grad.shape[extra + d] != 1]
    total: Array = grad.sum(axis=(*range(extra), *stretched))
    return total.reshape(shape)


def _squeeze(total: Array, dim: int | tuple[int, ...] | None) -> Array:
    return total.reshape(()) if dim is None else total.squeeze(axis=dim)


def _plus(a: Array, b: Array) -> Array:
    same = a.shape == b.shape and a.dtype == b.dtype and a.dtype in (np.float32, np.float64)
    total: Array = ops.add(a, b) if same else a + b
    return total


def _add_to(a: Array, b: Array) -> None:
    """a += b, same shape and dtype."""
    if a.dtype in (np.float32, np.float64):
        ops.add_to(a, b)
    else:
        np.add(a, b, out=a)


@recorded
def _add(a: Tensor, b: Tensor) -> Tensor:
    sa, sb = a.shape, b.shape
    return apply(_plus(a.data, b.data), (a, b), lambda dy, _: (_sum_to(dy, sa), _sum_to(dy, sb)))


@recorded
def _subtract(a: Tensor, b: Tensor) -> Tensor:
    sa, sb = a.shape, b.shape
    return apply(a.data - b.data, (a, b), lambda dy, _: (_sum_to(dy, sa), _sum_to(-dy, sb)))


@recorded
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.data, b.data

    def backward(dy: Array, needs: Needs) -> tuple[Array | None, Array | None]:
        da = _sum_to(dy * y, x.shape) if needs[0] else None
        db = _sum_to(dy * x, y.shape) if needs[1] else None
        return da, db

    return apply(x * y, (a, b), backward)

"""`Module`, the base of all layers and models, and `Parameter`.

A module finds its parameters, buffers and children among its own attributes, in the order of
assignment: assigning an attribute is all the registration there is. Names and `state_dict` keys are
PyTorch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastconv.tensor import Array, Tensor, array_of, device_of, move, to_numpy

M = TypeVar("M", bound="Module")
ForwardHook = Callable[["Module", tuple[Any, ...], Any], Any]


_versions = itertools.count()
ARRAY_OF_PARAMETER: Any = vars(Tensor)["data"]  # the slot below the property


class Parameter(Tensor):
    """A tensor that training changes, listed under the name of the module attribute it is.

    version: a number that is a new one after every use of `data`, since whoever has the array may
        write to it.
    """

    __slots__ = ("version",)

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)

    def _get_data(self) -> Array:
        self.version = next(_versions)
        return array_of(self)

    def _set_data(self, array: Array) -> None:
        self.version = next(_versions)
        ARRAY_OF_PARAMETER.__set__(self, array)

    data = property(_get_data, _set_data)


class KeyReport(NamedTuple):
    """What `load_state_dict(strict=False)` left alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class HasState(Protocol):
    """A live module, of this library or of PyTorch."""

    def state_dict(self) -> Mapping[str, Any]: ...


class HookHandle:
    """A registered hook; `remove()` unregisters it, any number of times."""

    def __init__(self, module: Module, hook: ForwardHook) -> None:
        self._module = module
        self.hook = hook

    def remove(self) -> None:
        kept = tuple(handle for handle in self._module._forward_hooks if handle is not self)
        self._module._forward_hooks = kept


class Module:
    """Base class of layers and models: assign parameters and children, write `forward`."""

    training: bool = True
    _buffer_names: tuple[str, ...] = ()
    _optional_state: tuple[str, ...] = ()  # buffers that a state_dict may lack
    _forward_hooks: tuple[HookHandle, ...] = ()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        output = self.forward(*inputs, **options)
        for handle in self._forward_hooks:
            replaced = handle.hook(self, inputs, output)
            output = output if replaced is None else replaced
        return output

    def register_forward_hook(self, hook: ForwardHook) -> HookHandle:
        """Calls hook(module, inputs, output) after every forward.

        What the hook returns, unless None, replaces the output. A module with a hook is never fused
        with its neighbours, so the hook sees its true output.
        """
        handle = HookHandle(self, hook)
        self._forward_hooks = (*self._forward_hooks, handle)
        return handle

    def register_buffer(self, name: str, value: Array | None) -> None:
        """Makes attribute `name` part of the state; None: a place without state."""
        if name not in self._buffer_names:
            self._buffer_names = (*self._buffer_names, name)
        setattr(self, name, value)

    def add_module(self, name: str, module: Module | None) -> None:
        """Assigns a child, for names that are computed."""
        setattr(self, name, module)

    # What the module holds.

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the modules among the attributes, each once."""
        seen: set[int] = set()
        for name, value in vars(self).items():
            if isinstance(value, Module) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def children(self) -> Iterator[Module]:
        """The modules among the attributes, each once."""
        for _, child in self.named_children():
            yield child

    def named_modules(
        self, prefix: str = "", _seen: set[int] | None = None
    ) -> Iterator[tuple[str, Module]]:
        """(path, module) of this module (path `prefix`) and everything below it, each once."""
        seen = set() if _seen is None else _seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(_join(prefix, name), seen)

    def modules(self) -> Iterator[Module]:
        """This module and everything below it, each module once."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once."""
        seen: set[int] = set()
        for path, module in self.named_modules(prefix) if recurse else [(prefix, self)]:
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield _join(path, name), value

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters, each once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array]]:
        """(path, array) of the state that is not trained."""
        for path, module in self.named_modules(prefix) if recurse else [(prefix, self)]:
            for name in module._buffer_names:
                value = getattr(module, name)
                if value is not None:
                    yield _join(path, name), value

    def buffers(self, recurse: bool = True) -> Iterator[Array]:
        """The arrays of the state that is not trained."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    # State.

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """Parameters and buffers by path, in PyTorch's order; they share the module's memory."""
        state = {
            _join(prefix, name): value.data
            for name, value in vars(self).items()
            if isinstance(value, Parameter)
        }
        state.update(self.named_buffers(prefix, recurse=False))
        for name, value in vars(self).items():
            if isinstance(value, Module):
                state.update(value.state_dict(_join(prefix, name)))
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | HasState, strict: bool = True
    ) -> KeyReport:
        """Copies weights into parameters and buffers.

        state_dict: numpy arrays, torch tensors or anything with DLPack by name
            (`fastconv.read_weights` gives them for a file); or a live module, of fastconv or torch.
        strict: whether missing and unexpected keys are errors; they are returned otherwise. As in
            PyTorch, a batch norm's num_batches_tracked, younger than many weights, may be missing.

        ValueError names every key with a wrong shape or dtype and, when strict, every missing and
        unexpected key; then nothing has been changed.
        """
        if not isinstance(state_dict, Mapping):
            state_dict = _state_of(state_dict)
        own = self.state_dict()
        optional = {
            _join(path, name) for path, m in self.named_modules() for name in m._optional_state
        }
        missing = [key for key in own if key not in state_dict and key not in optional]
        unexpected = [key for key in state_dict if key not in own]
        problems = [f"missing key {key!r} (shape {own[key].shape})" for key in missing if strict]
        problems += [f"unexpected key {key!r}" for key in unexpected if strict]
        values: dict[str, Array] = {}
        for key in own.keys() & state_dict.keys():
            try:
                values[key] = _loadable(state_dict[key], own[key])
            except (TypeError, ValueError, RuntimeError, BufferError) as error:
                problems.append(f"{key!r}: {error}")
        if problems:
            listing = "\n  ".join(sorted(problems))
            raise ValueError(f"state_dict does not fit {type(self).__name__}:\n  {listing}")
        for key, value in values.items():
            own[key][...] = move(value, device_of(own[key]))
        return KeyReport(missing, unexpected)

    def astype(self: M, dtype: npt.DTypeLike) -> M:
        """Converts floating parameters and buffers, and drops gradients."""
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, Parameter):
                    value.data, value.grad = value.data.astype(dtype), None
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype.kind == "f":
                    setattr(module, name, buffer.astype(dtype))
        return self

    @property
    def device(self) -> str:
        """Where the parameters are: "cpu" (a module without parameters, too) or "cuda"."""
        first = next(self.parameters(), None)
        return "cpu" if first is None else first.device

    def to(self: M, device: str) -> M:
        """Moves parameters and buffers to "cpu" or "cuda", and drops gradients.

        Make optimisers afterwards: their state is made where the parameters are. Counters stay on
        the CPU. RuntimeError, saying why, where there is no CUDA device.
        """
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, Parameter):
                    value.data, value.grad = move(value.data, device), None
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype.kind == "f":
                    setattr(module, name, move(buffer, device))
        return self

    def cpu(self: M) -> M:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self: M) -> M:
        """`to("cuda")`."""
        return self.to("cuda")

    def float(self: M) -> M:
        """float32 throughout."""
        return self.astype(np.float32)

    def double(self: M) -> M:
        """float64 throughout."""
        return self.astype(np.float64)

    # Modes.

    def train(self: M, mode: bool = True) -> M:
        """Training behaviour (batch statistics, dropout) of this module and all below it."""
        for module in self.modules():
            module.training = mode
            module._forget()
        return self

    def _forget(self) -> None:
        """Frees what was made of the weights for evaluation."""

    def eval(self: M) -> M:
        """Inference behaviour of this module and all below it."""
        return self.train(False)

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Freezes (False) or unfreezes every parameter."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of all parameters, or fills them with zeros."""
        for parameter in self.parameters():
            clear_grad(parameter, set_to_none)

    def apply(self: M, function: Callable[[Module], object]) -> M:
        """Calls function(module) on everything below this module, then on itself."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def extra_repr(self) -> str:
        """The settings shown by repr()."""
        return ""

    def __repr__(self) -> str:
        name, extra = type(self).__name__, self.extra_repr()
        lines = [
            f"({child_name}): " + repr(child).replace("\n", "\n  ")
            for child_name, child in vars(self).items()
            if isinstance(child, Module)
        ]
        if not lines:
            return f"{name}({extra})"
        head = [extra] if extra else []
        return f"{name}(\n  " + "\n  ".join(head + lines) + "\n)"


def clear_grad(parameter: Tensor, set_to_none: bool) -> None:
    """Forgets a gradient, or fills it with zeros."""
    if set_to_none:
        parameter.grad = None
    elif parameter.grad is not None:
        parameter.grad[...] = 0


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _state_of(module: HasState) -> Mapping[str, Any]:
    """TypeError when it is no module."""
    if isinstance(module, type) or not callable(getattr(module, "state_dict", None)):
        raise TypeError(f"expected weights by name or a module, got {type(module).__name__}")
    return module.state_dict()


def _readable(value: Any) -> Any:
    """A torch tensor that numpy cannot share, on a GPU or of bfloat16, as one that it can."""
    if not hasattr(value, "detach") or not hasattr(value, "cpu"):
        return value
    value = value.detach().cpu()
    return value.float() if str(value.dtype) == "torch.bfloat16" else value


def _loadable(value: Any, target: Array) -> Array:
    """`value` as an array that may be copied into `target`."""
    array = to_numpy(_readable(value))
    if array.shape != target.shape:
        raise ValueError(f"shape {array.shape} does not fit {target.shape}")
    if not np.can_cast(array.dtype, target.dtype, "same_kind"):
        raise TypeError(f"dtype {array.dtype} does not fit {target.dtype}")
    return array

"""Models for inference alone: the operations of one forward pass, without the modules around them.

A small network on a small batch spends as much time in Python, finding out which operation comes
next, as in its kernels. `freeze` calls a model once, notes the operations, and gives a function
that does no more than call them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from fastconv import cuda
from fastconv._recording import thread
from fastconv.module import Module
from fastconv.tensor import Array, Tensor, array_of, as_tensor, memory_order, no_grad


class _Place(NamedTuple):
    """Stands for a tensor of the pass, by its number."""

    number: int


class _Step(NamedTuple):
    call: Callable[..., Tensor]
    inputs: tuple[int, ...]
    output: int
    last: tuple[int, ...]  # of the tensors, those that nobody needs any more


def freeze(model: Module, example: Any) -> Frozen:
    """The forward pass of `model` in evaluation as a function of inputs like `example`.

    The function has the bits of `model(x)` and less to do for them: it knows every operation in
    advance, batch norms are folded and weights packed as `fastconv.folding` describes. It holds
    copies of all weights: changing or training the model later does not change it.

    As any tracing, it keeps the operations that `example` took: a model that chooses them by the
    values of its input cannot be frozen. A second pass over random numbers must agree with the
    model to the last bit, which finds most such models, and those that compute outside of
    `fastconv.functional` and `Tensor`.

    Args:
        model: on the CPU, all of it in evaluation (`model.eval()`), without forward hooks.
        example: a floating array or Tensor of the shape, dtype and memory order to come.

    Raises:
        TypeError: an example that is not floating or lies on a CUDA device.
        ValueError: a model in training, or with hooks.
        RuntimeError: the model does not compute what was noted, or returns more than tensors, and
            tuples, lists and dicts of them.
    """
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if module.training:
            raise ValueError(f"{where} is in training: call eval() before freeze")
        if module._forward_hooks:
            raise ValueError(f"{where} has forward hooks, which a frozen model would not call")
    x = Tensor(example)
    if cuda.is_device_array(x.data) or x.dtype.kind != "f":
        raise TypeError(f"the example must be floating and on the CPU, got {x.dtype} on {x.device}")
    frozen = _Recorder(x).run(model)
    again = Tensor(_random_like(x.data))
    with no_grad():
        expected = model(again)
    if not _same(expected, frozen(again)):
        raise RuntimeError(
            f"{type(model).__name__} computes something else than the operations noted of it: it "
            "chooses them by values, or computes outside of fastconv.functional and Tensor"
        )
    return frozen


class Frozen:
    """What `freeze` gives: call it as the model. Several threads may."""

    def __init__(self, x: Tensor, steps: Sequence[_Step], output: Any) -> None:
        self._shape, self._dtype = x.shape, x.dtype
        self._steps, self._output = tuple(steps), output

    def __call__(self, x: Any) -> Any:
        """`model(x)`. x: of the example's shape (ValueError) and dtype (TypeError)."""
        x = as_tensor(x)
        if x.shape != self._shape:
            raise ValueError(f"frozen for inputs of shape {self._shape}, got {x.shape}")
        if x.dtype != self._dtype:
            raise TypeError(f"frozen for inputs of {self._dtype}, got {x.dtype}")
        values: list[Any] = [None] * (len(self._steps) + 1)
        values[0] = x
        with no_grad():
            for call, inputs, output, last in self._steps:
                values[output] = call(*[values[i] for i in inputs])
                for i in last:  # its memory serves the next operation
                    values[i] = None
        return _fill(self._output, values)


class _Recorder:
    """Notes the operations of a pass."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        # Of the tensors that are still alive: the model lets go of them as without a recorder.
        self._numbers: WeakKeyDictionary[Tensor, int] = WeakKeyDictionary({x: 0})
        self._calls: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []

    def run(self, model: Module) -> Frozen:
        outer, thread.record = thread.record, self._record
        try:
            with no_grad():
                output = self._template(model(self._x))
        finally:
            thread.record = outer
        results = set(_numbers(output))
        used = {n: i for i, (_, inputs) in enumerate(self._calls) for n in (i + 1, *inputs)}
        steps = [
            _Step(call, inputs, i + 1, tuple(n for n in used if used[n] == i and n not in results))
            for i, (call, inputs) in enumerate(self._calls)
        ]
        return Frozen(self._x, steps, output)

    def _record(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        output: Any,
    ) -> None:
        if not isinstance(output, Tensor):
            raise RuntimeError(f"{function.__name__} does not give one tensor: it cannot be frozen")
        if output in self._numbers:
            return  # an operation that does nothing in evaluation
        given, named = self._template(arguments), self._template(options)
        self._calls.append(_bound(function, given, named))
        self._numbers[output] = len(self._calls)

    def _template(self, value: Any) -> Any:
        """`value` with places for the tensors of the pass, and with copies of other arrays."""
        if isinstance(value, Tensor):
            number = self._numbers.get(value)
            return Tensor(np.array(array_of(value))) if number is None else _Place(number)
        if isinstance(value, np.ndarray):
            return np.array(value)
        return _map(self._template, value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """A tuple, list or dict of what `function` gives for its elements; others as they are."""
    if isinstance(value, dict):
        return {key: function(element) for key, element in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    return value


def _fill(template: Any, values: Sequence[Any]) -> Any:
    """The template with tensors in their places."""
    if isinstance(template, _Place):
        return values[template.number]
    return _map(lambda element: _fill(element, values), template)


def _numbers(template: Any) -> list[int]:
    """Of the tensors that have a place in it, in the order of the places."""
    found: list[int] = []

    def visit(value: Any) -> None:
        found.append(value.number) if isinstance(value, _Place) else _map(visit, value)

    visit(template)
    return found


def _bound(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[int, ...]]:
    """The call as a function of the tensors of the pass alone, and their numbers."""
    first = 0
    while first < len(arguments) and isinstance(arguments[first], _Place):
        first += 1
    rest, inputs = arguments[first:], tuple(_numbers((arguments, options)))
    if len(inputs) == first:  # the usual case
        return lambda *tensors: function(*tensors, *rest, **options), inputs
    values: list[Any] = [None] * (max(inputs) + 1)

    def call(*tensors: Tensor) -> Tensor:
        filled = values.copy()
        for number, tensor in zip(inputs, tensors, strict=True):
            filled[number] = tensor
        return function(*_fill(arguments, filled), **_fill(options, filled))

    return call, inputs


def _random_like(array: Array) -> Array:
    """Normal numbers in the shape, dtype and memory order of `array`."""
    order = memory_order(array.shape, array.strides)
    numbers = np.random.default_rng(0).standard_normal([array.shape[d] for d in order])
    return numbers.astype(array.dtype).transpose(np.argsort(order))


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs are the same to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and np.array_equal(a.data, b.data, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)

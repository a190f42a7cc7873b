"""A table of a model, a row a layer: shape, parameters, multiply-adds, memory, receptive field.

The receptive field of a layer is the window of the input that can influence one of its outputs.
With kernel k, dilation d, stride s and padding p at the start, on each axis (Dumoulin and Visin
2016, "A guide to convolution arithmetic for deep learning"; Araujo, Norris and Sim 2019, "Computing
receptive fields of convolutional neural networks"):

    receptive field  r' = r + (k - 1) d j
    jump             j' = j s                            between windows of neighbouring outputs
    offset           o' = o + ((k - 1) d / 2 - p) j      centre of the first output's window

from r = j = 1 and o = 0.5, the centre of the first pixel, for the image itself. The window may
reach into the padding and is not cut off there.

Branches are followed along the tape that automatic differentiation records, whatever a model's
`forward` does between its layers: where they meet (addition, concatenation, multiplication), the
window is the smallest that holds both.

Limits. Functions that are no layers change the window only where that can be told from the shapes:
what reduces a plane to 1 x 1 sees all of it, everything else that changes the size of a plane (a
functional max_pool2d, say) has an unknown window, and so has all that follows. A gate of 1 x 1 that
is broadcast over a plane (squeeze and excitation) is left out, though it sees all of the image: the
window given is that of what it weighs, as in published figures. Multiply-adds are those of
convolutions and linear layers; a layer that is called twice counts twice, its parameters once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastconv import nn
from fastconv.tensor import Tensor

__all__ = ["Row", "Summary", "summarize"]


@dataclass(frozen=True)
class Row:
    """One call of one layer, for one image. Pairs are (height, width), None where unknown."""

    name: str
    type: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int
    multiply_adds: int
    activation_bytes: int  # of the output
    receptive_field: tuple[int, int] | None
    jump: tuple[float, float] | None
    offset: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """The rows in the order of the calls, and the totals."""

    model: str
    input_shape: tuple[int, ...]
    rows: tuple[Row, ...]
    parameters: int  # of the whole model, used or not, shared ones once
    multiply_adds: int
    activation_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            "layer", "type", "output", "parameters", "multiply-adds", "memory",
            "field", "jump", "offset",
        )  # fmt: skip
        lines = [
            (
                row.name, row.type, "x".join(map(str, row.output_shape)), f"{row.parameters:,}",
                f"{row.multiply_adds:,}", _bytes(row.activation_bytes),
                _both(row.receptive_field), _both(row.jump), _both(row.offset),
            )
            for row in self.rows
        ]  # fmt: skip
        totals = (
            "total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}",
            _bytes(self.activation_bytes), "", "", "",
        )  # fmt: skip
        table = [head, *lines, totals]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        text = [f"{self.model}, input {'x'.join(map(str, self.input_shape))}, one image"]
        text += ["  ".join(_aligned(i, cell, widths[i]) for i, cell in enumerate(l)) for l in table]
        rule = "-" * max(map(len, text[1:]))
        return "\n".join(line.rstrip() for line in [*text[:2], rule, *text[2:-1], rule, text[-1]])


def summarize(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Runs the model on one image of zeros and describes it.

    input_size  (C, H, W), or (features,)

    The model's mode, statistics and gradients are as before afterwards. Raises ValueError for sizes
    that are not positive, and what the model raises for a size it cannot take. Inside no_grad there
    is no tape, and every receptive field is unknown.
    """
    if not input_size or any(n < 1 for n in input_size):
        raise ValueError(f"input_size must be positive sizes, got {list(input_size)}")
    dtype = next((p.dtype for p in model.parameters()), np.dtype(np.float32))
    image = Tensor(np.zeros((1, *input_size), dtype), requires_grad=True)
    walk = _Walk(image)
    modes = [(module, module.training) for module in model.modules()]
    # A composite has a row only for parameters of its own.
    hooks = [
        module.register_forward_hook(walk.hook(name or type(module).__name__))
        for name, module in model.named_modules()
        if not any(module.children()) or any(module.parameters(recurse=False))
    ]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return Summary(
        model=type(model).__name__,
        input_shape=tuple(input_size),
        rows=tuple(walk.rows),
        parameters=sum(math.prod(p.shape) for p in model.parameters()),
        multiply_adds=sum(row.multiply_adds for row in walk.rows),
        activation_bytes=sum(row.activation_bytes for row in walk.rows),
    )


@dataclass(frozen=True)
class _Axis:
    """The receptive field along one axis of a plane of `size` outputs."""

    size: int
    field: int = 1
    jump: float = 1.0
    offset: float = 0.5

    def window(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        """After a convolution or a pooling with an output of `size`."""
        reach = (kernel - 1) * dilation
        return _Axis(
            size,
            self.field + math.ceil(reach * self.jump - 1e-6),  # a jump may be a fraction
            self.jump * stride,
            self.offset + (reach / 2 - padding) * self.jump,
        )

    def transposed(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        """After a transposed convolution: i sees whole (i + p - t d) / s, 0 <= t < k."""
        reach = (kernel - 1) * dilation
        return _Axis(
            size,
            self.field + math.ceil(reach // stride * self.jump - 1e-6),
            self.jump / stride,
            self.offset + (padding - reach / 2) / stride * self.jump,
        )

    def whole(self) -> _Axis:
        """Of something that sees the whole plane."""
        return self.window(1, self.size, self.size, 0, 1)

    def merged(self, other: _Axis) -> _Axis:
        """The smallest window that holds both, where two branches of equal size meet."""
        low = min(self.offset - self.field / 2, other.offset - other.field / 2)
        high = max(self.offset + self.field / 2, other.offset + other.field / 2)
        return _Axis(self.size, math.ceil(high - low), self.jump, (low + high) / 2)


_Field = tuple[_Axis, _Axis]  # height, width


class _Walk:
    """Follows receptive fields along the tape while the layers are called, and makes their rows."""

    def __init__(self, image: Tensor) -> None:
        self.rows: list[Row] = []
        self._counted: set[int] = set()  # parameters that a row has
        height, width = image.shape[2:] if image.ndim == 4 else (1, 1)
        # By node of the tape (which keeps its nodes alive) or leaf tensor; None where unknown.
        self._fields: dict[Any, _Field | None] = {image: (_Axis(height), _Axis(width))}

    def hook(self, name: str) -> Any:
        def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            x = next((t for t in inputs if isinstance(t, Tensor)), None)
            if isinstance(y, Tensor) and x is not None:
                self._add(name, module, x, y)

        return called

    def _add(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        composite = any(module.children())
        if not composite:
            self._follow(module, x, y)
        field = self._field(_source(y))
        own = [p for p in module.parameters(recurse=False) if id(p) not in self._counted]
        self._counted.update(id(p) for p in own)
        plane = y.ndim == 4
        self.rows.append(
            Row(
                name=name,
                type=type(module).__name__,
                output_shape=y.shape[1:],
                parameters=sum(math.prod(p.shape) for p in own),
                multiply_adds=_multiply_adds(module, x, y),
                activation_bytes=0 if composite else y.data.nbytes,
                receptive_field=field and (field[0].field, field[1].field),
                jump=(field[0].jump, field[1].jump) if field and plane else None,
                offset=field and (field[0].offset, field[1].offset),
            )
        )

    def _follow(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Notes the field of a layer: its geometry on x, joined with the field of a residual."""
        entered, left = _source(x), _source(y)
        if left in self._fields:  # the layer hands on what it was given
            return
        field = _through(module, self._field(entered), x, y)
        others = [_reshaped(self._fields[s], y.shape) for s in self._known_behind(left) - {entered}]
        self._fields[left] = _merge([field, *others])

    def _field(self, source: Any) -> _Field | None:
        """The field of a node of the tape, and of the functions that led to it from known ones."""
        for node in sorted(self._unknown_behind(source), key=lambda n: n.number):
            known = [self._fields[s] for s in node.sources if s in self._fields]
            if known:  # without any it was computed from parameters, not from the image
                self._fields[node] = _merge([_reshaped(field, node.shape) for field in known])
        return self._fields.get(source)

    def _unknown_behind(self, source: Any) -> set[Any]:
        """The node, and those before it up to nodes with a known field; parameters have none."""
        found: set[Any] = set()
        waiting = [source]
        while waiting:
            node = waiting.pop()
            if node not in self._fields and node not in found and not isinstance(node, Tensor):
                found.add(node)
                waiting += [s for s in node.sources if s is not None]
        return found

    def _known_behind(self, source: Any) -> set[Any]:
        sources = (s for node in self._unknown_behind(source) for s in node.sources)
        return {s for s in sources if s in self._fields}


def _source(tensor: Tensor) -> Any:
    """What stands for a tensor on the tape: the node that computed it, or itself."""
    return tensor if tensor._node is None else tensor._node


def _merge(fields: Iterable[_Field | None]) -> _Field | None:
    result: _Field | None = None
    for field in fields:
        if field is None:
            return None
        if result is None or _is_gate(result, of=field):
            result = field
        elif not _is_gate(field, of=result):
            result = result[0].merged(field[0]), result[1].merged(field[1])
    return result


def _is_gate(field: _Field, of: _Field) -> bool:
    return _plane(field) == (1, 1) != _plane(of)


def _plane(field: _Field) -> tuple[int, int]:
    return field[0].size, field[1].size


def _reshaped(field: _Field | None, shape: tuple[int, ...]) -> _Field | None:
    """The field behind a function that is no layer, as far as the shape of its result tells it."""
    if field is None or len(shape) != 4:
        return field  # flattened: each element sees what it saw
    size = _plane(field)
    if size == shape[2:] or size == (1, 1):  # elementwise, or broadcast
        return field
    return (field[0].whole(), field[1].whole()) if shape[2:] == (1, 1) else None


def _through(module: nn.Module, field: _Field | None, x: Tensor, y: Tensor) -> _Field | None:
    """The field of what a layer makes of x."""
    if field is None:
        return None
    if isinstance(module, nn.Linear):
        return field[0].whole(), field[1].whole()
    if isinstance(module, nn.AdaptiveAvgPool2d):
        # Windows of floor(i H / P) to ceil((i+1) H / P): H / P, or one longer where P divides not.
        kernel = tuple(-(-n // m) for n, m in zip(x.shape[2:], y.shape[2:], strict=True))
        stride = tuple(n / m for n, m in zip(x.shape[2:], y.shape[2:], strict=True))
        return _windows(field, y, kernel, stride, (0, 0), (1, 1))
    if isinstance(module, nn.ConvTranspose2d):
        h, w = (
            axis.transposed(*sizes)
            for axis, *sizes in zip(
                field, y.shape[2:], _pair(module.kernel_size), _pair(module.stride),
                _pair(module.padding), _pair(module.dilation), strict=True,
            )
        )  # fmt: skip
        return h, w
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        dilation = _pair(getattr(module, "dilation", 1))
        padding = _padding_before(module.padding, x.shape[2:], kernel, stride, dilation)
        return _windows(field, y, kernel, stride, padding, dilation)
    return _reshaped(field, y.shape)


def _windows(
    field: _Field, y: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> _Field:
    h, w = (
        axis.window(*sizes)
        for axis, *sizes in zip(field, y.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    return h, w


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding_before(
    padding: Any, size: Any, kernel: Any, stride: Any, dilation: Any
) -> tuple[int, int]:
    """Rows above and columns left of the image, of any form of padding that conv2d takes."""
    if padding == "valid":
        return 0, 0
    if padding == "same":  # the total that makes the output ceil(n / s), the smaller half first
        h, w = (
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) // 2
            for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
        )
        return h, w
    h, w = _pair(padding)
    return (h, w) if isinstance(h, int) else (h[0], w[0])


def _multiply_adds(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Products that a convolution or a linear layer sums."""
    if isinstance(module, nn.Conv2d):
        return y.data.size * math.prod(module.weight.shape[1:])
    if isinstance(module, nn.ConvTranspose2d):
        return x.data.size * math.prod(module.weight.shape[1:])
    if isinstance(module, nn.Linear):
        return y.data.size * module.in_features
    return 0


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


def _both(pair: tuple[float, float] | None) -> str:
    """A number for height and width, two where they differ."""
    if pair is None:
        return "-"
    height, width = (f"{value:.6g}" for value in pair)
    return height if height == width else f"{height}x{width}"


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)

"""Convolutions with constant weights: batch norm folded in, weights packed once.

In evaluation batch norm is a scale and a shift of each channel, so that

    batch_norm(conv(x, w) + b) = conv(x, w * scale) + shift,
    scale = gamma / sqrt(var + eps), shift = beta + (b - mean) * scale

(Jacob et al. 2018, arXiv 1712.05877, section 3.2). When nothing records a gradient, `Conv2d` and
`nn.conv_norm` compute this, without a pass over memory for the batch norm, and keep the weights in
the form that the kernels read. What is kept is never out of date:

- A weight counts as unchanged while nobody could have changed it. `Parameter` notes every use of
  its `data`, by an optimiser, `load_state_dict`, an average or anybody else. And while anything but
  the parameter refers to the array (a variable, a view, a torch tensor, a `state_dict`), nothing is
  kept: the weights are packed in each call.
- Biases, running statistics and the batch norm's weights are compared with copies in each call.

Only a write through a bare address, of which no reference tells, goes unseen: call `eval()` after
it, which, as `train()`, forgets what is kept.

On a CUDA device nothing is folded or kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastconv import _C, cuda
from fastconv._recording import thread
from fastconv.module import ARRAY_OF_PARAMETER, Parameter
from fastconv.ops._arrays import operand
from fastconv.ops.conv import ConvSizes, PackedConv2d, conv_sizes
from fastconv.ops.norm import scale_and_shift
from fastconv.tensor import Array, Tensor, array_of

if TYPE_CHECKING:
    from fastconv.nn import Conv2d, _BatchNorm

_NONE = np.empty(0, np.float32)  # in the place of a vector that a layer does not have


class _Kept(NamedTuple):
    """What was made of a weight at some version and of copies of some vectors."""

    weight: Parameter
    version: int
    norm: _BatchNorm | None
    eps: float
    copies: list[Array]
    scale: Array | None
    shift: Array | None
    cache: _C.WeightCache | None  # None while others refer to the weight


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all lie on the CPU, which alone folds and keeps weights."""
    if not cuda.in_use():
        return True  # the usual case, for a microsecond a layer
    return not any(
        t is not None and cuda.is_device_array(ARRAY_OF_PARAMETER.__get__(t)) for t in tensors
    )


class KeptWeights:
    """What a convolution keeps between calls in evaluation. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        # Both are replaced as a whole: calls may come from several threads.
        self._kept: _Kept | None = None
        self._sizes: tuple[object, ConvSizes] | None = None

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[()]]:
        return KeptWeights, ()

    def forward(
        self,
        conv: Conv2d,
        norm: _BatchNorm | None,
        x: Tensor,
        residual: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        """activation(norm(conv(x)) + residual) in one pass; norm None: the convolution alone."""
        kept = self._current(conv, norm)
        y = _C.conv2d_cached(
            operand(x.data, "input"),
            operand(array_of(conv.weight), "weight"),
            kept.shift,
            None if residual is None else operand(residual.data, "residual"),
            *self.sizes_of(conv),
            activation or "",
            kept.scale,
            kept.cache,
        )
        output = Tensor(y)
        if thread.record is not None:
            given = (x,) if residual is None else (x, residual)
            thread.record(_packed(conv, norm, activation), given, {}, output)
        return output

    def sizes_of(self, conv: Conv2d) -> ConvSizes:
        """Stride, padding, dilation and groups as the kernels take them."""
        given, sizes = (conv.stride, conv.padding, conv.dilation, conv.groups), self._sizes
        if sizes is None or sizes[0] != given:
            self._sizes = sizes = (given, conv_sizes(*given))
        return sizes[1]

    def _current(self, conv: Conv2d, norm: _BatchNorm | None) -> _Kept:
        """What belongs to the present weights, made anew where they are not those of last time."""
        kept, weight = self._kept, conv.weight
        version = weight.version  # before anything is read: a later change has a later version
        sole = _C.sole_owner(weight, ARRAY_OF_PARAMETER)
        vectors, eps = _vectors(conv.bias, norm), 0.0 if norm is None else norm.eps
        if (
            kept is None
            or kept.norm is not norm
            or kept.eps != eps
            or not _C.same_bytes(vectors, kept.copies)
        ):
            copies = [np.array(vector, order="C") for vector in vectors]
            scale, shift = _folded(copies, norm, eps)
        elif kept.weight is weight and kept.version == version and sole == (kept.cache is not None):
            return kept
        else:
            copies, scale, shift = kept.copies, kept.scale, kept.shift
        cache = _C.WeightCache() if sole else None
        self._kept = _Kept(weight, version, norm, eps, copies, scale, shift, cache)
        return self._kept


def _packed(conv: Conv2d, norm: _BatchNorm | None, activation: str | None) -> Callable[..., Tensor]:
    """`KeptWeights.forward` of (x, residual) with copies of the present weights."""
    bias = None if conv.bias is None else array_of(conv.bias)
    folded = None
    if norm is not None:
        gamma, beta = (None if p is None else array_of(p) for p in (norm.weight, norm.bias))
        folded = (norm.running_mean, norm.running_var, gamma, beta, norm.eps)
    sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
    packed = PackedConv2d(array_of(conv.weight), bias, *sizes, batch_norm=folded)

    def convolution(x: Tensor, residual: Tensor | None = None) -> Tensor:
        added = None if residual is None else residual.data
        return Tensor(packed(x.data, activation=activation, residual=added))

    return convolution


def _vectors(bias: Parameter | None, norm: _BatchNorm | None) -> list[Array]:
    """Bias of the convolution, mean, variance, weight and bias of the norm."""
    own = _NONE if bias is None else array_of(bias)
    if norm is None:
        return [own, _NONE, _NONE]
    weight, shift = norm.weight, norm.bias
    assert norm.running_mean is not None and norm.running_var is not None
    return [
        own,
        norm.running_mean,
        norm.running_var,
        _NONE if weight is None else array_of(weight),
        _NONE if shift is None else array_of(shift),
    ]


def _folded(
    vectors: list[Array], norm: _BatchNorm | None, eps: float
) -> tuple[Array | None, Array | None]:
    """(scale or None, bias or None) of the convolution that does the work of both."""
    if norm is None:
        return None, vectors[0] if len(vectors[0]) else None
    bias, mean, var, gamma, beta = (vector if len(vector) else None for vector in vectors)
    assert mean is not None and var is not None
    return scale_and_shift(mean, var, gamma, beta, eps, bias)

"""Convolution, its transpose, and their gradients.

Shapes: x (N, C, H, W), w (K, C/groups, R, S), y (N, K, P, Q). Dtype float32, or float64 through the
reference implementation; all arrays of a call have the same one. Any strides; channels-last memory
is the native layout and is answered in channels-last, dense NCHW in NCHW. The forward pass of 3x3,
5x5, 7x7, 1x7 and 7x1 kernels at stride 1 and of 3x3 kernels at stride 2 takes bfloat16 too
(torch.bfloat16, or arrays of the package ml_dtypes): sums are float32, and y is rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C, cuda
from ._arrays import Array, integer, kernels, like, operand, pair, to_stored
from .norm import scale_and_shift

PaddingLike = Any  # int, (h, w), ((top, bottom), (left, right)), "same" or "valid"


def padding_sides(padding: PaddingLike) -> str | tuple[int, int, int, int]:
    """(top, bottom, left, right), or "same" or "valid" as they are."""
    if isinstance(padding, str):
        return padding
    if type(padding) is tuple and len(padding) == 2 and type(padding[0]) is int:  # the usual case
        rows, columns = pair(padding, "padding")
        return rows, rows, columns, columns
    if not isinstance(padding, int) and np.ndim(padding) == 2:
        if len(padding) != 2 or any(len(side) != 2 for side in padding):
            raise ValueError(f"padding must be ((top, bottom), (left, right)), got {padding!r}")
        top, bottom, left, right = (integer(v, "padding") for side in padding for v in side)
        return top, bottom, left, right
    rows, columns = pair(padding, "padding")
    return rows, rows, columns, columns


ConvSizes = tuple[tuple[int, int], "str | tuple[int, int, int, int]", tuple[int, int], int]


def conv_sizes(stride: Any, padding: PaddingLike, dilation: Any, groups: int) -> ConvSizes:
    """The sizes of a convolution as the kernels take them."""
    return (
        pair(stride, "stride"),
        padding_sides(padding),
        pair(dilation, "dilation"),
        integer(groups, "groups"),
    )


def _needs(needs: Any, count: int) -> list[bool]:
    flags = [bool(flag) for flag in needs]
    if len(flags) != count:
        raise ValueError(f"needs must have {count} flags, got {needs!r}")
    return flags


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: PaddingLike = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """act(cross-correlation of x with w + bias + residual), as torch.nn.functional.conv2d.

    Output size of each axis: floor((size + padding - dilation * (kernel - 1) - 1) / stride) + 1
    (Dumoulin and Visin, arXiv 1603.07285).

    Args:
        x: (N, C, H, W). w: (K, C/groups, R, S). bias: (K,). residual: (N, K, P, Q).
        stride, dilation: int or (height, width).
        padding: int, (height, width), ((top, bottom), (left, right)), "valid", or "same": output
            size ceil(size / stride) for any stride, the odd pixel of padding at the bottom and
            right.
        activation: None, "relu", "relu6", "silu", "sigmoid", "tanh" or "hardswish", fused.

    Returns:
        y (N, K, P, Q), of x's kind and layout.

    Raises:
        ValueError: shapes, sizes or groups that do not fit together; the message has the values.
        TypeError: wrong or different dtypes, a parameter that is not an integer.
    """
    sizes = conv_sizes(stride, padding, dilation, groups)
    return like(conv2d_of_sizes(x, w, bias, residual, sizes, activation), x)


def conv2d_of_sizes(
    x: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    sizes: ConvSizes,
    activation: str | None,
) -> Any:
    """:func:`conv2d` by what :func:`conv_sizes` gave, and in the kernels' own array."""
    return kernels.conv2d(
        to_stored(x, "input"),
        to_stored(w, "weight"),
        None if bias is None else to_stored(bias, "bias"),
        None if residual is None else to_stored(residual, "residual"),
        *sizes,
        activation or "",
    )


def conv2d_moments(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: PaddingLike = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Array, Array]:
    """(:func:`conv2d`, :func:`batch_norm_moments` of it) for a batch norm behind the convolution.

    On a CUDA device the tensor-core kernels take the moments of y, as it is rounded, before they
    store it, which saves the batch norm a pass over y. Elsewhere this is two operations.
    """
    y, moments = kernels.conv2d_moments(
        operand(x, "input"),
        operand(w, "weight"),
        None if bias is None else operand(bias, "bias"),
        *conv_sizes(stride, padding, dilation, groups),
    )
    return like(y, x), like(moments, x)


def _on_cpu(x: Array, name: str) -> np.ndarray:
    array = operand(x, name)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"PackedConv2d computes on the CPU, but {name} is on a CUDA device")
    return array


class PackedConv2d:
    """:func:`conv2d` with constant weights, packed once: for inference outside of `fastconv.nn`.

    Args:
        w, bias, stride, padding, dilation, groups: as for :func:`conv2d`. w and bias are copied:
            later changes of the arrays do not count.
        batch_norm: (running_mean, running_var, weight, bias, eps) of a batch norm behind the
            convolution, folded into its weights; its weight and bias (C,) may be None.

    Raises as :func:`conv2d`, for shapes that do not fit when it is called; TypeError for an array
    on a CUDA device.
    """

    def __init__(
        self,
        w: Array,
        bias: Array | None = None,
        stride: Any = 1,
        padding: PaddingLike = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        batch_norm: tuple[Array, Array, Array | None, Array | None, float] | None = None,
    ) -> None:
        self._weight = np.array(_on_cpu(w, "weight"))  # in the order of its memory
        self._scale: np.ndarray | None = None
        self._bias = None if bias is None else np.array(_on_cpu(bias, "bias"))
        if batch_norm is not None:
            *vectors, eps = batch_norm
            mean, var, weight, shift = (
                None if vector is None else _on_cpu(vector, "batch_norm") for vector in vectors
            )
            if mean is None or var is None:
                raise ValueError("batch_norm needs a running mean and variance, got None")
            self._scale, self._bias = scale_and_shift(mean, var, weight, shift, eps, self._bias)
        self._settings = conv_sizes(stride, padding, dilation, groups)
        self._cache = _C.WeightCache()

    def __call__(
        self, x: Array, *, activation: str | None = None, residual: Array | None = None
    ) -> Array:
        """act(batch_norm(convolution of x + bias) + residual), of x's kind and layout."""
        y = _C.conv2d_cached(
            _on_cpu(x, "input"),
            self._weight,
            self._bias,
            None if residual is None else _on_cpu(residual, "residual"),
            *self._settings,
            activation or "",
            self._scale,
            self._cache,
        )
        return like(y, x)


def conv2d_backward(
    dy: Array,
    x: Array,
    w: Array,
    stride: Any = 1,
    padding: PaddingLike = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    needs: Any = (True, True, True),
) -> tuple[Array, Array, Array]:
    """(dx, dw, db) of :func:`conv2d` without activation; None where `needs` says so.

    dy has the shape of y and is the gradient before the activation. dx has x's shape and layout, dw
    those of w, db is (K,): the sum of dy over batch and pixels.
    """
    sizes = conv_sizes(stride, padding, dilation, groups)
    gradients = conv2d_gradients(dy, x, w, sizes, _needs(needs, 3))
    dx, dw, db = (None if g is None else like(g, x) for g in gradients)
    return dx, dw, db


def conv2d_gradients(dy: Array, x: Array, w: Array, sizes: ConvSizes, needs: Any) -> Any:
    """:func:`conv2d_backward`, as :func:`conv2d_of_sizes`."""
    return kernels.conv2d_backward(
        operand(dy, "dy"), operand(x, "input"), operand(w, "weight"), *sizes, needs
    )


def conv_transpose2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Array:
    """The input gradient of a convolution as an operation: torch.nn.functional.conv_transpose2d.

    x (N, C, H, W), w (C, K/groups, R, S), bias (K,), y (N, K, P, Q) with
    P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.
    Raises as :func:`conv2d`; output_padding must be smaller than stride or dilation.
    """
    y = kernels.conv_transpose2d(
        operand(x, "input"),
        operand(w, "weight"),
        None if bias is None else operand(bias, "bias"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        pair(dilation, "dilation"),
        integer(groups, "groups"),
    )
    return like(y, x)


def conv_transpose2d_backward(
    dy: Array,
    x: Array,
    w: Array,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    needs: Any = (True, True, True),
) -> tuple[Array, Array, Array]:
    """(dx, dw, db) of :func:`conv_transpose2d`; None where not needed. dy has the shape of y."""
    gradients = kernels.conv_transpose2d_backward(
        operand(dy, "dy"),
        operand(x, "input"),
        operand(w, "weight"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        pair(dilation, "dilation"),
        integer(groups, "groups"),
        _needs(needs, 3),
    )
    dx, dw, db = (None if g is None else like(g, x) for g in gradients)
    return dx, dw, db


def explain(
    op: str,
    x_shape: Any,
    w_shape: Any,
    stride: Any = 1,
    padding: PaddingLike = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    dtype: str = "float32",
    direction: str = "forward",
    device: str = "cpu",
) -> list[tuple[str, str | None]]:
    """Which implementation of "conv2d" will run, and why each faster one declines.

    Returns (name, reason) rows, fastest first; the last one, with reason None, is the one that
    runs. direction: "forward", "backward_input" or "backward_weight". device: "cpu", or "cuda",
    which knows the dtype "float16", too; "bfloat16" is known to both.
    """
    if op != "conv2d":
        raise ValueError(f"explain knows 'conv2d', got {op!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    module = cuda.kernels() if device == "cuda" else _C
    rows = module.explain_conv2d(
        [integer(v, "x_shape") for v in x_shape],
        [integer(v, "w_shape") for v in w_shape],
        *conv_sizes(stride, padding, dilation, groups),
        cuda.dtype_name(dtype),
        direction,
    )
    return [(name, reason or None) for name, reason in rows]


def conv2d_output_shape(
    x_shape: Any,
    w_shape: Any,
    stride: Any = 1,
    padding: PaddingLike = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, int, int, int]:
    """(N, K, P, Q) of :func:`conv2d` for these shapes; raises as conv2d does."""
    n, k, p, q = kernels.conv2d_output_shape(
        [integer(v, "x_shape") for v in x_shape],
        [integer(v, "w_shape") for v in w_shape],
        *conv_sizes(stride, padding, dilation, groups),
    )
    return n, k, p, q

"""Batch normalisation and its gradients (Ioffe and Szegedy, arXiv 1502.03167).

Shapes: x (N, C, H, W) or (N, C), vectors (C,). Dtype float32 or float64, the same for all arrays of
a call. Any strides; channels-last memory is the native layout and is answered in channels-last,
dense NCHW in NCHW.

All raise ValueError for shapes and values that do not fit (the message has them) and TypeError for
wrong dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import Array, integer, kernels, like, operand, pair
from ._inplace import writable


def _image(array: np.ndarray, name: str) -> np.ndarray:
    """A (N, C) array as images of one pixel."""
    if array.ndim not in (2, 4):
        raise ValueError(f"{name} must have shape (N, C) or (N, C, H, W), got {array.shape}")
    return array[:, :, None, None] if array.ndim == 2 else array


def _optional(x: Array | None, name: str) -> np.ndarray | None:
    return None if x is None else operand(x, name)


def _optional_image(x: Array | None, name: str) -> np.ndarray | None:
    return None if x is None else _image(operand(x, name), name)


def _with_rank(image: np.ndarray, ndim: int) -> np.ndarray:
    return image if ndim == 4 else image[:, :, 0, 0]


def scale_and_shift(
    mean: np.ndarray,
    var: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
    offset: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift): batch_norm(x + offset) = x * scale + shift, by running statistics.

    All (C,); computed in float64, returned in the dtype of mean.
    """
    scale = 1.0 / np.sqrt(var.astype(np.float64) + eps)
    if weight is not None:
        scale = scale * weight
    shift = scale * ((0.0 if offset is None else offset) - mean.astype(np.float64))
    if bias is not None:
        shift = shift + bias
    return scale.astype(mean.dtype), shift.astype(mean.dtype)


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
) -> Array:
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual).

    As torch.nn.functional.batch_norm, with residual and activation fused.

    In training mean and var (divisor M = N H W) are those of the batch, and the running statistics,
    where given, are updated in place: running = (1 - momentum) running + momentum new, with divisor
    M - 1 in running_var. Otherwise mean and var are the running statistics, which must be given.

    Args:
        residual: like x, added before the activation.
        activation: None, "relu", "relu6", "silu", "sigmoid", "tanh" or "hardswish".

    Raises:
        ValueError: also in training for a single value per channel.
    """
    if training:
        return batch_norm_train(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            momentum,
            eps,
            residual=residual,
            activation=activation,
        )[0]
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given unless training")
    array = operand(x, "input")
    y = kernels.batch_norm_eval(
        _image(array, "input"),
        operand(running_mean, "running_mean"),
        operand(running_var, "running_var"),
        _optional(weight, "weight"),
        _optional(bias, "bias"),
        float(eps),
        _optional_image(residual, "residual"),
        activation or "",
    )
    return like(_with_rank(y, array.ndim), x)


def batch_norm_train(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    moments: tuple[int, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """:func:`batch_norm` in training, and what its backward needs: (y, mean, rstd).

    mean and rstd = 1 / sqrt(var + eps) are those of the batch, (C,).

    moments: (M, mean, squares) of the whole batch where x is a part of it, or where they are known
        already: its values per channel, and what :func:`batch_norm_moments` gives for it.
        ValueError when M is 1 or below that of x.
    """
    array = operand(x, "input")
    y, mean, rstd = kernels.batch_norm_train(
        _image(array, "input"),
        _optional(weight, "weight"),
        _optional(bias, "bias"),
        None if running_mean is None else writable(running_mean, "running_mean"),
        None if running_var is None else writable(running_var, "running_var"),
        float(momentum),
        float(eps),
        _optional_image(residual, "residual"),
        activation or "",
        _given(moments),
    )
    return like(_with_rank(y, array.ndim), x), like(mean, x), like(rstd, x)


def _given(moments: tuple[int, Array, Array] | None) -> tuple[int, Any, Any] | None:
    if moments is None:
        return None
    count, mean, squares = moments
    return integer(count, "count"), operand(mean, "mean"), operand(squares, "squares")


def batch_norm_moments(x: Array) -> Array:
    """(2, C) float64: the mean of each channel, and its sum of squared distances from the mean."""
    return like(kernels.batch_norm_moments(_image(operand(x, "input"), "input")), x)


def batch_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    training: bool = True,
    needs: Any = (True, True, True, True),
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    """(dx, dweight, dbias, dresidual) of :func:`batch_norm`; None where `needs` says so.

    The activation's derivative is found again from x, mean, rstd, weight, bias and residual, which
    must be those of the forward pass; bias is not needed without an activation. dresidual is None
    without a residual. training: mean and rstd are functions of x; otherwise constants, 1 /
    sqrt(running_var + eps) being rstd.
    """
    flags = [bool(flag) for flag in needs]
    if len(flags) != 4:
        raise ValueError(f"needs must have 4 flags, got {needs!r}")
    array, gradient = operand(x, "input"), operand(dy, "dy")
    dx, dweight, dbias, dresidual = kernels.batch_norm_backward(
        _image(gradient, "dy"),
        _image(array, "input"),
        _optional(weight, "weight"),
        operand(mean, "mean"),
        operand(rstd, "rstd"),
        _optional(bias, "bias"),
        _optional_image(residual, "residual"),
        activation or "",
        bool(training),
        flags,
    )
    if array.ndim == 4 and gradient is dy:  # the usual case: an image in the kernels' own arrays
        return dx, dweight, dbias, dresidual
    return (
        None if dx is None else like(_with_rank(dx, array.ndim), dy),
        None if dweight is None else like(dweight, dy),
        None if dbias is None else like(dbias, dy),
        None if dresidual is None else like(_with_rank(dresidual, array.ndim), dy),
    )


def batch_norm_backward_sums(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> tuple[Array, Array | None]:
    """(sums, dresidual): the first half of :func:`batch_norm_backward` for a part of a batch.

    sums, (2, C) float64: with dz the gradient in front of the activation, the sum of dz and that of
    dz (x - mean). So dbias of this part is sums[0], and dweight is sums[1] * rstd. dresidual is dz;
    None without a residual.
    """
    array = operand(x, "input")
    sums, dresidual = kernels.batch_norm_backward_sums(
        _image(operand(dy, "dy"), "dy"),
        _image(array, "input"),
        _optional(weight, "weight"),
        operand(mean, "mean"),
        operand(rstd, "rstd"),
        _optional(bias, "bias"),
        _optional_image(residual, "residual"),
        activation or "",
    )
    dz = None if dresidual is None else like(_with_rank(dresidual, array.ndim), dy)
    return like(sums, dy), dz


def batch_norm_backward_input(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    sums: Array,
    count: int,
    *,
    bias: Array | None = None,
    activation: str | None = None,
) -> Array:
    """dx: the second half of :func:`batch_norm_backward` for a part of a batch.

    sums: those of :func:`batch_norm_backward_sums`, added up over all parts, which have `count`
        values per channel together.

    Where the forward had a residual, give dresidual of the first half as dy, and no activation.
    """
    array = operand(x, "input")
    both = operand(sums, "sums")
    if both.ndim != 2 or len(both) != 2:
        raise ValueError(f"sums must have shape (2, C), got {both.shape}")
    dx = kernels.batch_norm_backward_input(
        _image(operand(dy, "dy"), "dy"),
        _image(array, "input"),
        _optional(weight, "weight"),
        operand(mean, "mean"),
        operand(rstd, "rstd"),
        both[0],
        both[1],
        integer(count, "count"),
        _optional(bias, "bias"),
        activation or "",
    )
    return like(_with_rank(dx, array.ndim), dy)


def batch_norm_max_pool_train(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    kernel_size: Any,
    stride: Any = None,
    *,
    activation: str | None = None,
    moments: tuple[int, Array, Array] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """:func:`batch_norm_train` of images, and :func:`max_pool2d` of the result, in one pass.

    Without the normalised image in memory, and with the bits of the two. No padding; windows have
    at most 256 elements, and should not overlap: rows that two of them share are normalised twice.
    Returns (y, places, mean, rstd), y and places those of max_pool2d. moments: as for
    batch_norm_train.
    """
    kernel = pair(kernel_size, "kernel_size")
    y, places, mean, rstd = kernels.batch_norm_max_pool_train(
        operand(x, "input"),
        _optional(weight, "weight"),
        _optional(bias, "bias"),
        None if running_mean is None else writable(running_mean, "running_mean"),
        None if running_var is None else writable(running_var, "running_var"),
        float(momentum),
        float(eps),
        activation or "",
        kernel,
        kernel if stride is None else pair(stride, "stride"),
        _given(moments),
    )
    return like(y, x), like(places, x), like(mean, x), like(rstd, x)


def batch_norm_max_pool_backward(
    dy: Array,
    x: Array,
    places: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    kernel_size: Any,
    stride: Any = None,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    needs: Any = (True, True, True),
) -> tuple[Array | None, Array | None, Array | None]:
    """(dx, dweight, dbias) of :func:`batch_norm_max_pool_train`; None where `needs` says so.

    dy has the shape of y; places, mean and rstd are those of the forward pass, and x, weight, bias,
    kernel_size, stride and activation its arguments. Where the windows tile the image, on the CPU,
    the gradient of the normalised image is not made in memory.
    """
    flags = [bool(flag) for flag in needs]
    if len(flags) != 3:
        raise ValueError(f"needs must have 3 flags, got {needs!r}")
    kernel = pair(kernel_size, "kernel_size")
    gradients = kernels.batch_norm_max_pool_backward(
        operand(dy, "dy"),
        operand(x, "input"),
        operand(places, "places"),
        _optional(weight, "weight"),
        operand(mean, "mean"),
        operand(rstd, "rstd"),
        _optional(bias, "bias"),
        activation or "",
        kernel,
        kernel if stride is None else pair(stride, "stride"),
        flags,
    )
    dx, dweight, dbias = (None if g is None else like(g, dy) for g in gradients)
    return dx, dweight, dbias

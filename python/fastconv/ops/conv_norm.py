"""A convolution and the batch norm behind it, in training, as one call of the kernels each way."""

from __future__ import annotations

from typing import Any

from ._arrays import Array, kernels, operand
from ._inplace import writable
from .conv import ConvSizes

Pair = tuple[int, int]


def _optional(x: Array | None, name: str) -> Any:
    return None if x is None else operand(x, name)


def conv2d_batch_norm_train(
    x: Array,
    w: Array,
    conv_bias: Array | None,
    sizes: ConvSizes,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    residual: Array | None,
    activation: str | None,
    pool: tuple[Pair, Pair] | None,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """(y, z, mean, rstd, places): z = conv2d(x, w, conv_bias), and what is made of it.

    Without pool y, mean and rstd are those of `ops.batch_norm_train` of z, and places is None; with
    pool = (kernel size, stride), which excludes a residual, of `ops.batch_norm_max_pool_train`.
    sizes: as :func:`ops.conv.conv_sizes` gives them. Raises as those functions.
    """
    kernel, stride = pool or (None, None)
    results: tuple[Array, Array, Array, Array, Array | None] = kernels.conv2d_batch_norm_train(
        operand(x, "input"),
        operand(w, "weight"),
        _optional(conv_bias, "bias"),
        *sizes,
        _optional(weight, "weight"),
        _optional(bias, "bias"),
        None if running_mean is None else writable(running_mean, "running_mean"),
        None if running_var is None else writable(running_var, "running_var"),
        float(momentum),
        float(eps),
        _optional(residual, "residual"),
        activation or "",
        kernel,
        stride,
    )
    return results


def conv2d_batch_norm_backward(
    dy: Array,
    x: Array,
    w: Array,
    z: Array,
    sizes: ConvSizes,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    rstd: Array,
    residual: Array | None,
    activation: str | None,
    places: Array | None,
    pool: tuple[Pair, Pair] | None,
    needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:
    """Gradients of x, w, conv_bias (zero), weight, bias, residual; None where `needs` says so.

    dy has the shape of y; the others are the arguments and the results of the forward pass.
    """
    kernel, stride = pool or (None, None)
    gradients: tuple[Array | None, ...] = kernels.conv2d_batch_norm_backward(
        operand(dy, "dy"),
        operand(x, "input"),
        operand(w, "weight"),
        z,
        *sizes,
        _optional(weight, "weight"),
        _optional(bias, "bias"),
        mean,
        rstd,
        _optional(residual, "residual"),
        activation or "",
        places,
        kernel,
        stride,
        needs,
    )
    return gradients

"""Pooling and its gradients.

Shapes: x (N, C, H, W), y (N, C, P, Q). Dtype float32 or float64. Any strides; channels-last memory
is the native layout and is answered in channels-last, dense NCHW in NCHW. Sizes, ties and divisors
are PyTorch's.

All raise ValueError for shapes and sizes that do not fit (the message has the values) and TypeError
for wrong dtypes and for parameters that are not integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import Array, integer, kernels, like, operand, pair

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _window(kernel_size: Any, stride: Any, padding: Any) -> Window:
    """Kernel, stride (the kernel's size unless given) and padding as pairs."""
    kernel = pair(kernel_size, "kernel_size")
    return kernel, kernel if stride is None else pair(stride, "stride"), pair(padding, "padding")


def max_pool2d(
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    return_places: bool = False,
) -> Any:
    """Largest element of each window, as torch.nn.functional.max_pool2d.

    Size of y: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 on each axis,
    rounded up with ceil_mode, where the last window must start inside the image or the padding
    before it. Padding counts as -inf. The first of equal elements (row-major) is the maximum; NaN
    is larger than every number.

    Args:
        kernel_size, stride, padding, dilation: int or (height, width); stride None is kernel_size;
            padding at most half the kernel's size.
        return_indices: also return where the maxima are: int64, flat index in the H * W plane.
        return_places: in their stead a byte each, which is all that the backward needs of x: uint8,
            the number of the maximum among the elements of its window that lie in the image. For
            kernels of at most 256 elements.

    Returns:
        y, or (y, indices) or (y, places) of the same shape and layout.
    """
    if return_indices and return_places:
        raise ValueError("return_indices and return_places exclude each other, got both")
    y, where = kernels.max_pool2d(
        operand(x, "input"),
        *_window(kernel_size, stride, padding),
        pair(dilation, "dilation"),
        bool(ceil_mode),
        bool(return_indices),
        bool(return_places),
    )
    return like(y, x) if where is None else (like(y, x), like(where, x))


def max_pool2d_backward(
    dy: Array,
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    indices: Array | None = None,
    places: Array | None = None,
) -> Array:
    """dx of :func:`max_pool2d`, laid out like x: each dy goes to the maximum of its window.

    The maxima are found again in x; or taken from `indices` (int64, as returned by max_pool2d;
    ValueError if one lies outside the plane) or `places` (uint8, likewise; a number beyond the
    window's last drops its dy), and then x gives only shape and layout.
    """
    dx = kernels.max_pool2d_backward(
        operand(dy, "dy"),
        operand(x, "input"),
        *_window(kernel_size, stride, padding),
        pair(dilation, "dilation"),
        bool(ceil_mode),
        None if indices is None else operand(indices, "indices"),
        None if places is None else operand(places, "places"),
    )
    return like(dx, dy)


def avg_pool2d(
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Mean of each window, as torch.nn.functional.avg_pool2d. Sizes as :func:`max_pool2d`.

    The divisor is divisor_override if given; else the elements of the window in the padded image
    (not those that ceil_mode adds beyond it); else, with count_include_pad=False, those in the
    image.
    """
    y = kernels.avg_pool2d(
        operand(x, "input"),
        *_window(kernel_size, stride, padding),
        bool(ceil_mode),
        bool(count_include_pad),
        None if divisor_override is None else integer(divisor_override, "divisor_override"),
    )
    return like(y, x)


def avg_pool2d_backward(
    dy: Array,
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """dx of :func:`avg_pool2d`: each dy spread over its window. x gives only shape and layout."""
    dx = kernels.avg_pool2d_backward(
        operand(dy, "dy"),
        operand(x, "input"),
        *_window(kernel_size, stride, padding),
        bool(ceil_mode),
        bool(count_include_pad),
        None if divisor_override is None else integer(divisor_override, "divisor_override"),
    )
    return like(dx, dy)


def _output_size(output_size: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """A size of None is that of the input."""
    if len(shape) != 4:
        raise ValueError(f"input must have 4 dimensions, got shape {shape}")
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if len(sizes) != 2:
        raise ValueError(f"output_size must be one or two integers, got {output_size!r}")
    rows, columns = (
        extent if size is None else integer(size, "output_size")
        for size, extent in zip(sizes, shape[2:], strict=True)
    )
    return rows, columns


def adaptive_avg_pool2d(x: Array, output_size: Any) -> Array:
    """torch.nn.functional.adaptive_avg_pool2d: means over output_size windows covering the image.

    Window i of an axis is floor(i size / outputs) .. ceil((i + 1) size / outputs) - 1. output_size:
    int or (height, width); None is the size of the input.
    """
    array = operand(x, "input")
    return like(kernels.adaptive_avg_pool2d(array, _output_size(output_size, array.shape)), x)


def adaptive_avg_pool2d_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`adaptive_avg_pool2d`; dy has the output's size, x gives only its shape."""
    return like(kernels.adaptive_avg_pool2d_backward(operand(dy, "dy"), operand(x, "input")), dy)


def global_avg_pool2d(x: Array) -> Array:
    """Mean over the whole image: (N, C, H, W) -> (N, C, 1, 1)."""
    return adaptive_avg_pool2d(x, 1)


def global_avg_pool2d_backward(dy: Array, x: Array) -> Array:
    """dx of :func:`global_avg_pool2d`; dy (N, C, 1, 1), x gives shape and layout only."""
    gradient: np.ndarray = operand(dy, "dy")
    if gradient.shape[2:] != (1, 1):
        raise ValueError(f"dy must have shape (N, C, 1, 1), got {gradient.shape}")
    return adaptive_avg_pool2d_backward(dy, x)

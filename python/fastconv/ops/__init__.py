"""Operations on arrays, each with its backward as a function of its own, for people who bring their own autograd."""

from .conv import (
    conv2d,
    conv2d_backward,
    conv2d_output_shape,
    conv_transpose2d,
    conv_transpose2d_backward,
    explain,
)

__all__ = [
    "conv2d",
    "conv2d_backward",
    "conv2d_output_shape",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "explain",
]

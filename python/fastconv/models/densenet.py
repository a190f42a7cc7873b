"""DenseNet-BC: Huang, Liu, van der Maaten, Weinberger, "Densely connected convolutional networks",
2016 (arXiv 1608.06993), table 1. Names and arguments are those of torchvision's DenseNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastconv import functional as F
from fastconv import init
from fastconv.folding import on_cpu
from fastconv.models._image_size import check_image_size
from fastconv.nn import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
    channels_last,
    conv_norm,
)
from fastconv.ops.dropout import check_probability
from fastconv.tensor import Tensor


class DenseLayer(Module):
    """conv2(relu(norm2(conv1(relu(norm1(x)))))): a 1x1 to bn_size * growth_rate channels, a 3x3 to
    growth_rate new ones, then dropout. Each batch norm applies its ReLU in its own pass."""

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float
    ) -> None:
        width = bn_size * growth_rate
        self.norm1 = BatchNorm2d(num_input_features)
        self.conv1 = Conv2d(num_input_features, width, 1, bias=False)
        self.norm2 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: Any, *, moments: F.Moments | None = None) -> Tensor:
        """moments: those of x, where they are known already, in training."""
        y = self.norm1(x, activation="relu", moments=moments)
        y = self.conv2(conv_norm(self.conv1, self.norm2, y, activation="relu"))
        return F.dropout(y, self.drop_rate, self.training)


class DenseBlock(Module):
    """Layers that each see the channels of the block's input and of all layers before them.

    The channels are joined as they grow, so a layer's backward splits its gradient in two, not in
    as many parts as there are layers before it. In training, the statistics that each layer's batch
    norm would find of the channels it shares with others are found once.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
    ) -> None:
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = DenseLayer(channels, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Any) -> Tensor:
        features = F.as_tensor(x)
        layers = list(self.children())
        known: dict[str, F.Moments] = {}
        if on_cpu(features) and all(map(_finds_moments, layers)):
            known["moments"] = F.moments(features)
        for layer in layers:
            new = layer(features, **known)
            features = F.cat([features, new])
            if known and layer is not layers[-1]:
                count, mean, squares = known["moments"]
                _, new_mean, new_squares = F.moments(new)
                joined = np.concatenate((mean, new_mean)), np.concatenate((squares, new_squares))
                known["moments"] = (count, *joined)
        return features


def _finds_moments(layer: Module) -> bool:
    """Whether the batch norm of a layer would take the statistics of this process's batch."""
    # Exact types: a subclass may have a forward of its own.
    if type(layer) is not DenseLayer or type(layer.norm1) is not BatchNorm2d:
        return False
    return layer.norm1.training and layer.norm1.communicator is None


class Transition(Sequential):
    """Batch norm, ReLU, a 1x1 convolution and 2x2 average pooling between two dense blocks."""

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        self.norm = BatchNorm2d(num_input_features)
        self.relu = ReLU()
        self.conv = Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = AvgPool2d(2)


class DenseNet(Module):
    """A 7x7 convolution, max pooling, four dense blocks with transitions, a dense layer.

    growth_rate: channels that a layer adds.
    block_config: layers of each block.
    num_init_features: channels of the first convolution.
    bn_size: channels of a layer's 1x1 convolution, in growth rates.
    drop_rate: dropout behind each layer of a block.
    memory_efficient: recomputing the joined channels in the backward pass is not implemented:
        ValueError when True.
    image_size: at least 29.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        check_image_size("DenseNet", image_size, 29)
        check_probability("dropout", drop_rate)
        if memory_efficient:
            raise ValueError(
                "memory_efficient=True (recomputing in the backward pass) is not supported"
            )
        features = Sequential()
        features.add_module(
            "conv0", Conv2d(in_channels, num_init_features, 7, stride=2, padding=3, bias=False)
        )
        features.add_module("norm0", BatchNorm2d(num_init_features))
        features.add_module("relu0", ReLU())
        features.add_module("pool0", MaxPool2d(3, stride=2, padding=1))
        channels = num_init_features
        for i, layers in enumerate(block_config, 1):
            block = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate)
            features.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            if i < len(block_config):
                features.add_module(f"transition{i}", Transition(channels, channels // 2))
                channels //= 2
        features.add_module("norm5", BatchNorm2d(channels))
        self.features = features
        self.classifier = Linear(channels, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Conv2d):
                layer.weight.data = channels_last(init.kaiming_normal_fan_in(layer.weight.shape))
            elif isinstance(layer, Linear) and layer.bias is not None:
                layer.bias.data[...] = 0

    def forward(self, x: Any) -> Tensor:
        y = F.global_avg_pool2d(F.relu(self.features(x)))
        logits: Tensor = self.classifier(F.flatten(y, 1))
        return logits


def densenet121(**settings: Any) -> DenseNet:
    """Blocks of 6, 12, 24 and 16 layers, 8.0 million parameters. Settings: those of DenseNet."""
    return DenseNet(32, (6, 12, 24, 16), 64, **settings)


def densenet161(**settings: Any) -> DenseNet:
    """Blocks of 6, 12, 36 and 24 layers with growth rate 48, 28.7 million parameters."""
    return DenseNet(48, (6, 12, 36, 24), 96, **settings)


def densenet169(**settings: Any) -> DenseNet:
    """Blocks of 6, 12, 32 and 32 layers, 14.1 million parameters. Settings: those of DenseNet."""
    return DenseNet(32, (6, 12, 32, 32), 64, **settings)


def densenet201(**settings: Any) -> DenseNet:
    """Blocks of 6, 12, 48 and 32 layers, 20.0 million parameters. Settings: those of DenseNet."""
    return DenseNet(32, (6, 12, 48, 32), 64, **settings)

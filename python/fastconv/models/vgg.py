"""VGG: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
recognition", 2014.

Names, arguments and state_dict keys are torchvision's; `in_channels` and `image_size` are what
every model here takes besides.
"""

from __future__ import annotations

from typing import Any

from fastconv import init
from fastconv.models._initial import kaiming_normal_fan_out
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
)
from fastconv.tensor import Tensor

# Convolutions in each of the five groups between poolings: the columns A, B, D, E of table 1.
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(Module):
    """Convolutions (see `make_features`), a mean over 7x7 parts, three dense layers.

    features: ends in 512 channels.
    init_weights: normal weights, fan out for the convolutions and deviation 0.01 for the dense
        layers, and zero biases; else PyTorch's defaults of the layers.
    """

    def __init__(
        self,
        features: Module,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
    ) -> None:
        self.features = features
        self.avgpool = AdaptiveAvgPool2d(7)
        self.flatten = Flatten()
        self.classifier = Sequential(
            Linear(_WIDTHS[-1] * 7 * 7, 4096),
            ReLU(),
            Dropout(dropout),
            Linear(4096, 4096),
            ReLU(),
            Dropout(dropout),
            Linear(4096, num_classes),
        )
        if init_weights:
            self.apply(_initialise)

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(x))))
        return logits


def _initialise(module: Module) -> None:
    if isinstance(module, Conv2d):
        kaiming_normal_fan_out(module)
    elif isinstance(module, Linear):
        module.weight.data = init.normal(module.weight.shape, 0.01)
        assert module.bias is not None
        module.bias.data[...] = 0


def make_features(depth: int, batch_norm: bool = False, in_channels: int = 3) -> Sequential:
    """Five groups of 3x3 convolutions with ReLU, each with a 2x2 pooling behind it.

    depth: 11, 13, 16 or 19 layers with weights, of which three are VGG's dense ones.
    batch_norm: one behind every convolution.
    """
    layers: list[Module] = []
    channels = in_channels
    for width, count in zip(_WIDTHS, _DEPTHS[depth], strict=True):
        for _ in range(count):
            layers += [Conv2d(channels, width, 3, padding=1)]
            layers += [BatchNorm2d(width), ReLU()] if batch_norm else [ReLU()]
            channels = width
        layers += [MaxPool2d(2)]
    return Sequential(*layers)


def _vgg(
    depth: int,
    batch_norm: bool = False,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    **settings: Any,
) -> VGG:
    if image_size < 32:
        raise ValueError(f"VGG needs images of at least 32x32, got image_size={image_size}")
    return VGG(make_features(depth, batch_norm, in_channels), **settings)


# The settings of all of these: num_classes, init_weights and dropout of VGG, in_channels, and
# image_size, at least 32; other sizes than 224 are averaged to the 7x7 that the dense layers see.


def vgg11(**settings: Any) -> VGG:
    """Configuration A, 132.9M parameters."""
    return _vgg(11, **settings)


def vgg11_bn(**settings: Any) -> VGG:
    """Configuration A with batch norm."""
    return _vgg(11, True, **settings)


def vgg13(**settings: Any) -> VGG:
    """Configuration B, 133.0M parameters."""
    return _vgg(13, **settings)


def vgg13_bn(**settings: Any) -> VGG:
    """Configuration B with batch norm."""
    return _vgg(13, True, **settings)


def vgg16(**settings: Any) -> VGG:
    """Configuration D, 138.4M parameters."""
    return _vgg(16, **settings)


def vgg16_bn(**settings: Any) -> VGG:
    """Configuration D with batch norm."""
    return _vgg(16, True, **settings)


def vgg19(**settings: Any) -> VGG:
    """Configuration E, 143.7M parameters."""
    return _vgg(19, **settings)


def vgg19_bn(**settings: Any) -> VGG:
    """Configuration E with batch norm."""
    return _vgg(19, True, **settings)

"""AlexNet as torchvision has it (Krizhevsky, "One weird trick for parallelizing convolutional
neural networks", 2014) and the original of 2012 with its local response normalisation.

`in_channels` and `image_size` are what every model here takes besides.
"""

from __future__ import annotations

from typing import Any

from fastconv import init
from fastconv.nn import (
    AdaptiveAvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
    channels_last,
)
from fastconv.tensor import Tensor


class AlexNet(Module):
    """torchvision's: five convolutions, three overlapping poolings, three dense layers.

    image_size: at least 63; other sizes than 224 are averaged to the 6x6 that the dense layers see.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        _check(image_size)
        self.features = Sequential(
            Conv2d(in_channels, 64, 11, stride=4, padding=2),
            ReLU(),
            MaxPool2d(3, stride=2),
            Conv2d(64, 192, 5, padding=2),
            ReLU(),
            MaxPool2d(3, stride=2),
            Conv2d(192, 384, 3, padding=1),
            ReLU(),
            Conv2d(384, 256, 3, padding=1),
            ReLU(),
            Conv2d(256, 256, 3, padding=1),
            ReLU(),
            MaxPool2d(3, stride=2),
        )
        self.avgpool = AdaptiveAvgPool2d(6)
        self.flatten = Flatten()
        self.classifier = _classifier(num_classes, dropout)

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(x))))
        return logits


class AlexNetLRN(Module):
    """The original: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional
    neural networks", 2012.

    Section 3.5: the second, fourth and fifth convolution have two groups, each of which sees the
    maps of one of the paper's two GPUs; response normalisation follows the first two convolutions,
    pooling follows both normalisations and the fifth convolution. Section 3.3: the constants of the
    normalisation, k = 2, n = 5, alpha = 1e-4, beta = 0.75; `LocalResponseNorm` divides its alpha by
    n, the paper does not. Section 3.4: overlapping pooling. Section 5: the initial weights.
    image_size: as for `AlexNet`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        _check(image_size)
        self.features = Sequential(
            Conv2d(in_channels, 96, 11, stride=4, padding=2),
            ReLU(),
            LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
            MaxPool2d(3, stride=2),
            Conv2d(96, 256, 5, padding=2, groups=2),
            ReLU(),
            LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
            MaxPool2d(3, stride=2),
            Conv2d(256, 384, 3, padding=1),
            ReLU(),
            Conv2d(384, 384, 3, padding=1, groups=2),
            ReLU(),
            Conv2d(384, 256, 3, padding=1, groups=2),
            ReLU(),
            MaxPool2d(3, stride=2),
        )
        self.avgpool = AdaptiveAvgPool2d(6)
        self.flatten = Flatten()
        self.classifier = _classifier(num_classes, dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Section 5: normal weights; biases of 1 give most ReLUs positive inputs at first."""
        layers = [m for m in self.modules() if isinstance(m, Conv2d | Linear)]
        for number, layer in enumerate(layers, 1):
            weight = init.normal(layer.weight.shape, 0.01)
            layer.weight.data = channels_last(weight) if isinstance(layer, Conv2d) else weight
            assert layer.bias is not None
            layer.bias.data[...] = 1 if number in (2, 4, 5, 6, 7) else 0

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(x))))
        return logits


def _check(image_size: int) -> None:
    if image_size < 63:
        raise ValueError(f"AlexNet needs images of at least 63x63, got image_size={image_size}")


def _classifier(num_classes: int, dropout: float) -> Sequential:
    return Sequential(
        Dropout(dropout),
        Linear(256 * 6 * 6, 4096),
        ReLU(),
        Dropout(dropout),
        Linear(4096, 4096),
        ReLU(),
        Linear(4096, num_classes),
    )

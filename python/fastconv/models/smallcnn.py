"""Two small networks for 32x32 images: SmallCNN, and the layer stack of the textbooks."""

from __future__ import annotations

from typing import Any

from fastconv.nn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
    Softmax,
)
from fastconv.tensor import Tensor, no_grad


def _size_after_two_pools(model: str, image_size: int) -> int:
    if image_size < 4:
        raise ValueError(f"{model} needs images of at least 4x4, got image_size={image_size}")
    return image_size // 2 // 2


class SmallCNN(Module):
    """Two convolutions and two dense layers, 545,290 parameters at the default settings.

    [3x3 CONV -> batch norm -> ReLU -> 2x2 POOL] with 32 and 64 channels -> DENSE 128 -> ReLU ->
    DROPOUT -> DENSE classes.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        dropout: float = 0.5,
    ) -> None:
        size = _size_after_two_pools("SmallCNN", image_size)
        self.features = Sequential(
            Conv2d(in_channels, 32, 3, padding=1),
            BatchNorm2d(32),
            ReLU(),
            MaxPool2d(2),
            Conv2d(32, 64, 3, padding=1),
            BatchNorm2d(64),
            ReLU(),
            MaxPool2d(2),
        )
        self.classifier = Sequential(
            Flatten(),
            Linear(64 * size * size, 128),
            ReLU(),
            Dropout(dropout),
            Linear(128, num_classes),
        )

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class TextbookStack(Module):
    """The usual stack: 3x3 convolutions that keep the size, 2x2 max pooling, dense layers.

    INPUT -> [CONV 32 -> ReLU] x2 -> POOL -> CONV 64 -> ReLU -> POOL -> FLATTEN -> DENSE 128 -> ReLU
    -> DROPOUT -> DENSE classes -> SOFTMAX.

    Calling the model stops before the SOFTMAX, in training and in evaluation: the cross-entropy
    loss wants logits, and computes the softmax itself without overflow. At inference `predict` adds
    the SOFTMAX.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        dropout: float = 0.5,
    ) -> None:
        size = _size_after_two_pools("TextbookStack", image_size)
        self.layers = Sequential(
            Conv2d(in_channels, 32, 3, padding="same"),
            ReLU(),
            Conv2d(32, 32, 3, padding="same"),
            ReLU(),
            MaxPool2d(2),
            Conv2d(32, 64, 3, padding="same"),
            ReLU(),
            MaxPool2d(2),
            Flatten(),
            Linear(64 * size * size, 128),
            ReLU(),
            Dropout(dropout),
            Linear(128, num_classes),
        )
        self.softmax = Softmax(dim=1)

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits

    @no_grad()
    def predict(self, x: Any) -> Tensor:
        """Class probabilities [N, classes] in evaluation mode; all modes are left as they were."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            probabilities: Tensor = self.softmax(self(x))
        finally:
            for module, training in modes:
                module.training = training
        return probabilities

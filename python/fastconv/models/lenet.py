"""LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document
recognition", 1998, sec. II.B.
"""

from __future__ import annotations

from typing import Any

from fastconv.nn import AvgPool2d, Conv2d, Flatten, Linear, Module, Sequential, Tanh
from fastconv.tensor import Tensor


class LeNet5(Module):
    """Two 5x5 convolutions with mean pooling and three dense layers.

    28x28 images are padded to the paper's 32x32. Of the paper's form, the pooling here has no
    weights of its own, the second convolution sees all six maps, and the output is logits instead
    of distances.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 32, num_classes: int = 10) -> None:
        padding = 2 if image_size == 28 else 0
        size = ((image_size + 2 * padding - 4) // 2 - 4) // 2
        if size < 1:
            raise ValueError(f"LeNet5 needs images of at least 16x16, got image_size={image_size}")
        self.features = Sequential(
            Conv2d(in_channels, 6, 5, padding=padding),
            Tanh(),
            AvgPool2d(2),
            Conv2d(6, 16, 5),
            Tanh(),
            AvgPool2d(2),
        )
        self.classifier = Sequential(
            Flatten(),
            Linear(16 * size * size, 120),
            Tanh(),
            Linear(120, 84),
            Tanh(),
            Linear(84, num_classes),
        )

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits

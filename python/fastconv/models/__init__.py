"""Models by name: `create(name, in_channels=3, image_size=32, num_classes=10, ...)`.

Every model takes these three arguments; images are [N, in_channels, image_size, image_size] and the
result is [N, num_classes] logits. To add a model, write it in a file of this folder and give it a
line in `_MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastconv.models.lenet import LeNet5
from fastconv.models.resnet import BasicBlock, ResNet, resnet8_cifar, resnet20_cifar
from fastconv.models.smallcnn import SmallCNN, TextbookStack
from fastconv.nn import Module

__all__ = [
    "BasicBlock",
    "LeNet5",
    "ResNet",
    "SmallCNN",
    "TextbookStack",
    "available",
    "create",
    "resnet8_cifar",
    "resnet20_cifar",
]

_MODELS: dict[str, Callable[..., Module]] = {
    "lenet5": LeNet5,
    "resnet8_cifar": resnet8_cifar,
    "resnet20_cifar": resnet20_cifar,
    "smallcnn": SmallCNN,
    "textbook_stack": TextbookStack,
}


def available() -> list[str]:
    """The names that `create` knows."""
    return sorted(_MODELS)


def create(name: str, **settings: Any) -> Module:
    """A new model with weights from the library's random numbers. ValueError: unknown name."""
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of: {', '.join(available())}")
    return _MODELS[name](**settings)

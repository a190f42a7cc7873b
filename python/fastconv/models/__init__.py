"""Models by name: `create(name, in_channels=3, image_size=32, num_classes=10, ...)`.

Every model takes these three arguments; images are [N, in_channels, image_size, image_size] and the
result is [N, num_classes] logits. Models that torchvision has, have its names, constructor
arguments, defaults (1000 classes), initial distributions and state_dict keys. To add a model, write
it in a file of this folder and give it a line in `_MODELS` and one in `tests/architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastconv.models.alexnet import AlexNet, AlexNetLRN
from fastconv.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
)
from fastconv.models.efficientnet import (
    EfficientNet,
    MBConvConfig,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
)
from fastconv.models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from fastconv.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from fastconv.models.inception import Inception3, InceptionOutputs, inception_v3
from fastconv.models.lenet import LeNet5
from fastconv.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet8_cifar,
    resnet18,
    resnet18_cifar,
    resnet20_cifar,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)
from fastconv.models.smallcnn import SmallCNN, TextbookStack
from fastconv.models.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from fastconv.models.vit import PatchEmbedding
from fastconv.nn import Module

__all__ = [
    "VGG",
    "AlexNet",
    "AlexNetLRN",
    "BasicBlock",
    "Bottleneck",
    "DenseNet",
    "EfficientNet",
    "EfficientNetLite",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception3",
    "InceptionOutputs",
    "LeNet5",
    "MBConvConfig",
    "PatchEmbedding",
    "ResNet",
    "SmallCNN",
    "TextbookStack",
    "available",
    "create",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "googlenet",
    "inception_v3",
    "resnet8_cifar",
    "resnet18",
    "resnet18_cifar",
    "resnet20_cifar",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
]

_MODELS: dict[str, Callable[..., Module]] = {
    "alexnet": AlexNet,
    "alexnet_lrn": AlexNetLRN,
    "efficientnet_lite0": efficientnet_lite0,
    "densenet121": densenet121,
    "densenet161": densenet161,
    "densenet169": densenet169,
    "densenet201": densenet201,
    "efficientnet_b0": efficientnet_b0,
    "efficientnet_b1": efficientnet_b1,
    "efficientnet_b2": efficientnet_b2,
    "efficientnet_b3": efficientnet_b3,
    "efficientnet_b4": efficientnet_b4,
    "efficientnet_b5": efficientnet_b5,
    "efficientnet_b6": efficientnet_b6,
    "efficientnet_b7": efficientnet_b7,
    "googlenet": googlenet,
    "inception_v3": inception_v3,
    "lenet5": LeNet5,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet18": resnet18,
    "resnet18_cifar": resnet18_cifar,
    "resnet20_cifar": resnet20_cifar,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet8_cifar": resnet8_cifar,
    "resnext50_32x4d": resnext50_32x4d,
    "smallcnn": SmallCNN,
    "textbook_stack": TextbookStack,
    "vgg11": vgg11,
    "vgg11_bn": vgg11_bn,
    "vgg13": vgg13,
    "vgg13_bn": vgg13_bn,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "vgg19": vgg19,
    "vgg19_bn": vgg19_bn,
    "wide_resnet50_2": wide_resnet50_2,
}


def available() -> list[str]:
    """The names that `create` knows."""
    return sorted(_MODELS)


def create(name: str, **settings: Any) -> Module:
    """A new model with weights from the library's random numbers. ValueError: unknown name."""
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of: {', '.join(available())}")
    return _MODELS[name](**settings)

"""Small residual networks for 32x32 images.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015, section 4.2. Names are
those of torchvision's ResNet ("layer1.0.conv1.weight", "layer2.0.downsample.0.weight").
Where the shape changes, the shortcut is a 1x1 convolution with batch norm (the paper's option B).
"""

from __future__ import annotations

from typing import Any

from fastconv import init
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Module,
    Sequential,
    channels_last,
)
from fastconv.tensor import Tensor


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Conv2d:
    padding = kernel_size // 2
    conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    conv.weight.data = channels_last(init.kaiming_normal_fan_out(conv.weight.shape))
    return conv


class BasicBlock(Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Each batch norm applies its ReLU, and the second one the sum, in its own pass over memory.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.downsample: Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = Sequential(
                _conv(in_channels, channels, 1, stride), BatchNorm2d(channels)
            )

    def forward(self, x: Any) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), activation="relu")
        result: Tensor = self.bn2(self.conv2(y), residual=shortcut, activation="relu")
        return result


class ResNet(Module):
    """A 3x3 convolution, stages of blocks with 16, 32 and 64 channels, global mean, dense layer.

    blocks: residual blocks a stage; the depth is 6 blocks + 2. Any image size; `image_size` is
    there because every model takes it.
    """

    def __init__(
        self, blocks: int, in_channels: int = 3, image_size: int = 32, num_classes: int = 10
    ) -> None:
        if blocks < 1 or image_size < 1:
            raise ValueError(f"blocks and image_size must be positive, got {blocks}, {image_size}")
        self.conv1 = _conv(in_channels, 16, 3)
        self.bn1 = BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = AdaptiveAvgPool2d(1)
        self.flatten = Flatten()
        self.fc = Linear(64, num_classes)

    def forward(self, x: Any) -> Tensor:
        y = self.bn1(self.conv1(x), activation="relu")
        y = self.layer3(self.layer2(self.layer1(y)))
        logits: Tensor = self.fc(self.flatten(self.avgpool(y)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def resnet8_cifar(**settings: Any) -> ResNet:
    """One block a stage, 78k parameters. Settings: in_channels, image_size, num_classes."""
    return ResNet(1, **settings)


def resnet20_cifar(**settings: Any) -> ResNet:
    """Three blocks a stage, 272k parameters. Settings: in_channels, image_size, num_classes."""
    return ResNet(3, **settings)

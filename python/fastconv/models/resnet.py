"""Residual networks: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015.

Names, arguments and state_dict keys are torchvision's ("layer1.0.conv1.weight",
"layer2.0.downsample.0.weight"). As there, a `Bottleneck` has its stride in the 3x3 convolution, not
in the paper's first 1x1, and a shortcut that changes shape is a 1x1 convolution with batch norm
(the paper's option B).

Beyond torchvision: `in_channels` and `image_size`, which every model here takes, and the forms for
32x32 images of section 4.2, with a 3x3 stem without pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastconv.models._initial import kaiming_normal_fan_out
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Identity,
    Linear,
    MaxPool2d,
    Module,
    Sequential,
    conv_norm,
)
from fastconv.tensor import Tensor

NormLayer = Callable[[int], Module]


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Conv2d:
    """Without bias, padded so that stride 1 keeps the size."""
    padding = kernel_size // 2 * dilation
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
    )
    return kaiming_normal_fan_out(conv)


class BasicBlock(Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Each batch norm applies its ReLU, and the second one the sum, in its own pass over memory; so a
    `norm_layer` takes `activation` and `residual` as `BatchNorm2d` does.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = BatchNorm2d,
    ) -> None:
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                "BasicBlock needs groups=1, base_width=64 and dilation=1, "
                f"got {groups}, {base_width} and {dilation}"
            )
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x: Any) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = conv_norm(self.conv1, self.bn1, x, activation="relu")
        return conv_norm(self.conv2, self.bn2, y, shortcut, activation="relu")


class Bottleneck(Module):
    """1x1 to few channels, 3x3 with the stride, 1x1 to 4 * planes, plus the shortcut.

    groups, base_width: the 3x3 convolution has groups * planes * base_width / 64 channels (ResNeXt:
        Xie et al. 2017; wide ResNet: Zagoruyko and Komodakis 2016). Fused as `BasicBlock`.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = BatchNorm2d,
    ) -> None:
        width = planes * base_width // 64 * groups
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Any) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = conv_norm(self.conv1, self.bn1, x, activation="relu")
        y = conv_norm(self.conv2, self.bn2, y, activation="relu")
        return conv_norm(self.conv3, self.bn3, y, shortcut, activation="relu")


class ResNet(Module):
    """Stem, stages of residual blocks, global mean, dense layer.

    block, layers: `BasicBlock` or `Bottleneck`, and how many of them each stage has.
    zero_init_residual: every block starts as its shortcut, the last batch norm's scale being 0
        (Goyal et al. 2017, "Accurate, large minibatch SGD", section 5.1).
    groups, width_per_group: see `Bottleneck`.
    replace_stride_with_dilation: for each stage but the first, whether its convolutions look
        further apart instead of halving the size.
    norm_layer: makes a normalisation of so many channels that is called as `BatchNorm2d` is.
    in_channels, image_size: of the images; any size will do.
    widths: channels of the stages, before `block.expansion`.
    small_images: a 3x3 convolution without pooling as the stem, for 32x32 images, instead of a 7x7
        one of stride 2 and a pooling.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer = BatchNorm2d,
        *,
        in_channels: int = 3,
        image_size: int = 224,
        widths: Sequence[int] = (64, 128, 256, 512),
        small_images: bool = False,
    ) -> None:
        if len(layers) != len(widths) or min(layers) < 1:
            raise ValueError(f"layers must be {len(widths)} positive numbers, got {layers}")
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        dilate = replace_stride_with_dilation or [False] * (len(widths) - 1)
        if len(dilate) != len(widths) - 1:
            raise ValueError(
                f"replace_stride_with_dilation must have {len(widths) - 1} elements, got {dilate}"
            )
        self.conv1 = _conv(in_channels, widths[0], *((3,) if small_images else (7, 2)))
        self.bn1 = norm_layer(widths[0])
        self.maxpool = Identity() if small_images else MaxPool2d(3, stride=2, padding=1)
        settings: dict[str, Any] = {
            "groups": groups,
            "base_width": width_per_group,
            "norm_layer": norm_layer,
        }
        inplanes, dilation = widths[0], 1
        for i, (planes, count) in enumerate(zip(widths, layers, strict=True)):
            stride, first_dilation = (1 if i == 0 else 2), dilation
            if i > 0 and dilate[i - 1]:
                stride, dilation = 1, dilation * 2
            outplanes = planes * block.expansion
            downsample = None
            if stride != 1 or inplanes != outplanes:
                downsample = Sequential(
                    _conv(inplanes, outplanes, 1, stride), norm_layer(outplanes)
                )
            blocks = [
                block(inplanes, planes, stride, downsample, dilation=first_dilation, **settings)
            ]
            blocks += [
                block(outplanes, planes, dilation=dilation, **settings) for _ in range(count - 1)
            ]
            setattr(self, f"layer{i + 1}", Sequential(*blocks))
            inplanes = outplanes
        self.avgpool = AdaptiveAvgPool2d(1)
        self.flatten = Flatten()
        self.fc = Linear(inplanes, num_classes)
        self._stages = len(widths)
        if zero_init_residual:
            self.apply(_zero_last_scale)

    def forward(self, x: Any) -> Tensor:
        y = self.maxpool(conv_norm(self.conv1, self.bn1, x, activation="relu"))
        for i in range(self._stages):
            y = getattr(self, f"layer{i + 1}")(y)
        logits: Tensor = self.fc(self.flatten(self.avgpool(y)))
        return logits


def _zero_last_scale(module: Module) -> None:
    if isinstance(module, BasicBlock | Bottleneck):
        norm = module.bn2 if isinstance(module, BasicBlock) else module.bn3
        weight = getattr(norm, "weight", None)  # None without affine parameters
        if weight is not None:
            weight.data[...] = 0


# The settings of all of these are the keyword arguments of ResNet.


def resnet18(**settings: Any) -> ResNet:
    """18 layers, 11.7M parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **settings)


def resnet34(**settings: Any) -> ResNet:
    """34 layers, 21.8M parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **settings)


def resnet50(**settings: Any) -> ResNet:
    """50 layers, 25.6M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **settings)


def resnet101(**settings: Any) -> ResNet:
    """101 layers, 44.5M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **settings)


def resnet152(**settings: Any) -> ResNet:
    """152 layers, 60.2M parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **settings)


def resnext50_32x4d(**settings: Any) -> ResNet:
    """ResNet-50 with 32 groups of 4 channels in its 3x3 convolutions, 25.0M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4, **settings})


def wide_resnet50_2(**settings: Any) -> ResNet:
    """ResNet-50 with twice the channels in its 3x3 convolutions, 68.9M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"width_per_group": 128, **settings})


_SMALL_IMAGES: dict[str, Any] = {"num_classes": 10, "image_size": 32, "small_images": True}


def resnet8_cifar(**settings: Any) -> ResNet:
    """For 32x32 images: stages of 16, 32 and 64 channels, one block each, 78k parameters."""
    return ResNet(BasicBlock, (1, 1, 1), **{**_SMALL_IMAGES, "widths": (16, 32, 64), **settings})


def resnet20_cifar(**settings: Any) -> ResNet:
    """For 32x32 images: stages of 16, 32 and 64 channels, three blocks each, 272k parameters."""
    return ResNet(BasicBlock, (3, 3, 3), **{**_SMALL_IMAGES, "widths": (16, 32, 64), **settings})


def resnet18_cifar(**settings: Any) -> ResNet:
    """ResNet-18 with a 3x3 stem and no pooling, for 32x32 images, 11.2M parameters."""
    return resnet18(**{**_SMALL_IMAGES, **settings})

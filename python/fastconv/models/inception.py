"""Inception v3: Szegedy et al., "Rethinking the Inception architecture for computer vision", 2015
(arXiv 1512.00567), section 6.

Names and arguments are those of torchvision's Inception3. Blocks A, C and E keep the size of the
image, B and D halve it; C and E have 1xn and nx1 convolutions in place of nxn (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastconv import functional as F
from fastconv.models._image_size import check_image_size
from fastconv.models.googlenet import (
    BasicConv2d,
    check_transform_input,
    init_normal,
    normalized_to_unit,
)
from fastconv.nn import AdaptiveAvgPool2d, AvgPool2d, Dropout, Linear, MaxPool2d, Module
from fastconv.tensor import Tensor

ConvBlock = Callable[..., Module]


class InceptionOutputs(NamedTuple):
    """Logits [N, num_classes] of the main head and of the auxiliary one, in training."""

    logits: Tensor
    aux_logits: Tensor


class Inception3(Module):
    """Eleven Inception blocks; an auxiliary head that only training uses.

    aux_logits: with the auxiliary head. Then calling the model in training returns
        InceptionOutputs, and needs images of 299x299; otherwise logits.
    transform_input: as GoogLeNet's.
    inception_blocks: the classes of convolutions, of the blocks A to E, and of the auxiliary head.
    init_weights: normal weights of standard deviation 0.1, in the auxiliary head's dense layer
        0.001; False leaves every layer's own.
    dropout: before the dense layer.
    image_size: at least 75.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        inception_blocks: Sequence[Callable[..., Module]] | None = None,
        init_weights: bool = True,
        dropout: float = 0.5,
        *,
        in_channels: int = 3,
        image_size: int = 299,
    ) -> None:
        check_image_size("Inception3", image_size, 75)
        check_transform_input(transform_input, in_channels)
        blocks = _BLOCKS if inception_blocks is None else inception_blocks
        if len(blocks) != 7:
            raise ValueError(f"inception_blocks must be 7 classes, got {len(blocks)}: {blocks!r}")
        conv, block_a, block_b, block_c, block_d, block_e, aux = blocks
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = conv(in_channels, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.maxpool1 = MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.maxpool2 = MaxPool2d(3, stride=2)
        self.Mixed_5b = block_a(192, pool_features=32)
        self.Mixed_5c = block_a(256, pool_features=64)
        self.Mixed_5d = block_a(288, pool_features=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, channels_7x7=128)
        self.Mixed_6c = block_c(768, channels_7x7=160)
        self.Mixed_6d = block_c(768, channels_7x7=160)
        self.Mixed_6e = block_c(768, channels_7x7=192)
        self.AuxLogits = aux(768, num_classes) if aux_logits else None
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280)
        self.Mixed_7c = block_e(2048)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = Dropout(dropout)
        self.fc = Linear(2048, num_classes)
        if init_weights:
            init_normal(self, 0.1)
            if isinstance(self.AuxLogits, InceptionAux):
                init_normal(self.AuxLogits.fc, 0.001)

    def forward(self, x: Any) -> Tensor | InceptionOutputs:
        x = normalized_to_unit(x) if self.transform_input else x
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        aux = self.AuxLogits(x) if self.AuxLogits is not None and self.training else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = F.flatten(self.dropout(self.avgpool(x)), 1)
        logits: Tensor = self.fc(x)
        return logits if aux is None else InceptionOutputs(logits, aux)


class InceptionA(Module):
    """1x1, 5x5, two 3x3, and average pooling, side by side."""

    def __init__(
        self, in_channels: int, pool_features: int, conv_block: ConvBlock | None = None
    ) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.branch1x1 = conv(in_channels, 64, kernel_size=1)
        self.branch5x5_1 = conv(in_channels, 48, kernel_size=1)
        self.branch5x5_2 = conv(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, kernel_size=3, padding=1)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, pool_features, kernel_size=1)

    def forward(self, x: Any) -> Tensor:
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return F.cat([one, five, double, self.branch_pool(self.pool(x))])


class InceptionB(Module):
    """3x3 and two 3x3, both with stride 2, and max pooling, side by side."""

    def __init__(self, in_channels: int, conv_block: ConvBlock | None = None) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.branch3x3 = conv(in_channels, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, kernel_size=3, stride=2)
        self.pool = MaxPool2d(3, stride=2)

    def forward(self, x: Any) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return F.cat([self.branch3x3(x), double, self.pool(x)])


class InceptionC(Module):
    """1x1, 1x7 -> 7x1, twice 7x1 -> 1x7, and average pooling, side by side."""

    def __init__(
        self, in_channels: int, channels_7x7: int, conv_block: ConvBlock | None = None
    ) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        c7 = channels_7x7
        row: dict[str, Any] = {"kernel_size": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = conv(in_channels, 192, kernel_size=1)
        self.branch7x7_1 = conv(in_channels, c7, kernel_size=1)
        self.branch7x7_2 = conv(c7, c7, **row)
        self.branch7x7_3 = conv(c7, 192, **column)
        self.branch7x7dbl_1 = conv(in_channels, c7, kernel_size=1)
        self.branch7x7dbl_2 = conv(c7, c7, **column)
        self.branch7x7dbl_3 = conv(c7, c7, **row)
        self.branch7x7dbl_4 = conv(c7, c7, **column)
        self.branch7x7dbl_5 = conv(c7, 192, **row)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, 192, kernel_size=1)

    def forward(self, x: Any) -> Tensor:
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return F.cat([one, seven, double, self.branch_pool(self.pool(x))])


class InceptionD(Module):
    """3x3, and 1x7 -> 7x1 -> 3x3, both with stride 2, and max pooling, side by side."""

    def __init__(self, in_channels: int, conv_block: ConvBlock | None = None) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.branch3x3_1 = conv(in_channels, 192, kernel_size=1)
        self.branch3x3_2 = conv(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = conv(in_channels, 192, kernel_size=1)
        self.branch7x7x3_2 = conv(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(192, 192, kernel_size=3, stride=2)
        self.pool = MaxPool2d(3, stride=2)

    def forward(self, x: Any) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return F.cat([three, seven, self.pool(x)])


class InceptionE(Module):
    """1x1, 1x3 beside 3x1, 3x3 -> 1x3 beside 3x1, and average pooling, side by side."""

    def __init__(self, in_channels: int, conv_block: ConvBlock | None = None) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        row: dict[str, Any] = {"kernel_size": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel_size": (3, 1), "padding": (1, 0)}
        self.branch1x1 = conv(in_channels, 320, kernel_size=1)
        self.branch3x3_1 = conv(in_channels, 384, kernel_size=1)
        self.branch3x3_2a = conv(384, 384, **row)
        self.branch3x3_2b = conv(384, 384, **column)
        self.branch3x3dbl_1 = conv(in_channels, 448, kernel_size=1)
        self.branch3x3dbl_2 = conv(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, **row)
        self.branch3x3dbl_3b = conv(384, 384, **column)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, 192, kernel_size=1)

    def forward(self, x: Any) -> Tensor:
        one = self.branch1x1(x)
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [one, self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return F.cat([*parts, self.branch_pool(self.pool(x))])


class InceptionAux(Module):
    """The auxiliary head on the 17x17 grid: average pooling, 1x1, 5x5, a dense layer."""

    def __init__(
        self, in_channels: int, num_classes: int, conv_block: ConvBlock | None = None
    ) -> None:
        conv = BasicConv2d if conv_block is None else conv_block
        self.pool = AvgPool2d(5, stride=3)
        self.conv0 = conv(in_channels, 128, kernel_size=1)
        self.conv1 = conv(128, 768, kernel_size=5)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(768, num_classes)

    def forward(self, x: Any) -> Tensor:
        if min(x.shape[2:]) < 17:
            raise ValueError(
                "training Inception3 with its auxiliary head needs images of at least 299x299, "
                f"which give it 17x17; got {x.shape[2]}x{x.shape[3]}: use aux_logits=False"
            )
        logits: Tensor = self.fc(F.flatten(self.avgpool(self.conv1(self.conv0(self.pool(x)))), 1))
        return logits


_BLOCKS = (BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, InceptionAux)


def inception_v3(**settings: Any) -> Inception3:
    """Inception v3, 27.2 million parameters, 23.8 without the auxiliary head. Settings: those of
    Inception3."""
    return Inception3(**settings)

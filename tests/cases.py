"""One list of shapes for the tests and the benchmark: convolutions, transposed ones, pooling.

Letters as everywhere in fastconv: x[N, C, H, W], w[K, C/groups, R, S], y[N, K, P, Q].

`RESNET50`, `VGG16`, `SMALLCNN`, ... hold every distinct convolution of the network with the number
of times it occurs, `KINDS` layers of other networks, a few of each kind; `NETWORKS` finds them by
the name that the benchmark's --set takes. `CONV_CASES` and the sweeps are small shapes chosen to
break kernels: tails, odd geometry, and the shapes on which other libraries failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Pair = tuple[int, int]
Sides = tuple[Pair, Pair]  # ((top, bottom), (left, right))


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class ConvCase:
    """One 2-D convolution. `count`: how often the layer occurs in its network."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int | Pair = 1
    padding: int | Pair | Sides | str = 0
    dilation: int | Pair = 1
    groups: int = 1
    count: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        sides, step, spread = self.sides, pair(self.stride), pair(self.dilation)
        size = [
            (extent + sum(sides[i]) - (kernel - 1) * spread[i] - 1) // step[i] + 1
            for i, (extent, kernel) in enumerate([(self.h, self.r), (self.w, self.s)])
        ]
        return self.n, self.k, size[0], size[1]

    @property
    def sides(self) -> Sides:
        """The padding as ((top, bottom), (left, right))."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            return self._same(0), self._same(1)
        if isinstance(self.padding, int):
            return (self.padding, self.padding), (self.padding, self.padding)
        assert not isinstance(self.padding, str)
        first, second = self.padding
        if isinstance(first, int):
            assert isinstance(second, int)
            return (first, first), (second, second)
        assert not isinstance(second, int)
        return first, second

    def _same(self, axis: int) -> Pair:
        """TensorFlow's SAME: ceil(size / stride) outputs, the odd padding at the end."""
        extent, kernel = ((self.h, self.r), (self.w, self.s))[axis]
        step, spread = pair(self.stride)[axis], pair(self.dilation)[axis]
        outputs = -(-extent // step)
        total = max((outputs - 1) * step + (kernel - 1) * spread + 1 - extent, 0)
        return total // 2, total - total // 2

    @property
    def arguments(self) -> dict[str, object]:
        """The keyword arguments of conv2d, conv2d_backward and explain."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def macs(self) -> int:
        """Multiply-adds of one pass (forward or one of the gradients), padding counted."""
        n, k, p, q = self.y_shape
        return n * k * p * q * (self.c // self.groups) * self.r * self.s

    @property
    def products(self) -> dict[str, int]:
        """K of the error limits: how many products one element of each result adds up."""
        n, _, p, q = self.y_shape
        return {
            "y": self.c // self.groups * self.r * self.s,
            "dx": self.k // self.groups * self.r * self.s,
            "dw": n * p * q,
            "db": n * p * q,
        }


# -------------------------------------------------------------------------------------------------
# Networks. Every distinct convolution at its real size.


def _layer(size: int, c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> ConvCase:
    return ConvCase("", 1, c, size, size, k, kernel, kernel, stride, kernel // 2, 1, groups)


def _network(name: str, batch: int, layers: Iterable[ConvCase]) -> list[ConvCase]:
    """The distinct layers in order of first use, named and counted."""

    def named(layer: ConvCase, count: int) -> ConvCase:
        kind = "dw" if layer.groups > 1 else f"{layer.c}-{layer.k}"
        title = f"{name}/{kind}{layer.c if layer.groups > 1 else ''}_{layer.r}x{layer.s}"
        title += f"_{layer.h}" + (f"_s{layer.stride}" if layer.stride != 1 else "")
        return replace(layer, name=title, n=batch, count=count)

    return [named(layer, count) for layer, count in Counter(layers).items()]


def _resnet50() -> Iterable[ConvCase]:
    """torchvision's ResNet-50: the stride sits in the 3x3 convolution."""
    yield _layer(224, 3, 64, 7, stride=2)
    size, channels = 56, 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            yield _layer(size, channels, width, 1)
            yield _layer(size, width, width, 3, stride)
            yield _layer(size // stride, width, 4 * width, 1)
            if block == 0:
                yield _layer(size, channels, 4 * width, 1, stride)
            size, channels = size // stride, 4 * width


def _vgg16() -> Iterable[ConvCase]:
    size, channels = 224, 3
    for width, convolutions in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        for _ in range(convolutions):
            yield _layer(size, channels, width, 3)
            channels = width
        size //= 2


def _mobilenet_v1() -> Iterable[ConvCase]:
    yield _layer(224, 3, 32, 3, stride=2)
    size, channels = 112, 32
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    widths += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    for width, stride in widths:
        yield _layer(size, channels, channels, 3, stride, groups=channels)
        size //= stride
        yield _layer(size, channels, width, 1)
        channels = width


def _mobilenet_v2() -> Iterable[ConvCase]:
    yield _layer(224, 3, 32, 3, stride=2)
    size, channels = 112, 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    stages += [(6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, width, blocks, first_stride in stages:
        for block in range(blocks):
            stride, hidden = first_stride if block == 0 else 1, expand * channels
            if expand > 1:
                yield _layer(size, channels, hidden, 1)
            yield _layer(size, hidden, hidden, 3, stride, groups=hidden)
            size //= stride
            yield _layer(size, hidden, width, 1)
            channels = width
    yield _layer(size, channels, 1280, 1)


def _resnet_cifar(widths: Sequence[int], blocks: int) -> Iterable[ConvCase]:
    """A ResNet of basic blocks for images of 32 x 32."""
    size, channels = 32, widths[0]
    yield _layer(size, 3, channels, 3)
    for width in widths:
        for block in range(blocks):
            stride = 2 if block == 0 and width > widths[0] else 1
            yield _layer(size, channels, width, 3, stride)
            yield _layer(size // stride, width, width, 3)
            if stride == 2:
                yield _layer(size, channels, width, 1, stride)
            size, channels = size // stride, width


def _densenet121() -> Iterable[ConvCase]:
    yield _layer(224, 3, 64, 7, stride=2)
    size, channels = 56, 64
    for layers in (6, 12, 24, 16):
        for _ in range(layers):
            yield _layer(size, channels, 128, 1)
            yield _layer(size, 128, 32, 3)
            channels += 32
        if size > 7:
            yield _layer(size, channels, channels // 2, 1)
            size, channels = size // 2, channels // 2


def _googlenet() -> Iterable[ConvCase]:
    """torchvision's GoogLeNet without the auxiliary heads: 3x3 where the paper has 5x5."""
    yield _layer(224, 3, 64, 7, stride=2)
    yield _layer(56, 64, 64, 1)
    yield _layer(56, 64, 192, 3)
    channels = 192
    for size, one, reduce3, three, reduce5, five, pooled in [
        (28, 64, 96, 128, 16, 32, 32),
        (28, 128, 128, 192, 32, 96, 64),
        (14, 192, 96, 208, 16, 48, 64),
        (14, 160, 112, 224, 24, 64, 64),
        (14, 128, 128, 256, 24, 64, 64),
        (14, 112, 144, 288, 32, 64, 64),
        (14, 256, 160, 320, 32, 128, 128),
        (7, 256, 160, 320, 32, 128, 128),
        (7, 384, 192, 384, 48, 128, 128),
    ]:
        yield _layer(size, channels, one, 1)
        for reduced, width in ((reduce3, three), (reduce5, five)):
            yield _layer(size, channels, reduced, 1)
            yield _layer(size, reduced, width, 3)
        yield _layer(size, channels, pooled, 1)
        channels = one + three + five + pooled


def _efficientnet_b0() -> Iterable[ConvCase]:
    """The two 1x1 of squeeze and excitation are dense layers in disguise and left out."""
    yield _layer(224, 3, 32, 3, stride=2)
    size, channels = 112, 32
    stages = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)]
    stages += [(6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)]
    for expand, kernel, first_stride, width, blocks in stages:
        for block in range(blocks):
            stride, hidden = first_stride if block == 0 else 1, expand * channels
            if expand > 1:
                yield _layer(size, channels, hidden, 1)
            yield _layer(size, hidden, hidden, kernel, stride, groups=hidden)
            size //= stride
            yield _layer(size, hidden, width, 1)
            channels = width
    yield _layer(size, channels, 1280, 1)


def _kinds() -> list[ConvCase]:
    """Layers of AlexNet, Inception, DeepLab, ResNeXt and others: the kinds that the networks above
    lack or have once."""

    def kind(n: int, size: int, c: int, k: int, kernel: Pair, **more: Any) -> ConvCase:
        r, s = kernel
        spread = more.get("dilation", 1)
        title = f"kinds/{c}-{k}_{r}x{s}_{size}"
        for letter, word in (("s", "stride"), ("d", "dilation"), ("g", "groups")):
            title += f"_{letter}{more[word]}" if word in more else ""
        settings = {"padding": (r // 2 * spread, s // 2 * spread), **more}
        return ConvCase(title, n, c, size, size, k, r, s, **settings)

    return [
        kind(8, 27, 64, 192, (5, 5)),
        kind(8, 35, 48, 64, (5, 5)),
        kind(8, 28, 128, 128, (5, 5)),
        kind(8, 28, 256, 256, (3, 3), dilation=2),
        kind(2, 28, 512, 512, (3, 3), dilation=4),
        kind(8, 56, 64, 64, (3, 3), dilation=2),
        kind(8, 17, 128, 128, (1, 7)),
        kind(8, 17, 192, 192, (7, 1)),
        kind(8, 35, 288, 384, (3, 3), stride=2, padding=0),
        kind(8, 56, 64, 128, (3, 3), stride=2),
        kind(8, 28, 128, 256, (3, 3), stride=2),
        kind(4, 56, 64, 64, (7, 7)),
        kind(8, 56, 128, 128, (3, 3), groups=32),
        kind(8, 28, 256, 256, (3, 3), groups=32),
        kind(8, 14, 512, 512, (3, 3), groups=32),
        kind(8, 14, 1024, 1024, (3, 3), stride=2, groups=32),
        kind(8, 27, 96, 256, (5, 5), groups=2),
        kind(8, 56, 32, 32, (3, 3)),
        kind(8, 56, 32, 64, (3, 3)),
        kind(8, 56, 16, 32, (3, 3)),
    ]


RESNET18_CIFAR = _network("resnet18_cifar", 32, _resnet_cifar((64, 128, 256, 512), 2))
RESNET20_CIFAR = _network("resnet20_cifar", 128, _resnet_cifar((16, 32, 64), 3))
RESNET50 = _network("resnet50", 8, _resnet50())
VGG16 = _network("vgg16", 4, _vgg16())
SMALLCNN = _network("smallcnn", 128, [_layer(32, 3, 32, 3), _layer(16, 32, 64, 3)])
MOBILENET_V1 = _network("mobilenet_v1", 8, _mobilenet_v1())
MOBILENET_V2 = _network("mobilenet_v2", 8, _mobilenet_v2())
MOBILENET = MOBILENET_V1 + MOBILENET_V2
DENSENET121 = _network("densenet121", 8, _densenet121())
GOOGLENET = _network("googlenet", 8, _googlenet())
EFFICIENTNET_B0 = _network("efficientnet_b0", 8, _efficientnet_b0())
KINDS = _kinds()

NETWORKS: dict[str, list[ConvCase]] = {
    "resnet50": RESNET50,
    "vgg16": VGG16,
    "smallcnn": SMALLCNN,
    "mobilenet": MOBILENET,
    "mobilenet_v1": MOBILENET_V1,
    "mobilenet_v2": MOBILENET_V2,
    "resnet18_cifar": RESNET18_CIFAR,
    "resnet20_cifar": RESNET20_CIFAR,
    "densenet121": DENSENET121,
    "googlenet": GOOGLENET,
    "efficientnet_b0": EFFICIENTNET_B0,
    "kinds": KINDS,
}


def reduced_network_layers() -> list[ConvCase]:
    """Every kernel of the networks (channels, window, stride, groups) once, on a small image."""
    small = {}
    for layer in RESNET50 + VGG16 + SMALLCNN + MOBILENET:
        key = (layer.c, layer.k, layer.r, layer.stride, layer.groups)
        name = "{}-{}_{}x{}_s{}_g{}".format(*key[:3], layer.s, *key[3:])
        side = 15 if layer.c <= 64 else 9 if layer.c <= 256 else 7
        small[key] = replace(layer, name=name, n=2 if layer.c <= 64 else 1, h=side, w=side - 1)
    return list(small.values())


# -------------------------------------------------------------------------------------------------
# Convolutions that break kernels.

_C = ConvCase

CONV_GEOMETRY = [
    _C("1x1", 2, 5, 6, 7, 4, 1, 1),
    _C("3x3", 2, 5, 6, 7, 4, 3, 3, padding=1),
    _C("3x3_valid", 1, 16, 9, 10, 16, 3, 3),
    _C("5x5", 2, 9, 8, 9, 6, 5, 5, padding=2),
    _C("7x7_s2", 1, 3, 17, 18, 20, 7, 7, stride=2, padding=3),
    _C("2x2_even", 2, 8, 6, 7, 8, 2, 2),
    _C("4x4_even_s2_p1", 2, 8, 9, 8, 8, 4, 4, stride=2, padding=1),
    _C("stride_3", 2, 7, 14, 16, 5, 3, 3, stride=3, padding=1),
    _C("stride_2_1", 2, 7, 9, 8, 5, 3, 3, stride=(2, 1), padding=(0, 2)),
    _C("stride_1_3", 2, 7, 9, 11, 5, 3, 3, stride=(1, 3), padding=(2, 0)),
    _C("stride_beyond_kernel", 2, 6, 15, 13, 9, 2, 3, stride=(5, 4), padding=1),
    _C("stride_7_1x1", 1, 6, 15, 16, 9, 1, 1, stride=7),
    _C("dilation_2", 2, 8, 11, 10, 6, 3, 3, padding=2, dilation=2),
    _C("dilation_3_1", 1, 8, 13, 10, 6, 3, 3, padding=(3, 1), dilation=(3, 1)),
    _C("dilation_1_4_s2", 1, 8, 10, 17, 6, 3, 3, stride=2, padding=(1, 4), dilation=(1, 4)),
    _C("dilation_2_s2_g2", 2, 8, 13, 12, 6, 3, 3, stride=2, padding=2, dilation=2, groups=2),
    _C("1x7", 1, 10, 9, 12, 7, 1, 7, padding=(0, 3)),
    _C("7x1", 1, 10, 12, 9, 7, 7, 1, padding=(3, 0)),
    _C("1x3_s2", 1, 18, 5, 21, 7, 1, 3, stride=2, padding=(0, 1)),
    _C("5x3", 1, 12, 10, 9, 20, 5, 3, padding=(2, 1)),
    _C("11x11_s4", 1, 3, 35, 37, 12, 11, 11, stride=4, padding=2),
]

CONV_PADDING = [
    _C("sides", 2, 6, 7, 8, 5, 3, 3, padding=((0, 2), (1, 3))),
    _C("sides_s2", 2, 6, 8, 9, 5, 3, 3, stride=2, padding=((1, 0), (0, 2))),
    _C("sides_1x1", 1, 6, 5, 4, 5, 1, 1, padding=((1, 0), (2, 0))),
    _C("sides_depthwise", 1, 6, 7, 8, 6, 3, 3, padding=((2, 0), (0, 1)), groups=6),
    _C("sides_rgb", 1, 3, 7, 8, 6, 3, 3, padding=((2, 0), (0, 1))),
    _C("same_odd", 1, 6, 7, 8, 5, 3, 3, padding="same"),
    _C("same_even_kernel", 1, 6, 7, 8, 5, 2, 4, padding="same"),
    _C("same_s2_even", 2, 6, 8, 10, 5, 3, 3, stride=2, padding="same"),
    _C("same_s2_odd", 2, 6, 7, 9, 5, 3, 3, stride=2, padding="same"),
    _C("same_s3_dilated", 1, 6, 11, 13, 5, 3, 2, stride=3, padding="same", dilation=2),
    _C("same_stride_beyond_kernel", 1, 6, 9, 10, 5, 2, 1, stride=4, padding="same"),
    _C("same_depthwise_s2", 1, 16, 10, 11, 16, 3, 3, stride=2, padding="same", groups=16),
    _C("valid", 1, 6, 7, 8, 5, 3, 3, stride=2, padding="valid"),
    _C("padding_beyond_kernel", 1, 6, 4, 5, 8, 3, 3, padding=5),
    _C("padding_beyond_image", 1, 6, 2, 3, 8, 3, 3, padding=7),
    _C("padding_beyond_image_s3", 1, 6, 2, 3, 8, 3, 3, stride=3, padding=7),
    _C("padding_beyond_depthwise", 1, 20, 3, 2, 20, 3, 3, padding=6, groups=20),
    _C("padding_beyond_rgb", 1, 3, 3, 2, 20, 3, 3, padding=6),
    _C("padding_1x1", 1, 6, 3, 4, 8, 1, 1, padding=2),
    _C("padding_1x1_s2", 1, 6, 4, 3, 8, 1, 1, stride=2, padding=3),
    _C("image_1x1_s2_kernel_1x1", 3, 6, 1, 1, 5, 1, 1, stride=2),
    _C("column_s1x2_kernel_1x1", 2, 6, 5, 1, 4, 1, 1, stride=(1, 2)),
    _C("row_s2x1_kernel_1x1", 2, 6, 1, 5, 4, 1, 1, stride=(2, 1)),
    _C("streamed_s2", 1, 5, 261, 259, 32, 3, 3, stride=2, padding=1),
    _C("window_without_data", 1, 5, 1, 1, 4, 2, 2, stride=1, padding=4, dilation=3),
]

CONV_GROUPS = [
    _C("groups_2", 2, 6, 7, 8, 4, 3, 3, padding=1, groups=2),
    _C("groups_3_s2", 2, 9, 8, 9, 12, 3, 3, stride=2, padding=1, groups=3),
    _C("groups_few_channels", 2, 32, 6, 7, 64, 3, 3, padding=1, groups=8),
    _C("groups_k16", 1, 24, 6, 7, 48, 3, 3, padding=1, groups=3),
    _C("groups_1x1", 2, 24, 6, 7, 36, 1, 1, groups=4),
    _C("groups_1x1_s2", 2, 24, 7, 6, 36, 1, 1, stride=2, groups=4),
    # Several groups in a vector: tails of vectors and tiles, more channels than one band has.
    _C("groups_of_4", 2, 40, 9, 20, 40, 3, 3, padding=1, groups=10),
    _C("groups_of_4_5x5_s2", 1, 72, 11, 18, 72, 5, 5, stride=2, padding=2, groups=18),
    _C("groups_of_2_1xn", 1, 6, 5, 9, 6, 1, 4, groups=3),
    _C("groups_of_2_dilated", 1, 12, 9, 17, 12, 3, 3, padding=2, dilation=2, groups=6),
    _C("groups_of_8", 1, 24, 6, 7, 24, 3, 3, padding=1, groups=3),
    _C("groups_of_16_s2", 1, 32, 9, 8, 32, 3, 3, stride=2, padding=1, groups=2),
    # Groups of whole vectors, a few of which share a packed band: more than one has, unevenly.
    _C("groups_of_16", 2, 80, 7, 9, 80, 3, 3, padding=1, groups=5),
    _C("groups_of_32_s2", 2, 96, 7, 9, 120, 3, 3, stride=2, padding=1, groups=3),
    _C("groups_of_16_s3_5x5", 1, 80, 10, 8, 80, 5, 5, stride=3, padding=2, groups=5),
    _C("groups_wide", 1, 66, 5, 6, 70, 3, 3, padding=1, groups=2),
    _C("depthwise", 2, 19, 8, 9, 19, 3, 3, padding=1, groups=19),
    _C("depthwise_24_s2", 2, 24, 9, 9, 24, 3, 3, stride=2, padding=1, groups=24),
    _C("depthwise_5x5", 1, 33, 9, 10, 33, 5, 5, padding=2, groups=33),
    _C("depthwise_5x5_s2", 1, 40, 9, 10, 40, 5, 5, stride=2, padding=2, groups=40),
    _C("depthwise_7x7", 1, 16, 9, 10, 16, 7, 7, padding=3, groups=16),
    _C("depthwise_dilated", 1, 20, 9, 10, 20, 3, 3, padding=2, dilation=2, groups=20),
    _C("depthwise_s3_dilated", 1, 20, 12, 11, 20, 3, 3, stride=3, padding=2, dilation=2, groups=20),
    _C("depthwise_1x1", 2, 18, 5, 6, 18, 1, 1, groups=18),
    _C("depthwise_2x2_s2", 2, 18, 7, 6, 18, 2, 2, stride=2, groups=18),
    _C("depthwise_1xn", 1, 18, 5, 12, 18, 1, 5, padding=(0, 2), groups=18),
    _C("depthwise_4x4", 1, 18, 7, 16, 18, 4, 4, padding=1, groups=18),
    _C("depthwise_rows_dilated", 1, 18, 9, 8, 18, 3, 3, padding=(2, 1), dilation=(2, 1), groups=18),
    _C("depthwise_s1x3", 1, 18, 7, 13, 18, 3, 3, stride=(1, 3), padding=1, groups=18),
    _C("depthwise_s3x1", 1, 18, 13, 7, 18, 3, 3, stride=(3, 1), padding=1, groups=18),
    # Outputs that are written around the cache.
    _C("depthwise_streamed", 1, 64, 65, 64, 64, 3, 3, padding=1, groups=64),
    _C("depthwise_streamed_s2", 2, 64, 47, 48, 64, 3, 3, stride=2, padding=1, groups=64),
    _C("depthwise_wide", 1, 200, 5, 6, 200, 3, 3, padding=1, groups=200),
    _C("depthwise_image_1x1", 2, 17, 1, 1, 17, 3, 3, padding=1, groups=17),
    _C("multiplier_2", 2, 10, 7, 8, 20, 3, 3, padding=1, groups=10),
    _C("multiplier_3_s2", 1, 17, 8, 7, 51, 3, 3, stride=2, padding=1, groups=17),
    _C("one_channel_multiplier_4", 2, 1, 7, 8, 4, 3, 3, padding=1),
    _C("groups_one_output_each", 1, 12, 6, 7, 4, 3, 3, padding=1, groups=4),
]

CONV_EXTREMES = [
    # Taps that read nothing but padding, of columns, of rows and of both.
    _C("image_in_padding", 2, 18, 2, 3, 20, 7, 7, padding=3),
    _C("image_in_padding_s2", 1, 18, 3, 2, 34, 5, 7, stride=2, padding=(2, 4)),
    _C("kernel_is_image", 2, 6, 5, 7, 9, 5, 7),
    _C("kernel_is_image_wide", 3, 40, 4, 4, 70, 4, 4),
    _C("kernel_is_padded_image", 1, 6, 5, 7, 9, 7, 9, padding=1),
    _C("image_1x1", 2, 20, 1, 1, 12, 1, 1),
    _C("image_1x1_3x3", 2, 20, 1, 1, 12, 3, 3, padding=1),
    _C("one_row", 1, 9, 1, 40, 7, 1, 3, padding=(0, 1)),
    _C("one_column", 1, 9, 40, 1, 7, 3, 1, padding=(1, 0)),
    _C("one_row_3x3", 1, 17, 1, 70, 33, 3, 3, padding=1),
    _C("one_column_3x3", 1, 17, 70, 1, 33, 3, 3, padding=1),
    _C("long_row", 1, 4, 2, 517, 5, 3, 3, padding=1),
    _C("long_row_16", 1, 16, 2, 517, 16, 3, 3, padding=1),
    _C("long_row_1x1", 1, 5, 1, 1031, 18, 1, 1),
    _C("huge_stride", 2, 9, 20, 21, 6, 3, 3, stride=100, padding=1),
    _C("huge_stride_1x1", 2, 9, 20, 21, 6, 1, 1, stride=1000),
    _C("huge_dilation", 1, 6, 33, 35, 5, 2, 2, dilation=31),
    _C("dilation_on_1x1", 1, 6, 5, 6, 5, 1, 1, dilation=50),
    _C("huge_dilation_depthwise", 1, 18, 33, 35, 18, 2, 2, dilation=31, groups=18),
    _C("many_channels", 1, 600, 5, 6, 70, 3, 3, padding=1),
    _C("many_outputs", 1, 70, 5, 6, 600, 3, 3, padding=1),
    _C("many_channels_1x1", 2, 1050, 5, 3, 33, 1, 1),
    _C("many_outputs_1x1", 2, 33, 5, 3, 1050, 1, 1),
    _C("many_channels_1x1_s2", 2, 1050, 5, 4, 33, 1, 1, stride=2),
    _C("many_outputs_1x1_s2", 2, 33, 6, 3, 1050, 1, 1, stride=(2, 3)),
    _C("many_channels_groups_1x1", 1, 1100, 3, 5, 40, 1, 1, groups=2),
    _C("many_images", 37, 5, 3, 4, 6, 3, 3, padding=1),
    _C("many_images_rgb", 37, 3, 6, 5, 6, 3, 3, padding=1),
    _C("single_channels", 3, 1, 6, 7, 1, 3, 3, padding=1),
    _C("rgb_wide_image", 1, 3, 9, 70, 17, 3, 3, padding=1),
    _C("rgb_five", 1, 3, 12, 13, 40, 5, 5, stride=(1, 2), padding=2),
    _C("rgb_dilated", 1, 3, 12, 13, 33, 3, 3, padding=2, dilation=2),
    _C("rgb_one_output", 1, 3, 9, 8, 1, 3, 3, padding=1),
    _C("rgba_1x1", 2, 4, 7, 6, 35, 1, 1),
    _C("grey_one_output", 2, 1, 9, 21, 1, 3, 3, padding=1),
    _C("grey_5x5_wide", 1, 1, 6, 270, 18, 5, 5, padding=2),
    _C("rgb_dilated_rows", 1, 3, 13, 9, 20, 3, 3, padding=2, dilation=(3, 1)),
    _C("rgb_beside_the_caches", 1, 3, 128, 129, 32, 3, 3, padding=1),
    _C("1x1_beside_the_caches", 1, 5, 128, 129, 32, 1, 1),
    # More blocks of pixels than partial sums of the weight gradient; both factors are packed.
    _C("1x1_many_pixels", 1, 26, 60, 61, 41, 1, 1),
    _C("1x1_many_pixels_s2", 1, 41, 120, 61, 26, 1, 1, stride=(2, 1)),
    _C("two_channels_s2", 2, 2, 11, 10, 21, 3, 3, stride=2, padding=1),
]

# The input gradient where rows and columns at the end meet no window: (H + 2p - k) % s != 0.
CONV_LEFTOVERS = [
    _C(
        f"leftover_{kind}_k{r}s{stride}_{extra}",
        1,
        c,
        2 * stride + r - 2 * pad + extra,
        3 * stride + r - 2 * pad + (extra + 1) % stride,
        k,
        r,
        r,
        stride=stride,
        padding=pad,
        groups=groups,
    )
    for kind, c, k, groups in [("dense", 9, 7, 1), ("depthwise", 18, 18, 18), ("rgb", 3, 8, 1)]
    for r, stride, pad in [(3, 2, 1), (3, 3, 0), (1, 2, 0), (2, 3, 0), (5, 4, 2)]
    for extra in range(1, stride)
]

# 1x1 kernels over 1 to 32 pixels: dense layers, squeeze-excitation, and one pixel more.
CONV_FEW_PIXELS = [
    _C(f"few_pixels_{n}x{h}x{w}_c{c}_k{k}", n, c, h, w, k, 1, 1)
    for n, h, w, c, k in [
        (1, 1, 1, 200, 70),
        (1, 1, 2, 17, 25),
        (3, 1, 1, 33, 24),
        (1, 2, 2, 64, 7),
        (5, 1, 1, 1, 10),
        (2, 1, 3, 5, 1),
        (7, 1, 1, 300, 50),
        (2, 2, 2, 16, 49),
        (1, 3, 3, 40, 30),
        (32, 1, 1, 100, 26),
        (3, 1, 11, 20, 30),
    ]
]

# Shapes on which PyTorch, oneDNN, MLX and others once failed.
CONV_REGRESSIONS = [
    _C("pytorch_25101", 1, 10, 6, 6, 8, 3, 3, stride=2, padding=1),
    _C("pytorch_50042_c23", 2, 23, 8, 8, 23, 3, 3, stride=2, padding=1, groups=23),
    _C("pytorch_50042_c24", 2, 24, 8, 8, 24, 3, 3, stride=2, padding=1, groups=24),
    _C("pytorch_50042_c25", 2, 25, 8, 8, 25, 3, 3, stride=2, padding=1, groups=25),
    _C("pytorch_50042_c48", 2, 48, 8, 8, 48, 3, 3, stride=2, padding=1, groups=48),
    _C("pytorch_19912", 2, 16, 6, 6, 32, 3, 3, padding=1, groups=4),
    _C("pytorch_19912_wide", 1, 48, 5, 5, 64, 3, 3, padding=1, groups=16),
    _C("mlx_3800", 2, 8, 9, 9, 8, 3, 3, stride=2, padding=1, groups=2),
    _C("mlx_3800_dilated", 2, 8, 11, 11, 8, 3, 3, stride=2, padding=2, dilation=2, groups=4),
    _C("pytorch_51430", 3, 12, 6, 6, 18, 3, 3, padding=1, groups=6),
    _C("pytorch_68868", 3, 30, 5, 5, 60, 1, 1, groups=5),
    _C("onednn_6035_c4", 2, 4, 7, 7, 20, 1, 1, stride=2),
    _C("onednn_6035_c8", 2, 8, 7, 7, 24, 1, 1, stride=2),
    _C("onednn_6035_c13", 2, 13, 8, 7, 16, 1, 1, stride=2),
    _C("onednn_wide_stride_dilation", 1, 24, 31, 30, 3, 11, 11, 4, (5, 20), (1, 2)),
    _C("onednn_1x1_huge_stride", 1, 32, 14, 14, 32, 1, 1, stride=(13, 9)),
    _C("pytorch_120211", 1, 3, 1, 64, 32, 1, 9, padding=(0, 4)),
]

CONV_EMPTY = [
    _C("empty_batch", 0, 5, 6, 7, 4, 3, 3, padding=1),
    _C("empty_batch_depthwise", 0, 16, 6, 7, 16, 3, 3, padding=1, groups=16),
    _C("empty_batch_1x1", 0, 16, 6, 7, 20, 1, 1),
    _C("empty_batch_rgb", 0, 3, 6, 7, 20, 3, 3, stride=2),
]

CONV_CASES = (
    CONV_GEOMETRY
    + CONV_PADDING
    + CONV_GROUPS
    + CONV_EXTREMES
    + CONV_LEFTOVERS
    + CONV_FEW_PIXELS
    + CONV_REGRESSIONS
    + CONV_EMPTY
)


def channel_tails() -> dict[str, list[ConvCase]]:
    """Small images over every channel count from 1 to 70 (and around 128), by what is swept."""
    counts = [*range(1, 71), 127, 128, 129]
    return {
        "c_3x3": [_C(f"c{c}", 1, c, 4, 5, 6, 3, 3, padding=1) for c in counts],
        "k_3x3": [_C(f"k{k}", 1, 6, 4, 5, k, 3, 3, padding=1) for k in counts],
        "k_rgb": [_C(f"k{k}", 1, 3, 4, 5, k, 3, 3, padding=1) for k in counts],
        "c_3x3_s2": [_C(f"c{c}", 1, c, 6, 5, 9, 3, 3, stride=2, padding=1) for c in counts],
        "both_3x3": [_C(f"c{c}k{c}", 1, c, 4, 4, c, 3, 3, padding=1) for c in counts],
        "c_1x1": [_C(f"c{c}", 1, c, 3, 5, 7, 1, 1) for c in counts],
        "k_1x1": [_C(f"k{k}", 1, 7, 3, 5, k, 1, 1) for k in counts],
        "both_1x1_s2": [_C(f"c{c}k{c}", 1, c, 5, 4, c, 1, 1, stride=2) for c in counts],
        "depthwise": [_C(f"c{c}", 1, c, 5, 4, c, 3, 3, padding=1, groups=c) for c in counts],
        "depthwise_s2": [_C(f"c{c}", 1, c, 5, 6, c, 3, 3, 2, 1, groups=c) for c in counts],
        "groups_2": [_C(f"c{c}", 1, 2 * c, 4, 4, 2 * c, 3, 3, 1, 1, groups=2) for c in counts],
    }


def spatial_tails() -> dict[str, list[ConvCase]]:
    """Sweeps over every width, and over every small height and width together."""
    widths = range(1, 41)
    return {
        "w_3x3": [_C(f"w{w}", 1, 17, 3, w, 18, 3, 3, padding=1) for w in widths],
        "w_3x3_s2": [_C(f"w{w}", 1, 16, 3, w, 16, 3, 3, stride=2, padding=1) for w in widths],
        "w_1x1": [_C(f"w{w}", 1, 17, 1, w, 18, 1, 1) for w in widths],
        "w_depthwise": [_C(f"w{w}", 1, 17, 3, w, 17, 3, 3, padding=1, groups=17) for w in widths],
        "w_depthwise_s2": [_C(f"w{w}", 1, 17, 3, w, 17, 3, 3, 2, 1, groups=17) for w in widths],
        "w_rgb": [_C(f"w{w}", 1, 3, 3, w, 18, 3, 3, padding=1) for w in widths],
        "hw_3x3": [
            _C(f"{h}x{w}", 1, 8, h, w, 8, 3, 3, padding=1) for h in range(1, 8) for w in range(1, 8)
        ],
    }


# -------------------------------------------------------------------------------------------------
# Transposed convolutions: x[N, C, H, W], w[C, K/groups, R, S].


@dataclass(frozen=True)
class ConvTransposeCase:
    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int | Pair = 1
    padding: int | Pair = 0
    output_padding: int | Pair = 0
    groups: int = 1
    dilation: int | Pair = 1

    def __str__(self) -> str:
        return self.name

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.c, self.k // self.groups, self.r, self.s

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        step, pad, spread = pair(self.stride), pair(self.padding), pair(self.dilation)
        extra = pair(self.output_padding)
        size = [
            (extent - 1) * step[i] - 2 * pad[i] + spread[i] * (kernel - 1) + extra[i] + 1
            for i, (extent, kernel) in enumerate([(self.h, self.r), (self.w, self.s)])
        ]
        return self.n, self.k, size[0], size[1]

    @property
    def arguments(self) -> dict[str, object]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }

    @property
    def products(self) -> dict[str, int]:
        n, _, p, q = self.y_shape
        return {
            "y": self.c // self.groups * self.r * self.s,
            "dx": self.k // self.groups * self.r * self.s,
            "dw": n * self.h * self.w,
            "db": n * p * q,
        }


_T = ConvTransposeCase

CONV_TRANSPOSE_CASES = [
    _T("plain", 2, 5, 4, 6, 7, 3, 3),
    _T("1x1", 2, 5, 4, 6, 7, 1, 1),
    _T("padding_1", 2, 5, 4, 6, 7, 3, 3, padding=1),
    _T("stride_2_unet", 2, 16, 4, 5, 8, 2, 2, stride=2),
    _T("stride_2_dcgan", 2, 12, 4, 5, 10, 4, 4, stride=2, padding=1),
    _T("stride_2_output_padding", 2, 6, 4, 5, 9, 3, 3, 2, 1, output_padding=1),
    _T("stride_3_output_padding_2_0", 1, 6, 4, 5, 9, 3, 3, 3, 1, output_padding=(2, 0)),
    _T("stride_2_1", 1, 6, 4, 5, 9, 3, 3, stride=(2, 1), padding=(0, 1)),
    _T("stride_beyond_kernel", 1, 6, 3, 4, 5, 2, 2, stride=4),
    _T("dilation_2", 1, 6, 5, 4, 5, 3, 3, dilation=2, padding=2),
    _T("dilation_3_output_padding_2", 1, 6, 5, 4, 5, 3, 3, output_padding=2, dilation=3),
    _T("dilation_2_s2", 1, 6, 5, 4, 5, 3, 3, 2, 2, output_padding=1, dilation=2),
    _T("groups_2", 2, 6, 4, 5, 8, 3, 3, stride=2, padding=1, groups=2),
    _T("groups_4_dilated", 1, 8, 4, 5, 12, 3, 3, 2, 1, output_padding=1, groups=4, dilation=2),
    _T("depthwise", 2, 20, 4, 5, 20, 3, 3, padding=1, groups=20),
    _T("depthwise_s2", 2, 20, 4, 5, 20, 3, 3, 2, 1, output_padding=1, groups=20),
    _T("multiplier_2", 1, 9, 4, 5, 18, 3, 3, stride=2, groups=9),
    _T("rgb_out", 1, 18, 5, 6, 3, 4, 4, stride=2, padding=1),
    _T("rgb_in", 1, 3, 5, 6, 18, 3, 3, padding=1),
    _T("1xn", 1, 8, 5, 6, 7, 1, 5, stride=(1, 2), padding=(0, 2)),
    _T("image_1x1", 2, 30, 1, 1, 17, 4, 4),
    _T("large_padding", 1, 6, 9, 8, 5, 3, 3, padding=4),
    _T("wide", 1, 70, 3, 4, 66, 3, 3, stride=2, padding=1),
    _T("empty_batch", 0, 5, 4, 6, 7, 3, 3, stride=2),
]


# -------------------------------------------------------------------------------------------------
# Pooling.


@dataclass(frozen=True)
class PoolCase:
    """Max pooling; average pooling takes those with dilation 1."""

    name: str
    n: int
    c: int
    h: int
    w: int
    kernel_size: int | Pair
    stride: int | Pair | None = None
    padding: int | Pair = 0
    dilation: int | Pair = 1
    ceil_mode: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def arguments(self) -> dict[str, object]:
        """The keyword arguments of average pooling."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
        }

    @property
    def max_arguments(self) -> dict[str, object]:
        return {**self.arguments, "dilation": self.dilation}


_P = PoolCase

POOL_CASES = [
    _P("2x2", 2, 7, 8, 10, 2),
    _P("2x2_odd", 2, 7, 7, 9, 2),
    _P("2x2_odd_ceil", 2, 7, 7, 9, 2, ceil_mode=True),
    _P("3x3_s2_p1", 2, 17, 9, 8, 3, 2, 1),
    _P("3x3_s2_p1_ceil", 2, 17, 9, 8, 3, 2, 1, ceil_mode=True),
    _P("3x3_s1_p1", 1, 33, 6, 7, 3, 1, 1),
    _P("overlap_s1", 1, 16, 6, 7, 4, 1),
    _P("kernel_2_3", 1, 5, 8, 9, (2, 3), (1, 2), (1, 1)),
    _P("stride_beyond_kernel", 1, 5, 11, 12, 2, 5),
    _P("stride_beyond_kernel_ceil", 1, 5, 11, 12, 2, 5, ceil_mode=True),
    _P("1x1", 2, 5, 4, 3, 1),
    _P("1x1_s2", 2, 5, 5, 4, 1, 2),
    _P("kernel_is_image", 2, 20, 5, 6, (5, 6)),
    _P("image_1x1", 2, 20, 1, 1, 1),
    _P("one_row", 1, 9, 1, 33, (1, 2)),
    _P("one_column", 1, 9, 33, 1, (3, 1), (2, 1), (1, 0)),
    _P("dilation_2", 1, 9, 9, 10, 3, 1, 1, dilation=2),
    _P("dilation_2_3_s2", 1, 9, 11, 13, 3, 2, (1, 0), dilation=(2, 3)),
    _P("dilation_2_ceil", 1, 9, 10, 10, 2, 3, 0, dilation=2, ceil_mode=True),
    _P("last_window_in_padding", 1, 3, 4, 4, 2, 3, 1, ceil_mode=True),
    _P("pytorch_36977", 1, 2, 3, 4, 3, 2, 1, ceil_mode=True),
    _P("pytorch_45357", 1, 1, 2, 2, 2, 2, 1, ceil_mode=True),
    _P("onnx_ceil_reduce_by_one", 1, 1, 2, 2, 1, 2, ceil_mode=True),
    _P("onnx_ceil_last_window_on_pad", 1, 1, 2, 2, 3, 3, 1, ceil_mode=True),
    _P("alexnet", 1, 64, 13, 13, 3, 2),
    _P("empty_batch", 0, 5, 6, 7, 2),
]


def pool_channel_tails() -> list[PoolCase]:
    return [_P(f"c{c}", 1, c, 5, 6, 3, 2, 1) for c in range(1, 71)]

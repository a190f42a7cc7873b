"""EfficientNet: Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural
networks", 2019 (arXiv 1905.11946), table 1. Names and arguments are those of torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastconv import functional as F
from fastconv import init
from fastconv.models._image_size import check_image_size
from fastconv.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Linear,
    Module,
    Parameter,
    Sequential,
    SiLU,
    SqueezeExcitation,
    StochasticDepth,
    channels_last,
    conv_norm,
)
from fastconv.tensor import Tensor

NormLayer = Callable[[int], Module]


@dataclass(frozen=True)
class MBConvConfig:
    """A stage: `num_layers` blocks of a depthwise `kernel`, the first one with `stride`.

    expand_ratio: channels between the 1x1 convolutions of a block, in input channels.
    """

    expand_ratio: float
    kernel: int
    stride: int
    input_channels: int
    out_channels: int
    num_layers: int

    def __post_init__(self) -> None:
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {self.stride}")

    def scaled(self, width: float, depth: float) -> MBConvConfig:
        """Channels and layers times these factors: compound scaling, section 3.3 of the paper."""
        return replace(
            self,
            input_channels=_to_multiple_of_8(self.input_channels * width),
            out_channels=_to_multiple_of_8(self.out_channels * width),
            num_layers=math.ceil(self.num_layers * depth),
        )


def _to_multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, but not less than 0.9 of the channels."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm_layer: NormLayer,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> Sequential:
    """Convolution, batch norm and SiLU, which Sequential applies together."""
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )
    layers = [conv, norm_layer(out_channels)]
    return Sequential(*layers, SiLU()) if activation else Sequential(*layers)


class MBConv(Module):
    """1x1 to more channels, depthwise, squeeze and excitation, 1x1 to few channels, and the input
    added where the shape allows: Sandler et al. 2018 (arXiv 1801.04381); Tan and Le, section 4.
    """

    def __init__(
        self,
        cnf: MBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: NormLayer,
        se_layer: Callable[..., Module] = SqueezeExcitation,
    ) -> None:
        self.use_res_connect = cnf.stride == 1 and cnf.input_channels == cnf.out_channels
        channels = _to_multiple_of_8(cnf.input_channels * cnf.expand_ratio)
        layers: list[Module] = []
        if channels != cnf.input_channels:
            layers.append(_conv_norm(cnf.input_channels, channels, 1, norm_layer))
        layers.append(
            _conv_norm(
                channels, channels, cnf.kernel, norm_layer, stride=cnf.stride, groups=channels
            )
        )
        layers.append(se_layer(channels, max(1, cnf.input_channels // 4), activation=SiLU))
        layers.append(_conv_norm(channels, cnf.out_channels, 1, norm_layer, activation=False))
        self.block = Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")
        self.out_channels = cnf.out_channels

    def forward(self, x: Any) -> Tensor:
        *layers, project = self.block
        hooked = any(m._forward_hooks for m in (self.block, project, self.stochastic_depth))
        if self.use_res_connect and not self.training and not hooked:
            y = x
            for layer in layers:
                y = layer(y)
            conv, norm = project.children()
            return conv_norm(conv, norm, y, x)  # the sum in the pass of the convolution
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.use_res_connect else y


class EfficientNet(Module):
    """A 3x3 convolution, stages of MBConv blocks, a 1x1 convolution, dropout, a dense layer.

    inverted_residual_setting: the stages.
    dropout: before the dense layer.
    stochastic_depth_prob: with which the last block's residual branch is dropped; it grows linearly
        from 0 at the first.
    norm_layer: what makes the batch norm of so many channels; BatchNorm2d by default.
    last_channel: channels of the last convolution, by default four times those of the last stage.
    Any image size; `image_size` is there because every model takes it.
    """

    def __init__(
        self,
        inverted_residual_setting: Sequence[MBConvConfig],
        dropout: float,
        stochastic_depth_prob: float = 0.2,
        num_classes: int = 1000,
        norm_layer: NormLayer | None = None,
        last_channel: int | None = None,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        check_image_size("EfficientNet", image_size, 1)
        stages = list(inverted_residual_setting)
        if not stages:
            raise ValueError("inverted_residual_setting must have a stage, got none")
        norm = BatchNorm2d if norm_layer is None else norm_layer
        layers = [_conv_norm(in_channels, stages[0].input_channels, 3, norm, stride=2)]
        blocks, total = 0, sum(stage.num_layers for stage in stages)
        for stage in stages:
            following = replace(stage, input_channels=stage.out_channels, stride=1)
            configs = [stage] + [following] * (stage.num_layers - 1)
            layers.append(
                Sequential(
                    *(
                        MBConv(config, stochastic_depth_prob * i / total, norm)
                        for i, config in enumerate(configs, blocks)
                    )
                )
            )
            blocks += stage.num_layers
        channels = stages[-1].out_channels
        last = 4 * channels if last_channel is None else last_channel
        layers.append(_conv_norm(channels, last, 1, norm))
        self.features = Sequential(*layers)
        self.avgpool = AdaptiveAvgPool2d(1)
        self.classifier = Sequential(Dropout(dropout), Linear(last, num_classes))
        self._init_weights()

    def _init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Conv2d):
                layer.weight.data = channels_last(init.kaiming_normal_fan_out(layer.weight.shape))
            elif isinstance(layer, Linear):
                bound = 1.0 / math.sqrt(layer.out_features)
                layer.weight.data = init.uniform(layer.weight.shape, bound)
            if isinstance(layer, Conv2d | Linear) and isinstance(layer.bias, Parameter):
                layer.bias.data[...] = 0

    def forward(self, x: Any) -> Tensor:
        y = F.flatten(self.avgpool(self.features(x)), 1)
        logits: Tensor = self.classifier(y)
        return logits


# Table 1 of the paper: the stages of B0.
_B0 = (
    MBConvConfig(1, 3, 1, 32, 16, 1),
    MBConvConfig(6, 3, 2, 16, 24, 2),
    MBConvConfig(6, 5, 2, 24, 40, 2),
    MBConvConfig(6, 3, 2, 40, 80, 3),
    MBConvConfig(6, 5, 1, 80, 112, 3),
    MBConvConfig(6, 5, 2, 112, 192, 4),
    MBConvConfig(6, 3, 1, 192, 320, 1),
)


def _efficientnet(
    width: float, depth: float, dropout: float, settings: dict[str, Any]
) -> EfficientNet:
    stages = [stage.scaled(width, depth) for stage in _B0]
    return EfficientNet(stages, **{"dropout": dropout, **settings})


# The larger ones were trained with batch norm as in TensorFlow.
_tensorflow_norm = partial(BatchNorm2d, eps=0.001, momentum=0.01)


def efficientnet_b0(**settings: Any) -> EfficientNet:
    """5.3 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.0, 1.0, 0.2, settings)


def efficientnet_b1(**settings: Any) -> EfficientNet:
    """7.8 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.0, 1.1, 0.2, settings)


def efficientnet_b2(**settings: Any) -> EfficientNet:
    """9.1 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.1, 1.2, 0.3, settings)


def efficientnet_b3(**settings: Any) -> EfficientNet:
    """12.2 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.2, 1.4, 0.3, settings)


def efficientnet_b4(**settings: Any) -> EfficientNet:
    """19.3 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.4, 1.8, 0.4, settings)


def efficientnet_b5(**settings: Any) -> EfficientNet:
    """30.4 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.6, 2.2, 0.4, {"norm_layer": _tensorflow_norm, **settings})


def efficientnet_b6(**settings: Any) -> EfficientNet:
    """43.0 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(1.8, 2.6, 0.5, {"norm_layer": _tensorflow_norm, **settings})


def efficientnet_b7(**settings: Any) -> EfficientNet:
    """66.3 million parameters. Settings: those of EfficientNet behind the stages."""
    return _efficientnet(2.0, 3.1, 0.5, {"norm_layer": _tensorflow_norm, **settings})

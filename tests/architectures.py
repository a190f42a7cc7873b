"""Every model of fastconv.models: its size, and the same model in PyTorch.

One line a model in `ARCHITECTURES`; `test_architectures.py` holds each of them to the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastconv import init, models, nn
from fastconv.tensor import Array

from . import torch_models
from .torchvision_models import models as torchvision


@dataclass(frozen=True)
class Published:
    """Figures of others for one image of `image_size`; None where they state nothing."""

    source: str
    image_size: int
    giga_multiply_adds: str | None = None  # with the digits that the source gives
    receptive_field: int | None = None
    layer: str = ""  # the one with that receptive field, in front of the global mean


@dataclass(frozen=True)
class Architecture:
    """A model of `models.create(name)` and how to check it.

    parameters: with default arguments: 1000 classes for the models of torchvision, else 10.
    reference: the same model in PyTorch, with its default arguments; called on the device "meta".
    image_size, batch: of the runs, the smallest that still means something: where training would
        normalise fewer than a handful of values a channel, no two implementations agree.
    arguments: for `models.create`, of the runs.
    residual_norm: how the names of the batch norms at the ends of residual branches end. Their
        scale is drawn small, as training leaves it: where every branch is as strong as its
        shortcut, rounding errors grow from block to block, and PyTorch's float32 too misses 1e-5.
    narrow: in the comparisons of logits and gradients one dense layer for ten classes replaces the
        three of VGG with their 120 million weights, in both models. Those of `vgg11` are compared,
        and of `alexnet`: the code is the same.
    """

    parameters: int
    reference: Callable[[], torch.nn.Module]
    image_size: int = 32
    in_channels: int = 3
    batch: int = 2
    arguments: Mapping[str, Any] = field(default_factory=dict)
    narrow: bool = False
    residual_norm: str | tuple[str, ...] | None = None
    published: Published | None = None

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.image_size, self.image_size


def _torchvision(name: str, **arguments: Any) -> Callable[[], torch.nn.Module]:
    return lambda: torchvision.get_model(name, weights=None, **arguments)


def _vgg(parameters: int, name: str, **settings: Any) -> Architecture:
    reference = _torchvision(name, init_weights=False)
    return Architecture(parameters, reference, **{"narrow": True, **settings})


def _resnet(parameters: int, name: str, **settings: Any) -> Architecture:
    return Architecture(
        parameters,
        _torchvision(name),
        **{"image_size": 33, "residual_norm": "bn2", **settings},
    )


def _densenet(parameters: int, name: str, giga_multiply_adds: str) -> Architecture:
    figures = Published("torchvision", 224, giga_multiply_adds)
    return Architecture(parameters, _torchvision(name), batch=4, published=figures)


def _efficientnet(parameters: int, name: str, published: Published | None = None) -> Architecture:
    return Architecture(
        parameters,
        _torchvision(name),
        batch=4,
        residual_norm=("block.2.1", "block.3.1"),
        published=published,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "alexnet": Architecture(61_100_840, _torchvision("alexnet"), image_size=63),
    "alexnet_lrn": Architecture(60_965_224, torch_models.AlexNetLRN, image_size=63),
    "efficientnet_lite0": Architecture(
        4_652_008,
        torch_models.EfficientNetLite0,
        image_size=64,
        batch=4,
        residual_norm="_bn2",
    ),
    "lenet5": Architecture(61_706, torch_models.LeNet5, in_channels=1, batch=4),
    "smallcnn": Architecture(545_290, torch_models.SmallCNN, batch=4),
    "textbook_stack": Architecture(554_346, torch_models.TextbookStack, batch=4),
    "vgg11": _vgg(132_863_336, "vgg11", narrow=False),
    "vgg11_bn": _vgg(132_868_840, "vgg11_bn"),
    "vgg13": _vgg(133_047_848, "vgg13"),
    "vgg13_bn": _vgg(133_053_736, "vgg13_bn"),
    "vgg16": _vgg(
        138_357_544,
        "vgg16",
        published=Published(
            "torchvision; Araujo, Norris and Sim 2019", 224, "15.47", 212, "features.30"
        ),
    ),
    "vgg16_bn": _vgg(138_365_992, "vgg16_bn"),
    "vgg19": _vgg(143_667_240, "vgg19"),
    "vgg19_bn": _vgg(143_678_248, "vgg19_bn"),
    "resnet18": _resnet(11_689_512, "resnet18"),
    "resnet34": _resnet(21_797_672, "resnet34"),
    "resnet50": _resnet(
        25_557_032, "resnet50", residual_norm="bn3", published=Published("torchvision", 224, "4.09")
    ),
    "resnet101": _resnet(44_549_160, "resnet101", residual_norm="bn3"),
    "resnet152": _resnet(60_192_808, "resnet152", residual_norm="bn3"),
    "resnext50_32x4d": _resnet(25_028_904, "resnext50_32x4d", residual_norm="bn3"),
    "wide_resnet50_2": _resnet(68_883_240, "wide_resnet50_2", residual_norm="bn3"),
    "resnet18_cifar": Architecture(11_173_962, torch_models.resnet18_cifar),
    "resnet8_cifar": Architecture(78_042, lambda: torch_models.ResNet(1), batch=4),
    "resnet20_cifar": Architecture(272_474, lambda: torch_models.ResNet(3), batch=4),
    "googlenet": Architecture(
        13_004_888,
        _torchvision("googlenet", init_weights=False),
        batch=4,
        published=Published("torchvision", 224, "1.498"),
    ),
    # In training the auxiliary head needs 299x299: see test_model_arguments.py.
    "inception_v3": Architecture(
        23_834_568,
        _torchvision("inception_v3", aux_logits=False, init_weights=False),
        image_size=75,
        arguments={"aux_logits": False},
        published=Published("torchvision", 299, "5.713"),
    ),
    "densenet121": _densenet(7_978_856, "densenet121", "2.834"),
    "densenet161": _densenet(28_681_000, "densenet161", "7.728"),
    "densenet169": _densenet(14_149_480, "densenet169", "3.36"),
    "densenet201": _densenet(20_013_928, "densenet201", "4.291"),
    "efficientnet_b0": _efficientnet(
        5_288_548,
        "efficientnet_b0",
        Published("Tan and Le 2019; Araujo, Norris and Sim 2019", 224, "0.39", 851, "features.8.2"),
    ),
    "efficientnet_b1": _efficientnet(
        7_794_184, "efficientnet_b1", Published("torchvision", 240, "0.687")
    ),
    "efficientnet_b2": _efficientnet(
        9_109_994, "efficientnet_b2", Published("torchvision", 288, "1.088")
    ),
    "efficientnet_b3": _efficientnet(
        12_233_232, "efficientnet_b3", Published("torchvision", 300, "1.827")
    ),
    "efficientnet_b4": _efficientnet(
        19_341_616, "efficientnet_b4", Published("torchvision", 380, "4.394")
    ),
    # At the sizes of their published figures the larger ones need gigabytes.
    "efficientnet_b5": _efficientnet(30_389_784, "efficientnet_b5"),
    "efficientnet_b6": _efficientnet(43_040_704, "efficientnet_b6"),
    "efficientnet_b7": _efficientnet(66_347_960, "efficientnet_b7"),
}


def create(name: str, **settings: Any) -> nn.Module:
    """The model of a line of the table, its random weights all zero: drawing them takes longer
    than the checks."""
    line = ARCHITECTURES[name]
    sizes = {"in_channels": line.in_channels, "image_size": line.image_size}
    with _zeros_for_random_numbers():
        return models.create(name, **{**sizes, **line.arguments, **settings})


class _Zeros:
    """Stands in for numpy's generator and for what it draws."""

    def uniform(self, low: float, high: float, size: Any) -> _Zeros:
        self.shape = size
        return self

    normal = uniform

    def astype(self, dtype: Any) -> Array:
        return np.zeros(self.shape, dtype)  # memory that nobody has touched yet


@contextmanager
def _zeros_for_random_numbers() -> Iterator[None]:
    with mock.patch.object(init, "_numpy_generator", lambda count: _Zeros()):
        yield


def create_pair(name: str) -> tuple[nn.Module, torch.nn.Module]:
    """The model of a line, and the same in PyTorch with random weights that keep activations in
    range, float64; without dropout."""
    line = ARCHITECTURES[name]
    model = create(name)
    with torch.device("meta"):
        reference = line.reference()
        if line.narrow:
            replace_dense_layers(model, nn.Linear)
            replace_dense_layers(reference, torch.nn.Linear)
    reference = reference.double().to_empty(device="cpu")
    _randomise(reference, line.residual_norm)
    return without_noise(model), without_noise(reference)


def replace_dense_layers(model: Any, linear: Any) -> None:
    """One dense layer for ten classes instead of the three of AlexNet and VGG."""
    first = next(module for module in model.classifier.modules() if isinstance(module, linear))
    model.classifier = linear(first.in_features, 10)


def without_noise(model: Any) -> Any:
    """`model`, here or in PyTorch, with dropout and stochastic depth switched off."""
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0
    return model


def outputs(result: Any) -> list[Any]:
    """The logits of all heads: models with auxiliary ones return several while they train."""
    return list(result) if isinstance(result, tuple) else [result]


# Random numbers in [-1, 1), used again and again: drawing 140 million for a VGG would take seconds.
# The count is prime, so no two rows of a weight are alike.
_POOL = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _draw(like: torch.Tensor, start: int) -> torch.Tensor:
    start %= 500_000
    pool = _POOL.repeat(1 + (start + like.numel()) // len(_POOL))
    return pool[start:][: like.numel()].view(like.shape).to(like.dtype)


@torch.no_grad()
def _randomise(model: torch.nn.Module, residual_norm: str | tuple[str, ...] | None) -> None:
    for number, (path, module) in enumerate(model.named_modules()):
        for parameter in module.parameters(recurse=False):
            noise = _draw(parameter, 1009 * number)
            if _is_batch_norm(module):
                # Shifts to the positive side: without, each batch norm and ReLU would amplify small
                # differences by 1.2 (Yang et al. 2019, "A mean field theory of batch
                # normalization"), PyTorch's rounding errors too.
                parameter.copy_(1 + 0.5 * noise)
            elif parameter.ndim >= 2:  # He et al. 2015: keeps the size of activations
                parameter.copy_(noise * math.sqrt(6 / parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise)
        if _is_batch_norm(module):
            if residual_norm is not None and path.endswith(residual_norm):
                module.weight.mul_(0.25)
            module.reset_running_stats()
        elif next(module.buffers(recurse=False), None) is not None:
            raise NotImplementedError(f"buffers of {type(module).__name__}")


def _is_batch_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def randomise_running_statistics(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Random ones, of a size with which each batch norm about halves what it is given for `images`.

    Those of a small batch would not do. In some channels its variance is close to zero, a division
    by which makes rounding the result; and to other images it is wrong by a factor that grows from
    layer to layer.
    """
    hooks = [
        module.register_forward_pre_hook(_observer(number))
        for number, module in enumerate(model.modules())
        if _is_batch_norm(module)
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()


def _observer(number: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
    def observe(norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        power = inputs[0].square().mean()
        norm.running_mean.copy_(0.1 * power.sqrt() * _draw(norm.running_mean, 7907 * number))
        norm.running_var.copy_(power * (4 + 2 * _draw(norm.running_var, 7919 * number)))

    return observe

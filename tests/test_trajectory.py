"""Training in PyTorch and here: same weights, same batches, float32. Fifty steps of the small
models on made-up classes, ten of a member of each family on digits.

A wrong gradient, running statistic or update, however small, grows from step to step: this is the
test that all parts are right together. The batches come from classes that can be told apart, so the
loss falls as it does in real training. Their noise is low and their number large for another
reason: rounding that moves a value across the kink of a ReLU changes a gradient by a step, and in
harder problems PyTorch's own runs, float32 and float64 or NCHW and channels-last, part by 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import models, nn, optim
from fastconv.data import mnist5k
from fastconv.nn import channels_last
from fastconv.tensor import Array

from . import torch_models
from .architectures import ARCHITECTURES, create_pair, outputs, replace_dense_layers

STEPS = 50
BATCH = 64


def batches() -> Iterator[tuple[Array, Array]]:
    """Noisy images of ten random patterns, and their classes."""
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((10, 3, 16, 16))
    for _ in range(STEPS):
        y = rng.integers(0, 10, BATCH)
        x = patterns[y] + 0.25 * rng.standard_normal((BATCH, 3, 16, 16))
        yield x.astype(np.float32), y


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.nn.Module]]] = {
    "smallcnn": (
        lambda: models.SmallCNN(image_size=16, dropout=0.0),
        lambda: torch_models.SmallCNN(image_size=16, dropout=0.0),
    ),
    "resnet8_cifar": (models.resnet8_cifar, lambda: torch_models.ResNet(1)),
}
# (settings, largest difference of the losses)
OPTIMISERS: dict[str, tuple[dict[str, Any], float]] = {
    "SGD": ({"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}, 1e-3),
    "AdamW": ({"lr": 1e-3}, 5e-3),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_stay_together(model: str, optimiser: str) -> None:
    settings, tolerance = OPTIMISERS[optimiser]
    torch.manual_seed(0)
    mine, reference = (make() for make in MODELS[model])
    mine.load_state_dict(reference.state_dict())
    losses, expected = train(mine, reference, optimiser, settings, batches())
    np.testing.assert_allclose(losses, expected, rtol=0, atol=tolerance)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def train(
    mine: nn.Module,
    reference: torch.nn.Module,
    optimiser: str,
    settings: dict[str, Any],
    batches: Iterable[tuple[Array, Array]],
) -> tuple[list[float], list[float]]:
    """The losses of both, step by step."""
    step = getattr(optim, optimiser)(mine.parameters(), **settings)
    reference_step = getattr(torch.optim, optimiser)(reference.parameters(), **settings)
    losses, expected = [], []
    for x, y in batches:
        step.zero_grad()
        loss: Any = sum(
            nn.CrossEntropyLoss()(logits, y) for logits in outputs(mine(channels_last(x)))
        )
        loss.backward()
        step.step()
        losses.append(loss.item())

        reference_step.zero_grad()
        reference_loss = sum(
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
            for logits in outputs(reference(torch.from_numpy(x)))
        )
        reference_loss.backward()
        reference_step.step()
        expected.append(reference_loss.item())
    return losses, expected


def digits(channels: int, size: int, count: int) -> tuple[Array, Array]:
    """Real digits, enlarged without interpolation, the same in every channel."""
    data = mnist5k()[np.random.default_rng(0).permutation(4000)[:count]]
    pixels = np.arange(size) * 28 // size
    x = (data.images[:, None, :, :, 0] / 255.0 - 0.13) / 0.31
    x = x[:, :, pixels][..., pixels].astype(np.float32)
    return np.repeat(x, channels, axis=1), data.labels


# A member of each family: (digits, lr). So few of them that ten steps tell them apart.
FAMILIES: dict[str, tuple[int, float]] = {
    "lenet5": (16, 0.05),
    "alexnet": (8, 3e-5),
    "alexnet_lrn": (8, 3e-4),
    "vgg13": (8, 1e-5),
    "resnet18": (8, 3e-3),
    "googlenet": (8, 4e-5),
    "inception_v3": (8, 4e-6),
    "densenet121": (8, 5e-5),
    "efficientnet_b0": (8, 1e-3),
}
HEAVY = ("alexnet", "alexnet_lrn")  # one dense layer instead of three, as in vgg13
# Sizes of images that are made noisy: the pixels of a plain background share their values, and in
# so many layers rounding moves some of them, all at once, across the kink of a ReLU.
NOISY = {"googlenet": 48, "inception_v3": 75, "densenet121": 48, "efficientnet_b0": 48}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_digits(name: str) -> None:
    torch.manual_seed(0)
    count, lr = FAMILIES[name]
    line = ARCHITECTURES[name]
    mine, reference = create_pair(name)
    reference.float()
    if name in HEAVY:
        replace_dense_layers(mine, nn.Linear)
        replace_dense_layers(reference, torch.nn.Linear)
    mine.load_state_dict(reference.state_dict())
    x, y = digits(line.in_channels, NOISY.get(name, line.image_size), count)
    if name in NOISY:
        x += np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    losses, expected = train(
        mine,
        reference,
        "SGD",
        {"lr": lr, "momentum": 0.9},
        [(x, y)] * 10,
    )
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    assert np.mean(losses[-3:]) < 0.8 * losses[0]

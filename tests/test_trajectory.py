"""Fifty training steps in PyTorch and here: same weights, same batches, float32.

A wrong gradient, running statistic or update, however small, grows from step to step: this is the
test that all parts are right together. The batches come from classes that can be told apart, so the
loss falls as it does in real training. Their noise is low and their number large for another
reason: rounding that moves a value across the kink of a ReLU changes a gradient by a step, and in
harder problems PyTorch's own runs, float32 and float64 or NCHW and channels-last, part by 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import models, nn, optim
from fastconv.nn import channels_last
from fastconv.tensor import Array

from . import torch_models

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
    "resnet8": (models.resnet8_cifar, lambda: torch_models.ResNet(1)),
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
    step = getattr(optim, optimiser)(mine.parameters(), **settings)
    reference_step = getattr(torch.optim, optimiser)(reference.parameters(), **settings)
    losses, expected = [], []
    for x, y in batches():
        step.zero_grad()
        loss = nn.CrossEntropyLoss()(mine(channels_last(x)), y)
        loss.backward()
        step.step()
        losses.append(loss.item())

        reference_step.zero_grad()
        reference_loss = torch.nn.functional.cross_entropy(
            reference(torch.from_numpy(x)), torch.from_numpy(y)
        )
        reference_loss.backward()
        reference_step.step()
        expected.append(reference_loss.item())
    np.testing.assert_allclose(losses, expected, rtol=0, atol=tolerance)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]

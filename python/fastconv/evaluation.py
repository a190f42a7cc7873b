"""How good a model is on images that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastconv import functional as F
from fastconv import nn
from fastconv.data import DataLoader
from fastconv.tensor import Tensor, no_grad

__all__ = ["Evaluation", "count_correct", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of right answers over `images` images."""

    loss: float
    accuracy: float
    images: int


def evaluate(model: nn.Module, loader: DataLoader) -> Evaluation:
    """Loss and accuracy over the loader's epoch 0, in evaluation mode; the modes are put back.

    Raises ValueError for a loader without batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss_sum, correct, images = 0.0, 0, 0
    try:
        with no_grad():
            for x, y in loader:
                logits = model(Tensor(x))
                loss_sum += F.cross_entropy(logits, y).item() * len(y)
                correct += count_correct(logits, y)
                images += len(y)
    finally:
        for module, training in modes:
            module.training = training
    if not images:
        raise ValueError("no images to evaluate on")
    return Evaluation(loss_sum / images, correct / images, images)


def count_correct(logits: Tensor, y: NDArray[np.int64]) -> int:
    """How many of the logits [N, classes] are largest at their label y [N]."""
    return int((logits.data.argmax(axis=1) == y).sum())

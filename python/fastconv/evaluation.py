"""How good a model is on images that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastconv import functional as F
from fastconv import nn
from fastconv.data import DataLoader
from fastconv.tensor import Tensor, no_grad

__all__ = ["Evaluation", "count_correct", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and shares of right answers over `images` images.

    top5_accuracy  share of the images whose class is among the five with the largest logits
    confusion      [classes, classes]: how many images of the class of the row were taken for the
                   class of the column
    """

    loss: float
    accuracy: float
    images: int
    top5_accuracy: float
    confusion: NDArray[np.int64] = field(repr=False, compare=False)

    def class_accuracies(self) -> list[float | None]:
        """The share of right answers of each class; None for a class without images."""
        counts = zip(np.diag(self.confusion).tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [right / images if images else None for right, images in counts]


def evaluate(model: nn.Module, loader: DataLoader) -> Evaluation:
    """Loss and accuracies over the loader's epoch 0, in evaluation mode; the modes are put back.

    Raises ValueError for a loader without batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss_sum, in_top5, classes = 0.0, 0, 0
    labels: list[NDArray[np.int64]] = []
    answers: list[NDArray[np.int64]] = []
    try:
        with no_grad():
            for x, y in loader:
                logits = model(Tensor(x))
                loss_sum += F.cross_entropy(logits, y).item() * len(y)
                in_top5 += count_in_top(logits, y, 5)
                labels.append(y)
                answers.append(logits.data.argmax(axis=1))
                classes = logits.shape[1]
    finally:
        for module, training in modes:
            module.training = training
    images = sum(map(len, labels))
    if not images:
        raise ValueError("no images to evaluate on")
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (np.concatenate(labels), np.concatenate(answers)), 1)
    accuracy = int(np.trace(confusion)) / images
    return Evaluation(loss_sum / images, accuracy, images, in_top5 / images, confusion)


def count_correct(logits: Tensor, y: NDArray[np.int64]) -> int:
    """How many of the logits [N, classes] are largest at their label y [N]."""
    return int((logits.data.argmax(axis=1) == y).sum())


def count_in_top(logits: Tensor, y: NDArray[np.int64], k: int) -> int:
    """How many of the labels y [N] are among the k largest of their logits [N, classes]."""
    target = np.take_along_axis(logits.data, y[:, None], axis=1)
    ahead = ~(logits.data <= target)  # what is no number is ahead, too
    return int((ahead.sum(axis=1) < k).sum())

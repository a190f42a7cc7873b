"""How good a model is on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastconv import functional as F
from fastconv import nn
from fastconv.data import DataLoader
from fastconv.distributed import Communicator, SingleProcess
from fastconv.tensor import Tensor, move, no_grad

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

    def report(self, classes: Sequence[str]) -> str:
        """The figures in a line, under the confusion matrix or, of many classes, its errors."""
        table = self._matrix(classes) if len(classes) <= 20 else self._worst_errors(classes)
        figures = (
            f"accuracy {self.accuracy:.2%}, top-5 {self.top5_accuracy:.2%}, loss {self.loss:.4f} "
            f"on {self.images:,} images"
        )
        return "\n".join([*table, figures])

    def _matrix(self, classes: Sequence[str]) -> list[str]:
        """A row a class, a column an answer, and the share of right answers."""
        numbers = [["." if n == 0 else str(n) for n in row] for row in self.confusion.tolist()]
        shares = ["" if share is None else f"{share:.1%}" for share in self.class_accuracies()]
        rows = [["", *classes, "right"]]
        for name, row, right in zip(classes, numbers, shares, strict=True):
            rows.append([name, *row, right])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return [
            "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
            for row in rows
        ]

    def _worst_errors(self, classes: Sequence[str], count: int = 10) -> list[str]:
        """The pairs of classes that are confused most often."""
        errors = self.confusion - np.diag(np.diag(self.confusion))
        order = np.argsort(-errors, axis=None, kind="stable")[:count]
        pairs = (np.unravel_index(place, errors.shape) for place in order)
        return [
            f"{errors[true, answer]} of {self.confusion[true].sum()} images of "
            f"{classes[true]} taken for {classes[answer]}"
            for true, answer in pairs
            if errors[true, answer]
        ]


def evaluate(
    model: nn.Module, loader: DataLoader, communicator: Communicator | None = None
) -> Evaluation:
    """Loss and accuracies over the loader's epoch 0, in evaluation mode; the modes are put back.

    communicator  the processes whose loaders share the images; each gets the figures of all

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
                logits = model(Tensor(move(x, model.device))).cpu()
                loss_sum += F.cross_entropy(logits, y, reduction="sum").item()
                in_top5 += count_in_top(logits, y, 5)
                labels.append(y)
                answers.append(logits.data.argmax(axis=1))
                classes = logits.shape[1]
    finally:
        for module, training in modes:
            module.training = training
    if not labels:
        raise ValueError("no images to evaluate on")
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (np.concatenate(labels), np.concatenate(answers)), 1)
    communicator = communicator or SingleProcess()
    sums = np.array([loss_sum, in_top5])
    for part in (sums, confusion):
        communicator.all_reduce(part).wait()
    loss_sum, in_top5 = sums.tolist()
    images = int(confusion.sum())
    accuracy = int(np.trace(confusion)) / images
    return Evaluation(loss_sum / images, accuracy, images, in_top5 / images, confusion)


def count_correct(logits: Tensor, y: NDArray[np.int64]) -> int:
    """How many of the logits [N, classes] are largest at their label y [N]."""
    return int((logits.cpu().data.argmax(axis=1) == move(y, "cpu")).sum())


def count_in_top(logits: Tensor, y: NDArray[np.int64], k: int) -> int:
    """How many of the labels y [N] are among the k largest of their logits [N, classes]."""
    target = np.take_along_axis(logits.data, y[:, None], axis=1)
    ahead = ~(logits.data <= target)  # what is no number is ahead, too
    return int((ahead.sum(axis=1) < k).sum())

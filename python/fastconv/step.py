"""One step of training."""

from __future__ import annotations

import math
from typing import Any

from fastconv import functional as F
from fastconv import nn
from fastconv.evaluation import count_correct
from fastconv.tensor import Tensor


class TrainingError(RuntimeError):
    """The training itself went wrong, for example its loss is no longer a number."""


def train_step(
    model: nn.Module, optimizer: Any, x: Any, y: Any, label_smoothing: float = 0.0
) -> tuple[float, int]:
    """A step on images x [N, C, H, W], labels y [N]: (mean loss, how many right) before it.

    Raises TrainingError, and leaves the weights alone, when the loss is not finite.
    """
    optimizer.zero_grad()
    logits = model(Tensor(x))
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value}: try a smaller learning rate")
    loss.backward()
    optimizer.step()
    return value, count_correct(logits, y)

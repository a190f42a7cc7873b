"""One step of training: forward, backward, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastconv import functional as F
from fastconv import nn, ops, optim
from fastconv.distributed import Communicator, GradientReducer, SingleProcess
from fastconv.init import Share, default_generator
from fastconv.tensor import Tensor, move
from fastconv.train.evaluation import count_correct

# Of the auxiliary heads' losses, by the type of what the model returns in training: Szegedy et al.
# 2014, "Going deeper with convolutions", section 5, and torchvision's reference for Inception v3.
AUXILIARY_WEIGHT = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}


class TrainingError(RuntimeError):
    """The training itself went wrong, for example its loss is no longer a number."""


class Step(NamedTuple):
    """What a step found, in all processes together, before it changed the weights."""

    loss: float  # mean over the images
    correct: int
    gradient_norm: float | None  # before it was clipped; None where nothing clips

    def check_finite(self) -> None:
        """TrainingError where it is not: then the weights were left alone."""
        _check_finite("loss", self.loss)
        if self.gradient_norm is not None:
            _check_finite("norm of the gradients", self.gradient_norm)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingError(f"the {name} is {value}: try a smaller learning rate")


def train_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    x: NDArray[Any],
    y: NDArray[Any],
    label_smoothing: float = 0.0,
    *,
    micro_batch: int | None = None,
    clip_norm: float | None = None,
    gradients: GradientReducer | None = None,
    shares: Sequence[Share] | None = None,
) -> Step:
    """A step on images x [N, C, H, W], labels y [N].

    micro_batch  go through the model with this many images at a time and add up the gradients: the
                 step of the whole batch, to rounding, in the memory of a smaller one (but batch
                 norm sees the smaller one's statistics)
    clip_norm    scale the gradients so that their common L2 norm is at most this
    gradients    what adds up the gradients of all processes (op "sum"), each of which has a part of
                 the batch; None: this process is alone
    shares       which rows of each micro-batch x and y are, one after another; needed with
                 `gradients`, and instead of micro_batch

    Raises TrainingError, and leaves the weights alone, when the loss or the clipped norm is not
    finite; in all processes then.
    """
    optimizer.zero_grad()
    size = micro_batch or len(y)
    if shares is None:
        sizes = (min(size, len(y) - first) for first in range(0, len(y), size))
        shares = [Share(0, n, n) for n in sizes]
    communicator = SingleProcess() if gradients is None else gradients.communicator
    total = sum(share.total for share in shares)
    loss, correct, first = 0.0, 0, 0
    for number, share in enumerate(shares, 1):
        part = slice(first, first + share.stop - share.start)
        first = part.stop
        adding = gradients.no_sync() if gradients and number < len(shares) else nullcontext()
        with default_generator.batch_share(share), adding:
            value, right = _forward_backward(
                model, x[part], y[part], label_smoothing, total, communicator
            )
        loss += value
        correct += right
    if gradients is not None:
        gradients.finish()
    norm, scale = None, 1.0
    if clip_norm is not None:
        norm = ops.gradient_norm([p.grad for g in optimizer.param_groups for p in g["params"]])
        _check_finite("norm of the gradients", norm)
        scale = optim.clip_factor(norm, clip_norm)
    optimizer.step(scale)
    return Step(loss, correct, norm)


def training_loss(output: Any, y: Any, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(logits, loss) of what a model returned in training.

    That is logits [N, classes], or a named tuple of the logits and those of auxiliary heads, which
    count with the weight that their paper gives them. Raises TypeError for any other tuple.
    """
    if isinstance(output, Tensor):
        return output, F.cross_entropy(output, y, label_smoothing=label_smoothing)
    kind = type(output).__name__
    if kind not in AUXILIARY_WEIGHT:
        raise TypeError(f"a model must return logits, got {kind}")
    logits, *auxiliary = output
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    for head in auxiliary:
        if head is not None:
            head_loss = F.cross_entropy(head, y, label_smoothing=label_smoothing)
            loss = loss + AUXILIARY_WEIGHT[kind] * head_loss
    return logits, loss


def _forward_backward(
    model: nn.Module,
    x: NDArray[Any],
    y: NDArray[Any],
    label_smoothing: float,
    total: int,
    communicator: Communicator,
) -> tuple[float, int]:
    """(loss, how many right) of all processes: the sum over the images, divided by `total`.

    The gradients of this process's loss are added to the parameters.
    """
    device = model.device
    output = model(Tensor(move(x, device)))
    logits, loss = training_loss(output, move(y, device), label_smoothing)
    share = len(y) / total
    own = loss.item() * share if len(y) else 0.0  # the mean over no images is no number
    figures = np.array([own, count_correct(logits, y)])
    communicator.all_reduce(figures).wait()
    value, correct = figures.tolist()
    _check_finite("loss", value)
    loss.backward(np.full(loss.shape, share, loss.dtype))
    return value, int(correct)

"""Whole training steps, forward, loss, backward and optimiser, against PyTorch in four modes.

PyTorch counts with the fastest of eager and torch.compile, each in NCHW and channels_last, and has
its fused AdamW. Both sides start from the same weights and see the same batch; before the clock
starts, the losses of a few steps without dropout must agree.

    python -m bench.steps --models smallcnn --threads 1,2 --json F
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

import fastconv
from bench import options, report, roofline
from bench.measure import Call, alternate
from fastconv import models, nn, optim
from fastconv.summary import summarize
from fastconv.tensor import Tensor
from fastconv.train.step import training_loss

MODELS = ["smallcnn"]
IMAGE = (3, 32, 32)
CLASSES = 10
TOLERANCE = 5e-3  # of the loss, between two float32 trajectories


@dataclass(frozen=True)
class Training:
    """An optimiser, by its name here and in PyTorch, and how many steps of it are compared."""

    optimizer: str
    settings: Mapping[str, Any]
    checked_steps: int

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        made: optim.Optimizer = getattr(optim, self.optimizer)(parameters, **self.settings)
        return made


TRAINING = Training("AdamW", {"lr": 1e-3}, checked_steps=5)


def batch(size: int, image: tuple[int, int, int] = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """Images of logical shape NCHW in channels-last memory, and their labels."""
    rng = np.random.default_rng(0)
    channels, height, width = image
    images = rng.standard_normal((size, height, width, channels), np.float32)
    return images.transpose(0, 3, 1, 2), rng.integers(0, CLASSES, size)


def step(
    model: nn.Module, optimizer: optim.Optimizer, images: np.ndarray, labels: np.ndarray
) -> Tensor:
    optimizer.zero_grad()
    _, loss = training_loss(model(images), labels, label_smoothing=0.0)
    loss.backward()
    optimizer.step()
    return loss


def compare(
    name: str,
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    training: Training,
    peer: ModuleType,
) -> list[float]:
    """Trains `model` and the peer's from the same weights without dropout: the differences of the
    losses, step by step; ends the run if they part."""
    peer.without_noise(model)
    expected = peer.losses(name, model.state_dict(), images, labels, training)
    optimizer = training.optimizer_of(model.parameters())
    losses = [step(model, optimizer, images, labels).item() for _ in expected]
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    if not max(differences) <= TOLERANCE:
        raise SystemExit(f"{name}: losses {losses} differ from PyTorch's {expected}")
    return differences


def run(
    name: str, limit: roofline.Roofline, arguments: argparse.Namespace, peer: ModuleType | None
) -> report.Row:
    """Checks and times the training step of one model with one number of threads."""
    images, labels = batch(8 if arguments.quick else arguments.batch)
    fastconv.set_num_threads(limit.threads)
    model = models.create(name)
    peers: dict[str, Call] = {}
    details: dict[str, object] = {"batch": len(images)}
    if peer:
        peer.set_num_threads(limit.threads)
        details["difference"] = compare(name, models.create(name), images, labels, TRAINING, peer)
        compiled = not (arguments.quick or arguments.no_compile)
        peers = peer.steps(name, model.state_dict(), images, labels, TRAINING, compiled)
    optimizer = TRAINING.optimizer_of(model.parameters())
    ours = partial(step, model, optimizer, images, labels)
    samples = alternate({"fastconv": ours, **peers}, arguments.budget, arguments.min_rounds)
    flops = training_flops(model, images)
    return report.Row(
        group="steps",
        name=f"{name} batch {len(images)}",
        op="step",
        threads=limit.threads,
        flops=flops,
        bound=limit.bound(flops, 0),
        ours=samples.pop("fastconv"),
        peers=samples,
        details=details,
    )


def training_flops(model: nn.Module, images: np.ndarray) -> float:
    """Two flops a multiply-add, three passes: forward, input gradient and weight gradient."""
    return 3 * 2.0 * len(images) * summarize(model, images.shape[1:]).multiply_adds


def chosen(arguments: argparse.Namespace) -> Iterator[str]:
    return (name for name in arguments.models if arguments.filter in name)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("steps", __doc__)
    options.add_comparison(parser, budget=10.0)
    options.add_choice(parser, "--models", MODELS, MODELS)
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images in a batch")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    peer = options.peer_module(arguments)
    limits = [roofline.measure(threads) for threads in arguments.threads]
    rows = []
    for name in chosen(arguments):
        for limit in limits:
            row = run(name, limit, arguments, peer)
            report.progress(row)
            rows.append(row)
    report.finish("steps", rows, [limit.as_json() for limit in limits], arguments)


if __name__ == "__main__":
    main()

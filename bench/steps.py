"""Whole training steps, forward, loss, backward and optimiser, against PyTorch in four modes.

PyTorch counts with the fastest of eager and torch.compile, each in NCHW and channels_last, and has
its fused AdamW. Both sides start from the same weights and see the same batch; before the clock
starts, the losses of a few steps without dropout must agree.

    python -m bench.steps --models smallcnn --threads 1,2 --json F
    python -m bench.steps --models resnet50,vgg16,efficientnet_b0 --no-compile
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

import fastconv
from bench import options, report, roofline
from bench.measure import PAUSE, Call, alternate
from fastconv import models, nn, optim
from fastconv.ops._arrays import pair
from fastconv.summary import summarize
from fastconv.tensor import Tensor
from fastconv.train.step import training_loss

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


ADAMW = Training("AdamW", {"lr": 1e-3}, checked_steps=5)
SGD = Training("SGD", {"lr": 1e-4, "momentum": 0.9}, checked_steps=2)


@dataclass(frozen=True)
class Work:
    """A step: so many images of size x size, and how the model is trained."""

    batch: int
    size: int
    training: Training = SGD


WORK = {
    "smallcnn": Work(128, 32, ADAMW),
    "resnet18_cifar": Work(32, 32),
    "vgg16": Work(4, 224),
    "resnet50": Work(8, 224),
    "densenet121": Work(8, 224),
    "googlenet": Work(8, 224),
    "efficientnet_b0": Work(8, 224),
    "resnet20_cifar": Work(128, 32),
    "resnet18": Work(8, 224),
}
QUICK = {"batch": 8, "size": 64}  # what every model takes, with enough values for its batch norms


def batch(size: int, image: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
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
    losses, step by step; ends the run if they part further than TOLERANCE and what the peer's own
    layouts differ by. Fifty layers of random weights magnify a rounding error: after one step of
    ResNet-50 PyTorch's losses lie up to 8e-3 apart, each as far from float64's."""
    peer.without_noise(model)
    expected: dict[str, list[float]] = peer.losses(
        name, model.state_dict(), images, labels, training
    )
    optimizer = training.optimizer_of(model.parameters())
    differences = []
    for theirs in zip(*expected.values(), strict=True):
        loss = step(model, optimizer, images, labels).item()
        differences.append(abs(loss - theirs[0]))
        if not differences[-1] <= TOLERANCE + max(theirs) - min(theirs):
            at = f"{name}: the loss of step {len(differences)} is {loss:g}"
            raise SystemExit(f"{at}, PyTorch's {dict(zip(expected, theirs, strict=True))}")
    return differences


def run(
    name: str, limit: roofline.Roofline, arguments: argparse.Namespace, peer: ModuleType | None
) -> report.Row:
    """Checks and times the training step of one model with one number of threads."""
    work = WORK[name]
    size = min(work.size, QUICK["size"]) if arguments.quick else work.size
    number = QUICK["batch"] if arguments.quick else arguments.batch or work.batch
    images, labels = batch(number, (3, size, size))
    fastconv.set_num_threads(limit.threads)
    model = models.create(name, image_size=size)
    peers: dict[str, Call] = {}
    details: dict[str, object] = {"batch": number, "image_size": size}
    if peer:
        peer.set_num_threads(limit.threads)
        twin = copy.deepcopy(model)
        details["difference"] = compare(name, twin, images, labels, work.training, peer)
        del twin
        compiled = not (arguments.quick or arguments.no_compile)
        peers = peer.steps(name, model.state_dict(), images, labels, work.training, compiled)
    optimizer = work.training.optimizer_of(model.parameters())
    ours = partial(step, model, optimizer, images, labels)
    samples = alternate({"fastconv": ours, **peers}, arguments.budget, arguments.min_rounds, PAUSE)
    flops = training_flops(model, images)
    details["least_flops"] = least_flops(model, images)
    return report.Row(
        group="steps",
        name=f"{name} batch {number} of {size}",
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


def least_flops(
    model: nn.Module, images: np.ndarray, ops: Sequence[str] = ("fwd", "dgrad", "wgrad")
) -> float:
    """Of these passes by the library's best algorithms, on images that their tiles divide. The
    input gradient of the first layer is nobody's need."""
    layers = dict(model.named_modules())
    total = 0.0
    for i, row in enumerate(
        row for row in summarize(model, images.shape[1:]).rows if row.multiply_adds
    ):
        layer = layers[row.name]
        for op in ops:
            if i == 0 and op == "dgrad":
                continue
            fewer = 1.0
            if isinstance(layer, nn.Conv2d):
                kernel, stride = (pair(v, "size") for v in (layer.kernel_size, layer.stride))
                groups = layer.groups
                fewer = roofline.fewer_multiplications(
                    kernel, stride, layer.in_channels // groups, layer.out_channels // groups, op
                )
            total += row.multiply_adds / fewer
    return 2.0 * len(images) * total


def chosen(arguments: argparse.Namespace) -> Iterator[str]:
    return (name for name in arguments.models if arguments.filter in name)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("steps", __doc__)
    options.add_comparison(parser, budget=10.0)
    options.add_choice(parser, "--models", list(WORK), ["smallcnn"])
    parser.add_argument("--batch", type=int, metavar="N", help="images in a batch (the model's)")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="without torch.compile, which takes minutes for a model of many layers",
    )
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

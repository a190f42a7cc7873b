"""Which parts of a convolutional network earn their place? Four studies on real digits.

    python examples/ablations.py depth                 plain and residual networks, 8 to 56 layers
    python examples/ablations.py kernels               three 3x3 layers against one 7x7
    python examples/ablations.py norm                  batch norm before or after ReLU, or none
    python examples/ablations.py regularisation        with and without dropout and augmentation
    python examples/ablations.py all --plot docs       all of them, each with a picture (matplotlib)

The variants of a study differ in the one thing that is studied: they see the same digits in the
same order, for the same number of steps. Each is trained from several seeds; the table gives mean
and standard deviation. docs/ablations.md says what was found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastconv
from fastconv import functional as F
from fastconv import init, nn
from fastconv.augment import Augmentation
from fastconv.data import DataLoader, Dataset, channel_statistics, mnist5k
from fastconv.models import SmallCNN
from fastconv.optim import SGD, CosineAnnealingLR, parameter_groups
from fastconv.summary import summarize
from fastconv.tensor import Tensor
from fastconv.train import evaluate
from fastconv.train.step import TrainingError, train_step

BATCH = 64
WEIGHT_DECAY = 1e-4  # He et al. 2015, section 3.4, as is the momentum


# What is compared


@dataclass(frozen=True)
class Variant:
    """A network, and how it is trained where that is what the study compares."""

    build: Callable[[], nn.Module]
    lr: float = 0.1
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Study:
    question: str
    variants: dict[str, Variant]
    epochs: int
    seeds: int
    colours: int  # of the plot; variants beyond that number repeat them, dashed


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed. A run that diverged has the errors of a guess, 0.9."""

    losses: list[float]  # the mean training loss of each epoch
    train_loss: float  # at the end, in evaluation mode and without augmentation
    train_error: float
    test_error: float
    diverged: bool = False


# The networks: 28x28 digits, halved by the first layer, a global mean before the classifier


def conv(channels: int, filters: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, started as in He et al. 2015, "Delving deep"."""
    layer = nn.Conv2d(channels, filters, size, stride, padding=size // 2, bias=bias)
    layer.weight.data[...] = init.kaiming_normal_fan_out(layer.weight.shape)
    return layer


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, with or without a shortcut around them.

    The shortcut has no parameters: every stride-th pixel, and zeros for the new channels (He et al.
    2015, "Deep residual learning", section 4.1, option A). So the plain network and the residual
    one have the same parameters and, from the same seed, the same initial weights.
    """

    def __init__(self, channels: int, filters: int, stride: int, shortcut: bool) -> None:
        self.conv1 = conv(channels, filters, 3, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = shortcut
        self.stride = stride
        # As a convolution with the 1x1 kernel that copies each channel.
        self.copy = np.eye(filters, channels, dtype=np.float32)[:, :, None, None]

    def forward(self, x: Any) -> Tensor:
        around = None
        if self.shortcut:
            same = self.stride == 1 and self.copy.shape[0] == self.copy.shape[1]
            around = x if same else F.conv2d(x, self.copy, stride=self.stride)
        y = self.bn1(self.conv1(x), activation="relu")
        result: Tensor = self.bn2(self.conv2(y), residual=around, activation="relu")
        return result


def deep_network(depth: int, shortcut: bool) -> nn.Module:
    """Depth 6n + 2: n blocks each of 8, 16 and 32 channels on 14x14, 7x7 and 4x4 pixels.

    The networks of He et al. 2015, section 4.2, at half the width and about half the image size.
    """
    layers: list[nn.Module] = [conv(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    channels = 8
    for filters in (8, 16, 32):
        for _ in range((depth - 2) // 6):
            layers.append(Block(channels, filters, filters // channels, shortcut))
            channels = filters
    return nn.Sequential(*layers, *head(32))


def kernel_network(
    sizes: Sequence[int], channels: int = 16, relu_between: bool = True
) -> nn.Module:
    """Two groups of convolutions of the given sizes, on 14x14 and on 7x7 pixels."""
    layers: list[nn.Module] = [conv(1, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU()]
    for group in range(2):
        if group:
            layers.append(nn.MaxPool2d(2))
        for i, size in enumerate(sizes):
            layers += [conv(channels, channels, size), nn.BatchNorm2d(channels)]
            if relu_between or i == len(sizes) - 1:
                layers.append(nn.ReLU())
    return nn.Sequential(*layers, *head(channels))


def norm_network(order: str) -> nn.Module:
    """Six convolutions, each followed by what `order` says: "bn relu", "relu bn" or "relu".

    All have a bias: where ReLU comes first, it is the only threshold.
    """
    layers: list[nn.Module] = []
    for channels, filters, stride in (
        (1, 16, 2), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)
    ):  # fmt: skip
        layers.append(conv(channels, filters, 3, stride, bias=True))
        for name in order.split():
            layers.append(nn.BatchNorm2d(filters) if name == "bn" else nn.ReLU())
    return nn.Sequential(*layers, *head(32))


# The studies


def studies(quick: bool) -> dict[str, Study]:
    depths = (8, 14) if quick else (8, 20, 32, 56)
    augmentation = Augmentation(crop_padding=2, rotation=10, zoom=0.1)
    small_cnn = partial(SmallCNN, in_channels=1, image_size=28)
    return {
        "depth": Study(
            "Plain and residual networks of growing depth",
            {
                f"{'residual' if shortcut else 'plain'} {depth}": Variant(
                    partial(deep_network, depth, shortcut)
                )
                for shortcut in (False, True)
                for depth in depths
            },
            epochs=6,
            seeds=2,
            colours=len(depths),
        ),
        "kernels": Study(
            "Three 3x3 layers against one 7x7",
            {
                "one 7x7": Variant(partial(kernel_network, [7])),
                "one 7x7, 12 channels": Variant(partial(kernel_network, [7], 12)),
                "three 3x3": Variant(partial(kernel_network, [3, 3, 3])),
                "three 3x3, no ReLU between": Variant(
                    partial(kernel_network, [3, 3, 3], relu_between=False)
                ),
            },
            epochs=6,
            seeds=5,
            colours=4,
        ),
        "norm": Study(
            "Batch norm before or after ReLU, or none",
            {
                f"{name}, rate {lr}": Variant(partial(norm_network, order), lr)
                for lr in (0.01, 0.1)
                for name, order in (
                    ("BN, ReLU", "bn relu"),
                    ("ReLU, BN", "relu bn"),
                    ("ReLU alone", "relu"),
                )
            },
            epochs=4,
            seeds=2,
            colours=3,
        ),
        "regularisation": Study(
            "With and without dropout and augmentation",
            {
                "neither": Variant(partial(small_cnn, dropout=0.0), 0.02),
                "dropout": Variant(partial(small_cnn, dropout=0.5), 0.02),
                "augmentation": Variant(partial(small_cnn, dropout=0.0), 0.02, augmentation),
                "both": Variant(partial(small_cnn, dropout=0.5), 0.02, augmentation),
            },
            epochs=12,
            seeds=2,
            colours=4,
        ),
    }


def digits(quick: bool) -> tuple[Dataset, Dataset]:
    """4,000 to train and 1,000 held out; a few of each with `quick`."""
    train, test = mnist5k("train"), mnist5k("test")
    return (train[::10], test[::5]) if quick else (train, test)


# Training


def train(variant: Variant, seed: int, epochs: int, data: tuple[Dataset, Dataset]) -> Run:
    """SGD with momentum, its rate falling to zero along half a cosine."""
    fastconv.manual_seed(seed)  # of weights and dropout masks
    model = variant.build()
    mean, std = channel_statistics(data[0])
    batches = DataLoader(
        data[0],
        BATCH,
        shuffle=True,
        seed=seed,
        augmentation=variant.augmentation,
        mean=mean,
        std=std,
    )
    groups = parameter_groups(model.named_parameters(), variant.lr, WEIGHT_DECAY)
    optimizer = SGD(groups, variant.lr, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, epochs * len(batches))

    losses: list[float] = []
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches.batches(epoch):
            try:
                total += train_step(model, optimizer, x, y).loss * len(y)
            except TrainingError:  # the loss is no longer a number
                return Run(losses, float("nan"), 0.9, 0.9, diverged=True)
            schedule.step()
        losses.append(total / len(data[0]))
    on_train, on_test = (evaluate(model, DataLoader(d, 250, mean=mean, std=std)) for d in data)
    return Run(losses, on_train.loss, 1 - on_train.accuracy, 1 - on_test.accuracy)


def run(
    study: Study, seeds: int, epochs: int, data: tuple[Dataset, Dataset], keep: Path | None = None
) -> dict[str, list[Run]]:
    """Every variant from every seed. Runs that the file `keep` holds are not repeated."""
    known = read_runs(keep) if keep is not None else {}
    runs: dict[str, list[Run]] = {name: [] for name in study.variants}
    for seed in range(seeds):
        for name, variant in study.variants.items():
            key = f"{study.question}; {name}; seed {seed}; {epochs} epochs; {len(data[0])} digits"
            result = known.get(key)
            if result is None:
                result = train(variant, seed, epochs, data)
                if keep is not None:
                    with keep.open("a") as file:
                        file.write(json.dumps([key, asdict(result)]) + "\n")
            runs[name].append(result)
            print(
                f"{name}, seed {seed}: training loss {result.train_loss:.4f}, "
                f"error {result.train_error:.2%}, held out {result.test_error:.2%}",
                file=sys.stderr,
                flush=True,
            )
    return runs


def read_runs(path: Path) -> dict[str, Run]:
    """The runs that `run` has written, a line each; none where there is no file yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key: Run(**figures) for key, figures in map(json.loads, lines)}


# What is shown

COLUMNS = (
    "network", "parameters", "multiply-adds", "training loss", "training error", "held-out error",
)  # fmt: skip


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation, for example 1.20% ± 0.10%."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def table(study: Study, runs: dict[str, list[Run]]) -> str:
    """In Markdown, a row a variant."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|---:|---:|"]
    for name, of_seeds in runs.items():
        size = summarize(study.variants[name].build(), (1, 28, 28))
        diverged = sum(r.diverged for r in of_seeds)
        cells = [
            name + (f" ({diverged} of {len(of_seeds)} diverged)" if diverged else ""),
            f"{size.parameters:,}",
            f"{size.multiply_adds:,}",
            spread([r.train_loss for r in of_seeds], ".4f"),
            spread([r.train_error for r in of_seeds], ".2%"),
            spread([r.test_error for r in of_seeds], ".2%"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(study: Study, runs: dict[str, list[Run]], target: Path) -> None:
    """Left the training loss of each epoch, mean of the seeds; right each seed's final errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, of_seeds) in enumerate(runs.items()):
        style = {"color": f"C{i % study.colours}", "ls": "-" if i < study.colours else "--"}
        whole = [r.losses for r in of_seeds if not r.diverged]
        if whole:
            left.plot(range(1, len(whole[0]) + 1), np.mean(whole, axis=0), label=name, **style)
        for offset, marker, errors in (
            (-0.12, "o", [r.train_error for r in of_seeds]),
            (0.12, "x", [r.test_error for r in of_seeds]),
        ):
            places = [i + offset] * len(errors)
            right.plot(places, 100 * np.array(errors), marker, color=style["color"], ms=5)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log", title=study.question)
    left.legend(fontsize=7)
    right.set(ylabel="error in %", title="o training digits, x held-out digits")
    right.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right", fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=80)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[Run]]]:
    """Runs the chosen studies, prints their tables, and returns every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", choices=[*studies(False), "all"])
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default: 2, for kernels 5)")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="also draw DIR/ablations_STUDY.png"
    )
    parser.add_argument(
        "--quick", action="store_true", help="try the command: few digits, 2 epochs"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="go on from the runs in this file"
    )
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")

    data = digits(options.quick)
    results = {}
    for name, study in studies(options.quick).items():
        if options.study not in (name, "all"):
            continue
        seeds = options.seeds or (1 if options.quick else study.seeds)
        epochs = 2 if options.quick else study.epochs
        runs = results[name] = run(study, seeds, epochs, data, options.keep)
        steps = epochs * -(-len(data[0]) // BATCH)
        print(f"\n{study.question}: {seeds} seeds, {epochs} epochs, {steps} steps\n")
        print(table(study, runs), flush=True)
        if options.plot is not None:
            plot(study, runs, options.plot / f"ablations_{name}.png")
    return results


if __name__ == "__main__":
    main()

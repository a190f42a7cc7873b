"""What a training run shows: nothing, plain lines, or a progress bar; and its curves at the end.

`Progress` is silent and names the moments that are reported. Derive from it to report elsewhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from fastconv.train.config import TrainConfig

__all__ = ["BarProgress", "PlainProgress", "Progress", "choose_progress", "plot_curves"]


class Progress:
    """Reports nothing. Epochs count from 0, accuracies are shares, speed is images a second."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def run_started(
        self, config: TrainConfig, info: dict[str, Any], parameters: int, epoch: int, batch: int
    ) -> None:
        """A run begins, or goes on after `batch` batches of `epoch`; `info` as in checkpoints."""

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        """An epoch of `batches` batches begins, of which `done` were taken before a resume."""

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        """A step is done; means over the epoch up to here."""

    def epoch_ended(self, epoch: int, figures: dict[str, float], speed: float | None) -> None:
        """`figures` has loss, accuracy, test_loss and test_accuracy."""

    def message(self, text: str) -> None:
        """Something else that the user should know, one line."""


class PlainProgress(Progress):
    """A line when a run begins and one an epoch, on a stream (stderr when none is given)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.epochs = 0

    def run_started(
        self, config: TrainConfig, info: dict[str, Any], parameters: int, epoch: int, batch: int
    ) -> None:
        self.epochs = config.epochs
        size, channels, classes = info["image_size"], info["in_channels"], len(info["classes"])
        self.message(
            f"{config.model} ({parameters:,} parameters) on {config.data}: "
            f"images {channels}x{size}x{size}, {classes} classes"
        )
        if epoch or batch:
            self.message(f"going on after epoch {epoch}, batch {batch}")

    def epoch_ended(self, epoch: int, figures: dict[str, float], speed: float | None) -> None:
        self.message(
            f"epoch {epoch + 1}/{self.epochs}  "
            f"loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.2%}  "
            f"test loss {figures['test_loss']:.4f}  test accuracy {figures['test_accuracy']:.2%}  "
            f"{_speed(speed)}"
        )

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class BarProgress(PlainProgress):
    """The same lines, and under them a bar for the epoch, drawn by rich on stderr."""

    def __init__(self) -> None:
        super().__init__()
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        name = f"{epoch + 1}/{self.epochs}"
        self._task = self._bar.add_task("", total=batches, completed=done, epoch=name, text="")

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        text = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {_speed(speed)}"
        self._bar.update(self._task, advance=1, text=text)

    def message(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def choose_progress() -> Progress:
    """A bar where stderr is a terminal and rich is installed, plain lines elsewhere."""
    if not sys.stderr.isatty():
        return PlainProgress()
    try:
        return BarProgress()
    except ImportError:
        return PlainProgress()


def plot_curves(metrics: Path, target: Path) -> bool:
    """Draws loss and accuracy of a metrics.jsonl as a PNG; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = [record for record in records if record["event"] == "epoch"]
    numbers = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "train"), (f"test_{name}", "test")):
            axes.plot(numbers, [record[key] for record in epochs], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)
    return True


def _speed(images_per_second: float | None) -> str:
    return "" if images_per_second is None else f"{images_per_second:,.0f} images/s"

"""Training, from the choice of a model and a data set to checkpoints and curves.

    result = train(TrainConfig(model="smallcnn", data="mnist5k"), out="runs/first")

A run is a folder: config.json, metrics.jsonl (a line every few steps and one an epoch),
last.safetensors (everything needed to go on), best.safetensors (the weights of the best epoch),
curves.png. A run that was killed at any moment and resumed ends with the same bits as one never
stopped: last.safetensors is replaced in one step and holds weights, optimiser, schedule, random
state and position together, and the order and augmentation of the data are functions of (seed,
epoch, image).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastconv
from fastconv import checkpoint, data, models, nn, optim
from fastconv import functional as F
from fastconv.data import DataLoader
from fastconv.progress import Progress, plot_curves
from fastconv.tensor import Tensor, no_grad

__all__ = [
    "Evaluation",
    "Result",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "load_config",
    "load_model",
    "resume",
    "train",
    "train_step",
]

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "constant")
EVALUATION_BATCH = 250

_CHANGEABLE = ("threads", "prefetch", "data_dir", "checkpoint_every")

# What the configuration leaves open, by optimiser and by data set.
_LR = {"adamw": 2e-3, "sgd": 0.05}
_WEIGHT_DECAY = {"adamw": 1e-2, "sgd": 5e-4}
_CROP_PADDING = {"mnist5k": 1, "mnist": 1}
_FLIP = {"mnist5k": False, "mnist": False}  # a mirrored digit is another digit or none


class TrainingError(RuntimeError):
    """The training itself went wrong, for example its loss is no longer a number."""


@dataclass(frozen=True)
class TrainConfig:
    """What determines a run. None is the default of the optimiser or of the data set."""

    model: str = "smallcnn"
    data: str = "mnist5k"
    data_dir: str | None = None
    image_size: int = 32  # height and width that the data set "folder" is scaled to
    epochs: int = 12
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    momentum: float = 0.9  # of SGD
    weight_decay: float | None = None
    decay_all: bool = False  # biases and norms, too
    schedule: str = "cosine"  # with a linear warm-up over the first warmup_steps
    warmup_steps: int = 50
    label_smoothing: float = 0.0
    crop_padding: int | None = None
    flip: bool | None = None
    seed: int = 0
    threads: int | None = None  # no influence on the bits
    log_every: int = 10  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 50  # steps between two checkpoints
    prefetch: int = 2

    def resolved(self) -> TrainConfig:
        """With every open value filled in. Raises ValueError for a value out of its range."""
        for name, allowed in (
            ("model", tuple(models.available())),
            ("data", data.NAMES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )

        def default(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        config = dataclasses.replace(
            self,
            lr=default(self.lr, _LR[self.optimizer]),
            weight_decay=default(self.weight_decay, _WEIGHT_DECAY[self.optimizer]),
            crop_padding=default(self.crop_padding, _CROP_PADDING.get(self.data, 4)),
            flip=default(self.flip, _FLIP.get(self.data, True)),
        )
        for names, low, high in (
            ("epochs batch_size image_size log_every checkpoint_every threads", 1, math.inf),
            ("lr weight_decay warmup_steps crop_padding prefetch", 0, math.inf),
            ("momentum label_smoothing", 0, 1),
            ("seed", 0, 2**64),
        ):
            for name in names.split():
                value = getattr(config, name)
                if value is not None and not low <= value < high:  # NaN lies nowhere
                    raise ValueError(f"{name} must be at least {low} and below {high}, got {value}")
        return config


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of right answers over `images` images."""

    loss: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Result:
    """How a run ended. test_accuracy is that after the last epoch, not of the best one."""

    test_accuracy: float
    test_loss: float
    best_test_accuracy: float
    best_epoch: int  # 1 is the first
    images_per_second: float | None  # of training, in this process; None without any
    seconds: float  # in this process, with evaluation and checkpoints
    epochs: int
    steps: int
    parameters: int
    out: str | None
    model: nn.Module = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, for JSON."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"
        }


@dataclass
class _Position:
    """Where a run stands, apart from weights, optimiser and random state. Epochs count from 0."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that were taken
    step: int = 0
    images: int = 0  # of this epoch, and the sums over them
    loss_sum: float = 0.0
    correct: int = 0
    test_loss: float = 0.0  # of the last epoch that ended
    test_accuracy: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    metrics_lines: int = 0

    def add_batch(self, loss: float, correct: int, images: int) -> None:
        self.step += 1
        self.batch += 1
        self.images += images
        self.loss_sum += loss * images
        self.correct += correct

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = self.images = self.correct = 0
        self.loss_sum = 0.0


def train(
    config: TrainConfig,
    out: str | PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Trains a model as the configuration says and returns how it ended, with the model.

    out        folder of the run; None keeps nothing on the disk (and needs numpy alone)
    overwrite  replace the run that is in `out`; without it FileExistsError is raised
    progress   what reports on the way; nothing is reported without it

    Raises ValueError for a bad configuration or data set, TrainingError when the loss stops being
    finite, and KeyboardInterrupt after an interrupt, once the checkpoint is written.
    """
    config = config.resolved()
    folder = None if out is None else _RunFolder(out)
    if folder is not None:
        checkpoint.check_available()
        folder.check_free(overwrite)
    run = _Run(config, folder, progress or Progress())
    if folder is not None:
        folder.create(config)
    return run.run()


def resume(out: str | PathLike[str], *, progress: Progress | None = None, **changes: Any) -> Result:
    """Goes on with the run in `out` from its last checkpoint, to the bits of a run never stopped.

    changes  fields of TrainConfig that do not touch the result: threads, prefetch, data_dir,
             checkpoint_every. ValueError for any other, unless it is what the run has anyway.
    """
    config = load_config(out)
    for name, value in changes.items():
        kept = getattr(config, name)
        if name not in _CHANGEABLE and value != kept:
            raise ValueError(f"a resumed run keeps its {name}: {out} has {kept}, asked for {value}")
    config = dataclasses.replace(config, **changes).resolved()
    run = _Run(config, _RunFolder(out), progress or Progress())
    run.restore()
    return run.run()


def load_config(out: str | PathLike[str]) -> TrainConfig:
    """The configuration of the run in a folder. Raises FileNotFoundError or ValueError."""
    path = Path(out) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{out}: no run to resume here (no config.json)")
    try:
        return TrainConfig(**json.loads(path.read_text())).resolved()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of fastconv ({error})") from error


def load_model(path: str | PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint that `train` wrote, last or best, and the information on it."""
    weights, info = checkpoint.load_weights(path)
    if "model" not in info:
        raise ValueError(f"{path}: does not say which model its weights belong to")
    model = _create_model(info)
    model.load_state_dict(weights)
    return model, info


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
                correct += _count_correct(logits, y)
                images += len(y)
    finally:
        for module, training in modes:
            module.training = training
    if not images:
        raise ValueError("no images to evaluate on")
    return Evaluation(loss_sum / images, correct / images, images)


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
    return value, _count_correct(logits, y)


class _Run:
    """Everything that is alive during a run, and its loop."""

    def __init__(self, config: TrainConfig, folder: _RunFolder | None, progress: Progress) -> None:
        if config.threads is not None:
            fastconv.set_num_threads(config.threads)
        self.config = config
        self.folder = folder
        self.progress = progress
        self.train_loader, self.test_loader, self.info = _prepare_data(config)
        fastconv.manual_seed(config.seed)
        self.model = _create_model(self.info)
        self.optimizer = _create_optimizer(config, self.model)
        self.schedule = _create_schedule(
            config, self.optimizer, config.epochs * len(self.train_loader)
        )
        self.at = _Position()
        self.trained_images = 0  # by this process, and the seconds it took
        self.trained_seconds = 0.0

    def run(self) -> Result:
        began = time.perf_counter()
        parameters = sum(math.prod(p.shape) for p in self.model.parameters())
        if self.folder is not None:
            self.folder.cut_metrics(self.at.metrics_lines)
        with _interruptible() as interrupted, self.progress as progress:
            progress.run_started(self.config, self.info, parameters, self.at.epoch, self.at.batch)
            while self.at.epoch < self.config.epochs:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                self._train_epoch(interrupted)
                self._finish_epoch()
        if self.folder is not None and not plot_curves(self.folder.metrics, self.folder.curves):
            self.progress.message("no curves.png: pip install 'fastconv[plot]' for it")
        return Result(
            test_accuracy=self.at.test_accuracy,
            test_loss=self.at.test_loss,
            best_test_accuracy=self.at.best_accuracy,
            best_epoch=self.at.best_epoch + 1,
            images_per_second=self._speed(),
            seconds=time.perf_counter() - began,
            epochs=self.config.epochs,
            steps=self.at.step,
            parameters=parameters,
            out=None if self.folder is None else str(self.folder.path),
            model=self.model,
        )

    def _train_epoch(self, interrupted: threading.Event) -> None:
        """The batches of this epoch that are left, from self.at.batch on."""
        at, config = self.at, self.config
        assert config.lr is not None  # resolved
        self.progress.epoch_started(at.epoch, len(self.train_loader), at.batch)
        self.model.train()
        mark = time.perf_counter()
        with closing(self.train_loader.batches(at.epoch, start=at.batch)) as batches:
            for x, y in batches:
                lr = self.schedule.rate(config.lr, self.schedule.last_epoch)
                loss, correct = self._train_step(x, y, lr)
                at.add_batch(loss, correct, len(y))
                now = time.perf_counter()
                self.trained_images += len(y)
                self.trained_seconds += now - mark
                mark = now
                self.progress.step(at.loss_sum / at.images, at.correct / at.images, self._speed())
                if at.step % config.log_every == 0:
                    self._log("step", loss=loss, accuracy=correct / len(y), lr=lr)
                if interrupted.is_set() or at.step % config.checkpoint_every == 0:
                    self.save()
                if interrupted.is_set():
                    raise KeyboardInterrupt

    def _train_step(self, x: Any, y: Any, lr: float) -> tuple[float, int]:
        try:
            result = train_step(self.model, self.optimizer, x, y, self.config.label_smoothing)
        except TrainingError as error:
            where = f"epoch {self.at.epoch + 1}, step {self.at.step + 1}, learning rate {lr:g}"
            raise TrainingError(f"{where}: {error}") from None
        self.schedule.step()
        return result

    def _finish_epoch(self) -> None:
        """Evaluates, notes the figures, keeps the weights if they are the best, and moves on."""
        at = self.at
        test = evaluate(self.model, self.test_loader)
        at.test_loss, at.test_accuracy = test.loss, test.accuracy
        figures = {
            "loss": at.loss_sum / at.images,
            "accuracy": at.correct / at.images,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
        }
        self._log("epoch", **figures)
        self.progress.epoch_ended(at.epoch, figures, self._speed())
        if test.accuracy > at.best_accuracy:
            at.best_accuracy, at.best_epoch = test.accuracy, at.epoch
            if self.folder is not None:
                info = {**self.info, "epoch": at.epoch + 1, "test_accuracy": test.accuracy}
                checkpoint.save_weights(self.folder.best, self.model.state_dict(), info)
        at.next_epoch()
        self.save()

    def save(self) -> None:
        """Writes the checkpoint to go on from, if the run has a folder."""
        if self.folder is None:
            return
        self.folder.sync_metrics()  # the checkpoint counts on the lines that came before it
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": nn.get_rng_state(),
            "position": asdict(self.at),
            "train_images": len(self.train_loader.dataset),
        }
        checkpoint.save_state(self.folder.last, state, self.info)

    def restore(self) -> None:
        """Takes up the last checkpoint; a run killed before its first one starts again."""
        if self.folder is None or not self.folder.last.exists():
            return
        state, _ = checkpoint.load_state(self.folder.last)
        images = len(self.train_loader.dataset)
        if state["train_images"] != images:
            raise ValueError(
                f"{self.folder.path} was started with {state['train_images']} training images, "
                f"the data set has {images} now"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        nn.set_rng_state(state["random"])
        self.at = _Position(**state["position"])

    def _log(self, event: str, **figures: float) -> None:
        self.at.metrics_lines += 1
        if self.folder is not None:
            where = {"event": event, "epoch": self.at.epoch + 1, "step": self.at.step}
            speed = self._speed()
            timing = {"images_per_second": None if speed is None else round(speed, 1)}
            self.folder.write_metrics({**where, **figures, **timing})

    def _speed(self) -> float | None:
        """Training images per second of this process, without the time of evaluations."""
        return self.trained_images / self.trained_seconds if self.trained_images else None


class _RunFolder:
    """The files of a run."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.curves = self.path / "curves.png"

    def _files(self) -> list[Path]:
        files = (self.config, self.metrics, self.last, self.best, self.curves)
        return [file for file in files if file.exists()]

    def check_free(self, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path}: is a file, not a folder for a run")
        if self._files() and not overwrite:
            raise FileExistsError(f"{self.path}: holds a run already; resume it or overwrite it")

    def create(self, config: TrainConfig) -> None:
        """Makes the folder, removes the overwritten run, and writes the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self._files():
            file.unlink()
        checkpoint.atomic_write(self.config, (json.dumps(asdict(config), indent=2) + "\n").encode())

    def cut_metrics(self, lines: int) -> None:
        """Keeps this many lines; a resumed run writes those after its checkpoint again."""
        kept = self.metrics.read_bytes().splitlines(True)[:lines] if self.metrics.exists() else []
        checkpoint.atomic_write(self.metrics, b"".join(kept))

    def write_metrics(self, record: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync_metrics(self) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def _prepare_data(config: TrainConfig) -> tuple[DataLoader, DataLoader, dict[str, Any]]:
    """The loaders of both splits, and what a checkpoint says about model and data."""
    train_set, test_set = (
        data.load(config.data, split, config.data_dir, config.image_size)
        for split in ("train", "test")
    )
    for split, dataset in (("train", train_set), ("test", test_set)):
        if not len(dataset):
            raise ValueError(f"data set {config.data!r} has no images to {split}")
    height, width, channels = train_set.image_shape
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    if (test_set.image_shape, test_set.classes) != (train_set.image_shape, train_set.classes):
        raise ValueError(
            f"the test images {test_set.image_shape} or classes {test_set.classes} differ from "
            f"those to train, {train_set.image_shape} and {train_set.classes}"
        )
    mean, std = data.channel_statistics(train_set)
    train_loader = DataLoader(
        train_set,
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        crop_padding=config.crop_padding or 0,
        flip=bool(config.flip),
        mean=mean,
        std=std,
        prefetch=config.prefetch,
    )
    test_loader = DataLoader(test_set, EVALUATION_BATCH, mean=mean, std=std)
    info = {
        "model": config.model,
        "data": config.data,
        "in_channels": channels,
        "image_size": height,
        "classes": list(train_set.classes),
        "mean": list(mean),
        "std": list(std),
    }
    return train_loader, test_loader, info


def _create_model(info: dict[str, Any]) -> nn.Module:
    return models.create(
        info["model"],
        in_channels=info["in_channels"],
        image_size=info["image_size"],
        num_classes=len(info["classes"]),
    )


def _create_optimizer(config: TrainConfig, model: nn.Module) -> optim.Optimizer:
    assert config.lr is not None and config.weight_decay is not None  # resolved
    groups = optim.parameter_groups(
        model.named_parameters(), config.lr, config.weight_decay, decay_all=config.decay_all
    )
    if config.optimizer == "sgd":
        return optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
    return optim.AdamW(groups, config.lr)


def _create_schedule(
    config: TrainConfig, optimizer: optim.Optimizer, steps: int
) -> optim.LRScheduler:
    """A linear warm-up, then half a cosine down to zero or a constant rate, batch by batch."""
    warmup = min(config.warmup_steps, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return optim.LambdaLR(optimizer, factor)


def _count_correct(logits: Tensor, y: NDArray[np.int64]) -> int:
    return int((logits.data.argmax(axis=1) == y).sum())


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, to stop between two steps; a second Ctrl-C stops at once."""
    event = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or previous in (signal.SIG_IGN, None):
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)

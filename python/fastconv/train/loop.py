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
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from os import PathLike
from types import FrameType
from typing import Any, NamedTuple

import fastconv
from fastconv import checkpoint, distributed, nn
from fastconv.distributed import (
    Communicator,
    GradientReducer,
    SingleProcess,
    failing_together,
)
from fastconv.train.config import TrainConfig, load_config
from fastconv.train.ema import EMA
from fastconv.train.evaluation import evaluate
from fastconv.train.progress import Progress, plot_curves
from fastconv.train.recipe import (
    create_model,
    create_optimizer,
    create_schedule,
    prepare_data,
)
from fastconv.train.run_folder import RunFolder
from fastconv.train.step import Step, TrainingError
from fastconv.train.steps import Steps
from fastconv.weights import freeze_backbone, load_pretrained, read_weights

_CHANGEABLE = ("threads", "prefetch", "workers", "data_dir", "checkpoint_every", "graph")


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


class _Started(NamedTuple):
    """A step whose figures are not known yet."""

    number: int
    images: int
    lr: float


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

    def add_figures(self, loss: float, correct: int, images: int) -> None:
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
    communicator: Communicator | None = None,
) -> Result:
    """Trains a model as the configuration says and returns how it ended, with the model.

    out        folder of the run; None keeps nothing on the disk (and needs numpy alone)
    overwrite  replace the run that is in `out`; without it FileExistsError is raised
    progress   what reports on the way; nothing is reported without it
    communicator
               the processes that share the work, all of which call this: with batches of B images,
               P of them take the steps of one process with batches of P * B. Process 0 alone
               reports and writes; the figures are those of all. None: this process alone

    Raises ValueError for a bad configuration or data set, TrainingError when the loss stops being
    finite, KeyboardInterrupt after an interrupt (of any process), once the checkpoint is written,
    and CommunicationError where another process has failed. The communicator is closed then.
    """
    team = communicator or SingleProcess()
    with failing_together(team):
        config = config.resolved()
        folder = None if out is None or team.rank != 0 else RunFolder(out)
        if folder is not None:
            checkpoint.check_available()
            folder.check_free(overwrite)
        run = _Run(config, folder, progress or Progress(), team)
        if config.weights is not None:
            run.load_pretrained(config.weights)
        if folder is not None:
            folder.create(run.config)
        if config.weights is not None:
            run.save()  # from now on the file of the weights is not needed
        return run.run()


def resume(
    out: str | PathLike[str],
    *,
    progress: Progress | None = None,
    communicator: Communicator | None = None,
    **changes: Any,
) -> Result:
    """Goes on with the run in `out` from its last checkpoint, to the bits of a run never stopped.

    communicator
             as in `train`; as many processes as the run had, which all read `out`

    changes  fields of TrainConfig that do not touch the result: threads, prefetch, workers,
             data_dir, checkpoint_every, graph. ValueError for any other, unless it is what the run
             has anyway.
    """
    team = communicator or SingleProcess()
    with failing_together(team):
        config = _changed(out, changes)
        folder = RunFolder(out)
        run = _Run(config, folder if team.rank == 0 else None, progress or Progress(), team)
        run.restore(folder)
        return run.run()


def _changed(out: str | PathLike[str], changes: dict[str, Any]) -> TrainConfig:
    """The configuration of the run in `out` with changes that do not touch the result."""
    config = load_config(out)
    for name, value in changes.items():
        kept = getattr(config, name)
        if name not in _CHANGEABLE and value != kept:
            raise ValueError(f"a resumed run keeps its {name}: {out} has {kept}, asked for {value}")
    return dataclasses.replace(config, **changes).resolved()


class _Run:
    """Everything that is alive during a run, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder | None,
        progress: Progress,
        communicator: Communicator,
    ) -> None:
        if config.threads is not None:
            fastconv.set_num_threads(config.threads)
        self.config = config
        self.folder = folder  # of process 0; None in the others
        self.progress = progress if communicator.rank == 0 else Progress()
        self.communicator = communicator
        self.train_loader, self.test_loader, self.info = prepare_data(config, communicator)
        fastconv.manual_seed(config.seed)
        self.model = create_model(self.info)
        if config.device == "cuda":
            if communicator.size > 1:
                raise ValueError(f"{communicator.size} processes cannot train on one CUDA device")
            fastconv.cuda.kernels()  # which says why there is no device
        if config.freeze_backbone:
            freeze_backbone(self.model)
        distributed.broadcast_state(self.model, communicator)
        if config.sync_batch_norm:
            self.model = distributed.convert_sync_batchnorm(self.model, communicator)
        self.model.to(config.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = GradientReducer(trained, communicator, op="sum")
        self.ema = EMA(self.model, config.ema) if config.ema else None
        self.optimizer = create_optimizer(config, self.model)
        self.schedule = create_schedule(
            config, self.optimizer, config.epochs * len(self.train_loader)
        )
        self.steps: Steps | None = None  # made when model and optimiser are as they are to start
        self.started: list[_Started] = []
        self.at = _Position()
        self.trained_images = 0  # by this process, and the seconds it took
        self.trained_seconds = 0.0

    def run(self) -> Result:
        began = time.perf_counter()
        parameters = sum(math.prod(p.shape) for p in self.model.parameters())
        if self.folder is not None:
            self.folder.cut_metrics(self.at.metrics_lines)
        with _interruptible() as interrupted, self.progress as progress, self._autocast():
            progress.run_started(self.config, self.info, parameters, self.at.epoch, self.at.batch)
            while self.at.epoch < self.config.epochs and not self._out_of_patience():
                if self._is_set(interrupted):
                    raise KeyboardInterrupt
                self._train_epoch(interrupted)
                self._finish_epoch()
            self.gradients.close()
            if self.at.epoch < self.config.epochs:
                progress.message(f"ended early: no better for {self.config.patience} epochs")
        if self.folder is not None and not plot_curves(self.folder.metrics, self.folder.curves):
            self.progress.message("no curves.png: pip install 'fastconv[plot]' for it")
        return Result(
            test_accuracy=self.at.test_accuracy,
            test_loss=self.at.test_loss,
            best_test_accuracy=self.at.best_accuracy,
            best_epoch=self.at.best_epoch + 1,
            images_per_second=self._speed(),
            seconds=time.perf_counter() - began,
            epochs=self.at.epoch,
            steps=self.at.step,
            parameters=parameters,
            out=None if self.folder is None else str(self.folder.path),
            model=self.result_model,
        )

    @property
    def result_model(self) -> nn.Module:
        """The model that is evaluated and kept: with the averaged weights, if there are any."""
        return self.model if self.ema is None else self.ema.model

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self.config.autocast
        return nullcontext() if dtype is None else fastconv.cuda.autocast(dtype)

    def _is_set(self, event: threading.Event) -> bool:
        """Whether an event is set in any process: they stop after the same step."""
        return distributed.any_process(self.communicator, event.is_set())

    def _out_of_patience(self) -> bool:
        at, patience = self.at, self.config.patience
        return patience is not None and at.epoch - (at.best_epoch + 1) >= patience

    def _train_epoch(self, interrupted: threading.Event) -> None:
        """The batches of this epoch that are left, from self.at.batch on."""
        at, config = self.at, self.config
        assert config.lr is not None  # resolved
        self.progress.epoch_started(at.epoch, len(self.train_loader), at.batch)
        self.model.train()
        if config.freeze_backbone:
            freeze_backbone(self.model)
        if self.steps is None:
            self.steps = self._make_steps()
        mark = time.perf_counter()
        with closing(self.steps.batches(at.epoch, at.batch)) as batches:
            for batch in batches:
                self._start_step(batch)
                last = at.batch == len(self.train_loader)
                if last or at.step % config.log_every == 0 or not self.steps.waits:
                    mark = self._settle(mark)
                stopping = self._is_set(interrupted)
                if stopping or at.step % config.checkpoint_every == 0:
                    mark = self._settle(mark)
                    self.save()
                if stopping:
                    self.communicator.barrier()  # the end of one may be the end of all
                    raise KeyboardInterrupt

    def _make_steps(self) -> Steps:
        return Steps(
            self.config,
            self.model,
            self.optimizer,
            self.ema,
            self.gradients,
            self.train_loader,
            self.progress.message,
        )

    def _start_step(self, batch: tuple[Any, ...]) -> None:
        assert self.config.lr is not None and self.steps is not None
        at = self.at
        shares = self.train_loader.shares(at.batch)
        lr = self.schedule.rate(self.config.lr, self.schedule.last_epoch)
        self.started.append(_Started(at.step + 1, sum(share.total for share in shares), lr))
        try:
            self.steps.start(batch, shares)
        except TrainingError as error:
            failed = self.started.pop()
            self._take(self.steps.read())  # an earlier step may have failed before this one
            raise self._located(error, failed) from None
        self.schedule.step()
        at.step += 1
        at.batch += 1

    def _settle(self, mark: float) -> float:
        """Takes in the figures of all steps since the time `mark`; returns the time now."""
        assert self.steps is not None
        steps = self.steps.read()
        now = time.perf_counter()
        self.trained_images += sum(step.images for step in self.started)
        self.trained_seconds += now - mark
        self._take(steps)
        return now

    def _take(self, steps: list[Step]) -> None:
        at = self.at
        started, self.started = self.started, []
        for which, step in zip(started, steps, strict=True):
            try:
                step.check_finite()
            except TrainingError as error:
                raise self._located(error, which) from None
            at.add_figures(step.loss, step.correct, which.images)
            self.progress.step(at.loss_sum / at.images, at.correct / at.images, self._speed())
            if which.number % self.config.log_every == 0:
                self._log_step(step, which)

    def _located(self, error: TrainingError, step: _Started) -> TrainingError:
        where = f"epoch {self.at.epoch + 1}, step {step.number}, learning rate {step.lr:g}"
        return TrainingError(f"{where}: {error}")

    def _finish_epoch(self) -> None:
        """Evaluates, notes the figures, keeps the weights if they are the best, and moves on."""
        at = self.at
        # Without sync_batch_norm every process has running statistics of its own.
        distributed.broadcast_state(self.result_model, self.communicator)
        test = evaluate(self.result_model, self.test_loader, self.communicator)
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
                checkpoint.save_weights(self.folder.best, self.result_model.state_dict(), info)
        at.next_epoch()
        self.save()

    def save(self) -> None:
        """Writes the checkpoint to go on from, if the run has a folder."""
        if self.folder is None:
            return
        self.folder.sync_metrics()  # the checkpoint counts on the lines that came before it
        state = {
            "model": self.result_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": nn.get_rng_state(),
            "position": asdict(self.at),
            "train_images": len(self.train_loader.dataset),
            "processes": self.communicator.size,
        }
        if self.ema is not None:
            state["ema"] = {"updates": self.ema.updates, "model": self.model.state_dict()}
        checkpoint.save_state(self.folder.last, state, self.info)

    def load_pretrained(self, path: str) -> None:
        """Starts from the weights in a file, with what they expect of images."""
        fresh, grey = load_pretrained(self.model, read_weights(path))
        self.result_model.load_state_dict(self.model)  # averages start there, too
        mean, std = tuple(self.info["mean"]), tuple(self.info["std"])
        self.config = dataclasses.replace(self.config, mean=mean, std=std)
        classes = len(self.info["classes"])
        for layer in fresh:
            self.progress.message(f"{layer}: new, since {path} has not {classes} classes")
        if grey is not None:
            self.progress.message(f"{grey}: summed over the channels, since the images are grey")

    def restore(self, folder: RunFolder) -> None:
        """Takes up the last checkpoint; a run killed before its first one starts again."""
        if not folder.last.exists():
            if self.config.weights is not None:
                self.load_pretrained(self.config.weights)
            return
        state, _ = checkpoint.load_state(folder.last)
        if state["processes"] != self.communicator.size:
            raise ValueError(
                f"{folder.path} was started with {state['processes']} processes, not with "
                f"{self.communicator.size}"
            )
        images = len(self.train_loader.dataset)
        if state["train_images"] != images:
            raise ValueError(
                f"{folder.path} was started with {state['train_images']} training images, "
                f"the data set has {images} now"
            )
        self.result_model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.updates = state["ema"]["updates"]
            self.model.load_state_dict(state["ema"]["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        nn.set_rng_state(state["random"])
        self.at = _Position(**state["position"])

    def _log_step(self, step: Step, which: _Started) -> None:
        figures = {"loss": step.loss, "accuracy": step.correct / which.images, "lr": which.lr}
        if step.gradient_norm is not None:
            figures["gradient_norm"] = step.gradient_norm
        self._log("step", **figures)

    def _log(self, event: str, **figures: float) -> None:
        self.at.metrics_lines += 1
        if self.folder is not None:
            where = {"event": event, "epoch": self.at.epoch + 1, "step": self.at.step}
            speed = self._speed()
            timing = {"images_per_second": None if speed is None else round(speed, 1)}
            self.folder.write_metrics({**where, **figures, **timing})

    def _speed(self) -> float | None:
        """Training images per second, of all processes, without the time of evaluations."""
        return self.trained_images / self.trained_seconds if self.trained_images else None


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

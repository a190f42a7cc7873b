"""The steps of a run: single operations, or on a CUDA device graphs of full batches."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from fastconv import cuda, nn, optim
from fastconv.data import DataLoader, ResidentLoader
from fastconv.distributed import GradientReducer
from fastconv.init import Share
from fastconv.train.config import TrainConfig
from fastconv.train.ema import EMA
from fastconv.train.graph import GraphedStep, why_not
from fastconv.train.step import Step, train_step


class Steps:
    """Takes batches from the loader and trains on them.

    With config.device "cuda" and config.graph, a full batch is one graph, and its figures stay on
    the device until they are read; a smaller one runs as single operations. Images stay on the
    device where they can. `tell` is given the reasons where that cannot be so.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: optim.Optimizer,
        ema: EMA | None,
        gradients: GradientReducer,
        loader: DataLoader,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._tell = config, tell
        self._model, self._optimizer, self._ema, self._gradients = model, optimizer, ema, gradients
        self._loader = loader
        self._resident: ResidentLoader | None = None
        self._done: list[Step] = []
        self._graph: GraphedStep | None = None
        self._full = loader.shares(0)
        self._graphs = config.device == "cuda" and config.graph
        if config.device == "cuda":
            self._make_resident()

    def _make_resident(self) -> None:
        reason = ResidentLoader.why_not(self._loader)
        if reason is None:
            self._resident = ResidentLoader(self._loader)
        else:
            self._tell(f"batches are made by the CPU: {reason}")

    def batches(self, epoch: int, start: int) -> Generator[tuple[Any, ...], None, None]:
        """What `start` takes, from batch number `start` of an epoch on."""
        return (self._resident or self._loader).batches(epoch, start=start)

    @property
    def waits(self) -> bool:
        """Whether reading figures costs a wait, so that it is better done seldom."""
        return self._graph is not None

    def start(self, batch: tuple[Any, ...], shares: list[Share]) -> None:
        """A step on a batch. TrainingError, with the weights as they were, if it shows at once."""
        if self._graphs and self._graph is None and shares == self._full:
            self._make_graph()
        if self._graph is not None and shares == self._full:
            self._graph(*batch)
            if self._graph.obstacle is not None:
                self._tell(f"steps are single operations: {self._graph.obstacle}")
                self._done += self._graph.read()
                self._graph, self._graphs = None, False
            return
        if self._graph is not None:
            self._done += self._graph.read()
        x, y = batch if self._resident is None else self._resident.arrays(cuda.array(*batch))
        self._done.append(
            train_step(
                self._model,
                self._optimizer,
                x,
                y,
                self._config.label_smoothing,
                clip_norm=self._config.clip_norm,
                gradients=self._gradients,
                shares=shares,
            )
        )
        if self._ema is not None:
            self._ema.update(self._model)

    def _make_graph(self) -> None:
        reason = why_not(self._model)
        if reason is not None:
            self._tell(f"steps are single operations: {reason}")
            self._graphs = False
            return
        options = {} if self._resident is None else {"arrays": self._resident.arrays}
        self._graph = GraphedStep(
            self._model,
            self._optimizer,
            self._config.label_smoothing,
            shares=self._full,
            clip_norm=self._config.clip_norm,
            ema=self._ema,
            **options,
        )

    def read(self) -> list[Step]:
        """The figures of the steps since the last call, in order; waits for them."""
        done, self._done = self._done, []
        return done if self._graph is None else done + self._graph.read()

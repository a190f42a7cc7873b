"""Training steps on a CUDA device as one graph.

A step of a small network is hundreds of short kernels, and starting each of them takes longer than
running it. So forward, loss, backward, clipping, update and averaging are recorded once and started
as one. All arrays keep their addresses. What changes from step to step - learning rates, AdamW's
corrections, the averaging factor, where the random numbers stand - lies in device memory and is
written before each replay; the same code computes it as for a single step, with the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastconv import cuda, nn, optim
from fastconv.init import Share, default_generator
from fastconv.tensor import Array, Tensor
from fastconv.train.ema import EMA
from fastconv.train.step import Step, training_loss

_HISTORY = 64  # steps whose figures may wait on the device


@functools.cache
def _recording_stream() -> int:
    """A graph cannot be recorded on the default stream; it is replayed on the current one."""
    stream: int = cuda.kernels().make_stream()
    return stream


def why_not(model: nn.Module) -> str | None:
    """Why a step of this model cannot be one graph; None where it can."""
    if model.device != "cuda":
        return "the model is not on a CUDA device"
    for name, module in model.named_modules():
        if getattr(module, "momentum", 0.0) is None and module.training:
            return f"{name} takes the plain average of all batches, another factor in each step"
    return None


class GraphedStep:
    """`train_step`, and the update of averaged weights, for batches of one size.

    model      on a CUDA device, in the mode that it stays in
    shares     the micro-batches of a batch: see `train_step`
    clip_norm  scale the gradients so that their common L2 norm is at most this
    ema        averages to update
    arrays     makes the images [N, C, H, W] and labels [N] on the device from the arrays of a
               batch there; it is part of the graph. By default a batch is these two

    Labels must be classes of the model; those that lie on the device are not checked, because a
    graph cannot stop to look at them. The first step runs as single operations, the second is
    recorded. Where recording fails, `obstacle` says why, and all steps run as single operations. A
    step whose loss or clipped norm is not finite leaves the weights alone; `read` shows it.
    Parameters, the optimiser's state and its settings but the learning rate stay as they are: after
    loading others, make a new GraphedStep.

    Raises ValueError for a model of which `why_not` says so.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        label_smoothing: float = 0.0,
        *,
        shares: Sequence[Share],
        clip_norm: float | None = None,
        ema: EMA | None = None,
        arrays: Callable[..., tuple[Array, Array]] | None = None,
    ) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"no graph of this step: {reason}")
        kernels = cuda.kernels()
        self._model, self._optimizer, self._ema = model, optimizer, ema
        self._label_smoothing, self._clip_norm = label_smoothing, clip_norm
        self._shares, self._arrays = list(shares), arrays
        self._classes = 0
        self.obstacle: str | None = None  # why the step could not be recorded
        self._staged: list[Any] = []  # the arrays of a batch, at fixed addresses
        self._figures = kernels.full([4], 0.0, "float64")  # loss, correct, norm, factor
        self._norm, self._factor = self._figures[2], self._figures[3]
        self._history = kernels.full([_HISTORY, 4], 0.0, "float64")
        self._waiting = 0  # rows of it
        self._steps: list[Step] = []
        self._numbers = kernels.StepNumbers()
        self._graph: Any = None
        self._fixed: list[Any] = []
        self._gradients: list[tuple[Tensor, Array | None]] = []
        self._counters: list[tuple[Array, Array]] = []
        self._draws = 0  # random numbers of a step

    def __call__(self, *batch: Array) -> None:
        """Starts a step on the arrays of a batch, numpy's or the device's; does not wait for it."""
        if not self._staged:
            self._staged = [cuda.array(array).copy() for array in batch]
            self._work()
        else:
            self._stage(batch)
            if self._graph is not None:
                self._advance()
            elif self.obstacle is None:
                self._record()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._work()
        self._history[self._waiting] = self._figures
        self._waiting += 1
        if self._waiting == _HISTORY:
            self._fetch()

    def read(self) -> list[Step]:
        """The figures of all steps since the last call; waits for them."""
        self._fetch()
        steps, self._steps = self._steps, []
        return steps

    def _fetch(self) -> None:
        rows = self._history[: self._waiting].numpy().tolist() if self._waiting else []
        for loss, correct, norm, _ in rows:
            self._steps.append(Step(loss, int(correct), norm if self._clip_norm else None))
        self._waiting = 0

    def _stage(self, batch: Sequence[Array]) -> None:
        if self._arrays is None and isinstance(batch[1], np.ndarray):
            low, high = batch[1].min(), batch[1].max()
            if not 0 <= low <= high < self._classes:
                raise ValueError(f"labels must lie in [0, {self._classes}), got {low} to {high}")
        for staged, array in zip(self._staged, batch, strict=True):
            if staged.shape != array.shape:
                raise ValueError(
                    f"a graph takes arrays of shape {staged.shape} alone, got {array.shape}"
                )
            staged[...] = cuda.array(array)

    def _work(self) -> None:
        """The step itself, as single operations; recorded or not."""
        kernels = cuda.kernels()
        self._optimizer.zero_grad()
        self._figures[...] = 0.0
        x, y = self._staged if self._arrays is None else self._arrays(*self._staged)
        total = sum(share.total for share in self._shares)
        first = 0
        for share in self._shares:
            part = slice(first, first + share.stop - share.start)
            first = part.stop
            with default_generator.batch_share(share):
                logits, loss = training_loss(
                    self._model(Tensor(x[part])), y[part], self._label_smoothing
                )
            self._classes = logits.shape[1]
            weight = (part.stop - part.start) / total
            kernels.add_figures(self._figures, loss.data, weight, logits.data, y[part])
            loss.backward(kernels.full([], weight, cuda.dtype_name(loss.dtype)))
        if self._clip_norm is not None:
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            kernels.store_gradient_norm(gradients, self._norm)
        kernels.judge(self._figures, math.inf if self._clip_norm is None else self._clip_norm)
        self._optimizer.step(self._factor)
        if self._ema is not None:
            self._ema.update(self._model)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _memory(self) -> list[Any]:
        """What is part of the graph and might be replaced: arrays, settings of the optimiser."""
        settings = (
            value
            for group in self._optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        )
        states = (self._optimizer.state.get(p, {}).values() for p in self._parameters())
        return [
            *settings,
            *(p.data for p in self._parameters()),
            *(value for state in states for value in state if cuda.is_device_array(value)),
        ]

    def _record(self) -> None:
        """Records the step and counts it on the host, or sets `obstacle`."""
        graph = cuda.kernels().Graph()
        models = [self._model] if self._ema is None else [self._model, self._ema.model]
        buffers = [buffer for model in models for _, buffer in model.named_buffers()]
        counters = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
        before = [counter.copy() for counter in counters]
        seed, offset = default_generator.state()
        try:
            self._draws = self._capture(graph)
        except BaseException as error:
            for counter, old in zip(counters, before, strict=True):
                counter[...] = old
            if not isinstance(error, RuntimeError):
                raise
            self.obstacle = str(error)  # something waits for the device
            return
        finally:
            default_generator.set_state((seed, offset))
        self._graph = graph
        self._fixed = self._memory()
        self._gradients = [(p, p.grad) for p in self._parameters()]
        self._counters = [(new, new - old) for new, old in zip(counters, before, strict=True)]
        self._numbers.upload(*default_generator.reserve(self._draws))

    def _capture(self, graph: Any) -> int:
        """Records the step into the graph; how many random numbers it draws."""
        cuda.empty_cache()  # a graph has memory of its own beside that of the first step
        default_generator.set_state((0, 0))  # it counts from there, and adds the real state
        with cuda.stream(_recording_stream()):
            self._numbers.record()
            try:
                graph.begin()
                self._work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the recording may be broken
                    graph.end()
                raise
            finally:
                self._numbers.done()
            graph.end()
        return default_generator.state()[1]

    def _advance(self) -> None:
        """What the host does for a step: counting, and the numbers that the kernels will read."""
        memory = self._memory()
        if len(memory) != len(self._fixed) or any(map(_differ, memory, self._fixed)):
            raise RuntimeError(
                "arrays of parameters or of the optimiser's state, or its settings, were replaced "
                "since the step was recorded: make a new GraphedStep"
            )
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for counter, change in self._counters:
            counter += change
        self._numbers.collect()
        try:
            self._optimizer.step(self._factor, count_only=True)
            if self._ema is not None:
                cuda.kernels().move_towards([], [], self._ema.count())
        finally:
            self._numbers.done()
        self._numbers.upload(*default_generator.reserve(self._draws))


def _differ(a: Any, b: Any) -> bool:
    return a is not b and (cuda.is_device_array(a) or a != b)

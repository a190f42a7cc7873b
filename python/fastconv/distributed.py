"""Data parallel training: several processes, each with its share of every batch.

    torchrun --nproc-per-node 2 -m fastconv train --batch-size 32

or, in a program that torchrun starts:

    communicator = distributed.init()
    distributed.broadcast_state(model, communicator)
    gradients = distributed.GradientReducer(model.parameters(), communicator)
    ...
    loss.backward()  # the averaging of the last layers runs while the first ones are computed
    gradients.finish()
    optimizer.step()

Processes talk through a `Communicator`. `init` gives the one of torch.distributed with gloo under
torchrun, and `SingleProcess` elsewhere; numpy arrays are shared with torch, not copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np

from fastconv import nn
from fastconv.module import Module
from fastconv.tensor import Array, Tensor, memory_order

__all__ = [
    "CommunicationError",
    "Communicator",
    "Environment",
    "GradientReducer",
    "Handle",
    "SingleProcess",
    "TorchCommunicator",
    "any_process",
    "broadcast_state",
    "convert_sync_batchnorm",
    "failing_together",
    "init",
]

_MEGABYTE = 1 << 20


class CommunicationError(RuntimeError):
    """Another process has ended or cannot be reached."""


class Handle(Protocol):
    """An operation that is under way."""

    def wait(self) -> None:
        """Returns when the array holds the result. Raises CommunicationError."""


class Communicator(Protocol):
    """A fixed group of processes, all of which call the same operations in the same order.

    Arrays are C-contiguous, writable and of dtype float32, float64 or int64, with the same shape
    and dtype in every process; otherwise ValueError or TypeError. An array belongs to an operation
    until that has been waited for.
    """

    rank: int  # of this process, 0 to size - 1
    size: int

    def all_reduce(self, array: Array, op: str = "sum") -> Handle:
        """Starts to replace `array`, in every process, by the "sum" or "mean" of all of them.

        Every process gets the same bits, and the same ones on each run with as many processes.
        """

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Replaces `array` by that of process `root`."""

    def barrier(self) -> None:
        """Returns when every process has called it."""

    def duplicate(self) -> Communicator:
        """The same processes, with an order of operations of its own. Called by all of them."""

    def close(self) -> None:
        """Leaves the group. What the others still expect of this process fails there."""


class _Done:
    def wait(self) -> None:
        pass


class SingleProcess:
    """The communicator of a process that is alone: every operation leaves the array as it is."""

    rank = 0
    size = 1

    def all_reduce(self, array: Array, op: str = "sum") -> Handle:
        _check(array, op)
        return _Done()

    def broadcast(self, array: Array, root: int = 0) -> None:
        _check(array)

    def barrier(self) -> None:
        pass

    def duplicate(self) -> SingleProcess:
        return self

    def close(self) -> None:
        pass


class TorchCommunicator:
    """The processes of torch.distributed; CPU arrays, so with backend gloo.

    group: one of torch.distributed's process groups; None: all processes. `close` destroys it.
    """

    def __init__(self, group: Any = None) -> None:
        import torch
        import torch.distributed

        self._torch = torch
        self._group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchCommunicator:
        return self  # the copy of a layer talks to the same processes

    def all_reduce(self, array: Array, op: str = "sum") -> Handle:
        _check(array, op)
        tensor = self._torch.from_numpy(array)  # the same memory
        with self._errors():
            work = self._torch.distributed.all_reduce(tensor, group=self._group, async_op=True)
        return _TorchHandle(self, work, array, 1 / self.size if op == "mean" else 1.0)

    def broadcast(self, array: Array, root: int = 0) -> None:
        _check(array)
        with self._errors():
            self._torch.distributed.broadcast(
                self._torch.from_numpy(array), group=self._group, group_src=root
            )

    def barrier(self) -> None:
        with self._errors():
            self._torch.distributed.barrier(self._group)

    def duplicate(self) -> TorchCommunicator:
        distributed = self._torch.distributed
        with self._errors():
            ranks = distributed.get_process_group_ranks(self._group)
            return TorchCommunicator(distributed.new_group(ranks))

    def close(self) -> None:
        if self._torch.distributed.is_initialized():
            self._torch.distributed.destroy_process_group(self._group)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CommunicationError(
                f"process {self.rank} of {self.size} lost another one: {error}"
            ) from error


@dataclass(frozen=True)
class _TorchHandle:
    communicator: TorchCommunicator
    work: Any
    array: Array
    factor: float  # gloo knows no mean

    def wait(self) -> None:
        with self.communicator._errors():
            self.work.wait()
        if self.factor != 1.0:
            np.multiply(self.array, self.factor, out=self.array)


def _check(array: Array, op: str = "sum") -> None:
    if op not in ("sum", "mean"):
        raise ValueError(f"op must be 'sum' or 'mean', got {op!r}")
    if array.dtype not in (np.float32, np.float64, np.int64):
        raise TypeError(f"expected an array of float32, float64 or int64, got {array.dtype}")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ValueError(
            f"expected a C-contiguous, writable array, got strides {array.strides} for shape "
            f"{array.shape}, writable: {array.flags.writeable}"
        )


@dataclass(frozen=True)
class Environment:
    """What torchrun tells a process in environment variables."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

    @staticmethod
    def read(variables: Mapping[str, str] = os.environ) -> Environment:
        """RANK, WORLD_SIZE and LOCAL_RANK; one process alone where they are not set.

        Raises ValueError when some of what several processes need is missing, when they are no
        integers or out of range.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        given = {name: variables[name] for name in names if name in variables}
        if given.get("RANK", "0") == "0" and given.get("WORLD_SIZE", "1") == "1":
            return Environment()
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"{', '.join(missing)} not set beside {given}: start with torchrun")
        try:
            rank, size, local_rank = (int(given[name]) for name in names[:3])
        except ValueError:
            raise ValueError(f"expected integers in {given}") from None
        if not (0 <= rank < size and 0 <= local_rank <= rank):
            raise ValueError(f"expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE, got {given}")
        return Environment(rank, size, local_rank)


def init(timeout: float = 1800.0) -> Communicator:
    """The processes that torchrun started, or `SingleProcess` without torchrun or with one process.

    timeout: seconds after which an operation that a process does not take part in fails.

    Raises ValueError for environment variables that make no sense, ImportError without torch, and
    CommunicationError when the processes do not find each other.
    """
    if Environment.read().size == 1:
        return SingleProcess()
    try:
        import torch.distributed
    except ImportError as error:
        raise ImportError(
            "several processes need PyTorch: pip install 'fastconv[torch]'"
        ) from error
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise CommunicationError(f"the processes do not find each other: {error}") from error
    return TorchCommunicator()


@contextmanager
def failing_together(communicator: Communicator) -> Iterator[None]:
    """Leaves the group when its body raises, so that no other process waits for this one."""
    try:
        yield
    except BaseException:
        communicator.close()
        raise


def any_process(communicator: Communicator, flag: bool) -> bool:
    """Whether `flag` is set in at least one of the processes."""
    flags = np.array([flag], np.int64)
    communicator.all_reduce(flags).wait()
    return bool(flags[0])


def broadcast_state(model: Module, communicator: Communicator) -> None:
    """Gives every process the parameters and buffers of process 0."""
    if communicator.size > 1:
        for value in model.state_dict().values():
            dense = np.array(value, order="C")
            communicator.broadcast(dense)
            value[...] = dense


def convert_sync_batchnorm(model: Module, communicator: Communicator) -> Module:
    """Gives every batch norm in `model` the statistics over all processes, as `nn.SyncBatchNorm`.

    Returns the model. The layers stay the same objects, with the same parameters and buffers.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.communicator = communicator
    return model


class GradientReducer:
    """Averages gradients over all processes while the backward pass is still running.

    As in PyTorch's DistributedDataParallel (Li et al., arXiv 2006.15704, section 3.2), gradients
    are collected in flat buckets; the all-reduce of a bucket starts when its last gradient is
    final, and buckets start in one order in all processes. The buckets follow the order in which
    gradients became final in the first backward pass of process 0, in which there is nothing to
    overlap with yet. After the backward pass, `finish` waits for all of them.

    A parameter without a gradient in this process counts as zeros. Where no process has one, `grad`
    stays None, so that the optimiser leaves the parameter alone, as it does in a single process.

    parameters: those to reduce; the ones that require no gradient when this is made are left out.
    communicator: the processes; the reducer talks on a duplicate of it.
    op: "mean", or "sum" where each process has already divided by the size of the whole batch.
    bucket_mb: size of a bucket in MiB, that of the first being `first_bucket_mb`, so that
        communication starts early. A larger parameter has a bucket of its own.

    Raises ValueError without parameters, and for sizes that are not positive.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        communicator: Communicator,
        *,
        op: str = "mean",
        bucket_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError("no parameter that requires a gradient")
        if op not in ("mean", "sum"):
            raise ValueError(f"op must be 'sum' or 'mean', got {op!r}")
        if not (bucket_mb > 0 and first_bucket_mb > 0):
            raise ValueError(
                f"sizes of buckets must be positive, got {bucket_mb} and {first_bucket_mb}"
            )
        # A channel of its own: a process that has no gradient for some parameter starts a bucket
        # later than the others, perhaps after an all-reduce of a synchronised batch norm.
        self._communicator = communicator.duplicate()
        self.communicator = communicator
        self._op = op
        self._first_bytes, self._bytes = first_bucket_mb * _MEGABYTE, bucket_mb * _MEGABYTE
        self._numbers = {p: i for i, p in enumerate(self._parameters)}
        self._ready: list[Tensor] = []  # in the order in which their gradients became final
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._started = 0  # buckets of this backward pass whose all-reduce is under way
        self._enabled = True
        alone = communicator.size == 1
        hooks = [] if alone else self._parameters
        # A function, not a bound method: a deep copy of a parameter does not copy the reducer.
        self._removers = [
            p.register_post_accumulate_grad_hook(lambda p: self._final(p)) for p in hooks
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside it only add to the gradients of this process."""
        outer, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = outer

    def finish(self) -> None:
        """Waits until every `grad` is that of all processes. Raises CommunicationError."""
        if self._communicator.size == 1:
            return
        if not self._buckets:
            self._make_buckets()
        self._start(len(self._buckets))
        for bucket in self._buckets:
            bucket.finish()
        self._started = 0

    def close(self) -> None:
        """Takes the hooks off the parameters and leaves the group of processes made for this."""
        for remove in self._removers:
            remove()
        self._communicator.close()

    def _final(self, parameter: Tensor) -> None:
        if not self._enabled or parameter not in self._numbers:
            return
        if not self._buckets:
            self._ready.append(parameter)
            return
        self._bucket_of[parameter].take(parameter)
        complete = self._started
        while complete < len(self._buckets) and not self._buckets[complete].waiting:
            complete += 1
        self._start(complete)

    def _start(self, end: int) -> None:
        """Starts the all-reduces of the buckets before number `end`."""
        for bucket in self._buckets[self._started : end]:
            bucket.start(self._communicator, self._op)
        self._started = max(self._started, end)

    def _make_buckets(self) -> None:
        """The buckets, in the order of process 0; parameters without a gradient come last."""
        ready = dict.fromkeys(self._numbers[p] for p in self._ready)
        unused = (i for i in self._numbers.values() if i not in ready)
        order = np.array([*ready, *unused], np.int64)
        self._communicator.broadcast(order)
        limit, members, filled = self._first_bytes, list[Tensor](), 0
        for parameter in (self._parameters[i] for i in order):
            size = parameter.data.nbytes
            if members and (filled + size > limit or members[0].dtype != parameter.dtype):
                self._buckets.append(_Bucket(members))
                limit, members, filled = self._bytes, [], 0
            members.append(parameter)
            filled += size
        self._buckets.append(_Bucket(members))
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.slices}
        self._ready = []


class _Bucket:
    """The gradients of some parameters in one flat array, and how many processes have each."""

    def __init__(self, parameters: list[Tensor]) -> None:
        count = sum(p.data.size for p in parameters)
        self.buffer = np.zeros(count + len(parameters), parameters[0].dtype)
        self.holders = self.buffer[count:]  # 1 for each parameter that has a gradient here
        self.slices: dict[Tensor, Array] = {}
        at = 0
        for p in parameters:
            self.slices[p] = _in_order_of(p.data, self.buffer[at : at + p.data.size])
            at += p.data.size
        self.waiting = set(parameters)  # those whose gradient is not final yet
        self.handle: Handle | None = None

    def take(self, parameter: Tensor) -> None:
        if self.handle is not None:
            raise RuntimeError(
                "a second backward pass before finish(): use no_sync() for all but the last one"
            )
        self.waiting.discard(parameter)

    def start(self, communicator: Communicator, op: str) -> None:
        for i, (parameter, values) in enumerate(self.slices.items()):
            self.holders[i] = parameter.grad is not None
            values[...] = 0 if parameter.grad is None else parameter.grad
        self.handle = communicator.all_reduce(self.buffer, op)

    def finish(self) -> None:
        assert self.handle is not None  # started
        self.handle.wait()
        for i, (parameter, values) in enumerate(self.slices.items()):
            if parameter.grad is not None:
                parameter.grad[...] = values
            elif self.holders[i] > 0:
                parameter.grad = values.copy(order="K")
        self.handle, self.waiting = None, set(self.slices)


def _in_order_of(like: Array, flat: Array) -> Array:
    """A view of `flat` with the shape of `like` and its order of dimensions in memory."""
    order = memory_order(like.shape, like.strides)
    return flat.reshape([like.shape[d] for d in order]).transpose(np.argsort(order))

"""What each process of test_distributed.py does; it is started with torchrun's variables.

python distributed_worker.py together FOLDER    # operations, steps: results in FOLDER/RANK.npz
python distributed_worker.py fail               # process 1 raises, process 0 waits for it
python distributed_worker.py command STOP ARGUMENTS...
    # the command fastconv, stopped by process 0 after some steps: kill:STEPS, interrupt:STEPS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import fastconv as fc
from fastconv import cli, distributed, nn, optim
from fastconv.data import DataLoader, Dataset
from fastconv.distributed import CommunicationError, Communicator, GradientReducer
from fastconv.train import progress
from fastconv.train.progress import Progress
from fastconv.train.step import train_step

# Steps whose last one has a single image, so that process 0 has none.
IMAGES, BATCH, EPOCHS = 25, 8, 2


def network() -> nn.Module:
    """Batch norm in both forms, dropout in front and behind, a shared order of everything."""
    fc.manual_seed(5)
    return nn.Sequential(
        nn.Dropout(0.2),
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    ).double()


def plain_network() -> nn.Module:
    """Without batch norm."""
    fc.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6 * 36, 3)
    ).double()


def images() -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, 8, 8, 2), np.uint8)
    return Dataset(pixels, rng.integers(0, 3, IMAGES), ("a", "b", "c"))


def take_steps(model: nn.Module, communicator: Communicator, accumulate: int = 1) -> Iterator[Any]:
    """The loss of each step, clipped and with momentum, in float64."""
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    loader = DataLoader(
        images(), BATCH, shuffle=True, rank=communicator.rank, processes=communicator.size,
        micro_batch=BATCH // accumulate,
    )  # fmt: skip
    reducer = GradientReducer(
        model.parameters(), communicator, op="sum", first_bucket_mb=1e-3, bucket_mb=1e-3
    )
    for epoch in range(EPOCHS):
        for number, (x, y) in enumerate(loader.batches(epoch)):
            yield train_step(
                model, optimizer, x.astype(np.float64), y, 0.1, clip_norm=0.5, gradients=reducer,
                shares=loader.shares(number),
            )  # fmt: skip
    reducer.close()


def train_all(communicator: Communicator) -> dict[str, Any]:
    """Weights and figures of each kind of run."""
    found: dict[str, Any] = {}
    for name, model, accumulate in (
        ("sync", distributed.convert_sync_batchnorm(network(), communicator), 1),
        ("plain", plain_network(), 1),
        ("accumulated", plain_network(), 2),
    ):
        steps = list(take_steps(model, communicator, accumulate))
        found[f"{name}.steps"] = np.array(steps)
        found.update({f"{name}.{key}": value for key, value in model.state_dict().items()})
    return found


def operations(communicator: Communicator) -> dict[str, Any]:
    """Sums and means under way at the same time, in the memory of the arrays themselves."""
    rank = communicator.rank
    other = communicator.duplicate()
    arrays = {
        "sum32": np.arange(1000, dtype=np.float32) * np.float32(0.1 + rank),
        "mean64": np.linspace(0, 1, 7) ** (rank + 1),
        "mean32": np.full((2, 3), 1.0 + 2 * rank, np.float32),
        "int": np.array([rank, 5]),
        "empty": np.zeros((0, 4)),
    }
    handles = [
        (communicator if i % 2 else other).all_reduce(a, name[:-2] if name[0] in "sm" else "sum")
        for i, (name, a) in enumerate(arrays.items())
    ]
    for handle in reversed(handles):
        handle.wait()
    arrays["from1"] = np.full(3, rank + 10.0)
    communicator.broadcast(arrays["from1"], root=1)
    arrays["any"] = np.array(
        [distributed.any_process(communicator, rank == 1), distributed.any_process(other, False)]
    )
    communicator.barrier()
    return arrays


def fail(communicator: Communicator) -> None:
    """Process 0 learns of the failure of process 1 although that one lives on."""
    values = np.ones(3)
    communicator.all_reduce(values).wait()
    try:
        with distributed.failing_together(communicator):
            if communicator.rank == 1:
                raise KeyError("wrong")
            communicator.all_reduce(values).wait()
    except KeyError:
        time.sleep(200)
    except CommunicationError as error:
        print(error)


class Stopping(Progress):
    """Kills its process, or gives its parent a Ctrl-C and waits for that, after some steps."""

    def __init__(self, stop: str) -> None:
        self.kind, steps = stop.split(":")
        self.steps = int(steps)

    def step(self, loss: float, accuracy: float, speed: float | None) -> None:
        self.steps -= 1
        if self.steps == 0 and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == 0:
            handler = signal.getsignal(signal.SIGINT)
            os.kill(os.getppid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is handler:  # which leaves its place when called
                time.sleep(0.01)


if __name__ == "__main__":
    if sys.argv[1] == "command":
        progress.choose_progress = lambda: Stopping(sys.argv[2])
        sys.exit(cli.main(sys.argv[3:]))
    group = distributed.init(timeout=200)
    assert (group.size, fc.get_num_threads()) == (2, 1)
    if sys.argv[1] == "fail":
        fail(group)
    else:
        results = {**operations(group), **train_all(group)}
        np.savez(f"{sys.argv[2]}/{group.rank}.npz", **results)
        group.close()

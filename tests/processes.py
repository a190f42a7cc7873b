"""Several processes for tests: as threads that share a memory, or really started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TIME_LIMIT = 240  # seconds; reached only where something hangs


class Threads:
    """The communicator of one of several threads: sums in the order of the ranks.

    `log` gets ("all_reduce", number of values) when an operation starts.
    """

    def __init__(self, rank: int, size: int, shared: dict[Any, Any], channel: str = "main") -> None:
        self.rank, self.size = rank, size
        self.log: list[Any] = []
        self._shared, self._channel, self._number, self._children = shared, channel, 0, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Threads:
        return self

    def all_reduce(self, array: np.ndarray, op: str = "sum") -> Any:
        self.log.append(("all_reduce", array.size))
        return _Pending(self, array, self._give(array), op)

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        array[...] = self._take(self._give(array))[root]

    def barrier(self) -> None:
        self._take(self._give(np.zeros(0)))

    def duplicate(self) -> Threads:
        self._children += 1
        twin = Threads(
            self.rank, self.size, self._shared, f"{self._channel}.{self._children}"
        )  # fmt: skip
        twin.log = self.log
        return twin

    def close(self) -> None:
        with self._shared["condition"]:
            self._shared["closed"] = True
            self._shared["condition"].notify_all()

    def _give(self, array: np.ndarray) -> Any:
        self._number += 1
        key = (self._channel, self._number)
        with self._shared["condition"]:
            self._shared.setdefault(key, {})[self.rank] = array.copy()
            self._shared["condition"].notify_all()
        return key

    def _take(self, key: Any) -> dict[int, np.ndarray]:
        def ready() -> bool:
            return len(self._shared[key]) == self.size or self._shared["closed"]

        with self._shared["condition"]:
            assert self._shared["condition"].wait_for(ready, TIME_LIMIT)
            parts: dict[int, np.ndarray] = self._shared[key]
        if len(parts) < self.size:
            raise RuntimeError("another thread has failed")
        assert len({(a.shape, a.dtype) for a in parts.values()}) == 1, "arrays that differ"
        return parts


class _Pending:
    def __init__(self, owner: Threads, array: np.ndarray, key: Any, op: str) -> None:
        self.owner, self.array, self.key, self.op = owner, array, key, op

    def wait(self) -> None:
        parts = self.owner._take(self.key)
        total = sum(parts[rank] for rank in range(self.owner.size))
        self.array[...] = total / self.owner.size if self.op == "mean" else total


def in_threads(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """work(communicator) in `size` threads: what they return, or the first of their errors."""
    shared: dict[Any, Any] = {"condition": threading.Condition(), "closed": False}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(communicator: Threads) -> None:
        try:
            results[communicator.rank] = work(communicator)
        except BaseException as error:
            errors.append(error)
            communicator.close()

    threads = [threading.Thread(target=run, args=(Threads(r, size, shared),)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def start_ranks(script: Path, size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The processes of `python script arguments`, with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["OMP_NUM_THREADS"] = "1"
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]  # fmt: skip


def torchrun(*arguments: str, size: int = 2) -> list[str]:
    """The command that starts `size` processes of `python arguments`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={size}", *arguments]

"""What the CUDA benchmarks share: streams, graphs, timing, rotating operands, the record of a run.

Both sides are timed as graphs of `SETS` calls over different operands, together larger than twice
the L2 cache, replayed on one stream between two events: neither Python nor the cache counts. Where
the device is emulated (`fastconv.cuda.is_emulated()`) nothing is timed and every figure is null: a
run then only shows that the benchmark runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastconv
from bench import report
from fastconv import cuda

Call = Callable[[], object]
ROUNDS = 7


def emulated() -> bool:
    return cuda.is_emulated()


def torch_device() -> str:
    """Where torch's tensors lie: an emulated device's memory is the host's."""
    return "cpu" if emulated() else "cuda"


def prepare_torch() -> None:
    """PyTorch at its best."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True


def sets_beyond_l2(nbytes: int) -> int:
    """How many sets of operands of this size are together larger than twice L2; at most 64."""
    if emulated():
        return 1
    l2: int = cuda.device_info()["l2_bytes"]
    return max(2, min(64, -(-2 * l2 // max(nbytes, 1))))


@functools.cache
def side_stream() -> Any:
    """The stream of what is recorded: PyTorch's backward pass runs on the one its forward ran on,
    and a recording may not reach another. None where the device is emulated."""
    return None if emulated() else torch.cuda.Stream()


@contextlib.contextmanager
def on_side_stream() -> Iterator[None]:
    """PyTorch's work of this block runs on :func:`side_stream`, after what came before it."""
    if not emulated():
        torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):  # None: the current one
        yield
    if not emulated():
        torch.cuda.synchronize()


class TorchGraph:
    """Calls of PyTorch as a graph."""

    def __init__(self, calls: Sequence[Call], stream: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # the first choose algorithms and make workspaces
                for call in calls:
                    call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.kept = [call() for call in calls]

    def replay(self) -> None:
        self.graph.replay()


class OurGraph:
    """Calls of fastconv as a graph."""

    def __init__(self, calls: Sequence[Call], stream: Any) -> None:
        with cuda.stream(stream.cuda_stream):
            for call in calls:
                call()
            cuda.synchronize()
            self.graph = cuda.kernels().Graph()
            self.graph.begin()
            self.kept = [call() for call in calls]
            self.graph.end()
        self.stream = stream

    def replay(self) -> None:
        with cuda.stream(self.stream.cuda_stream):
            self.graph.replay()


def microseconds(graphs: dict[str, Any], stream: Any, calls: int) -> dict[str, float]:
    """The median time of one call of each graph, in alternating rounds."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    with torch.cuda.stream(stream):
        for graph in graphs.values():
            graph.replay()
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                repeats = 3
                start.record(stream)
                for _ in range(repeats):
                    graph.replay()
                end.record(stream)
                end.synchronize()
                times[name].append(1000 * start.elapsed_time(end) / (repeats * calls))
    return {name: statistics.median(values) for name, values in times.items()}


def compare_times(ours: Sequence[Call], peers: dict[str, Sequence[Call]]) -> dict[str, Any]:
    """Microseconds of a call of ours and of each peer; null where the device is emulated.

    A peer that cannot be captured into a graph is left out and named under "failed".
    """
    if emulated():
        for call in ours:
            call()
        return {"ours": None, **dict.fromkeys(peers)}
    stream = side_stream()
    torch.cuda.synchronize()  # operands were made on the default stream
    graphs: dict[str, Any] = {"ours": OurGraph(ours, stream)}
    failed = {}
    for name, calls in peers.items():
        try:
            graphs[name] = TorchGraph(calls, stream)
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    result: dict[str, Any] = microseconds(graphs, stream, len(ours))
    return {**result, "failed": failed} if failed else result


def geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def record() -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    return {
        "device": cuda.device_info(),
        "fastconv": fastconv.__version__,
        "commit": report.git("rev-parse", "HEAD"),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


def write(path: str, content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps({**record(), **content}, indent=1) + "\n")

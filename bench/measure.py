"""Timing: candidates take turns in one process, so that all of them meet the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

# Shorter calls are timed several at a time: the clock and the loop cost about 0.1 us a call.
MIN_SAMPLE_SECONDS = 1e-3
MAX_ROUNDS = 100
# Seconds of rest before each sample of a whole model: a library's threads spin for a while when
# they have nothing to do, those of ONNX Runtime for 50 ms, and would take a core from whoever comes
# next.
PAUSE = 0.06


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one figure for each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def as_json(self) -> dict[str, object]:
        return {
            "median_ms": self.median * 1e3,
            "min_ms": self.minimum * 1e3,
            "samples_ms": [s * 1e3 for s in self.seconds],
        }


def seconds_per_call(call: Call, calls: int) -> float:
    """The mean of ``calls`` calls; freeing a result is part of the time, as it is for a user."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def alternate(
    candidates: Mapping[str, Call], budget: float, min_rounds: int = 5, pause: float = 0.0
) -> dict[str, Samples]:
    """Times every candidate once a round, for about ``budget`` seconds, at least ``min_rounds``.

    pause: seconds of rest before each sample, for candidates whose threads stay busy for a while;
        then one uncounted call, because the candidate's own threads have fallen asleep, too.

    Each round starts with another candidate, so that none always follows the same one. Two calls
    of each, uncounted, warm up first and tell how long a round will take.
    """
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, call in candidates.items():
        call()
        estimate = max(seconds_per_call(call, 1), 1e-7)
        calls[name] = math.ceil(MIN_SAMPLE_SECONDS / estimate)
        round_seconds += calls[name] * estimate + (pause + estimate if pause else 0)

    rounds = max(min_rounds, min(MAX_ROUNDS, round(budget / round_seconds)))
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            if pause:
                time.sleep(pause)
                candidates[name]()
            seconds[name].append(seconds_per_call(candidates[name], calls[name]))
    return {name: Samples(values) for name, values in seconds.items()}

"""What the machine can do: its FMA peak and its memory bandwidth, measured, never looked up.

The roofline model (Williams, Waterman and Patterson, 2009) bounds a kernel's time from below by
max(flops / peak, bytes / bandwidth), with the bytes that any algorithm must move: each operand
once. Bandwidth depends on whether the operands stay in a cache, so it is measured for several
working sets, and a kernel is held against the one nearest in size. Flops are those of the direct
algorithm, so an algorithm that needs fewer can pass 100%.

    python -m bench.roofline --threads 1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import options, report
from fastconv import _C

MEBIBYTE = 1 << 20
WORKING_SETS = tuple(size * MEBIBYTE for size in (2, 8, 32, 128, 512))


@dataclass(frozen=True)
class Roofline:
    """Limits for one number of threads: flops/s, and bytes/s for each working set in bytes."""

    threads: int
    peak: float
    bandwidth: dict[int, float]

    def bound(self, flops: float, traffic: float) -> float:
        """The least seconds for ``flops`` operations on ``traffic`` bytes."""
        nearest = min(self.bandwidth, key=lambda size: abs(size - traffic))
        return max(flops / self.peak, traffic / self.bandwidth[nearest])

    def as_json(self) -> dict[str, object]:
        return {
            "threads": self.threads,
            "peak_gflops": self.peak / 1e9,
            "bandwidth_gb_per_s": {size: rate / 1e9 for size, rate in self.bandwidth.items()},
        }


def fewer_multiplications(
    taps: tuple[int, int], stride: int | Sequence[int], channels: int, outputs: int, op: str
) -> float:
    """How many times fewer than a direct algorithm's the best one of the library has, on an image
    that its tiles divide: Winograd's, in six points an axis (csrc/README.md).

    op: "fwd", "dgrad" or "wgrad"; channels and outputs: those of a group.
    """
    if stride not in (1, [1, 1], (1, 1)):
        return 1.0
    if taps == (3, 3) and channels <= 4:
        return 1.0 if op == "dgrad" else 2.0  # along the rows alone
    # Taps times outputs over points; seven taps are two parts, one without a point at infinity.
    of_axis = {1: 1.0, 3: 3 * 4 / 6, 5: 5 * 2 / 6, 7: 7 * 3 / 11}
    if min(channels, outputs) < 16 or taps not in ((3, 3), (5, 5), (7, 7), (1, 7), (7, 1)):
        return 1.0
    return of_axis[taps[0]] * of_axis[taps[1]]


def measure(threads: int, seconds: float = 0.5) -> Roofline:
    """Measures both limits, the FMA peak for ``seconds``."""
    return Roofline(
        threads=threads,
        peak=_C.measure_fma_peak(seconds, threads),
        # It reads one array and writes another: each is half of the working set.
        bandwidth={size: _C.measure_bandwidth(size // 2, threads) for size in WORKING_SETS},
    )


def table(limits: Sequence[Roofline]) -> str:
    header = ["threads", "FMA GFLOP/s"]
    header += [f"GB/s in {size // MEBIBYTE} MiB" for size in WORKING_SETS]
    rows = [
        [str(limit.threads), f"{limit.peak / 1e9:.1f}"]
        + [f"{rate / 1e9:.1f}" for rate in limit.bandwidth.values()]
        for limit in limits
    ]
    return report.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options.parser("roofline", __doc__).parse_args(argv)
    limits = [measure(threads) for threads in arguments.threads]
    environment = report.environment()
    print(report.heading(environment), table(limits), sep="\n\n")
    if arguments.json:
        content: dict[str, object] = {
            "bench": "roofline",
            "environment": environment,
            "roofline": [limit.as_json() for limit in limits],
        }
        report.write_json(arguments.json, content)


if __name__ == "__main__":
    main()

"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fastconv

# What holds every library of the two sides to AVX2. All of them read it when they compute first.
AVX2 = {
    "FASTCONV_ISA": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


class HoldToAvx2(argparse.Action):
    """The option --avx2."""

    def __call__(self, *_: Any) -> None:
        late = "--avx2 needs a process in which nothing has been computed yet"
        if "torch" in sys.modules:
            raise SystemExit(late)
        os.environ.update(AVX2)
        if fastconv.isa() != "avx2":
            raise SystemExit(late)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--threads",
        type=numbers,
        default=sorted({1, len(os.sched_getaffinity(0))}),
        metavar="N,M",
        help="numbers of threads, each measured on its own",
    )
    made.add_argument("--json", type=Path, metavar="F", help="write everything measured to F")
    return made


def add_comparison(made: argparse.ArgumentParser, budget: float) -> None:
    """Options of a benchmark that measures fastconv against PyTorch."""
    made.add_argument("--no-peer", action="store_true", help="measure fastconv alone")
    made.add_argument("--filter", default="", metavar="NAME", help="only names that contain NAME")
    made.add_argument("--budget", type=float, default=budget, metavar="S", help="seconds a row")
    made.add_argument("--min-rounds", type=int, default=5, metavar="N", help="at least N samples")
    made.add_argument(
        "--avx2",
        action=HoldToAvx2,
        nargs=0,
        help="both sides without AVX-512: fastconv, PyTorch's own kernels, oneDNN and MKL",
    )
    made.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")


def add_choice(
    made: argparse.ArgumentParser, flag: str, names: Sequence[str], default: Sequence[str]
) -> None:
    """An option that takes some of ``names``, separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}, got {text!r}")
        return chosen

    made.add_argument(
        flag, type=parse, default=default, metavar="A,B", help=f"some of {','.join(names)}"
    )


def numbers(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, as in 1,2, got {text!r}")
    return counts


def peer_module(options: argparse.Namespace) -> ModuleType | None:
    """bench.peer, which needs PyTorch, unless the user measures without it."""
    if options.no_peer:
        return None
    try:
        from bench import peer
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: install '.[bench]', or measure with --no-peer") from None
    return peer

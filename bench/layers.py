"""Convolution layers of known networks: forward, input and weight gradient, against PyTorch.

Both sides are timed as their user calls them: fastconv's time includes the check of the arguments,
the packing of the weights and the allocation of the output. PyTorch counts with the faster of NCHW
and channels_last; torch.compile hands a single convolution to the same oneDNN and is left to
bench.steps. Every result is compared with PyTorch's before it is timed.

    python -m bench.layers --set resnet50,vgg16 --ops fwd,dgrad,wgrad --threads 1,2 --json F
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

import fastconv
from bench import options, report, roofline
from bench.measure import Call, alternate
from tests.cases import NETWORKS, ConvCase

OPS = {"fwd": "y", "dgrad": "dx", "wgrad": "dw"}  # and the array that each computes
DEFAULT_SETS = ["resnet50", "vgg16", "smallcnn", "mobilenet"]
UNIT = 2.0**-24  # the rounding unit of float32


def operands(case: ConvCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and dy in channels-last memory, w as a state_dict has it; all of logical shape NCHW."""
    rng = np.random.default_rng(0)

    def image(shape: tuple[int, int, int, int]) -> np.ndarray:
        n, c, h, w = shape
        return rng.standard_normal((n, h, w, c), np.float32).transpose(0, 3, 1, 2)

    return image(case.x_shape), rng.standard_normal(case.w_shape, np.float32), image(case.y_shape)


def our_call(case: ConvCase, op: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Call:
    arguments: dict[str, Any] = case.arguments
    if op == "fwd":
        return partial(fastconv.conv2d, x, w, **arguments)
    needs = (op == "dgrad", op == "wgrad", False)

    def gradient() -> object:
        dx, dw, _ = fastconv.conv2d_backward(dy, x, w, **arguments, needs=needs)
        return dx if op == "dgrad" else dw

    return gradient


def compare(case: ConvCase, op: str, ours: Call, peers: dict[str, Call]) -> dict[str, float]:
    """The relative L2 differences from the peer's results; ends the run if one is beyond rounding.

    The share of a direct float32 sum of K products is u(1 + sqrt K), of Winograd's 2u(sqrt K + 4).
    """
    limit = 3 * UNIT * (case.products[OPS[op]] ** 0.5 + 4)
    result = np.asarray(ours())
    differences = {}
    for mode, call in peers.items():
        expected = np.asarray(call())
        difference = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
        if not difference <= limit:
            raise SystemExit(
                f"{case.name} {op}: the result differs from PyTorch {mode} by {difference:.2e}, "
                f"more than {limit:.2e}"
            )
        differences[mode] = difference
    return differences


def tags(case: ConvCase) -> tuple[str, ...]:
    """The kinds of layer that the summary gives a mean for."""
    kernel, stride, channels = (case.r, case.s), case.stride, min(case.c, case.k)
    plain = case.groups == 1 and case.dilation == 1
    first = plain and case.c == 3
    depthwise = case.groups > 1 and case.groups == case.c == case.k
    kinds = {
        "3x3 s1 C,K>=64": plain and kernel == (3, 3) and stride == 1 and channels >= 64,
        "1x1": plain and kernel == (1, 1),
        "1x1 at 56": plain and kernel == (1, 1) and case.h == 56,
        "1x1 at 14 and 7": plain and kernel == (1, 1) and case.h in (14, 7),
        "3x3 C=3": first and kernel == (3, 3),
        "7x7 s2 C=3": first and kernel == (7, 7) and stride == 2,
        "depthwise": depthwise,
        "depthwise 3x3": depthwise and kernel == (3, 3),
        "depthwise 5x5": depthwise and kernel == (5, 5),
        "5x5 s1": plain and kernel == (5, 5) and stride == 1,
        "dilated 3x3": case.groups == 1 and kernel == (3, 3) and case.dilation != 1,
        "3x3 s2": plain and not first and kernel == (3, 3) and stride == 2,
        "7x7": plain and not first and kernel == (7, 7),
        "1x7, 7x1": plain and kernel in ((1, 7), (7, 1)),
        "grouped": case.groups > 1 and not depthwise,
        "C or K of 16 to 32": plain and 16 <= channels <= 32,
    }
    return tuple(kind for kind, belongs in kinds.items() if belongs)


def tiny(case: ConvCase) -> ConvCase:
    """The same kernel on one small image, for --quick."""
    side = 2 * max(case.r, case.s)
    return replace(case, n=1, h=min(case.h, side), w=min(case.w, side))


def run(
    group: str,
    case: ConvCase,
    limits: Sequence[roofline.Roofline],
    arguments: argparse.Namespace,
    peer: ModuleType | None,
) -> Iterator[report.Row]:
    """Checks and times every operation of one layer with every number of threads."""
    x, w, dy = operands(case)
    flops = 2.0 * case.macs
    traffic = 4.0 * (x.size + w.size + dy.size)
    for op in arguments.ops:
        ours = our_call(case, op, x, w, dy)
        peers: dict[str, Call] = peer.convolution(case, op, x, w, dy) if peer else {}
        for limit in limits:
            fastconv.set_num_threads(limit.threads)
            if peer:
                peer.set_num_threads(limit.threads)
            differences = compare(case, op, ours, peers)
            samples = alternate({"fastconv": ours, **peers}, arguments.budget, arguments.min_rounds)
            yield report.Row(
                group=group,
                name=case.name,
                op=op,
                threads=limit.threads,
                flops=flops,
                bound=limit.bound(flops, traffic),
                ours=samples.pop("fastconv"),
                peers=samples,
                tags=tags(case),
                details={"case": asdict(case), "traffic": traffic, "difference": differences},
            )


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, ConvCase]]:
    for group in arguments.set:
        for case in NETWORKS[group]:
            if arguments.filter in case.name:
                yield group, tiny(case) if arguments.quick else case


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("layers", __doc__)
    options.add_comparison(parser, budget=0.5)
    options.add_choice(parser, "--set", list(NETWORKS), DEFAULT_SETS)
    options.add_choice(parser, "--ops", list(OPS), list(OPS))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    peer = options.peer_module(arguments)
    limits = [roofline.measure(threads) for threads in arguments.threads]
    rows = []
    for group, case in chosen(arguments):
        for row in run(group, case, limits, arguments, peer):
            report.progress(row)
            rows.append(row)
    report.finish("layers", rows, [limit.as_json() for limit in limits], arguments)


if __name__ == "__main__":
    main()

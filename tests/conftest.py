"""Fixtures of all tests: the instruction sets, and settings put back after each test."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import pytest
import torch

import fastconv
from fastconv import cuda, data
from tests import device
from tests.device import ON_CUDA

Result = TypeVar("Result")

# Every implementation of convolution, in each direction where it has one.
ALGORITHMS = [
    "winograd",
    "winograd_rows",
    "direct",
    "pointwise",
    "grouped",
    "depthwise",
    "first_layer",
    "few_pixels",
    "reference",
]
if ON_CUDA:
    ALGORITHMS = ["depthwise", "simt"]  # of float32
    device.install()
# Those that explain() may name; on a device some take no float32.
NAMES = [*ALGORITHMS, "sm90", "sm80"] if ON_CUDA else ALGORITHMS
WINOGRAD = ["winograd", "winograd_rows"]  # whose errors have a limit of their own

# A job in the background of a shell ignores Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the oracle: tiny shapes
THREADS = fastconv.get_num_threads()


@pytest.fixture(params=["cuda"] if ON_CUDA else fastconv.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set of this machine."""
    if ON_CUDA:
        yield request.param
        return
    previous = fastconv.isa()
    fastconv._C.set_isa(request.param)
    yield request.param
    fastconv._C.set_isa(previous)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Numbers are checked on one thread, so that a busy machine does not slow thousands of tiny
    calls; test_determinism.py shows that other numbers of threads give the same bits."""
    fastconv.set_num_threads(1)
    yield
    fastconv.set_num_threads(THREADS)
    device.set_algorithm("")
    fastconv.set_precision("default")
    fastconv.load_tuning(None)
    if ON_CUDA and "PYTEST_XDIST_WORKER" in os.environ:
        # A kernel's fault is reported by a later call, and by every one until the process ends: it
        # belongs to the test that made it, and pytest-xdist then starts another process.
        try:
            cuda.synchronize()
        except RuntimeError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(70)


@pytest.fixture
def strict() -> None:
    """Plain sums only, for tests of exact results."""
    fastconv.set_precision("strict")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with 600 and 200 real digits in MNIST's own files."""
    folder = tmp_path_factory.mktemp("digits")
    for split, prefix, step in (("train", "train", 7), ("test", "t10k", 5)):
        chosen = data.mnist5k(split)[::step][:600]
        images, labels = chosen.images[..., 0], chosen.labels.astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()
        )
    return str(folder)


@contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Convolutions run this implementation or raise ValueError; "" lets the library choose."""
    device.set_algorithm(algorithm)
    try:
        yield
    finally:
        device.set_algorithm("")


def each_algorithm(call: Callable[[], Result]) -> Iterator[tuple[str, Result]]:
    """The result of the library's choice, then of every implementation that accepts the call."""
    yield "chosen", call()
    for algorithm in ALGORITHMS:
        with forced(algorithm):
            try:
                result = call()
            except ValueError as error:
                if "algorithm" not in str(error):
                    raise
                continue
        yield algorithm, result

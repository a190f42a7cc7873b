"""Convolution on a CUDA device in the types of the tensor cores, by every implementation.

The operands are small integers, whose sums are exact in float32 in any order: each result is the
exact sum, rounded once, and no tolerance hides a wrong index. Runs on a GPU and, with small shapes,
in the emulated build; skipped where there is neither. `-k sm80` runs one implementation alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastconv
from fastconv import cuda
from tests import cases, reference
from tests.cases import ConvCase

pytestmark = pytest.mark.skipif(not cuda.is_available(), reason="no CUDA device")

IMPLEMENTATIONS = ["depthwise", "sm90", "sm80", "simt"]
DTYPES = ["bfloat16", "float16", "float32"]  # float32 as tf32, which holds these integers exactly
SHAPES = [
    ConvCase("3x3", 2, 64, 9, 7, 72, 3, 3, padding=1),
    ConvCase("3x3_s2", 2, 24, 10, 9, 40, 3, 3, stride=2, padding=1),
    ConvCase("1x1_s2", 2, 72, 6, 6, 136, 1, 1, stride=2),
    ConvCase("5x3_s2x1_d1x2", 1, 16, 11, 13, 8, 5, 3, (2, 1), ((2, 1), (0, 3)), (1, 2)),
    ConvCase("7x7_rgb", 2, 3, 17, 15, 64, 7, 7, 2, 3),
    ConvCase("odd", 1, 7, 8, 9, 13, 3, 3, padding=1),
    ConvCase("groups", 2, 32, 7, 7, 48, 3, 3, padding=1, groups=4),
    ConvCase("depthwise", 2, 40, 9, 11, 40, 3, 3, padding=1, groups=40),
    ConvCase("depthwise_5x5_s2", 2, 24, 12, 9, 24, 5, 5, 2, 2, groups=24),
    ConvCase("one_pixel", 3, 8, 1, 1, 8, 1, 1),
    ConvCase("264_channels", 1, 264, 4, 5, 8, 3, 3, padding=1),  # 8 beyond whole tiles of dw
]
LAYERS = [
    replace(layer, n=2)
    for layer in cases.RESNET50 + cases.SMALLCNN + cases.MOBILENET_V2
    if layer not in cases.MOBILENET_V2 or layer.groups > 1
]


@contextmanager
def forced(name: str) -> Iterator[None]:
    cuda.kernels().set_algorithm(name)
    cuda.allow_tf32()
    try:
        yield
    finally:
        cuda.kernels().set_algorithm("")
        cuda.allow_tf32(False)


def operands(case: ConvCase, dtype: str) -> tuple[Any, Any, Any]:
    """x, w, dy on the device, channels-last, w as the caller has it."""

    def integers(role: str, shape: tuple[int, ...]) -> np.ndarray:
        return reference.generator(case.name, role).integers(-3, 4, shape).astype(np.float32)

    x, dy = (
        np.ascontiguousarray(integers(role, shape).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        for role, shape in (("x", case.x_shape), ("dy", case.y_shape))
    )
    return tuple(cuda.array(a, dtype) for a in (x, integers("w", case.w_shape), dy))  # type: ignore[return-value]


def results(name: str, case: ConvCase, given: tuple[Any, Any, Any]) -> dict[str, Any]:
    """What the implementation answers in the directions that it accepts."""
    x, w, dy = given
    bias = cuda.array(np.arange(case.k, dtype=np.float32) % 5 - 2, x.dtype_name)
    calls = {
        "y": lambda: fastconv.conv2d(x, w, bias, activation="relu", **case.arguments),
        "dx": lambda: gradients((True, False, False))[0],
        "dw": lambda: gradients((False, True, False))[1],
    }

    def gradients(needs: tuple[bool, ...]) -> Any:
        return fastconv.conv2d_backward(dy, x, w, **case.arguments, needs=needs)

    found = {}
    for role, call in calls.items():
        try:
            with forced(name):
                found[role] = call()
        except ValueError as error:
            if "declines" not in str(error):
                raise
    return found


def rounded(sums: np.ndarray, dtype: str) -> np.ndarray:
    return cuda.to_numpy(cuda.array(sums.astype(np.float32), dtype)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_exact_sums(name: str, case: ConvCase, dtype: str) -> None:
    given = operands(case, dtype)
    found = results(name, case, given)
    if not found:
        pytest.skip(f"{name} declines")
    x, w, dy = (cuda.to_numpy(a) for a in given)
    bias = np.arange(case.k) % 5 - 2
    y = np.maximum(reference.conv2d(x, w, case) + bias[:, None, None], 0)
    dx, dw, _ = reference.conv2d_backward(dy, x, w, case)
    expected = {"y": y, "dx": dx, "dw": dw}
    for role, result in found.items():
        got = cuda.to_numpy(result).astype(np.float32)
        np.testing.assert_array_equal(got, rounded(expected[role], dtype), role)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_input_channels_the_bias_is_left(dtype: str, groups: int) -> None:
    x, w = np.zeros((2, 0, 4, 5), np.float32), np.zeros((16, 0, 3, 3), np.float32)
    bias = np.arange(16, dtype=np.float32) - 8
    given = (cuda.array(a, dtype) for a in (x, w, bias))
    y = cuda.to_numpy(fastconv.conv2d(*given, padding=1, groups=groups, activation="relu"))
    expected = np.broadcast_to(np.maximum(bias, 0)[:, None, None], (2, 16, 4, 5))
    np.testing.assert_array_equal(y.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_moments(name: str, case: ConvCase, dtype: str) -> None:
    """Of y as it is rounded, with a bias far from zero; y has the bits that it has without them."""
    x, w, _ = operands(case, dtype)
    bias = cuda.array(np.arange(case.k, dtype=np.float32) * 8 - 40, dtype)
    try:
        with forced(name):
            y = fastconv.conv2d(x, w, bias, **case.arguments)
            same, moments = fastconv.conv2d_moments(x, w, bias, **case.arguments)
    except ValueError as error:
        if "declines" not in str(error):
            raise
        pytest.skip(f"{name} declines")
    numbers = cuda.to_numpy(y).astype(np.float64)
    np.testing.assert_array_equal(cuda.to_numpy(same).astype(np.float64), numbers)
    mean, squares = cuda.to_numpy(moments)
    right = numbers.mean((0, 2, 3))
    distances = ((numbers - right[:, None, None]) ** 2).sum((0, 2, 3))
    np.testing.assert_allclose(mean, right, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(squares, distances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_is_exercised(name: str) -> None:
    assert any(results(name, case, operands(case, "bfloat16")) for case in SHAPES)


@pytest.mark.skipif(
    cuda.is_available() and cuda.is_emulated(), reason="no GPU: real layers take long to emulate"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS[:-1])
def test_layers_of_networks(name: str, case: ConvCase, dtype: str) -> None:
    """Every implementation agrees with plain loops to the bit, and with itself on every run."""
    given = operands(case, dtype)
    found = results(name, case, given)
    if not found:
        pytest.skip(f"{name} declines")
    plain = results("simt", case, given)
    for again in (found, results(name, case, given), results(name, case, given)):
        for role, got in again.items():
            assert cuda.to_numpy(got).tobytes() == cuda.to_numpy(plain[role]).tobytes(), role

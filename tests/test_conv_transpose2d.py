"""conv_transpose2d and its gradients against float64."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc
from tests import reference
from tests.cases import CONV_TRANSPOSE_CASES, ConvCase, ConvTransposeCase
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import assert_conv_close, assert_same_bits, conv_data

# Winograd has limits of its own: test_winograd.py.
pytestmark = pytest.mark.usefixtures("strict")

NAMES = ["y", "dx", "dw", "db"]


def run(case: ConvTransposeCase, x, w, dy, bias=None) -> list[np.ndarray]:
    y = fc.conv_transpose2d(x, w, bias, **case.arguments)
    return [y, *fc.conv_transpose2d_backward(dy, x, w, **case.arguments)]


@pytest.mark.parametrize("case", CONV_TRANSPOSE_CASES, ids=str)
def test_against_float64(case, isa):
    data = conv_data(case)
    assert case.y_shape == data.ref["y"].shape
    for order in (np.ascontiguousarray, channels_last):
        for name, got in zip(NAMES, run(case, order(data.x), data.w, order(data.dy)), strict=True):
            limit = data.ref[name], data.abs_ref[name], case.products[name]
            assert_conv_close(got, *limit, f"{case} {name}")


@pytest.mark.parametrize("case", CONV_TRANSPOSE_CASES, ids=str)
def test_bias(case, isa):
    data = conv_data(case)
    bias = data.bias[:, None, None]
    y = fc.conv_transpose2d(channels_last(data.x), data.w, data.bias, **case.arguments)
    ref, scale = data.ref["y"] + bias.astype(np.float64), data.abs_ref["y"] + abs(bias)
    assert_conv_close(y, ref, scale, case.products["y"] + 1)


@pytest.mark.parametrize("case", CONV_TRANSPOSE_CASES, ids=str)
def test_float64(case):
    data = conv_data(case, np.float64)
    for name, got in zip(NAMES, run(case, data.x, data.w, data.dy), strict=True):
        assert got.dtype == np.float64
        assert_conv_close(got, data.ref[name], data.abs_ref[name], case.products[name], name)


@pytest.mark.parametrize("case", CONV_TRANSPOSE_CASES, ids=str)
def test_integers_are_exact(case, isa):
    data = reference.integer_conv_data(case)
    for name, got in zip(NAMES, run(case, data.x, data.w, data.dy), strict=True):
        np.testing.assert_array_equal(got, data.ref[name], name)


@pytest.mark.parametrize(
    "case",
    [
        ConvTransposeCase("output_padding", 1, 4, 3, 4, 6, 3, 2, 2, 1, (1, 0), 2),
        ConvTransposeCase("dilated", 2, 2, 3, 3, 3, 2, 3, 1, 0, 0, 1, 2),
    ],
    ids=str,
)
def test_gradients_by_finite_differences(case):
    data = conv_data(case, np.float64)

    def function(x, w, bias):
        return fc.conv_transpose2d(x, w, bias, **case.arguments)

    gradients = fc.conv_transpose2d_backward(data.dy, data.x, data.w, **case.arguments)
    reference.assert_gradient(function, [data.x, data.w, data.bias], data.dy, list(gradients))


def test_is_the_input_gradient_of_conv2d(isa):
    """The defining property, on equal geometry: bit for bit the same sums."""
    conv = ConvCase("", 2, 9, 8, 10, 7, 4, 4, 2, 1)
    data = conv_data(conv)
    dx, _, _ = fc.conv2d_backward(data.dy, data.x, data.w, **conv.arguments)
    y = fc.conv_transpose2d(data.dy, data.w, stride=2, padding=1)
    assert_conv_close(y, data.ref["dx"], data.abs_ref["dx"], conv.products["dx"])
    np.testing.assert_allclose(y, dx, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout, isa):
    case = ConvTransposeCase("", 2, 19, 4, 5, 21, 3, 3, 2, 1, 1)
    data = conv_data(case)
    expected = run(case, data.x, data.w, data.dy)
    x, w, dy = (as_layout(a, layout) for a in (data.x, data.w, data.dy))
    for arguments in [(x, data.w, data.dy), (data.x, w, data.dy), (x, w, dy)]:
        for name, got, right in zip(NAMES, run(case, *arguments), expected, strict=True):
            assert_same_bits(got, right, name)


def test_layout_of_results_follows_the_input():
    case = ConvTransposeCase("", 2, 19, 4, 5, 21, 3, 3, 2, 1, 1)
    data = conv_data(case)
    y, dx, _, _ = run(case, data.x, data.w, data.dy)
    assert y.flags.c_contiguous and dx.flags.c_contiguous
    y, dx, _, _ = run(case, channels_last(data.x), data.w, channels_last(data.dy))
    assert is_channels_last(y) and is_channels_last(dx)


def test_needs_selects_the_gradients():
    case = ConvTransposeCase("", 2, 5, 4, 5, 6, 3, 3, 2, 1, 1)
    data = conv_data(case)
    full = fc.conv_transpose2d_backward(data.dy, data.x, data.w, **case.arguments)
    for position in range(3):
        needs = tuple(i == position for i in range(3))
        got = fc.conv_transpose2d_backward(data.dy, data.x, data.w, **case.arguments, needs=needs)
        for i in range(3):
            assert (got[i] is None) == (i != position)
        assert_same_bits(got[position], full[position])


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_padding": 2, "stride": 2},
        {"output_padding": 1},
        {"output_padding": -1, "stride": 2},
        {"padding": 20},
        {"padding": -1},
        {"stride": 0},
        {"dilation": 0},
        {"groups": 2},
        {"groups": 0},
        {"stride": 2**62},
        {"padding": 2**31},
    ],
    ids=str,
)
def test_bad_arguments(arguments):
    x, w = np.ones((1, 3, 4, 4), np.float32), np.ones((3, 5, 3, 3), np.float32)
    with pytest.raises((ValueError, TypeError, OverflowError, MemoryError)):
        fc.conv_transpose2d(x, w, **arguments)


def test_bad_shapes():
    x, w = np.ones((1, 3, 4, 4), np.float32), np.ones((4, 5, 3, 3), np.float32)
    with pytest.raises(ValueError, match="3"):
        fc.conv_transpose2d(x, w)
    w = np.ones((3, 5, 3, 3), np.float32)
    with pytest.raises(ValueError):
        fc.conv_transpose2d(x, w, np.ones(4, np.float32))
    for shape in [(1, 5, 6, 7), (1, 4, 6, 6), (2, 5, 6, 6), (5, 6, 6)]:
        with pytest.raises(ValueError):
            fc.conv_transpose2d_backward(np.ones(shape, np.float32), x, w)

"""Forty failures that convolution, pooling and batch-norm kernels of other libraries have had, and
what is owed instead. The number is in each test's name; tests/README.md has the table.

Bad arguments raise ValueError or TypeError before memory is touched, the message shows the
offending values, and the process and later calls stay good: every test ends with a good call.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests import reference, test_batch_norm, test_conv2d, test_pool2d, test_process
from tests.cases import CONV_CASES, CONV_EXTREMES, CONV_LEFTOVERS, CONV_PADDING, ConvCase
from tests.conftest import ALGORITHMS, each_algorithm, forced
from tests.memory import LAYOUTS, as_layout, channels_last, guarded
from tests.reference import assert_conv_close, assert_same_bits, conv_data, normal

REFUSED = (ValueError, TypeError)
OVERFLOWS = (*REFUSED, OverflowError, MemoryError)


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.fixture(autouse=True)
def later_calls_stay_good() -> Iterator[None]:
    yield
    case = CONV_CASES[1]
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, **case.arguments)
    assert_conv_close(y, data.ref["y"], data.abs_ref["y"], case.products["y"])


def refused(call: Callable[[], object], *shown: object, errors: tuple = REFUSED) -> None:
    """The call raises, and the message shows each of the values."""
    with pytest.raises(errors) as caught:
        call()
    if isinstance(caught.value, ValueError):
        for value in shown:
            assert re.search(re.escape(str(value)), str(caught.value)), (value, str(caught.value))


def convolutions(x: np.ndarray, w: np.ndarray, **arguments: object) -> list[Callable[[], object]]:
    """The same geometry asked of every function that takes it."""
    dy = ones(1, 4, 6, 6)
    return [
        lambda: fc.conv2d(x, w, **arguments),
        lambda: fc.conv2d_backward(dy, x, w, **arguments),
        lambda: fc.conv2d_backward(dy, x, w, **arguments, needs=(True, False, False)),
        lambda: fc.conv2d_backward(dy, x, w, **arguments, needs=(False, True, False)),
        lambda: fc.explain("conv2d", x.shape, w.shape, **arguments),
    ]


def poolings(x: np.ndarray, **arguments: object) -> list[Callable[[], object]]:
    dy = ones(*x.shape[:2], 3, 3)
    return [
        lambda: fc.max_pool2d(x, **arguments),
        lambda: fc.max_pool2d(x, **arguments, return_indices=True),
        lambda: fc.max_pool2d_backward(dy, x, **arguments),
        lambda: fc.avg_pool2d(x, **arguments),
        lambda: fc.avg_pool2d_backward(dy, x, **arguments),
    ]


# -------------------------------------------------------------------------------------------------
# 1-12: arguments, shapes, types.


@pytest.mark.parametrize("value", [0, -1, (1, 0), (-2, 1), -(2**31), -(2**63)], ids=str)
def test_01_zero_or_negative_geometry(value):
    x, w = ones(1, 4, 6, 6), ones(4, 4, 3, 3)
    shown = value if isinstance(value, int) else min(value)
    for name in ("stride", "dilation"):
        for call in convolutions(x, w, **{name: value}):
            refused(call, shown, errors=OVERFLOWS)
        refused(lambda name=name: fc.conv_transpose2d(x, w, **{name: value}), errors=OVERFLOWS)
    if isinstance(value, int):
        for call in convolutions(x, w, groups=value):
            refused(call, value)
        refused(lambda: fc.conv_transpose2d(x, w, groups=value))
    if min(np.atleast_1d(value)) < 0:
        for padding in (value, ((0, shown), (0, 0))):
            for call in convolutions(x, w, padding=padding):
                refused(call, shown, errors=OVERFLOWS)
    for arguments in [{"kernel_size": value}, {"kernel_size": 2, "stride": value}]:
        for call in poolings(x, **arguments):
            refused(call, shown, errors=OVERFLOWS)
    for function in (
        fc.max_pool2d,
        lambda *a, **k: fc.max_pool2d_backward(ones(1, 4, 3, 3), *a, **k),
    ):
        refused(lambda f=function: f(x, 2, dilation=value), shown, errors=OVERFLOWS)
    if min(np.atleast_1d(value)) < 0:
        for call in poolings(x, kernel_size=2, padding=value):
            refused(call, shown, errors=OVERFLOWS)
    refused(lambda: fc.adaptive_avg_pool2d(x, -1), -1)
    refused(lambda: fc.avg_pool2d(x, 2, divisor_override=0), 0)


def test_02_groups_and_channels_that_do_not_match():
    x = ones(1, 6, 6, 6)
    for w, groups, shown in [
        (ones(4, 6, 3, 3), 4, (6, 4)),
        (ones(5, 3, 3, 3), 2, (5, 2)),
        (ones(4, 5, 3, 3), 1, (5, 6)),
        (ones(4, 6, 3, 3), 2, (6, 2)),
        (ones(4, 0, 3, 3), 1, (0, 6)),
        (ones(6, 1, 3, 3), 7, (6, 7)),
        (ones(6, 1, 3, 3), 2**40, (6, 2**40)),
    ]:
        for call in convolutions(x, w, groups=groups):
            refused(call, *shown)
    for bias in (ones(3), ones(5), ones(4, 1), ones(1, 4), ones(0), np.float32(1)):
        refused(lambda bias=bias: fc.conv2d(x, ones(4, 6, 3, 3), bias))
    refused(lambda: fc.conv_transpose2d(x, ones(5, 4, 3, 3)), 5, 6)
    refused(lambda: fc.conv_transpose2d(x, ones(6, 4, 3, 3), groups=4), 4, 6)


@pytest.mark.parametrize("shape", [(4, 4, 0, 3), (4, 4, 3, 0), (4, 4, 0, 0)])
def test_03_empty_kernel(shape):
    for call in convolutions(ones(1, 4, 6, 6), ones(*shape)):
        refused(call)
    for call in convolutions(ones(1, 4, 6, 6), ones(*shape), padding=1):
        refused(call)
    refused(lambda: fc.conv_transpose2d(ones(1, 4, 6, 6), ones(*shape)))
    for call in poolings(ones(1, 4, 6, 6), kernel_size=shape[2:]):
        refused(call)


def test_04_kernel_larger_than_the_padded_input():
    x = ones(1, 4, 5, 6)
    for w, arguments in [
        (ones(4, 4, 6, 3), {}),
        (ones(4, 4, 3, 7), {}),
        (ones(4, 4, 3, 3), {"dilation": 3}),
        (ones(4, 4, 3, 3), {"dilation": 5, "padding": 2}),
        (ones(4, 4, 8, 1), {"padding": ((1, 1), (0, 0))}),
        (ones(4, 4, 8, 1), {"padding": "valid", "stride": 100}),
    ]:
        for call in convolutions(x, w, **arguments):
            refused(call)
    for arguments in [
        {"kernel_size": 6},
        {"kernel_size": 6, "stride": 100},
        {"kernel_size": (20, 2), "stride": 3, "padding": 1, "ceil_mode": True},
    ]:
        for call in poolings(x, **arguments):
            refused(call)
    refused(lambda: fc.max_pool2d(x, 3, dilation=4))
    # Rounding up, one window that hangs over the far edge remains: PyTorch's rule for ceil_mode.
    np.testing.assert_array_equal(fc.max_pool2d(x, 12, ceil_mode=True), ones(1, 4, 1, 1))
    np.testing.assert_array_equal(fc.avg_pool2d(x, 12, ceil_mode=True), ones(1, 4, 1, 1))
    refused(lambda: fc.conv_transpose2d(x, ones(4, 4, 1, 1), padding=3))


HUGE = [2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64 + 1, 2**100]


def right_or_refused(x: np.ndarray, w: np.ndarray, stride=1, padding=0, dilation=1) -> None:
    """conv2d refuses, or its result is that of Python's unbounded integers."""
    (top, bottom), (left, right) = padding if isinstance(padding, tuple) else ((padding,) * 2,) * 2
    try:
        y = fc.conv2d(x, w, stride=stride, padding=padding, dilation=dilation)
    except OVERFLOWS:
        return
    rows = (6 + top + bottom - 2 * dilation - 1) // stride + 1
    columns = (6 + left + right - 2 * dilation - 1) // stride + 1
    assert y.shape == (1, 4, rows, columns)
    for p, q in np.ndindex(rows, columns):
        ref = np.zeros(4)
        for r, s in np.ndindex(3, 3):
            i, j = p * stride + r * dilation - top, q * stride + s * dilation - left
            if 0 <= i < 6 and 0 <= j < 6:
                ref += w[:, :, r, s].astype(np.float64) @ x[0, :, i, j]
        np.testing.assert_allclose(y[0, :, p, q], ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", HUGE)
def test_05_overflow_in_size_arithmetic(value):
    """2^32 + 1 must not become 1."""
    x, w = normal("x", shape=(1, 4, 6, 6)), normal("w", shape=(4, 4, 3, 3))
    dy = ones(1, 4, 5, 5)  # the right shape for none of these
    for arguments in [
        {"padding": value},
        {"padding": ((value, 0), (0, 0))},
        {"padding": ((0, 0), (0, value))},
        {"dilation": value},
        {"padding": value, "dilation": value},
        {"stride": value},
        {"stride": value, "padding": 1},
        {"stride": value, "padding": value},
        {"stride": value, "padding": value, "dilation": value},
        {"stride": value, "padding": value - 2},
    ]:
        right_or_refused(x, w, **arguments)
        refused(lambda a=arguments: fc.conv2d_backward(dy, x, w, **a), errors=OVERFLOWS)
    for call in convolutions(x, w, groups=value):
        refused(call, errors=OVERFLOWS)
    for arguments in [
        {"stride": value},
        {"padding": value},
        {"dilation": value},
        {"groups": value},
        {"output_padding": value},
        {"stride": value, "padding": value},
        {"stride": value, "padding": value, "dilation": value},
    ]:
        refused(lambda a=arguments: fc.conv_transpose2d(x, w, **a), errors=OVERFLOWS)
    for arguments in [{"kernel_size": value}, {"kernel_size": 2, "padding": value}]:
        for call in poolings(x, **arguments):
            refused(call, errors=OVERFLOWS)
    for call in poolings(x, kernel_size=2, padding=value, ceil_mode=True):
        refused(call, errors=OVERFLOWS)
    with contextlib.suppress(*OVERFLOWS):  # rounding up, a huge window is clipped to the image
        y = fc.max_pool2d(x, value, ceil_mode=True)
        np.testing.assert_array_equal(y, x.max((2, 3), keepdims=True))
    with contextlib.suppress(*OVERFLOWS):
        y = fc.avg_pool2d(x, value, ceil_mode=True)
        np.testing.assert_allclose(y, x.mean((2, 3), keepdims=True), rtol=0, atol=1e-6)
    refused(lambda: fc.max_pool2d(x, 2, dilation=value), errors=OVERFLOWS)
    refused(lambda: fc.adaptive_avg_pool2d(x, value), errors=OVERFLOWS)
    with contextlib.suppress(*OVERFLOWS):  # a huge stride has one output
        for ceil_mode in (False, True):
            assert fc.max_pool2d(x, 2, value, ceil_mode=ceil_mode).shape == (1, 4, 1, 1)
            assert fc.avg_pool2d(x, 2, value, ceil_mode=ceil_mode).shape == (1, 4, 1, 1)


def test_05_overflow_in_element_counts():
    huge = np.broadcast_to(np.float32(1), (2**20, 2**20, 2**10, 2**10))
    refused(lambda: fc.conv2d(huge, ones(4, 4, 3, 3)), errors=OVERFLOWS)
    w = np.broadcast_to(np.float32(1), (2**30, 2**20, 2**8, 2))
    refused(lambda: fc.conv2d(ones(1, 4, 6, 6), w), errors=OVERFLOWS)
    wide = np.broadcast_to(np.float32(1), (1, 1, 2**30, 2**30))
    narrow = np.broadcast_to(np.float32(1), (2**30, 1, 1, 1))
    refused(lambda: fc.conv2d(wide, narrow), errors=OVERFLOWS)
    refused(lambda: fc.max_pool2d(wide, 1), errors=OVERFLOWS)
    refused(lambda: fc.adaptive_avg_pool2d(ones(1, 1, 1, 1), 2**31), errors=OVERFLOWS)


BAD_DY = [(1, 4, 4, 5), (1, 4, 5, 4), (1, 3, 4, 4), (2, 4, 4, 4), (1, 4, 1, 1), (0, 4, 4, 4),
          (1, 4, 16), (4, 4, 4), (1, 4, 4, 4, 1), (1, 4, 10**4, 1), ()]  # fmt: skip


@pytest.mark.parametrize("shape", BAD_DY, ids=str)
def test_06_dy_without_the_shape_of_the_output(shape):
    x, w, dy = ones(1, 4, 6, 6), ones(4, 4, 3, 3), ones(*shape)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True,) * 3]:
        refused(lambda needs=needs: fc.conv2d_backward(dy, x, w, needs=needs))
        refused(lambda needs=needs: fc.conv_transpose2d_backward(dy, ones(1, 4, 2, 2), w,
                                                                 needs=needs))  # fmt: skip
    # A 3x3 window with stride 1 on 6x6 has 4x4 outputs, too.
    refused(lambda: fc.max_pool2d_backward(dy, x, 3, 1))
    refused(lambda: fc.max_pool2d_backward(dy, x, 3, 1, indices=np.zeros((1, 4, 4, 4), np.int64)))
    refused(lambda: fc.avg_pool2d_backward(dy, x, 3, 1))
    refused(lambda: fc.global_avg_pool2d_backward(dy, ones(3, 5, 6, 6)))
    if shape[:2] != (1, 4) or len(shape) != 4:
        refused(lambda: fc.adaptive_avg_pool2d_backward(dy, x))
    four = ones(4)
    refused(lambda: fc.batch_norm_backward(dy, ones(1, 4, 4, 4), four, four, four))
    refused(lambda: fc.relu_backward(dy, ones(1, 4, 4, 4)))


def test_07_indices_of_max_pooling():
    x = ones(2, 5, 6, 6)
    _, good = fc.max_pool2d(x, 2, return_indices=True)
    dy = ones(2, 5, 3, 3)
    assert fc.max_pool2d_backward(dy, x, 2, indices=good).sum() == 90
    for value in (36, -1, 2**31, 2**32, -(2**63), 2**63 - 1):
        for position in [(0, 0, 0, 0), (1, 4, 2, 2), (1, 3, 1, 1)]:
            bad = good.copy()
            bad[position] = value
            refused(lambda bad=bad: fc.max_pool2d_backward(dy, x, 2, indices=bad), value)
    for bad in (good[:, :, :2], good[:1], good[0], good.ravel(), good.astype(np.float32), None):
        if bad is not None:
            refused(lambda bad=bad: fc.max_pool2d_backward(dy, x, 2, indices=bad))
    strided = np.repeat(good, 2, 3)[..., ::2]
    assert fc.max_pool2d_backward(dy, x, 2, indices=strided).sum() == 90


@pytest.mark.parametrize("length", [0, 1, 4, 6, 10])
def test_08_batch_norm_vectors_of_another_length(length):
    x, good, bad = ones(2, 5, 3, 3), ones(5), ones(length)
    refused(lambda: fc.batch_norm(x, bad, good), length)
    refused(lambda: fc.batch_norm(x, good, bad), length)
    for training in (False, True):
        refused(lambda t=training: fc.batch_norm(x, good.copy(), good, bad, good, t), length)
        refused(lambda t=training: fc.batch_norm(x, good.copy(), good, good, bad, t), length)
    refused(lambda: fc.batch_norm(x, bad, good, training=True), length)
    refused(lambda: fc.batch_norm(x, good, bad, training=True), length)
    refused(lambda: fc.batch_norm(x, ones(5, 1), good))
    for position in range(3):
        vectors = [good] * 3
        vectors[position] = bad
        refused(lambda v=tuple(vectors): fc.batch_norm_backward(x, x, *v), length)
    refused(lambda: fc.batch_norm_backward(x, x, good, good, good, bias=bad, activation="relu"))
    refused(lambda: fc.batch_norm(x, good, good, residual=ones(2, 5, 3, 4)))
    refused(lambda: fc.batch_norm(x, good, good, activation="no_such"), "no_such")
    refused(lambda: fc.batch_norm(x, None, None))


def test_09_wrong_types_and_ranks():
    x, w = ones(1, 4, 6, 6), ones(4, 4, 3, 3)
    y = fc.conv2d(x, w)
    for dtype in ("f2", "i4", "i8", "u1", "?", "c8", "O", "U3", "M8[s]", "V4"):
        bad = np.zeros((1, 4, 6, 6), dtype)
        refused(lambda bad=bad: fc.conv2d(bad, w))
        refused(lambda bad=bad: fc.max_pool2d(bad, 2))
        refused(lambda bad=bad: fc.batch_norm(bad, ones(4), ones(4)))
        refused(lambda dtype=dtype: fc.conv2d(x, np.zeros(w.shape, dtype)))
    for bad in (None, "x", b"xx", 1, 1.5, [1, 2], {}, object(), print):
        refused(lambda bad=bad: fc.conv2d(bad, w))
        refused(lambda bad=bad: fc.conv2d(x, bad))
        refused(lambda bad=bad: fc.conv2d_backward(bad, x, w))
    for bad in ("x", 1, 1.5, [1, 2], {}, object()):
        refused(lambda bad=bad: fc.conv2d(x, w, bad))
    for shape in [(4, 6, 6), (6, 6), (6,), (), (1, 1, 4, 6, 6)]:
        refused(lambda shape=shape: fc.conv2d(ones(*shape), w))
        refused(lambda shape=shape: fc.conv2d(x, ones(*shape)))
        if len(shape) != 3:
            refused(lambda shape=shape: fc.max_pool2d(ones(*shape), 2))
    for bad in (1.5, 1.0, "1", None, (1, 1, 1), (1.5, 1), ((1, 1), (1, 1)), [], {}, object()):
        refused(lambda bad=bad: fc.conv2d(x, w, stride=bad))
        refused(lambda bad=bad: fc.conv2d(x, w, dilation=bad))
    bad_paddings = (0.5, "sane", None, (1, 1, 1), ((1, 1),), ((1, 1), 1), (1.5, 1), [], {},
                    ((1, 1), (1, 1, 1)), ((1.5, 1), (1, 1)))  # fmt: skip
    for bad in bad_paddings:
        refused(lambda bad=bad: fc.conv2d(x, w, padding=bad))
    for bad in (1.5, "1", None, (1, 1), [1]):
        refused(lambda bad=bad: fc.conv2d(x, w, groups=bad))
    for bad in ("RELU", "no_such", 1, fc.relu):
        refused(lambda bad=bad: fc.conv2d(x, w, activation=bad))
    refused(lambda: fc.conv2d(x, w, residual=ones(1, 4, 4, 5)))
    refused(lambda: fc.conv2d(x, w, residual=ones(4, 4, 4)))
    refused(lambda: fc.conv2d(x, w, residual=ones(1, 4, 4, 4, dtype=np.float64)))
    for arguments in [(x.astype(">f4"), w), (x, w.astype(">f4"))]:
        with contextlib.suppress(*REFUSED):
            np.testing.assert_array_equal(fc.conv2d(*arguments), y)
    with pytest.raises(TypeError):
        fc.conv2d()
    with pytest.raises(TypeError):
        fc.conv2d(x, w, strides=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2, "padding": 2},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": (3, 2), "padding": (1, 2)},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 2, "padding": 2, "ceil_mode": True},
    ],
    ids=str,
)
def test_10_pooling_window_without_data(arguments):
    for call in poolings(ones(1, 4, 6, 6), **arguments):
        refused(call, np.max(arguments["padding"]))


def test_11_empty_batch(isa):
    for w, groups in [(ones(6, 4, 3, 3), 1), (ones(4, 1, 3, 3), 4), (ones(7, 4, 1, 1), 1)]:
        x = ones(0, 4, 6, 7)
        y = fc.conv2d(x, w, ones(w.shape[0]), padding=1, groups=groups, activation="relu")
        assert y.shape == (0, w.shape[0], 9 - w.shape[2], 10 - w.shape[3])
        dx, dw, db = fc.conv2d_backward(y, x, w, padding=1, groups=groups)
        assert dx.shape == x.shape and dw.shape == w.shape and db.shape == w.shape[:1]
        assert not dw.any() and not db.any()
    x = ones(0, 4, 6, 7)
    y = fc.conv_transpose2d(x, ones(4, 5, 3, 3))
    dx, dw, db = fc.conv_transpose2d_backward(y, x, ones(4, 5, 3, 3))
    assert y.shape == (0, 5, 8, 9) and dx.shape == x.shape and not dw.any() and not db.any()
    y, index = fc.max_pool2d(x, 2, return_indices=True)
    assert y.shape == index.shape == (0, 4, 3, 3)
    assert fc.max_pool2d_backward(y, x, 2).shape == x.shape
    assert fc.max_pool2d_backward(y, x, 2, indices=index).shape == x.shape
    assert fc.avg_pool2d_backward(fc.avg_pool2d(x, 2), x, 2).shape == x.shape
    assert fc.adaptive_avg_pool2d(x, 3).shape == (0, 4, 3, 3)
    assert fc.global_avg_pool2d(x).shape == (0, 4, 1, 1)
    assert fc.batch_norm(x, ones(4), ones(4)).shape == x.shape
    for name in ("relu", "gelu", "softmax"):
        assert getattr(fc, name)(x).shape == x.shape
    assert fc.dropout(x, seed=1).shape == x.shape


def test_12_other_empty_dimensions():
    """An error or the right empty or bias-only answer."""
    bias = np.arange(4, dtype=np.float32)
    try:
        y = fc.conv2d(ones(2, 0, 6, 6), ones(4, 0, 3, 3), bias)
        np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], (2, 4, 4, 4)))
        dx, dw, db = fc.conv2d_backward(ones(2, 4, 4, 4), ones(2, 0, 6, 6), ones(4, 0, 3, 3))
        assert dx.shape == (2, 0, 6, 6) and dw.shape == (4, 0, 3, 3) and (db == 32).all()
    except REFUSED:
        pass
    try:
        assert fc.conv2d(ones(2, 3, 6, 6), ones(0, 3, 3, 3)).shape == (2, 0, 4, 4)
        dx, dw, db = fc.conv2d_backward(ones(2, 0, 4, 4), ones(2, 3, 6, 6), ones(0, 3, 3, 3))
        assert not dx.any() and dw.shape == (0, 3, 3, 3) and db.shape == (0,)
    except REFUSED:
        pass
    for shape in [(2, 4, 0, 6), (2, 4, 6, 0), (2, 4, 0, 0)]:
        x = ones(*shape)
        for call in [
            lambda x=x: fc.conv2d(x, ones(4, 4, 3, 3)),
            lambda x=x: fc.conv2d(x, ones(4, 4, 3, 3), padding=2),
            lambda x=x: fc.conv2d(x, ones(4, 4, 1, 1), padding=0),
            lambda x=x: fc.conv_transpose2d(x, ones(4, 4, 3, 3)),
            lambda x=x: fc.max_pool2d(x, 2),
            lambda x=x: fc.avg_pool2d(x, 2, padding=1),
            lambda x=x: fc.adaptive_avg_pool2d(x, 2),
            lambda x=x: fc.global_avg_pool2d(x),
            lambda x=x: fc.batch_norm(x, ones(4), ones(4)),
            lambda x=x: fc.batch_norm(x, ones(4), ones(4), training=True),
        ]:
            try:
                result = call()
                assert result.shape[:2] == (2, 4)
            except REFUSED:
                pass


# -------------------------------------------------------------------------------------------------
# 13-19: memory.


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "reversed" not in name])
def test_13_strided_input_and_weight(layout, isa):
    for case in test_conv2d.LAYOUT_CASES:
        _same_as_dense(case, layout)


@pytest.mark.parametrize("layout", ["reversed", "reversed_channels_last"])
def test_14_negative_strides(layout, isa):
    for case in test_conv2d.LAYOUT_CASES:
        _same_as_dense(case, layout)


def _same_as_dense(case: ConvCase, layout: str) -> None:
    data = conv_data(case)
    x, w, dy = (as_layout(a, layout) for a in (data.x, data.w, data.dy))
    got = [fc.conv2d(x, w, **case.arguments), *fc.conv2d_backward(dy, x, w, **case.arguments)]
    for name, result in zip(["y", "dx", "dw", "db"], got, strict=True):
        assert_conv_close(result, data.ref[name], data.abs_ref[name], case.products[name], name)


def test_15_stride_zero_arrays(isa):
    for case in test_conv2d.LAYOUT_CASES:
        test_conv2d.test_stride_zero_arrays(case, isa)
    x = np.broadcast_to(np.float32(3), (2, 19, 5, 6))
    assert (fc.max_pool2d(x, 2) == 3).all()
    y = fc.batch_norm(x, np.broadcast_to(np.float32(1), 19), np.broadcast_to(np.float32(4), 19))
    np.testing.assert_allclose(y, 1, rtol=1e-5)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 12, 16, 20, 32, 36, 60])
def test_16_unaligned_pointers(offset, isa):
    def moved(a: np.ndarray) -> np.ndarray:
        raw = np.zeros(a.nbytes + 192, np.uint8)
        start = -raw.ctypes.data % 64 + offset
        view = raw[start : start + a.nbytes].view(a.dtype)
        order = np.argsort([-s for s in a.strides], kind="stable")
        view = view.reshape(a.transpose(order).shape).transpose(np.argsort(order))
        view[...] = a
        return view

    for case in test_conv2d.LAYOUT_CASES:
        data = conv_data(case)
        x, w, dy = moved(channels_last(data.x)), moved(data.w), moved(channels_last(data.dy))
        assert x.ctypes.data % 64 == offset
        bias = moved(data.bias)
        y = fc.conv2d(channels_last(data.x), data.w, data.bias, **case.arguments)
        assert_same_bits(fc.conv2d(x, w, bias, **case.arguments), y)
        got = fc.conv2d_backward(dy, x, w, **case.arguments)
        expected = fc.conv2d_backward(channels_last(data.dy), channels_last(data.x), data.w,
                                      **case.arguments)  # fmt: skip
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
        assert_same_bits(fc.max_pool2d(x, 2), fc.max_pool2d(data.x, 2))
        assert_same_bits(fc.gelu(moved(data.bias)), fc.gelu(data.bias))


def _guard_cases() -> list[ConvCase]:
    counts = [*range(1, 20), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70]
    cases = []
    for c in counts:
        cases += [
            ConvCase("3x3", 1, c, 4, 5, 6, 3, 3, padding=1),
            ConvCase("3x3_k", 1, 6, 4, 5, c, 3, 3, padding=1),
            ConvCase("3x3_valid", 1, c, 4, 5, c, 3, 3),
            ConvCase("3x3_s2", 1, c, 5, 6, 9, 3, 3, stride=2, padding=1),
            ConvCase("1x1", 1, c, 3, 3, c, 1, 1),
            ConvCase("1x1_s2", 1, c, 4, 5, 7, 1, 1, stride=2),
            ConvCase("depthwise", 1, c, 4, 5, c, 3, 3, padding=1, groups=c),
            ConvCase("depthwise_s2", 1, c, 5, 6, c, 3, 3, stride=2, groups=c),
            ConvCase("groups", 1, 2 * c, 3, 4, 2 * c, 3, 3, padding=1, groups=2),
            ConvCase("rgb", 1, 3, 4, 2 + c, 5, 3, 3, padding=1),
            ConvCase("rgb_k", 1, 3, 4, 5, c, 3, 3),
        ]
    return cases


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("algorithm", ["", *ALGORITHMS])
def test_17_no_access_outside_the_arrays_convolution(algorithm, side, isa):
    """An inaccessible page touches each array. Running over one is a segmentation fault."""
    accepted = 0
    for case in _guard_cases():
        data = conv_data(case)
        x, dy = guarded(channels_last(data.x), side), guarded(channels_last(data.dy), side)
        w, bias = guarded(data.w, side), guarded(data.bias, side)
        residual = guarded(channels_last(data.dy), side)
        for call in [
            lambda: fc.conv2d(x, w, bias, **case.arguments, residual=residual),  # noqa: B023
            *[
                lambda needs=needs: fc.conv2d_backward(dy, x, w, **case.arguments, needs=needs)  # noqa: B023
                for needs in test_conv2d.DIRECTIONS.values()
            ],
        ]:
            with forced(algorithm):
                try:
                    call()
                    accepted += 1
                except ValueError as error:
                    assert algorithm and "algorithm" in str(error)
    assert accepted > 20


@pytest.mark.parametrize("side", ["start", "end"])
def test_17_no_access_outside_the_arrays_other(side, isa):
    for c in [*range(1, 34), 47, 48, 49, 63, 64, 65, 70]:
        for order in (np.ascontiguousarray, channels_last):
            x = guarded(order(normal(c, shape=(1, c, 5, 4))), side)
            half = guarded(order(normal(c, shape=(1, c, 2, 2))), side)
            vectors = [guarded(ones(c), side) for _ in range(4)]
            index = guarded(order(fc.max_pool2d(x, 2, return_indices=True)[1]), side)
            fc.max_pool2d_backward(half, x, 2)
            fc.max_pool2d_backward(half, x, 2, indices=index)
            places = guarded(order(fc.max_pool2d(x, 2, return_places=True)[1]), side)
            fc.max_pool2d_backward(half, x, 2, places=places)
            fc.avg_pool2d(x, 3, 1, 1)
            fc.avg_pool2d_backward(half, x, 2)
            fc.adaptive_avg_pool2d(x, 3)
            fc.global_avg_pool2d(x)
            fused = {"residual": x, "activation": "relu"}
            fc.batch_norm(x, *vectors, True, **fused)
            fc.batch_norm(x, *vectors, False, **fused)
            fc.batch_norm_backward(x, x, *vectors[:3], bias=vectors[3], **fused)
            fc.batch_norm_max_pool_train(x, *vectors, 0.1, 1e-5, 2, activation="silu")
            fc.batch_norm_backward(x, x, *vectors[:3], bias=vectors[3], activation="silu")
            fc.local_response_norm(x, 5)
            fc.local_response_norm_backward(x, x, 4, beta=0.5)
            fc.batch_norm_moments(x)
            sums, dz = fc.batch_norm_backward_sums(x, x, *vectors[:3], residual=x)
            fc.batch_norm_backward_input(dz, x, *vectors[:3], guarded(sums, side), 1 << 20)
            fc.add(x, x)
            fc.add_to(guarded(x.copy(order="K"), side), x)
            fc.silu_backward(x, fc.silu(x))
            fc.dropout(x, seed=1)
            fc.stochastic_depth(x, 0.0, "row", seed=1)
            gate = guarded(ones(1, c, 1, 1), side)
            fc.channel_gate(x, gate)
            fc.channel_gate(x, gate, guarded(ones(1, c, 1, 1), side))
            fc.channel_gate_backward(x, x, gate)
            fc.cat_backward(fc.cat([x, x]), (c, c))
            fc.softmax(x, 1)
        flat, w = guarded(normal(c, shape=(3, c)), side), guarded(normal("w", shape=(7, c)), side)
        fc.linear(flat, w, guarded(ones(7), side))
        fc.linear_backward(guarded(ones(3, 7), side), flat, w)
        target = guarded(np.array([0, c - 1, c // 2]), side)
        fc.cross_entropy(flat, target, vectors[0])
        fc.cross_entropy_backward(np.float32(1), flat, target)
        params, grads = [guarded(ones(c), side)], [guarded(ones(c), side)]
        fc.ops.optimizer.sgd_step(
            params, grads, [guarded(ones(c), side)], lr=0.1, momentum=0.9, dampening=0.0,
            weight_decay=0.1, nesterov=True, first=False,
        )  # fmt: skip
        fc.ops.optimizer.gradient_norm(grads)
        fc.ops.optimizer.move_towards(params, grads, 0.1)


def test_18_nan_beside_the_arrays_does_not_leak(isa):
    """Channel slices of a larger array of NaN, and memory that held NaN before."""
    for c in [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65]:
        for case in [
            ConvCase("3x3", 1, c, 5, 6, 9, 3, 3, padding=1),
            ConvCase("3x3_k", 1, 9, 5, 6, c, 3, 3, padding=1),
            ConvCase("1x1", 1, c, 5, 6, 9, 1, 1),
            ConvCase("depthwise", 1, c, 5, 6, c, 3, 3, padding=1, groups=c),
        ]:
            data = conv_data(case)
            nan_x, nan_dy = np.full_like(data.x, np.nan), np.full_like(data.dy, np.nan)
            for layout in ("channel_slice", "sliced", "channels_last"):
                x, w, dy = (as_layout(a, layout) for a in (data.x, data.w, data.dy))
                fc.conv2d(nan_x, data.w * np.float32(np.nan), **case.arguments)
                fc.conv2d_backward(nan_dy, nan_x, data.w, **case.arguments)
                for algorithm, y in each_algorithm(
                    lambda x=x, w=w, case=case: fc.conv2d(x, w, **case.arguments)
                ):
                    assert np.isfinite(y).all(), (case, layout, algorithm)
                for needs in test_conv2d.DIRECTIONS.values():
                    fc.conv2d_backward(nan_dy, nan_x, data.w, **case.arguments, needs=needs)
                    for algorithm, results in each_algorithm(
                        lambda x=x, w=w, dy=dy, case=case, needs=needs: fc.conv2d_backward(
                            dy, x, w, **case.arguments, needs=needs
                        )
                    ):
                        (result,) = [r for r in results if r is not None]
                        assert np.isfinite(result).all(), (case, layout, algorithm)


def test_18_nan_in_recycled_memory_does_not_leak_other(isa):
    for c in [1, 3, 7, 9, 17, 33]:
        x = normal(c, shape=(3, c, 6, 7))
        nan = np.full_like(x, np.nan)
        parameters = ones(c), normal("w", c, shape=(5, x[0].size)), ones(c, 4, 3, 3)

        def everything(x, parameters=parameters):
            one, w, transposed = parameters
            y, mean, rstd = fc.batch_norm_train(x, one, one, None, None, 0.1, 1e-5)
            flat = x.reshape(3, -1)
            top = fc.linear(flat, w)
            return [
                y, *fc.batch_norm_backward(x, x, one, mean, rstd)[:3],
                fc.max_pool2d(x, 3, 2, 1), fc.max_pool2d_backward(x, x, 3, 1, 1),
                fc.avg_pool2d(x, 3, 2, 1), fc.avg_pool2d_backward(x, x, 3, 1, 1),
                fc.adaptive_avg_pool2d(x, 4), fc.global_avg_pool2d(x),
                fc.conv_transpose2d(x, transposed, stride=2), fc.gelu(x), fc.softmax(x, 1),
                top, *fc.linear_backward(top, flat, w), fc.dropout(x, seed=1),
                fc.stochastic_depth(x, 0.5, "row", seed=1), fc.cat([x, x]),
                *fc.channel_gate_backward(x, x, fc.global_avg_pool2d(x)),
                np.asarray(fc.cross_entropy(top, np.arange(3))),
            ]  # fmt: skip

        for _ in range(2):
            everything(nan)
            for position, result in enumerate(everything(x)):
                assert np.isfinite(result).all(), position


def test_19_inputs_are_untouched_and_outputs_fresh(isa):
    for case in test_conv2d.LAYOUT_CASES:
        data = conv_data(case)
        for order in (np.ascontiguousarray, channels_last):
            arrays = [order(data.x), data.w.copy(), data.bias.copy(), order(data.dy)]
            before = [a.copy() for a in arrays]
            for a in arrays:
                a.flags.writeable = False
            x, w, bias, dy = arrays
            y = fc.conv2d(x, w, bias, **case.arguments, activation="relu", residual=dy)
            kept = y.copy()
            gradients = fc.conv2d_backward(dy, x, w, **case.arguments)
            other = fc.conv2d(x, w, bias, **case.arguments)
            outputs = [y, other, *gradients]
            for i, a in enumerate(outputs):
                assert not any(np.shares_memory(a, b) for b in arrays + outputs[:i])
            for a, b in zip(arrays, before, strict=True):
                assert_same_bits(a, b)
            assert_same_bits(y, kept)
    x = normal("x", shape=(2, 5, 6, 7))
    x.flags.writeable = False
    for y in (fc.relu(x), fc.max_pool2d(x, 1), fc.avg_pool2d(x, 1), fc.dropout(x, 0.0, seed=1),
              fc.dropout(x, 0.5, False, seed=1), fc.adaptive_avg_pool2d(x, (6, 7)),
              fc.stochastic_depth(x, 0.0, "row", seed=1), fc.cat([x]),
              *fc.cat_backward(x, (5,))):  # fmt: skip
        assert not np.shares_memory(x, y)


# -------------------------------------------------------------------------------------------------
# 20-28: convolution shapes. The shapes are in cases.py and run with all other tests as well.


def named(*prefixes: str) -> list[ConvCase]:
    found = [case for case in CONV_CASES if case.name.startswith(prefixes)]
    assert found
    return found


def check_all(cases: list[ConvCase], names: str) -> None:
    for case in cases:
        test_conv2d.check(case, names)
        data = reference.integer_conv_data(case)
        fc.set_precision("strict")
        for name in names.split():
            got = (
                fc.conv2d(data.x, data.w, **case.arguments)
                if name == "y"
                else test_conv2d.backward(case, name, data.dy, data.x, data.w)
            )
            np.testing.assert_array_equal(got, data.ref[name], f"{case} {name}")
        fc.set_precision("default")


def test_20_last_columns_of_the_strided_input_gradient(isa):
    check_all(CONV_LEFTOVERS + named("pytorch_25101"), "dx")


def test_21_depthwise_weight_gradient_of_24_channels(isa):
    check_all(named("pytorch_50042", "depthwise_24"), "dw")


def test_22_groups_of_few_channels(isa):
    check_all(named("pytorch_19912", "groups_k16", "groups_few_channels"), "y dx dw")


def test_23_grouped_strided_input_gradient(isa):
    check_all(named("mlx_3800", "groups_3_s2", "dilation_2_s2_g2", "groups_1x1_s2"), "dx")


def test_24_grouped_weight_gradient(isa):
    check_all(named("pytorch_51430", "pytorch_68868", "groups_", "multiplier_"), "dw db")


def test_25_strided_1x1_weight_gradient_of_few_channels(isa):
    check_all(named("onednn_6035"), "dw")
    for c in range(1, 20):
        check_all([ConvCase(f"c{c}", 2, c, 7, 8, 16, 1, 1, stride=2)], "dw")


def test_26_channel_tails_to_129(isa):
    for c in [*range(66, 130, 3), 127, 128, 129]:
        check_all([ConvCase(f"c{c}", 1, c, 3, 4, 5, 3, 3, padding=1),
                   ConvCase(f"k{c}", 1, 5, 3, 4, c, 3, 3, padding=1),
                   ConvCase(f"dw{c}", 1, c, 3, 4, c, 3, 3, padding=1, groups=c),
                   ConvCase(f"1x1_{c}", 1, c, 3, 4, c, 1, 1)], "y dx dw")  # fmt: skip


def test_27_padding_beyond_kernel_or_image(isa):
    check_all([case for case in CONV_PADDING if "beyond" in case.name or "window" in case.name
               or "padding" in case.name], "y dx dw db")  # fmt: skip


def test_28_kernel_is_image_huge_stride_and_dilation(isa):
    check_all(CONV_EXTREMES[:19] + named("onednn_", "pytorch_120211"), "y dx dw")


# -------------------------------------------------------------------------------------------------
# 29-33: pooling.


def test_29_divisor_of_average_pooling(isa):
    for case in test_pool2d.AVERAGE_CASES:
        for options in test_pool2d.OPTIONS:
            test_pool2d.check_average(case, options)
            y = fc.avg_pool2d(normal(case, shape=case.x_shape), **case.arguments, **options)
            assert np.isfinite(y).all()


def test_30_output_size_in_ceil_mode():
    """The last window must start inside the image or the padding before it."""
    for size in range(1, 13):
        for kernel in range(1, 6):
            for stride in range(1, 6):
                for pad in range(kernel // 2 + 1):
                    x = np.arange(size, dtype=np.float32).reshape(1, 1, 1, size)
                    arguments = (1, kernel), (1, stride), (0, pad)
                    try:
                        ref = F.max_pool2d(torch.tensor(x), *arguments, ceil_mode=True).numpy()
                    except RuntimeError:
                        refused(lambda x=x, a=arguments: fc.max_pool2d(x, *a, ceil_mode=True))
                        continue
                    got = fc.max_pool2d(x, *arguments, ceil_mode=True)
                    assert got.shape == ref.shape, (size, arguments)
                    np.testing.assert_array_equal(got, ref)
                    got = fc.avg_pool2d(x, *arguments, ceil_mode=True)
                    ref = F.avg_pool2d(torch.tensor(x), *arguments, ceil_mode=True).numpy()
                    np.testing.assert_allclose(got, ref, rtol=1e-6, err_msg=str((size, arguments)))


def test_31_nan_infinity_and_ties(isa, strict):
    for position in [(0, 0), (2, 3), (5, 6)]:
        test_pool2d.test_max_propagates_nan(position, isa)
    test_pool2d.test_max_ties_go_to_the_first(isa)
    test_conv2d.test_nan_and_infinity_reach_exactly_their_windows(isa, strict)
    assert (
        fc.max_pool2d(np.full((1, 9, 4, 4), -np.inf, np.float32), 2, padding=1) == -np.inf
    ).all()
    x = np.full((1, 17, 4, 4), np.nan, np.float32)
    assert np.isnan(fc.avg_pool2d(x, 2)).all() and np.isnan(fc.global_avg_pool2d(x)).all()


def test_32_padding_of_max_pooling_is_minus_infinity(isa):
    x = np.full((1, 17, 5, 6), -5, np.float32)
    y = fc.max_pool2d(x, 3, 2, 1)
    assert (y == -5).all()
    dx = fc.max_pool2d_backward(np.ones_like(y), x, 3, 2, 1)
    assert dx.sum() == y.size


def _sparse(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that take memory only where they are written."""
    size = int(np.prod(shape)) * 4
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    return np.frombuffer(region, np.float32).reshape(shape)


def test_33_more_than_2_31_elements():
    """Offsets in elements and in bytes beyond 32 bits, on memory that is mostly never touched."""
    x = _sparse((1, 1, 65600, 32768))
    assert x.size > 2**31
    x[0, 0, -1, -1], x[0, 0, -64, -64], x[0, 0, 0, 0] = 5, 7, 3
    w = ones(1, 1, 1, 1)
    y = fc.conv2d(x, w, stride=(65599, 32767))
    np.testing.assert_array_equal(y[0, 0], [[3, 0], [0, 5]])
    dy = np.array([[[[1, 10], [100, 1000]]]], np.float32)
    _, dw, _ = fc.conv2d_backward(dy, x, w, stride=(65599, 32767), needs=(False, True, False))
    assert dw.item() == 5003
    y, index = fc.max_pool2d(x, 1, (65599, 32767), return_indices=True)
    np.testing.assert_array_equal(y[0, 0], [[3, 0], [0, 5]])
    assert index[0, 0, 1, 1] == x.size - 1
    y = fc.avg_pool2d(x, 1, (65536, 32704))
    np.testing.assert_array_equal(y[0, 0], [[3, 0], [0, 7]])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_33_byte_offsets_above_2_31(layout):
    shape = (1, 8, 8300, 8192) if layout == "nchw" else (1, 8300, 8192, 8)
    x = _sparse(shape)
    if layout == "channels_last":
        x = x.transpose(0, 3, 1, 2)
    assert x.nbytes > 2**31
    x[0, :, -1, -1] = np.arange(8)
    w = ones(3, 8, 1, 1)
    if layout == "channels_last":  # dense NCHW would be copied whole
        y = fc.conv2d(x, w, stride=(8299, 8191))
        np.testing.assert_array_equal(y[0, :, 1, 1], [28, 28, 28])
        depthwise = fc.conv2d(x, ones(8, 1, 1, 1), stride=(8299, 8191), groups=8)
        np.testing.assert_array_equal(depthwise[0, :, 1, 1], np.arange(8))
    window = x[:, :, -4:, -4:]
    np.testing.assert_array_equal(fc.conv2d(window, w)[0, 0, 3, 3], 28)
    assert fc.max_pool2d(window, 4)[0, :, 0, 0].tolist() == list(range(8))


# -------------------------------------------------------------------------------------------------
# 34-36: batch normalisation.


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, -1e5])
def test_34_variance_of_data_with_a_large_mean(offset, isa):
    test_batch_norm.test_large_mean((4, 19, 8, 8), offset, isa)
    _, _, rstd = fc.batch_norm_train(
        np.full((4, 19, 8, 8), offset + 0.1, np.float32), None, None, None, None, 0.1, 0.0
    )
    assert not (rstd < 0).any()
    running = np.zeros(19, np.float32), np.zeros(19, np.float32)
    fc.batch_norm(np.full((4, 19, 8, 8), offset + 0.1, "f"), *running, training=True, momentum=1.0)
    assert (running[1] >= 0).all()


def test_35_one_value_per_channel_in_training():
    x = normal("x", shape=(1, 19, 1, 1))
    mean, var = np.zeros(19, np.float32), np.ones(19, np.float32)
    refused(lambda: fc.batch_norm(x, mean, var, training=True))
    refused(lambda: fc.batch_norm(x[:, :, 0, 0], mean, var, training=True))
    assert not mean.any() and (var == 1).all()
    assert np.isfinite(fc.batch_norm(x, mean, var)).all()
    two = normal("x", shape=(2, 19, 1, 1))
    fc.batch_norm(two, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(var, two[:, :, 0, 0].astype("d").var(0, ddof=1), rtol=1e-5)


def test_36_momentum_epsilon_affine_and_statistics(isa):
    for momentum in (0.0, 1.0, 0.3):
        test_batch_norm.test_running_statistics((4, 19, 5, 6), momentum, isa)
    for weight in (False, True):
        for bias in (False, True):
            test_batch_norm.test_without_affine(weight, bias)
    case = test_batch_norm.Case((4, 19, 5, 6))
    mean, var = case.running_mean.copy(), case.running_var.copy()
    y = fc.batch_norm(case.x, mean, var, eps=0.0)
    ref = (case.x - case.channel(mean)) / np.sqrt(case.channel(var))
    np.testing.assert_allclose(y, ref, rtol=1e-5, atol=1e-5)
    assert_same_bits(mean, case.running_mean)
    assert_same_bits(var, case.running_var)
    refused(lambda: fc.batch_norm(case.x, mean, var, eps=-1.0), -1)
    for bad in ("x", None):
        refused(lambda bad=bad: fc.batch_norm(case.x, mean, var, eps=bad))


# -------------------------------------------------------------------------------------------------
# 37-40: the process. test_process.py has more of each.


def test_37_fork_after_openmp_has_started():
    expected = test_process.run("print(digest())")
    test_process.test_use_after_fork(expected)


def test_38_threads_and_their_environment(isa):
    case = test_conv2d.LAYOUT_CASES[0]
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, **case.arguments)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert_same_bits(fc.conv2d(data.x, data.w, **case.arguments), y)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_38_omp_dynamic_does_not_hang():
    script = "print(digest())"
    dynamic = test_process.run(script, OMP_DYNAMIC="true", OMP_NUM_THREADS="4")
    assert dynamic == test_process.run(script)


def test_39_errors_inside_a_call_reach_python():
    """Out of memory in a workspace or an output, not std::terminate."""
    fc.set_num_threads(2)
    limit = fc.memory_stats().get("limit", 0)
    try:
        fc.set_memory_limit(fc.memory_stats()["bytes_in_use"] + (1 << 20))
        for call in [
            lambda: fc.conv2d(ones(1, 64, 80, 80), ones(64, 64, 3, 3), padding=1),
            lambda: fc.max_pool2d(ones(1, 64, 128, 128), 2, 1),
            lambda: fc.relu(ones(1 << 20)),
        ]:
            with pytest.raises(MemoryError):
                call()
    finally:
        fc.set_memory_limit(limit)
    assert fc.relu(ones(1 << 20)).all()


def test_40_no_side_effects_and_flat_memory():
    test_process.test_signal_handlers_and_environment_stay()
    test_process.test_errors_leak_nothing()
    test_process.test_subnormal_numbers_stay(test_process.run("print(digest())"))


def test_guard_pages_do_fault():
    """The guard itself works: reading one element further ends the process."""
    script = """
        import ctypes, numpy as np
        from tests.memory import guarded
        a = guarded(np.ones((3, 5), "f"), "{side}")
        ctypes.c_float.from_address(a.ctypes.data + {offset}).value
    """
    for side, offset in [("end", 60), ("start", -4)]:
        code = "\n".join(line.strip() for line in script.splitlines())
        good = code.format(side=side, offset=0)
        bad = code.format(side=side, offset=offset)
        root = str(__file__).rsplit("/tests/", 1)[0]
        assert subprocess.run([sys.executable, "-c", good], cwd=root).returncode == 0
        result = subprocess.run([sys.executable, "-c", bad], cwd=root, capture_output=True)
        assert result.returncode == -signal.SIGSEGV

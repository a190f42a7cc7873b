"""Local response normalisation against PyTorch in float64.

With n channels in a window the sum of squares, all of one sign, is right to n + 2 roundings, and
its power beta to beta times as many; the power itself, the division and the products add a few.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import as_tensor, assert_same_bits, assert_within, normal, unit

# (channels, size): windows of one channel, even and odd, as wide as the image, wider than it
SHAPES = [(1, 5), (3, 1), (7, 2), (19, 5), (33, 4), (64, 5), (6, 11), (5, 40), (130, 3)]
SETTINGS = [
    {},
    {"alpha": 5e-4, "beta": 0.75, "k": 2.0},  # the paper's
    {"alpha": 0.9, "beta": 0.75, "k": 0.5},
    {"alpha": 0.9, "beta": 0.4, "k": 1.5},
    {"alpha": 0.3, "beta": 1.0, "k": 2.0},
]


def oracle(x: np.ndarray, dy: np.ndarray, size: int, **settings: float) -> list[np.ndarray]:
    """y, dx, and the sum of the absolute values of the two terms of dx."""
    a = as_tensor(x, grad=True)
    y = F.local_response_norm(a, size, **settings)
    (dx,) = torch.autograd.grad(y, a, as_tensor(dy))
    with torch.no_grad():
        direct = as_tensor(abs(dy)) * abs(y / a)
    (with_positive,) = torch.autograd.grad(
        F.local_response_norm(a, size, **settings), a, as_tensor(abs(dy) * np.sign(x))
    )
    through_sums = (direct * torch.sign(a) - with_positive).abs()
    return [t.detach().numpy() for t in (y, dx, direct + through_sums)]


def check(channels: int, size: int, settings: dict[str, float], dtype: type = np.float32) -> None:
    shape = (2, channels, 3, 5)
    x = normal("lrn", channels, shape=shape, dtype=dtype) * dtype(3)
    dy = normal("lrn dy", channels, shape=shape, dtype=dtype)
    y_ref, dx_ref, dx_scale = oracle(x, dy, size, **settings)
    u, terms = unit(x.dtype), min(size, channels)
    beta = settings.get("beta", 0.75)
    for order in (np.ascontiguousarray, channels_last):
        y = fc.local_response_norm(order(x), size, **settings)
        assert y.dtype == dtype
        assert_within(y, y_ref, u * (beta * (terms + 2) + 4) * abs(y_ref), "y")
        dx = fc.local_response_norm_backward(order(dy), order(x), size, **settings)
        assert_within(dx, dx_ref, u * ((2 + beta) * (terms + 2) + 8) * dx_scale, "dx")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_both_directions(channels, size, settings, isa):
    check(channels, size, settings)


@pytest.mark.parametrize("settings", SETTINGS[2:4], ids=str)
def test_float64(settings, isa):
    check(19, 5, settings, np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, dy = normal("x", shape=(2, 19, 4, 5)), normal("dy", shape=(2, 19, 4, 5))
    given = as_layout(x, layout)
    y = fc.local_response_norm(given, 5)
    assert_same_bits(np.ascontiguousarray(y), fc.local_response_norm(x, 5))
    dx = fc.local_response_norm_backward(as_layout(dy, layout), given, 5)
    assert_same_bits(np.ascontiguousarray(dx), fc.local_response_norm_backward(dy, x, 5))


def test_layout_comes_back():
    x = normal("x", shape=(2, 19, 4, 5))
    for order, expected in ((channels_last, True), (np.ascontiguousarray, False)):
        given = order(x)
        assert is_channels_last(fc.local_response_norm(given, 3)) == expected
        assert is_channels_last(fc.local_response_norm_backward(given, given, 3)) == expected


def test_nan_stays_in_its_window(isa):
    x = normal("x", shape=(1, 20, 2, 2))
    x[0, 9, 1, 0] = np.nan
    y = fc.local_response_norm(x, 4)
    expected = F.local_response_norm(torch.tensor(x), 4).numpy()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.isnan(y).sum() == 4


def test_empty():
    for shape in ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)):
        x = np.ones(shape, np.float32)
        assert fc.local_response_norm(x, 5).shape == shape
        assert fc.local_response_norm_backward(x, x, 5).shape == shape


def test_refused():
    x = np.ones((2, 4, 3, 3), np.float32)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"size must be positive, got {size}"):
            fc.local_response_norm(x, size)
    with pytest.raises(TypeError, match="size must be an integer"):
        fc.local_response_norm(x, 2.0)
    with pytest.raises(ValueError, match=r"\(4, 3, 3\)"):
        fc.local_response_norm(x[0], 5)
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 4, 3, 3\)"):
        fc.local_response_norm_backward(x[:1], x, 5)
    with pytest.raises(TypeError, match="int64"):
        fc.local_response_norm(x.astype(np.int64), 5)
    with pytest.raises(TypeError, match="dy must be float32"):
        fc.local_response_norm_backward(x.astype(np.float64), x, 5)


def test_huge_size_is_every_channel():
    x = normal("x", shape=(1, 9, 2, 2))
    expected = F.local_response_norm(as_tensor(x), 2**20).numpy()
    assert_within(fc.local_response_norm(x, 2**20), expected, 1e-6)
    assert fc.local_response_norm(x, 2**62).shape == x.shape

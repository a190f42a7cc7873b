"""dropout and stochastic depth: a mask from a counter-based generator, so nothing is stored."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc
from fastconv import functional as F
from fastconv import nn
from fastconv.tensor import Tensor
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import assert_same_bits, normal


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keeps_the_right_share_and_scales_it(p, isa):
    n = 200_000
    y = fc.dropout(ones(n), p, seed=1)
    kept = y != 0
    np.testing.assert_array_equal(y[kept], np.float32(1 / (1 - p)))
    assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)


def test_elements_are_independent():
    mask = (fc.dropout(ones(1 << 18), 0.5, seed=3) != 0).astype(np.float64) - 0.5
    for lag in [1, 2, 3, 4, 5, 8, 16, 64, 1024]:
        correlation = (mask[lag:] * mask[:-lag]).mean() / 0.25
        assert abs(correlation) < 5 / np.sqrt(mask.size), lag
    other = (fc.dropout(ones(1 << 18), 0.5, seed=4) != 0) - 0.5
    assert abs((mask * other).mean() / 0.25) < 5 / np.sqrt(mask.size)


def test_same_seed_same_mask(isa):
    x = normal("x", shape=(4, 5, 6, 7))
    assert_same_bits(fc.dropout(x, seed=7), fc.dropout(x, seed=7))
    assert (fc.dropout(x, seed=7) != fc.dropout(x, seed=8)).any()
    assert (fc.dropout(x, seed=7) != fc.dropout(x, seed=7, offset=x.size)).any()


def test_every_instruction_set_draws_the_same_mask():
    previous, masks = fc.isa(), []
    for isa in fc.available_isas():
        fc._C.set_isa(isa)
        masks.append(fc.dropout(ones(1001), 0.3, seed=5, offset=3))
    fc._C.set_isa(previous)
    for mask in masks:
        assert_same_bits(mask, masks[0])


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 17, 1000])
def test_offset_continues_the_sequence(offset, isa):
    whole = fc.dropout(ones(offset + 70), 0.4, seed=11)
    assert_same_bits(fc.dropout(ones(70), 0.4, seed=11, offset=offset), whole[offset:])


def test_large_seeds_and_offsets():
    masks = [fc.dropout(ones(256), seed=seed, offset=offset) for seed, offset in
             [(0, 0), (2**32, 0), (2**63 - 1, 0), (0, 2**32), (0, 2**40)]]  # fmt: skip
    for i, a in enumerate(masks):
        assert all((a != b).any() for b in masks[:i])


def test_every_length(isa):
    whole = fc.dropout(ones(70), 0.5, seed=2)
    for n in range(71):
        assert_same_bits(fc.dropout(ones(n), 0.5, seed=2), whole[:n])


def test_backward_uses_the_same_mask(isa):
    x, dy = normal("x", shape=(4, 5, 6, 7)), normal("dy", shape=(4, 5, 6, 7))
    for p in (0.0, 0.25, 0.5):
        mask = fc.dropout(np.ones_like(x), p, seed=9, offset=21)
        np.testing.assert_array_equal(fc.dropout(x, p, seed=9, offset=21), x * mask)
        np.testing.assert_array_equal(fc.dropout_backward(dy, p, seed=9, offset=21), dy * mask)


def test_evaluation_and_extreme_probabilities():
    x = normal("x", shape=(3, 4))
    np.testing.assert_array_equal(fc.dropout(x, 0.5, False, seed=1), x)
    np.testing.assert_array_equal(fc.dropout(x, 0.0, seed=1), x)
    y = fc.dropout(x, 1.0, seed=1)
    assert not y.any() and np.isfinite(y).all()
    assert not fc.dropout_backward(x, 1.0, seed=1).any()


def test_float64():
    x = normal("x", shape=(5, 7), dtype=np.float64)
    y = fc.dropout(x, 0.5, seed=1)
    assert y.dtype == np.float64
    kept = fc.dropout(ones(5, 7), 0.5, seed=1) != 0
    np.testing.assert_array_equal(y, np.where(kept, x * 2, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Whatever the strides, forward and backward agree on the mask."""
    x = as_layout(normal("x", shape=(2, 19, 5, 6)), layout)
    y = fc.dropout(x, 0.5, seed=1)
    dx = fc.dropout_backward(x, 0.5, seed=1)
    assert_same_bits(y, dx)
    kept = y != 0
    np.testing.assert_array_equal(y[kept], 2 * x[kept])
    if layout == "channels_last":
        assert is_channels_last(y)
    assert is_channels_last(fc.dropout(channels_last(x), 0.5, seed=1))


def test_bad_arguments():
    x = ones(4)
    for p in (-0.1, 1.1, float("nan"), "half", None):
        with pytest.raises((ValueError, TypeError)):
            fc.dropout(x, p, seed=1)
    for seed in (1.5, "seed", None):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            fc.dropout(x, 0.5, seed=seed)
    with pytest.raises(TypeError):
        fc.dropout(x, 0.5)


SHAPES = [(3,), (5, 7), (6, 19, 5, 6), (2, 3, 40, 50)]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_depth_drops_whole_rows(shape, mode, isa):
    x = normal("x", shape=shape)
    draws = shape[0] if mode == "row" else 1
    for seed in range(5):
        factors = fc.dropout(ones(draws), 0.3, seed=seed, offset=5).reshape(-1, *[1] * (x.ndim - 1))
        y = fc.stochastic_depth(x, 0.3, mode, seed=seed, offset=5)
        np.testing.assert_array_equal(y, x * factors)
        assert_same_bits(fc.stochastic_depth_backward(x, 0.3, mode, seed=seed, offset=5), y)


def test_stochastic_depth_keeps_the_right_share():
    n, p = 20_000, 0.2
    y = fc.stochastic_depth(ones(n, 3), p, "row", seed=1)
    assert (y == y[:, :1]).all()
    np.testing.assert_array_equal(np.unique(y), np.float32([0, 1 / (1 - p)]))
    assert abs((y[:, 0] != 0).mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)
    dropped = [not fc.stochastic_depth(ones(2), p, "batch", seed=i).any() for i in range(2000)]
    assert abs(np.mean(dropped) - p) < 5 * np.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stochastic_depth_of_any_layout(layout):
    x = normal("x", shape=(6, 19, 5, 6))
    expected = fc.stochastic_depth(x, 0.5, "row", seed=2)
    assert 0 < expected.any((1, 2, 3)).sum() < 6
    assert_same_bits(fc.stochastic_depth(as_layout(x, layout), 0.5, "row", seed=2), expected)
    assert is_channels_last(fc.stochastic_depth(channels_last(x), 0.5, "row", seed=2))


def test_stochastic_depth_in_evaluation_and_extreme_probabilities():
    x = normal("x", shape=(3, 4)).astype(np.float64)
    for y in (
        fc.stochastic_depth(x, 0.5, "row", False, seed=1),
        fc.stochastic_depth(x, 0.0, "row", seed=1),
        F.stochastic_depth(x, 0.5, "row", training=False).data,
        nn.StochasticDepth(0.5, "row").eval()(x).data,
    ):
        np.testing.assert_array_equal(y, x)
    assert not fc.stochastic_depth(x, 1.0, "row", seed=1).any()
    assert fc.stochastic_depth(np.zeros((0, 3), "f"), 0.5, "row", seed=1).shape == (0, 3)


@pytest.mark.parametrize(("mode", "draws"), [("row", 8), ("batch", 1)])
def test_stochastic_depth_follows_the_seed_on_the_tape(mode, draws):
    layer = nn.StochasticDepth(0.5, mode)
    x = Tensor(normal("x", shape=(8, 3, 2, 2)), requires_grad=True)
    nn.manual_seed(3)
    y = layer(x)
    assert nn.get_rng_state() == (3, draws)
    assert_same_bits(y.data, fc.stochastic_depth(x.data, 0.5, mode, seed=3))
    y.backward(np.ones(y.shape, np.float32))
    np.testing.assert_array_equal(x.data * x.grad, y.data)
    assert (layer(x).data != y.data).any() or mode == "batch"
    nn.set_rng_state((3, 0))
    assert_same_bits(layer(x).data, y.data)


def test_stochastic_depth_bad_arguments():
    x = ones(4, 2)
    for p in (-0.1, 1.1, float("nan")):
        for call in (
            lambda p=p: fc.stochastic_depth(x, p, "row", seed=1),
            lambda p=p: F.stochastic_depth(x, p, "row", training=False),
            lambda p=p: nn.StochasticDepth(p, "row"),
        ):
            with pytest.raises(ValueError, match=f"got {p}"):
                call()
    for call in (
        lambda: fc.stochastic_depth(x, 0.5, "column", seed=1),
        lambda: F.stochastic_depth(x, 0.5, "column", training=False),
        lambda: nn.StochasticDepth(0.5, "column"),
    ):
        with pytest.raises(ValueError, match="'column'"):
            call()
    with pytest.raises(ValueError, match="at least one dimension"):
        fc.stochastic_depth(np.float32(1)[...], 0.5, "row", seed=1)

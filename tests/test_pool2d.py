"""Max, average, adaptive and global pooling against PyTorch in float64. Max pooling is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests import reference
from tests.cases import POOL_CASES, PoolCase, pool_channel_tails
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import as_tensor, assert_same_bits, assert_within, normal

AVERAGE_CASES = [case for case in POOL_CASES if case.dilation == 1]
OPTIONS = [{}, {"count_include_pad": False}, {"divisor_override": 5}]


def inputs(case: PoolCase) -> np.ndarray:
    """Small integers: many ties, exact sums."""
    return reference.generator(case).integers(-4, 5, case.x_shape).astype(np.float32)


def max_oracle(case: PoolCase, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, index = F.max_pool2d(as_tensor(x), **case.max_arguments, return_indices=True)
    return y.numpy(), index.numpy()


def backward_oracle(function, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    a = as_tensor(x, grad=True)
    return torch.autograd.grad(function(a), a, as_tensor(dy))[0].numpy()


def sum_limit(scale: np.ndarray, terms: int) -> np.ndarray:
    return 2 * reference.U * (np.sqrt(terms) + 2) * scale


# -------------------------------------------------------------------------------------------------
# Max.


def check_max(case: PoolCase) -> None:
    for x in (inputs(case), normal(case, shape=case.x_shape)):
        ref, index = max_oracle(case, x)
        dy = reference.generator(case, "dy").integers(-8, 9, ref.shape).astype(np.float32)
        dx_ref = backward_oracle(lambda a: F.max_pool2d(a, **case.max_arguments), x, dy)
        for order in (np.ascontiguousarray, channels_last):
            given = order(x)
            y = fc.max_pool2d(given, **case.max_arguments)
            np.testing.assert_array_equal(y, ref)
            y, got = fc.max_pool2d(given, **case.max_arguments, return_indices=True)
            np.testing.assert_array_equal(y, ref)
            assert got.dtype == np.int64
            np.testing.assert_array_equal(got, index)
            dx = fc.max_pool2d_backward(order(dy), given, **case.max_arguments)
            np.testing.assert_array_equal(dx, dx_ref)
            dx = fc.max_pool2d_backward(order(dy), given, **case.max_arguments, indices=got)
            np.testing.assert_array_equal(dx, dx_ref)
            y, places = fc.max_pool2d(given, **case.max_arguments, return_places=True)
            np.testing.assert_array_equal(y, ref)
            assert places.dtype == np.uint8 and is_channels_last(places) == is_channels_last(got)
            form = np.full_like(given, np.nan)  # of which only shape and layout count
            dx = fc.max_pool2d_backward(order(dy), form, **case.max_arguments, places=places)
            np.testing.assert_array_equal(dx, dx_ref)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max(case, isa):
    check_max(case)


def test_max_channel_tails(isa):
    for case in pool_channel_tails():
        check_max(case)


def test_max_sums_overlapping_gradients(isa):
    case = PoolCase("", 1, 9, 8, 9, 5, 1, 2)
    x, dy = normal(case, shape=case.x_shape), normal(case, "dy", shape=case.x_shape)
    dx = fc.max_pool2d_backward(dy, x, **case.max_arguments)
    ref = backward_oracle(lambda a: F.max_pool2d(a, **case.max_arguments), x, dy)
    scale = backward_oracle(lambda a: F.max_pool2d(a, **case.max_arguments), x, abs(dy))
    assert_within(dx, ref, sum_limit(scale, 25))


def test_max_places(isa):
    x = np.zeros((1, 19, 18, 17), np.float32)
    x[..., 15, 15] = x[..., 17, 16] = 1
    _, places = fc.max_pool2d(x, 16, 1, return_places=True)
    np.testing.assert_array_equal(places[0, 5], [[255, 254], [239, 238], [223, 222]])
    double = fc.max_pool2d(x.astype(np.float64), 16, 1, return_places=True)[1]
    np.testing.assert_array_equal(double, places)


def test_max_places_bad_arguments():
    x = np.zeros((1, 2, 20, 20), np.float32)
    y, places = fc.max_pool2d(x, 4, return_places=True)
    with pytest.raises(ValueError, match="at most 256 elements, got 17 x 16"):
        fc.max_pool2d(x, (17, 16), return_places=True)
    with pytest.raises(ValueError, match="exclude each other"):
        fc.max_pool2d(x, 4, return_indices=True, return_places=True)
    with pytest.raises(TypeError, match="places must be uint8, got int64"):
        fc.max_pool2d_backward(y, x, 4, places=places.astype(np.int64))
    with pytest.raises(ValueError, match="places must have shape"):
        fc.max_pool2d_backward(y, x, 4, places=places[:, :1])
    dx = fc.max_pool2d_backward(y + 1, x, 4, places=np.full_like(places, 16))
    assert not dx.any()


def test_max_ties_go_to_the_first(isa):
    x = np.zeros((1, 20, 6, 6), np.float32)
    _, index = fc.max_pool2d(x, 3, return_indices=True)
    np.testing.assert_array_equal(index[0, 7], [[0, 3], [18, 21]])
    dx = fc.max_pool2d_backward(np.ones((1, 20, 2, 2), np.float32), x, 3)
    assert dx.sum() == 80 and (dx[:, :, ::3, ::3] == 1).all()


def test_max_negative_zero_ties_with_zero(isa):
    x = np.array([-0.0, 0.0], np.float32).reshape(1, 1, 1, 2)
    _, index = fc.max_pool2d(np.tile(x, (1, 18, 1, 1)), (1, 2), return_indices=True)
    assert not index.any()


@pytest.mark.parametrize("position", [(0, 0), (1, 1), (3, 4), (5, 6)])
def test_max_propagates_nan(position, isa):
    case = PoolCase("", 1, 17, 6, 7, 3, 2, 1)
    for value in (np.nan, -np.inf, np.inf):
        for background in (0.0, -np.inf):
            x = np.full(case.x_shape, background, np.float32)
            x[:, ::2, position[0], position[1]] = value
            ref, index = max_oracle(case, x)
            y, got = fc.max_pool2d(channels_last(x), **case.max_arguments, return_indices=True)
            np.testing.assert_array_equal(y, ref)
            np.testing.assert_array_equal(got, index)


def test_max_padding_never_wins(isa):
    x = np.full((2, 19, 5, 6), -3e38, np.float32)
    y = fc.max_pool2d(x, 3, 1, 1)
    np.testing.assert_array_equal(y, x)


# -------------------------------------------------------------------------------------------------
# Average.


def check_average(case: PoolCase, options: dict[str, object]) -> None:
    x = normal(case, shape=case.x_shape)

    def oracle(a: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(a, **case.arguments, **options)

    ref, scale = oracle(as_tensor(x)).numpy(), oracle(as_tensor(abs(x))).numpy()
    dy = normal(case, "dy", shape=ref.shape)
    dx_ref, dx_scale = (backward_oracle(oracle, x, d) for d in (dy, abs(dy)))
    terms = int(np.prod(np.broadcast_to(case.kernel_size, 2)))
    for order in (np.ascontiguousarray, channels_last):
        y = fc.avg_pool2d(order(x), **case.arguments, **options)
        assert_within(y, ref, sum_limit(scale, terms), f"{case} y")
        dx = fc.avg_pool2d_backward(order(dy), order(x), **case.arguments, **options)
        assert_within(dx, dx_ref, sum_limit(dx_scale, terms), f"{case} dx")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", AVERAGE_CASES, ids=str)
def test_average(case, options, isa):
    check_average(case, options)


def test_average_channel_tails(isa):
    for case in pool_channel_tails():
        check_average(case, {})


@pytest.mark.parametrize(
    ("size", "output"),
    [((7, 7), 1), ((7, 9), (3, 4)), ((5, 6), (5, 6)), ((3, 4), (7, 5)), ((13, 11), (6, 6)),
     ((7, 9), (None, 2)), ((1, 1), (2, 3))],
    ids=str,
)  # fmt: skip
def test_adaptive_average(size, output, isa):
    x = normal(size, output, shape=(2, 19, *size))

    def oracle(a):
        return F.adaptive_avg_pool2d(a, output)

    ref, scale = oracle(as_tensor(x)).numpy(), oracle(as_tensor(abs(x))).numpy()
    dy = normal("dy", size, output, shape=ref.shape)
    dx_ref, dx_scale = (backward_oracle(oracle, x, d) for d in (dy, abs(dy)))
    terms = size[0] * size[1]
    for order in (np.ascontiguousarray, channels_last):
        y = fc.adaptive_avg_pool2d(order(x), output)
        assert_within(y, ref, sum_limit(scale, terms))
        dx = fc.adaptive_avg_pool2d_backward(order(dy), order(x))
        assert_within(dx, dx_ref, sum_limit(dx_scale, terms))


def test_global_average_channel_tails(isa):
    for c in [*range(1, 71), 512]:
        x = normal(c, shape=(2, c, 5, 7))
        ref = x.astype(np.float64).mean((2, 3), keepdims=True)
        dy = normal("dy", c, shape=ref.shape)
        for order in (np.ascontiguousarray, channels_last):
            y = fc.global_avg_pool2d(order(x))
            assert_within(y, ref, sum_limit(abs(x).mean((2, 3), keepdims=True), 35))
            dx = fc.global_avg_pool2d_backward(order(dy), order(x))
            dx_ref = np.broadcast_to(dy.astype(np.float64) / 35, x.shape)
            assert_within(dx, dx_ref, 2 * reference.U * abs(dx_ref))


# -------------------------------------------------------------------------------------------------
# All of them.


FUNCTIONS = {
    "max": (
        lambda x: fc.max_pool2d(x, 3, 2, 1),
        lambda dy, x: fc.max_pool2d_backward(dy, x, 3, 2, 1),
    ),
    "average": (
        lambda x: fc.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda dy, x: fc.avg_pool2d_backward(dy, x, 3, 2, 1, count_include_pad=False),
    ),
    "adaptive": (
        lambda x: fc.adaptive_avg_pool2d(x, (2, 3)),
        lambda dy, x: fc.adaptive_avg_pool2d_backward(dy, x),
    ),
    "global": (
        lambda x: fc.global_avg_pool2d(x),
        lambda dy, x: fc.global_avg_pool2d_backward(dy, x),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_by_finite_differences(name):
    forward, backward = FUNCTIONS[name]
    x = normal(name, shape=(2, 2, 5, 4), dtype=np.float64)
    dy = normal(name, "dy", shape=forward(x).shape, dtype=np.float64)
    dx = backward(dy, x)
    assert dx.dtype == np.float64
    reference.assert_gradient(forward, [x], dy, [dx])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts_do_not_change_a_bit(name, layout, isa):
    forward, backward = FUNCTIONS[name]
    x = normal(name, shape=(2, 19, 7, 8))
    y = forward(x)
    dy = normal(name, "dy", shape=y.shape)
    dx = backward(dy, x)
    assert_same_bits(forward(as_layout(x, layout)), y)
    assert_same_bits(backward(as_layout(dy, layout), as_layout(x, layout)), dx)
    assert_same_bits(backward(dy, as_layout(x, layout)), dx)
    assert_same_bits(backward(as_layout(dy, layout), x), dx)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stride_zero_gradient(name):
    forward, backward = FUNCTIONS[name]
    x = normal(name, shape=(2, 19, 7, 8))
    dy = np.broadcast_to(np.float32(1), forward(x).shape)
    assert_same_bits(backward(dy, x), backward(np.ascontiguousarray(dy), x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layout_of_results_follows_the_input(name):
    forward, backward = FUNCTIONS[name]
    x = normal(name, shape=(2, 19, 7, 8))
    y, last = forward(x), forward(channels_last(x))
    assert y.flags.c_contiguous and is_channels_last(last)
    assert backward(y, x).flags.c_contiguous
    assert is_channels_last(backward(last, channels_last(x)))

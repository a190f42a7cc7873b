"""Activations and their gradients against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests import reference
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import (
    ACTIVATIONS,
    U,
    activation_backward,
    activation_limit,
    as_tensor,
    assert_within,
    normal,
)

EXACT = ["relu", "relu6"]  # no arithmetic at all
PIECEWISE_LINEAR = [*EXACT, "leaky_relu", "hardsigmoid", "hardswish"]
VARIANTS = [
    *[(name, {}) for name in ACTIVATIONS],
    ("leaky_relu", {"negative_slope": 0.2}),
    ("leaky_relu", {"negative_slope": -0.5}),
    ("elu", {"alpha": 0.3}),
    ("gelu", {"approximate": "tanh"}),
]


def values() -> np.ndarray:
    """Ordinary numbers, tiny and huge ones, tails, and the neighbourhood of every kink."""
    rng = reference.generator("activation")
    kinks = np.array([0, 3, -3, 6, 1, -1], np.float32)
    special = [
        kinks,
        np.nextafter(kinks, np.float32(9)),
        np.nextafter(kinks, np.float32(-9)),
        [-0.0],
    ]
    ordinary = rng.standard_normal(2000) * 3
    wide = rng.choice([-1, 1], 500) * 10.0 ** rng.uniform(-44, 2.2, 500)  # also subnormal
    tails = np.linspace(-120, 120, 1001)
    huge = [-1e30, 1e30, 88.7, -88.7, 104.0, -104.0]
    return np.concatenate([*special, ordinary, wide, tails, huge]).astype("f")


def oracle(name: str, x: np.ndarray, **arguments) -> np.ndarray:
    return ACTIVATIONS[name](as_tensor(x), **arguments).numpy()


def approximation(arguments: dict) -> dict:
    return {key: value for key, value in arguments.items() if key == "approximate"}


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_forward(name, arguments, isa):
    x = values()
    y = getattr(fc, name)(x, **arguments)
    ref = oracle(name, x, **arguments)
    if name in EXACT:
        np.testing.assert_array_equal(y, ref)
    else:
        assert_within(y, ref, activation_limit(name, x, ref, **approximation(arguments)), name)


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_backward(name, arguments, isa):
    x = values()
    dy = normal(name, shape=x.shape)
    dx = getattr(fc, f"{name}_backward")(dy, x, **arguments)
    ref = activation_backward(name, dy, x, **arguments)
    if name in EXACT:
        np.testing.assert_array_equal(dx, ref)
    else:
        assert_within(dx, ref, 8 * U * (abs(ref) + abs(dy)), name)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_gradient_at_the_kinks_is_that_of_torch(name, isa):
    x = np.array([0, -0.0, 3, -3, 6], np.float32)
    dx = getattr(fc, f"{name}_backward")(np.ones(5, np.float32), x)
    a = torch.tensor(x, requires_grad=True)
    ref = torch.autograd.grad(getattr(F, name)(a).sum(), a)[0].numpy()
    np.testing.assert_allclose(dx, ref, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "silu", "elu"])
def test_relative_accuracy_near_zero(name, isa):
    """tanh(x) = x, not 0, for small x."""
    x = np.float32(10.0) ** np.arange(-30, 0, dtype=np.float32)
    x = np.concatenate([x, -x])
    ref = oracle(name, x)
    assert_within(getattr(fc, name)(x), ref, 8 * U * abs(ref), name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity(name, isa):
    function = getattr(fc, name)
    x = np.full(37, np.nan, np.float32)
    assert np.isnan(function(x)).all()
    x = np.zeros(37, np.float32)
    x[[3, 36]] = np.nan
    assert np.isnan(function(x)).tolist() == np.isnan(x).tolist()
    x = np.full(19, np.inf, np.float32)
    np.testing.assert_array_equal(function(x), oracle(name, x))
    if name not in ("silu", "gelu", "hardswish"):  # there the limit is -inf * 0
        np.testing.assert_array_equal(function(-x), oracle(name, -x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_length(name, isa):
    function, backward = getattr(fc, name), getattr(fc, f"{name}_backward")
    x = normal(name, shape=(70,))
    dy = normal(name, "dy", shape=(70,))
    y, dx = function(x), backward(dy, x)
    for size in range(71):
        assert_within(function(x[:size]), y[:size], 2 * activation_limit(name, x, y)[:size])
        assert_within(backward(dy[:size], x[:size]), dx[:size], 8 * U * (abs(dy[:size]) + 1e-3))


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_gradient_by_finite_differences(name, arguments):
    x = normal(name, shape=(2, 3, 4, 5), dtype=np.float64) * 3
    dy = normal(name, "dy", shape=x.shape, dtype=np.float64)
    dx = getattr(fc, f"{name}_backward")(dy, x, **arguments)
    assert dx.dtype == np.float64
    reference.assert_gradient(lambda a: getattr(fc, name)(a, **arguments), [x], dy, [dx])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_accuracy(name):
    x = values().astype(np.float64)
    ref = oracle(name, x)
    # 2^-52: the oracle rounds as often.
    assert_within(getattr(fc, name)(x), ref, activation_limit(name, x, ref, u=2.0**-52))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layouts(name, layout, isa):
    x = normal(name, shape=(2, 5, 6, 7))
    dy = normal(name, "dy", shape=x.shape)
    y, dx = getattr(fc, name)(x), getattr(fc, f"{name}_backward")(dy, x)
    given = as_layout(x, layout)
    assert_within(getattr(fc, name)(given), y, 2 * activation_limit(name, x, y))
    for d in (dy, as_layout(dy, layout)):
        got = getattr(fc, f"{name}_backward")(d, given)
        assert_within(got, dx, 8 * U * (abs(dx) + abs(dy)))


@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (3, 4), (2, 3, 4), (2, 0, 3, 4), (2, 2, 2, 2, 2)]
)
def test_any_rank(shape):
    x = np.asarray(normal(shape, shape=shape))
    y = fc.relu(x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    assert np.shape(y) == shape


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layout_is_kept_and_input_untouched(name):
    x = channels_last(normal(name, shape=(2, 5, 6, 7)))
    before = x.copy()
    y = getattr(fc, name)(x)
    assert is_channels_last(y) and not np.shares_memory(x, y)
    assert is_channels_last(getattr(fc, f"{name}_backward")(y, x))
    np.testing.assert_array_equal(x, before)


def test_bad_arguments():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError):
        fc.relu_backward(np.ones((3, 2), np.float32), x)
    with pytest.raises(ValueError, match="erf"):
        fc.gelu(x, approximate="erf")
    for bad in (x.astype(np.int32), x.astype(np.float16), "text", None, x.astype(object)):
        with pytest.raises((TypeError, ValueError)):
            fc.relu(bad)


def test_add(isa):
    for size in [0, 1, 7, 16, 70, 1000]:
        a, b = normal("a", size, shape=(size,)), normal("b", size, shape=(size,))
        np.testing.assert_array_equal(fc.add(a, b), a + b)
    a, b = normal("a", shape=(2, 5, 6, 7)), normal("b", shape=(2, 5, 6, 7))
    for layout in LAYOUTS:
        np.testing.assert_array_equal(fc.add(as_layout(a, layout), b), a + b)
        np.testing.assert_array_equal(fc.add(a, as_layout(b, layout)), a + b)
        total = a.copy()
        fc.add_to(total, as_layout(b, layout))
        np.testing.assert_array_equal(total, a + b)
    with pytest.raises(ValueError):
        fc.add(a, b[:, :, :, :6])
    for bad, message in ((a[:, :, ::2], "dense"), (np.broadcast_to(a, a.shape), "read-only")):
        with pytest.raises(ValueError, match=message):
            fc.add_to(bad, b[:, :, : bad.shape[2]])

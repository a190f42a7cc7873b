"""cat and channel_gate: joining, splitting and scaling channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastconv as fc
from fastconv import functional as F
from fastconv import nn
from fastconv.tensor import Tensor
from tests import reference
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import U, as_tensor, assert_same_bits, assert_within, normal

# Channels of the arrays that are joined.
JOINED = [(1,), (3, 5), (16, 1, 40), (2, 0, 3), (64, 32, 32, 32), (1, 1)]


def arrays(channels: tuple[int, ...], dtype: type = np.float32) -> list[np.ndarray]:
    return [normal("cat", i, c, shape=(2, c, 5, 4)).astype(dtype) for i, c in enumerate(channels)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("channels", JOINED, ids=str)
def test_cat(channels, dtype):
    parts = arrays(channels, dtype)
    expected = np.concatenate(parts, axis=1)
    for order in (np.ascontiguousarray, channels_last):
        assert_same_bits(fc.cat([order(p) for p in parts]), expected)


@pytest.mark.parametrize("channels", JOINED, ids=str)
def test_cat_backward_is_the_inverse(channels):
    parts = arrays(channels)
    for order in (np.ascontiguousarray, channels_last):
        split = fc.cat_backward(order(np.concatenate(parts, axis=1)), channels)
        for got, part in zip(split, parts, strict=True):
            assert_same_bits(got, part)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4, 5), (2, 3, 1, 2, 2)])
def test_every_dimension_and_rank(shape):
    for dim in range(-len(shape), len(shape)):
        other = list(shape)
        other[dim] = 7
        parts = [normal("a", shape=shape), normal("b", shape=tuple(other))]
        expected = torch.cat([torch.tensor(p) for p in parts], dim).numpy()
        joined = fc.cat(parts, dim)
        assert_same_bits(joined, expected)
        for got, part in zip(fc.cat_backward(joined, (shape[dim], 7), dim), parts, strict=True):
            assert_same_bits(got, part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cat_of_any_layout(layout):
    a, b = arrays((19, 7))
    expected = np.concatenate([a, b], axis=1)
    for first in (as_layout(a, layout), a, channels_last(a)):
        assert_same_bits(fc.cat([first, as_layout(b, layout)]), expected)
    for got, part in zip(
        fc.cat_backward(as_layout(expected, layout), (19, 7)), (a, b), strict=True
    ):
        assert_same_bits(got, part)


def test_cat_keeps_channels_last_and_copies():
    # A single channel lies both ways; the others decide.
    for channels in [(8, 4), (1, 8), (8, 1)]:
        parts = [channels_last(p) for p in arrays(channels)]
        joined = fc.cat(parts)
        assert is_channels_last(joined) and not is_channels_last(fc.cat(arrays(channels)))
        assert all(is_channels_last(p) for p in fc.cat_backward(joined, channels))
    only = arrays((4,))[0]
    assert not np.shares_memory(fc.cat([only]), only)


def test_cat_of_nothing_along_the_other_dimensions():
    for shape in [(0, 3, 4, 4), (2, 3, 0, 4)]:
        empty = np.zeros(shape, np.float32)
        assert fc.cat([empty, empty]).shape == (shape[0], 6, *shape[2:])
        assert [p.shape for p in fc.cat_backward(np.zeros(shape, "f"), (1, 2))][1][1] == 2


def test_cat_on_the_tape():
    shapes = [(2, 3, 4, 4), (2, 5, 4, 4)]
    ours = [Tensor(normal("t", i, shape=s, dtype=np.float64), True) for i, s in enumerate(shapes)]
    theirs = [as_tensor(t.data, grad=True) for t in ours]
    weights = normal("weights", shape=(2, 11, 4, 4), dtype=np.float64)
    (F.cat([*ours, ours[0]]) * weights).sum().backward()
    (torch.cat([*theirs, theirs[0]], 1) * torch.tensor(weights)).sum().backward()
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, expected.grad.numpy(), rtol=1e-14)


def test_cat_bad_arguments():
    a, b = arrays((3, 5))
    with pytest.raises(ValueError, match="at least one"):
        fc.cat([])
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 4\) and \(2, 5, 5, 3\)"):
        fc.cat([a, b[..., :3]])
    with pytest.raises(ValueError, match="same shape"):
        fc.cat([a, b[0]])
    with pytest.raises(TypeError, match="float32 and float64"):
        fc.cat([a, b.astype(np.float64)])
    with pytest.raises(ValueError, match="dim must be in"):
        fc.cat([a, b], 4)
    with pytest.raises(TypeError, match="dim"):
        fc.cat([a, b], 1.0)
    for sizes in [(3,), (3, 6), (9, -1), ()]:
        with pytest.raises(ValueError, match="sizes"):
            fc.cat_backward(np.concatenate([a, b], 1), sizes)


GATED = [(1, 1, 1, 1), (2, 3, 5, 4), (3, 16, 7, 7), (2, 70, 9, 3), (1, 33, 60, 50), (4, 96, 1, 1)]


def gated(shape: tuple[int, ...], dtype: type = np.float32) -> tuple[np.ndarray, ...]:
    x, dy = (normal(name, shape=shape, dtype=dtype) for name in ("x", "dy"))
    return x, normal("gate", shape=(*shape[:2], 1, 1), dtype=dtype), dy


@pytest.mark.parametrize("shape", GATED, ids=str)
def test_channel_gate(shape, isa):
    x, gate, _ = gated(shape)
    for order in (np.ascontiguousarray, channels_last):
        y = fc.channel_gate(order(x), gate)
        assert_same_bits(y, x * gate)
        assert order is np.ascontiguousarray or is_channels_last(y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", GATED, ids=str)
def test_channel_gate_backward(shape, dtype, isa):
    x, gate, dy = gated(shape, dtype)
    u, pixels = reference.unit(np.dtype(dtype)), shape[2] * shape[3]
    a, g = as_tensor(x, grad=True), as_tensor(gate, grad=True)
    dx_ref, dgate_ref = (t.numpy() for t in torch.autograd.grad(a * g, (a, g), as_tensor(dy)))
    sizes = (abs(as_tensor(x)) * abs(as_tensor(dy))).sum((2, 3), keepdim=True).numpy()
    for order in (np.ascontiguousarray, channels_last):
        dx, dgate = fc.channel_gate_backward(order(dy), order(x), gate)
        assert dx.dtype == dgate.dtype == dtype
        assert_within(dx, dx_ref, u * abs(dx_ref))
        assert_within(dgate, dgate_ref, 2 * u * (np.sqrt(pixels) + 2) * sizes)
        assert order is np.ascontiguousarray or is_channels_last(dx)


def test_channel_gate_gives_what_is_needed():
    x, gate, dy = gated((2, 5, 3, 3))
    dx, dgate = fc.channel_gate_backward(dy, x, gate)
    got, nothing = fc.channel_gate_backward(dy, x, gate, needs=(True, False))
    assert nothing is None
    assert_same_bits(got, dx)
    nothing, got = fc.channel_gate_backward(dy, x, gate, needs=(False, True))
    assert nothing is None
    assert_same_bits(got, dgate)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_gate_of_any_layout(layout):
    x, gate, dy = gated((2, 19, 5, 6))
    dx, dgate = fc.channel_gate_backward(dy, x, gate)
    given = as_layout(x, layout)
    for g in (as_layout(gate, layout), channels_last(gate)):
        assert_same_bits(fc.channel_gate(given, g), x * gate)
        for d in (dy, as_layout(dy, layout)):
            for got, right in zip(fc.channel_gate_backward(d, given, g), (dx, dgate), strict=True):
                assert_same_bits(got, right)


def test_channel_gate_special_values(isa):
    x, gate, dy = gated((2, 17, 3, 3))
    x[0, 3], gate[1, 5] = np.nan, np.inf
    y = fc.channel_gate(x, gate)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x * gate))
    dx, dgate = fc.channel_gate_backward(dy, x, gate)
    assert np.isnan(dgate[0, 3, 0, 0]) and np.isnan(dgate).sum() == 1
    assert np.isinf(dx[1, 5]).all()
    empty = np.zeros((2, 3, 0, 4), np.float32)
    gate = np.ones((2, 3, 1, 1), np.float32)
    assert fc.channel_gate(empty, gate).shape == empty.shape
    assert not fc.channel_gate_backward(empty, empty, gate)[1].any()


def test_channel_gate_by_finite_differences():
    x, gate, dy = gated((2, 3, 4, 2), np.float64)
    gradients = list(fc.channel_gate_backward(dy, x, gate))
    reference.assert_gradient(fc.channel_gate, [x, gate], dy, gradients)


def test_channel_gate_with_bias(isa):
    for shape in [(2, 5, 3, 3), (1, 48, 4, 2)]:
        x, gate, _ = gated(shape)
        bias = normal("bias", shape=gate.shape)
        for order in (np.ascontiguousarray, channels_last):
            y = fc.channel_gate(order(x), gate, order(bias))
            exact = x.astype(np.float64) * gate + bias
            assert_within(y, exact, 2 * U * (abs(x * gate) + abs(bias)))


def test_channel_gate_bad_arguments():
    x, gate, dy = gated((2, 3, 4, 4))
    with pytest.raises(ValueError, match="bias must have the shape"):
        fc.channel_gate(x, gate, gate[:1])
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 1\), got \(2, 4, 1, 1\)"):
        fc.channel_gate(x, np.ones((2, 4, 1, 1), np.float32))
    for bad in (gate[:1], gate[:, :, 0, 0], x):
        with pytest.raises(ValueError, match="gate must have shape"):
            fc.channel_gate(x, bad)
    with pytest.raises(ValueError, match="4 dimensions"):
        fc.channel_gate(x[0], gate[0])
    with pytest.raises(TypeError, match="gate must be float32, got float64"):
        fc.channel_gate(x, gate.astype(np.float64))
    with pytest.raises(TypeError, match="float"):
        fc.channel_gate(x.astype(np.int64), gate.astype(np.int64))
    with pytest.raises(ValueError, match="dy must have the shape"):
        fc.channel_gate_backward(dy[:, :2], x, gate)
    with pytest.raises(ValueError, match="2 flags"):
        fc.channel_gate_backward(dy, x, gate, needs=(True,))


class TorchSqueezeExcitation(torch.nn.Module):
    """Hu et al., section 3, with 1x1 convolutions."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Conv2d(channels, squeezed, 1)
        self.fc2 = torch.nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = torch.nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(squeezed))


def test_squeeze_excitation():
    expected = TorchSqueezeExcitation(12, 3).double()
    layer = nn.SqueezeExcitation(12, 3, activation=nn.SiLU).double()
    layer.load_state_dict(expected.state_dict())
    assert list(layer.state_dict()) == list(expected.state_dict())
    data = normal("x", shape=(3, 12, 5, 4), dtype=np.float64)
    dy = normal("dy", shape=data.shape, dtype=np.float64)
    for order in (np.ascontiguousarray, channels_last):
        x, z = Tensor(order(data), requires_grad=True), as_tensor(data, grad=True)
        y, right = layer(x), expected(z)
        np.testing.assert_allclose(y.data, right.detach().numpy(), rtol=1e-12)
        layer.zero_grad()
        expected.zero_grad()
        y.backward(order(dy))
        right.backward(torch.tensor(dy))
        np.testing.assert_allclose(x.grad, z.grad.numpy(), rtol=1e-10, atol=1e-14)
        for key, parameter in layer.named_parameters():
            right_grad = dict(expected.named_parameters())[key].grad.numpy()
            np.testing.assert_allclose(parameter.grad, right_grad, rtol=1e-10, atol=1e-14)


def gate_gradients(gate_of, function) -> list[np.ndarray]:
    """The gradients of x and of the two factors of a gate, of a sum that uses x and y."""
    data = normal("x", shape=(3, 12, 5, 4), dtype=np.float64)
    leaves = [Tensor(a, requires_grad=True) for a in (channels_last(data), data[:1, :, :1, :1])]
    x = leaves[0] * 1.5
    y = function(x, lambda mean: gate_of(mean, leaves[1]))
    (y * (x + y)).sum().backward()
    return [leaf.grad if leaf.grad is not None else np.zeros(1) for leaf in leaves]


@pytest.mark.parametrize(
    "gate_of",
    [
        lambda mean, factor: F.sigmoid(mean * factor),
        lambda mean, factor: F.sigmoid(mean.detach() * factor),
        lambda mean, factor: F.sigmoid(mean.detach()),
        lambda mean, factor: mean,
    ],
)
def test_channel_gate_by_mean(gate_of):
    """The same gradients as the two operations one by one, whatever the gate depends on."""
    got = gate_gradients(gate_of, F.channel_gate_by_mean)
    right = gate_gradients(gate_of, lambda x, f: F.channel_gate(x, f(F.global_avg_pool2d(x))))
    for a, b in zip(got, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_the_mean_of_a_gate_alone():
    kept = []
    x = Tensor(normal("x", shape=(2, 3, 4, 5)), requires_grad=True)
    F.channel_gate_by_mean(x, lambda mean: kept.append(mean) or mean)
    kept[0].sum().backward()
    np.testing.assert_array_equal(x.grad, np.full(x.shape, np.float32(1) / np.float32(20)))


def test_sums_of_many_pixels_stay_accurate():
    """A mean far from zero over many blocks: the limit of one sum holds all the same."""
    shape = (1, 8, 200, 200)
    x = normal("x", shape=shape) + np.float32(1000)
    dy, gate = np.ones(shape, np.float32), np.ones((1, 8, 1, 1), np.float32)
    _, dgate = fc.channel_gate_backward(channels_last(dy), channels_last(x), gate)
    ref = x.astype(np.float64).sum((2, 3), keepdims=True)
    assert_within(dgate, ref, 16 * U * abs(ref))

"""Batch normalisation, training and evaluation, with fused residual and activation, against
float64. Limit for M values a channel: (8 + 0.1 sqrt M) u (1 + |mean| / std)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests import reference
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import as_tensor, assert_same_bits, assert_within, normal

EPS = 1e-5
ACTIVATIONS = [None, *reference.FUSED_ACTIVATIONS]
SHAPES = [(4, 19, 5, 6), (2, 64, 7, 7), (33, 7), (2, 1, 3, 3), (2, 130, 1, 1), (1, 3, 9, 70)]


class Case:
    """Inputs and everything that follows from them in float64."""

    def __init__(self, shape, *, offset=0.0, spread=1.0, residual=False, activation=None,
                 training=True, dtype=np.float32):  # fmt: skip
        key = (shape, offset, spread)
        channels = shape[1]
        self.shape, self.activation, self.training = shape, activation, training
        raw = normal(*key, shape=shape, dtype=np.float64) * spread + offset
        self.x = raw.astype(dtype)
        self.weight = normal(*key, "w", shape=(channels,), dtype=dtype) + dtype(0.5)
        self.bias = normal(*key, "b", shape=(channels,), dtype=dtype)
        self.running_mean = normal(*key, "m", shape=(channels,), dtype=dtype)
        self.running_var = abs(normal(*key, "v", shape=(channels,), dtype=dtype)) + dtype(0.5)
        self.residual = normal(*key, "r", shape=shape, dtype=dtype) if residual else None
        self.dy = normal(*key, "dy", shape=shape, dtype=dtype)

    def channel(self, a: np.ndarray) -> np.ndarray:
        """A vector over channels, shaped to broadcast against x."""
        return np.asarray(a, np.float64).reshape(1, -1, *[1] * (len(self.shape) - 2))

    @property
    def axes(self) -> tuple[int, ...]:
        return (0, *range(2, len(self.shape)))

    @property
    def count(self) -> int:
        return self.x.size // self.shape[1]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.training:
            return self.running_mean.astype(np.float64), self.running_var.astype(np.float64)
        x = self.x.astype(np.float64)
        return x.mean(self.axes), x.var(self.axes)

    def limit(self) -> np.ndarray:
        """Relative error allowed, a channel."""
        mean, variance = self.statistics()
        root = np.sqrt(self.count) if self.training else 0.0
        return (8 + 0.1 * root) * reference.U * (1 + abs(mean) / np.sqrt(variance + EPS))

    def oracle(self) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """y and the inputs (x, weight, bias, residual) it was computed from, in float64."""
        x, weight, bias = (as_tensor(a, grad=True) for a in (self.x, self.weight, self.bias))
        residual = None if self.residual is None else as_tensor(self.residual, grad=True)
        y = F.batch_norm(
            x, as_tensor(self.running_mean), as_tensor(self.running_var), weight, bias,
            self.training, 0.1, EPS,
        )  # fmt: skip
        if residual is not None:
            y = y + residual
        if self.activation is not None:
            y = reference.ACTIVATIONS[self.activation](y)
        return y, [x, weight, bias, residual]


def check_forward(case: Case, y: np.ndarray) -> None:
    ref = case.oracle()[0].detach().numpy()
    mean, variance = case.statistics()
    normalised = (case.x - case.channel(mean)) / np.sqrt(case.channel(variance) + EPS)
    scale = abs(case.channel(case.weight)) * (1 + abs(normalised)) + abs(case.channel(case.bias))
    if case.residual is not None:
        scale = scale + abs(case.residual)
    limit = case.channel(case.limit()) * scale
    if case.activation is not None:
        limit = limit * reference.FUSED_ACTIVATIONS[case.activation]
        limit = limit + reference.activation_limit(case.activation, scale, ref)
    assert_within(y, ref, limit, "y")


def check_backward(case: Case, gradients) -> None:
    y, leaves = case.oracle()
    refs = torch.autograd.grad(y, [a for a in leaves if a is not None], as_tensor(case.dy))
    mean, variance = case.statistics()
    rstd = case.channel(1 / np.sqrt(variance + EPS))
    normalised = (case.x - case.channel(mean)) * rstd
    slope = 1.2  # bounds the derivative of every fused activation used here
    dy, axes = slope * abs(case.dy), case.axes
    keep = {"axis": axes, "keepdims": True}
    dx_scale = dy + case.training * (
        dy.mean(**keep) + abs(normalised) * (dy * abs(normalised)).mean(**keep)
    )
    limit = case.limit()
    # A smooth activation's derivative is taken where the forward pass put it, errors included.
    smooth = 3.0 if case.activation in ("silu", "sigmoid", "tanh") else 1.0
    dx, dweight, dbias, dresidual = gradients
    scale = abs(case.channel(case.weight)) * rstd * dx_scale * (1 + abs(normalised))
    assert_within(dx, refs[0].numpy(), smooth * case.channel(limit) * scale, "dx")
    scale = (dy * (1 + abs(normalised))).sum(axes) * (1 + abs(case.weight) + abs(case.bias))
    assert_within(dweight, refs[1].numpy(), smooth * limit * scale, "dweight")
    assert_within(dbias, refs[2].numpy(), smooth * limit * scale, "dbias")
    if case.residual is not None:
        dy_scale = abs(case.dy) * (3 + abs(normalised)) * (1 + abs(case.channel(case.weight)))
        limit = smooth * case.channel(limit) * dy_scale
        assert_within(dresidual, refs[3].numpy(), limit, "dresidual")


def run_train(case: Case, order=np.ascontiguousarray):
    """(y, gradients) by the functions that a tape uses."""
    x, dy = order(case.x), order(case.dy)
    residual = None if case.residual is None else order(case.residual)
    fused = {"residual": residual, "activation": case.activation}
    y, mean, rstd = fc.batch_norm_train(
        x, case.weight, case.bias, None, None, 0.1, EPS, **fused
    )  # fmt: skip
    return y, fc.batch_norm_backward(dy, x, case.weight, mean, rstd, bias=case.bias, **fused)


def orders(shape):
    return (np.ascontiguousarray, channels_last) if len(shape) == 4 else (np.ascontiguousarray,)


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, activation, residual, isa):
    case = Case(shape, residual=residual, activation=activation)
    for order in orders(shape):
        y, gradients = run_train(case, order)
        check_forward(case, y)
        check_backward(case, gradients)


def merged(parts):
    """(count, mean, squares) over parts [(count, moments)], by the definition."""
    count = sum(n for n, _ in parts)
    mean = sum(n * moments[0] for n, moments in parts) / count
    return count, mean, sum(m[1] + n * (m[0] - mean) ** 2 for n, m in parts)


def run_parts(case: Case, ends, order):
    """As run_train, of a batch in parts that end at these samples, each with sums of its own."""
    x, dy = np.split(case.x, ends), np.split(case.dy, ends)
    residual = [None] * len(x) if case.residual is None else np.split(case.residual, ends)
    ready = [order(a) if a is not None else None for a in (*x, *dy, *residual)]
    x, dy, residual = ready[: len(x)], ready[len(x) : 2 * len(x)], ready[2 * len(x) :]
    moments = merged([(a.size // a.shape[1], fc.batch_norm_moments(a)) for a in x])
    y, gradients, sums = [], [], []
    for a, da, r in zip(x, dy, residual, strict=True):
        y_part, mean, rstd = fc.batch_norm_train(
            a, case.weight, case.bias, None, None, 0.1, EPS,
            residual=r, activation=case.activation, moments=moments,
        )  # fmt: skip
        y.append(y_part)
        fixed = (case.weight, mean, rstd)
        both = fc.batch_norm_backward_sums(
            da, a, *fixed, bias=case.bias, residual=r, activation=case.activation
        )
        sums.append(both[0])
        gradients.append((da, a, fixed, both[1]))
    total = sum(sums)
    dx = []
    for da, a, fixed, dz in gradients:
        undone = (da, case.activation) if dz is None else (dz, None)
        dx.append(
            fc.batch_norm_backward_input(
                undone[0], a, *fixed, total, moments[0], bias=case.bias, activation=undone[1]
            )
        )
    dz = None if case.residual is None else np.concatenate([g[3] for g in gradients])
    both = (total[1] * rstd).astype(rstd.dtype), total[0].astype(rstd.dtype)
    return np.concatenate(y), (np.concatenate(dx), *both, dz)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_parts(shape, activation, residual, isa):
    """A batch in an empty part, one of a single sample, and the rest has the whole's statistics."""
    case = Case(shape, residual=residual, activation=activation)
    for order in orders(shape):
        y, gradients = run_parts(case, [0, 1], order)
        check_forward(case, y)
        check_backward(case, gradients)


def test_one_part_has_the_bits_of_the_whole(isa):
    case = Case((5, 19, 4, 6), residual=True, activation="relu", offset=3.0)
    for got, right in zip(run_parts(case, [], channels_last), run_train(case), strict=True):
        for a, b in zip(got, right, strict=True):
            assert_same_bits(a, b)


def test_parts_update_the_running_statistics_of_the_whole():
    case = Case((6, 7, 3, 5))
    parts = np.split(case.x, [2])
    moments = merged([(a.size // 7, fc.batch_norm_moments(a)) for a in parts])
    expected_mean, expected_var = (torch.tensor(v) for v in (case.running_mean, case.running_var))
    F.batch_norm(torch.tensor(case.x), expected_mean, expected_var, training=True, momentum=0.3)
    for part in parts:
        mean, var = case.running_mean.copy(), case.running_var.copy()
        fc.batch_norm_train(part, None, None, mean, var, 0.3, EPS, moments=moments)
        np.testing.assert_allclose(mean, expected_mean.numpy(), rtol=0, atol=4 * reference.U)
        np.testing.assert_allclose(var, expected_var.numpy(), rtol=8 * reference.U)


def test_parts_refuse():
    x, c = normal("x", shape=(2, 3, 4, 4)), np.ones(3, np.float32)
    mean, squares = fc.batch_norm_moments(x)
    train = (x, None, None, None, None, 0.1, EPS)
    one_value = (x[:1, :, :1, :1], *train[1:])
    for arguments, moments in ((train, (31, mean, squares)), (one_value, (1, mean, squares))):
        with pytest.raises(ValueError, match=f"got {moments[0]} and"):
            fc.batch_norm_train(*arguments, moments=moments)
    with pytest.raises(TypeError, match="mean must be float64, got float32"):
        fc.batch_norm_train(*train, moments=(32, c, squares))
    with pytest.raises(ValueError, match=r"squares must have shape \(3,\), got \(2,\)"):
        fc.batch_norm_train(*train, moments=(32, mean, squares[:2]))
    sums = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"count must be at least .* got 31 and 32"):
        fc.batch_norm_backward_input(x, x, None, c, c, sums, 31)
    with pytest.raises(ValueError, match=r"sums must have shape \(2, C\), got \(3,\)"):
        fc.batch_norm_backward_input(x, x, None, c, c, sums[0], 32)


def test_large_results_have_the_bits_of_their_parts(isa):
    """Results of 16 MB are written around the caches, those of their halves are not."""
    shape = (2, 64, 200, 200)
    x, dy = (channels_last(normal(name, shape=shape)) for name in "xd")
    vectors = [abs(normal(i, shape=(64,))) + np.float32(0.5) for i in range(4)]

    def results(x, dy):
        gradients = fc.batch_norm_backward_input(
            dy, x, *vectors[:3], np.ones((2, 64)), 1 << 20, bias=vectors[3], activation="relu"
        )
        pooled = fc.max_pool2d(x, 2, return_places=True)
        return (
            fc.batch_norm(x, *vectors, activation="relu"),
            gradients,
            fc.relu(x),
            fc.relu_backward(dy, x),
            fc.add(x, dy),
            *pooled,
            fc.max_pool2d_backward(pooled[0], x, 2, places=pooled[1]),
            fc.global_avg_pool2d_backward(pooled[0][:, :, :1, :1], x),
        )

    halves = zip(results(x[:1], dy[:1]), results(x[1:], dy[1:]), strict=True)
    for whole, parts in zip(results(x, dy), halves, strict=True):
        assert_same_bits(whole, np.concatenate(parts))


POOLED = [((2, 16, 6, 8), 2, None), ((3, 19, 7, 5), (2, 3), None), ((1, 33, 9, 11), 2, 3),
          ((2, 64, 4, 4), 4, None), ((4, 3, 33, 40), (16, 16), None),
          ((2, 20, 9, 8), 3, 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "kernel", "stride"), POOLED, ids=str)
def test_with_max_pooling(shape, kernel, stride, activation, dtype, isa):
    """The bits of the two operations."""
    case = Case(shape, activation=activation, dtype=dtype, offset=0.5)
    window, settings = (kernel, stride), (0.1, EPS)
    for order in orders(shape):
        x, running = order(case.x), [case.running_mean.copy(), case.running_var.copy()]
        again = [a.copy() for a in running]
        z, mean, rstd = fc.batch_norm_train(
            x, case.weight, case.bias, *running, *settings, activation=activation
        )
        right, right_places = fc.max_pool2d(z, *window, return_places=True)
        y, places, *statistics = fc.batch_norm_max_pool_train(
            x, case.weight, case.bias, *again, *settings, *window, activation=activation
        )
        for a, b in zip(
            (y, places, *statistics, *again), (right, right_places, mean, rstd, *running),
            strict=True,
        ):  # fmt: skip
            assert_same_bits(a, b)
        assert is_channels_last(y) == is_channels_last(right)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "kernel", "stride"), POOLED, ids=str)
def test_with_max_pooling_backward(shape, kernel, stride, activation, dtype, isa):
    """Where the windows tile the image, and where not; each gradient alone has the same bits."""
    case = Case(shape, activation=activation, dtype=dtype, offset=0.5)
    window, rest = (kernel, stride), {"bias": case.bias, "activation": activation}
    for order in orders(shape):
        x = order(case.x)
        y, places, *statistics = fc.batch_norm_max_pool_train(
            x, case.weight, case.bias, None, None, 0.1, EPS, *window, activation=activation
        )
        dy = order(normal("pooled", shape=y.shape, dtype=dtype))
        case.dy = np.asarray(fc.max_pool2d_backward(dy, x, *window, places=places))
        known = (dy, x, places, case.weight, *statistics, *window)
        gradients = fc.batch_norm_max_pool_backward(*known, **rest)
        if dtype is np.float32:
            check_backward(case, (*gradients, None))
        else:
            right = fc.batch_norm_backward(case.dy, x, case.weight, *statistics, **rest)
            for a, b in zip(gradients, right[:3], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        assert is_channels_last(gradients[0]) == is_channels_last(x)
        for i in range(3):
            needs = tuple(j == i for j in range(3))
            alone = fc.batch_norm_max_pool_backward(*known, **rest, needs=needs)
            assert tuple(g is not None for g in alone) == needs
            assert_same_bits(alone[i], gradients[i])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 9])
def test_moments_of_a_convolution(size, bias, isa):
    """The bits of the two operations, and of a batch norm, pooled or not, that is given them."""
    x, w = normal("x", shape=(2, 5, size, size)), normal("w", shape=(19, 5, 3, 3))
    b = normal("b", shape=(19,)) if bias else None
    y, moments = fc.conv2d_moments(x, w, b, padding=1)
    assert_same_bits(y, fc.conv2d(x, w, b, padding=1))
    assert_same_bits(moments, fc.batch_norm_moments(y))
    settings, known = (None, None, None, None, 0.1, EPS), (2 * size * size, *moments)
    for pooled in (False, True):
        function = fc.batch_norm_max_pool_train if pooled else fc.batch_norm_train
        window = (1,) if pooled else ()
        for a, b in zip(
            function(y, *settings, *window, moments=known), function(y, *settings, *window),
            strict=True,
        ):  # fmt: skip
            assert_same_bits(a, b)


def test_moments_of_an_empty_convolution(isa):
    y, moments = fc.conv2d_moments(np.zeros((0, 3, 4, 4), "f"), np.zeros((2, 3, 3, 3), "f"))
    assert y.shape == (0, 2, 2, 2)
    assert_same_bits(moments, np.zeros((2, 2)))
    y, moments = fc.conv2d_moments(
        np.zeros((1, 0, 4, 4), "f"), np.zeros((2, 0, 3, 3), "f"), np.array([3, -1], "f")
    )
    assert_same_bits(moments, np.array([[3.0, -1.0], [0.0, 0.0]]))


def test_with_max_pooling_of_no_image(isa):
    x, known = np.zeros((0, 3, 4, 4), "f"), (None, np.zeros(3, "f"), np.ones(3, "f"))
    y, places = np.zeros((0, 3, 2, 2), "f"), np.zeros((0, 3, 2, 2), np.uint8)
    dx, dweight, dbias = fc.batch_norm_max_pool_backward(y, x, places, *known, 2)
    assert dx.shape == x.shape
    assert_same_bits(dweight, np.zeros(3, "f"))
    assert_same_bits(dbias, np.zeros(3, "f"))


def test_with_max_pooling_refuses():
    train = (normal("x", shape=(1, 3, 20, 20)), None, None, None, None, 0.1, EPS)
    with pytest.raises(ValueError, match="at most 256 elements, got 17 x 17"):
        fc.batch_norm_max_pool_train(*train, 17)
    x, vectors = train[0], (None, np.zeros(3, "f"), np.ones(3, "f"))
    dy, places = np.zeros((1, 3, 10, 10), "f"), np.zeros((1, 3, 10, 10), np.uint8)
    with pytest.raises(ValueError, match=r"dy must have shape .*10, 10.* got .*10, 9"):
        fc.batch_norm_max_pool_backward(dy[..., :9], x, places, *vectors, 2)
    with pytest.raises(ValueError, match=r"places must have shape"):
        fc.batch_norm_max_pool_backward(dy, x, places[:, :2], *vectors, 2)
    with pytest.raises(TypeError, match="places must be uint8, got float32"):
        fc.batch_norm_max_pool_backward(dy, x, dy, *vectors, 2)
    with pytest.raises(ValueError, match="needs must have 3 flags"):
        fc.batch_norm_max_pool_backward(dy, x, places, *vectors, 2, needs=(True,))
    with pytest.raises(ValueError, match="21"):
        fc.batch_norm_max_pool_train(*train, (21, 2))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "hardswish"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation(shape, activation, residual, isa):
    case = Case(shape, residual=residual, activation=activation, training=False)
    statistics = case.running_mean.copy(), case.running_var.copy()
    for order in orders(shape):
        given = None if case.residual is None else order(case.residual)
        fused = {"residual": given, "activation": activation}
        arguments = case.running_mean, case.running_var, case.weight, case.bias
        check_forward(case, fc.batch_norm(order(case.x), *arguments, eps=EPS, **fused))
        if activation == "hardswish":
            continue
        mean, rstd = case.running_mean, 1 / np.sqrt(case.running_var + np.float32(EPS))
        check_backward(
            case,
            fc.batch_norm_backward(
                order(case.dy), order(case.x), case.weight, mean, rstd, bias=case.bias,
                training=False, **fused,
            ),
        )  # fmt: skip
    assert_same_bits(case.running_mean, statistics[0], "evaluation must not change the statistics")
    assert_same_bits(case.running_var, statistics[1], "evaluation must not change the statistics")


def test_channel_tails(isa):
    for channels in range(1, 71):
        case = Case((3, channels, 3, 5), residual=True, activation="relu")
        y, gradients = run_train(case, channels_last)
        check_forward(case, y)
        check_backward(case, gradients)


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(4, 19, 8, 8), (200, 9), (2, 5, 70, 80)], ids=str)
def test_large_mean(shape, offset, isa):
    """One-pass E[x^2] - E[x]^2 fails here."""
    case = Case(shape, offset=offset)
    y, gradients = run_train(case)
    check_forward(case, y)
    check_backward(case, gradients)
    _, mean, rstd = fc.batch_norm_train(case.x, None, None, None, None, 0.1, EPS)
    ref_mean, ref_var = case.statistics()
    assert_within(mean, ref_mean, case.limit() * (abs(ref_mean) + np.sqrt(ref_var)), "mean")
    ref = 1 / np.sqrt(ref_var + EPS)
    assert_within(rstd, ref, case.limit() * ref, "rstd")


@pytest.mark.parametrize("first", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4, 19, 8, 8), (200, 9), (2, 5, 70, 80)], ids=str)
def test_statistics_of_a_batch_that_begins_far_from_its_mean(shape, first, isa):
    """The kernels sum distances from what came first, a row and then a few rows."""
    raw = normal(*shape, first, shape=shape, dtype=np.float64)
    channels = np.moveaxis(raw, 1, -1)
    channels.reshape(-1, shape[1])[0] += first
    channels[:1, ..., ::2] += first  # of every other channel the whole first image or row
    x = raw.astype(np.float32)
    mean, squares = fc.batch_norm_moments(x)
    values = np.moveaxis(x.astype(np.float64), 1, -1).reshape(-1, shape[1])
    np.testing.assert_allclose(mean, values.mean(0), rtol=3e-6, atol=3e-7 * np.abs(values).max())
    np.testing.assert_allclose(squares, ((values - values.mean(0)) ** 2).sum(0), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4, 1e-20, 1e20])
def test_constant_channel_becomes_beta(value, isa):
    x = np.full((4, 19, 6, 6), value, np.float32)
    bias = normal("beta", shape=(19,))
    y, mean, rstd = fc.batch_norm_train(x, np.ones(19, "f"), bias, None, None, 0.1, EPS)
    limit = (8 + 0.1 * 12) * reference.U * (1 + abs(np.float32(value)) / np.sqrt(EPS))
    assert_within(mean, np.full(19, np.float64(np.float32(value))), 9 * reference.U * abs(value))
    assert np.isfinite(rstd).all()
    if value < 1e19:
        assert_within(y, np.broadcast_to(bias[:, None, None], x.shape), limit)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, 1 / 3])
@pytest.mark.parametrize("shape", [(4, 19, 5, 6), (33, 7)], ids=str)
def test_running_statistics(shape, momentum, isa):
    """running_var takes the unbiased variance, M / (M - 1)."""
    case = Case(shape, offset=2.0)
    mean, var = case.running_mean.copy(), case.running_var.copy()
    fc.batch_norm(case.x, mean, var, case.weight, case.bias, True, momentum, EPS)
    x_mean, x_var = case.statistics()
    x_var = x_var * case.count / (case.count - 1)
    for got, old, new in [(mean, case.running_mean, x_mean), (var, case.running_var, x_var)]:
        ref = (1 - momentum) * old.astype(np.float64) + momentum * new
        assert_within(got, ref, case.limit() * (abs(old) + abs(new)))
    if momentum == 0:
        assert_same_bits(mean, case.running_mean)
        assert_same_bits(var, case.running_var)


def test_training_forms_agree(isa):
    case = Case((4, 19, 5, 6))
    y, mean, rstd = fc.batch_norm_train(case.x, case.weight, case.bias, None, None, 0.1, EPS)
    same = fc.batch_norm(case.x, None, None, case.weight, case.bias, training=True, eps=EPS)
    assert_same_bits(y, same)
    assert mean.shape == rstd.shape == (19,) and mean.dtype == rstd.dtype == np.float32


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_affine(weight, bias):
    case = Case((4, 19, 5, 6))
    if not weight:
        case.weight[:] = 1
    if not bias:
        case.bias[:] = 0
    given = case.weight if weight else None, case.bias if bias else None
    y, mean, rstd = fc.batch_norm_train(case.x, *given, None, None, 0.1, EPS)
    check_forward(case, y)
    dx = fc.batch_norm_backward(case.dy, case.x, given[0], mean, rstd)[0]
    right = fc.batch_norm_backward(case.dy, case.x, case.weight, mean, rstd, bias=case.bias)
    assert_same_bits(dx, right[0])


@pytest.mark.parametrize("shape", [(4, 3, 4, 3), (9, 4)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_float64_by_finite_differences(shape, activation, training):
    case = Case(shape, residual=True, activation=activation, training=training, dtype=np.float64)
    statistics = case.running_mean, case.running_var

    def function(x, weight, bias, residual):
        given = [None, None] if training else [a.copy() for a in statistics]
        return fc.batch_norm(
            x, *given, weight, bias, training, eps=EPS, residual=residual, activation=activation
        )

    if training:
        _, gradients = run_train(case)
    else:
        rstd = 1 / np.sqrt(case.running_var + EPS)
        gradients = fc.batch_norm_backward(
            case.dy, case.x, case.weight, case.running_mean, rstd, bias=case.bias,
            residual=case.residual, activation=activation, training=False,
        )  # fmt: skip
    inputs = [case.x, case.weight, case.bias, case.residual]
    reference.assert_gradient(function, inputs, case.dy, list(gradients))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout, isa):
    case = Case((4, 19, 5, 6), residual=True, activation="relu")
    y, gradients = run_train(case)
    y2, gradients2 = run_train(case, lambda a: as_layout(a, layout))
    assert_same_bits(y2, y)
    for got, right in zip(gradients2, gradients, strict=True):
        assert_same_bits(got, right)
    case.residual = case.activation = None
    evaluated = fc.batch_norm(case.x, case.running_mean, case.running_var)
    given = as_layout(case.x, layout)
    assert_same_bits(fc.batch_norm(given, case.running_mean, case.running_var), evaluated)


def test_running_statistics_through_strides():
    """Statistics that are views are updated in place, and nothing beside them."""
    case = Case((4, 19, 5, 6))
    dense = case.running_mean.copy(), case.running_var.copy()
    fc.batch_norm(case.x, *dense, training=True)
    buffers = [np.full(40, 7, np.float32) for _ in range(2)]
    views = [b[1:39:2] for b in buffers]
    views[0][:], views[1][:] = case.running_mean, case.running_var
    fc.batch_norm(case.x, *views, training=True)
    for view, right, buffer in zip(views, dense, buffers, strict=True):
        assert_same_bits(view, right)
        assert (buffer[::2] == 7).all()


def test_layout_of_results_follows_the_input():
    case = Case((4, 19, 5, 6), residual=True, activation="relu")
    y, gradients = run_train(case)
    assert y.flags.c_contiguous and gradients[0].flags.c_contiguous
    y, gradients = run_train(case, channels_last)
    assert is_channels_last(y) and is_channels_last(gradients[0])


def test_needs_selects_the_gradients():
    case = Case((4, 19, 5, 6), residual=True, activation="relu")
    fused = {"residual": case.residual, "activation": "relu"}
    _, mean, rstd = fc.batch_norm_train(
        case.x, case.weight, case.bias, None, None, 0.1, EPS, **fused
    )
    arguments = case.dy, case.x, case.weight, mean, rstd
    full = fc.batch_norm_backward(*arguments, bias=case.bias, **fused)
    for bits in range(16):
        needs = tuple(bool(bits >> i & 1) for i in range(4))
        got = fc.batch_norm_backward(*arguments, bias=case.bias, **fused, needs=needs)
        for wanted, result, right in zip(needs, got, full, strict=True):
            assert (result is not None) == wanted
            if wanted:
                assert_same_bits(result, right)

"""linear and its gradients against float64."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc
from tests import reference
from tests.reference import assert_conv_close, assert_same_bits, normal

SHAPES = [((4, 7), 5), ((1, 1), 1), ((128, 300), 10), ((33, 130), 67), ((7,), 5), ((2, 3, 9), 4),
          ((2, 1, 3, 17), 20), ((0, 7), 5), ((3, 2000), 3), ((2, 5), 1000)]  # fmt: skip


def check(shape: tuple[int, ...], outputs: int) -> None:
    inputs = shape[-1]
    x, w = normal(shape, shape=shape), normal(shape, "w", shape=(outputs, inputs))
    bias = normal(shape, "b", shape=(outputs,))
    dy = normal(shape, "dy", shape=(*shape[:-1], outputs))
    rows = dy.size // outputs

    def results(x, w, bias, dy):
        flat_x, flat_dy = x.reshape(rows, inputs), dy.reshape(rows, outputs)
        y = (flat_x @ w.T).reshape(dy.shape) + bias
        return y, (flat_dy @ w).reshape(x.shape), flat_dy.T @ flat_x, flat_dy.sum(0)

    wide = [a.astype(np.float64) for a in (x, w, bias, dy)]
    refs, scales = results(*wide), results(*[abs(a) for a in wide])
    got = (fc.linear(x, w, bias), *fc.linear_backward(dy, x, w))
    for name, a, ref, scale, terms in zip(
        ["y", "dx", "dw", "db"], got, refs, scales, [inputs + 1, outputs, rows, rows], strict=True
    ):
        assert_conv_close(a, ref, scale, terms, f"{shape} -> {outputs} {name}")


@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
def test_against_float64(shape, outputs, isa):
    check(shape, outputs)


def test_tails(isa):
    for size in range(1, 71):
        check((3, size), 5)
        check((3, 5), size)
        check((size, 6), 7)


def test_large_weights_of_few_rows(isa):
    """Gradients that are written where they lie, around the caches too."""
    check((5, 1040), 530)
    check((64, 1100), 37)


def test_without_bias(isa):
    x, w = normal("x", shape=(4, 7)), normal("w", shape=(5, 7))
    assert_conv_close(fc.linear(x, w), x.astype("d") @ w.T, abs(x) @ abs(w).T, 7)


def test_integers_are_exact(isa):
    rng = reference.generator("linear")
    x, w = (rng.integers(-8, 9, s).astype(np.float32) for s in [(33, 130), (67, 130)])
    dy = rng.integers(-8, 9, (33, 67)).astype(np.float32)
    np.testing.assert_array_equal(fc.linear(x, w), x @ w.T)
    dx, dw, db = fc.linear_backward(dy, x, w)
    np.testing.assert_array_equal(dx, dy @ w)
    np.testing.assert_array_equal(dw, dy.T @ x)
    np.testing.assert_array_equal(db, dy.sum(0))


def test_gradients_by_finite_differences():
    x, w, bias, dy = (
        normal(i, shape=s, dtype=np.float64) for i, s in enumerate([(3, 4), (5, 4), (5,), (3, 5)])
    )
    gradients = fc.linear_backward(dy, x, w)
    reference.assert_gradient(fc.linear, [x, w, bias], dy, list(gradients))


def test_strides(isa):
    x, w, dy = normal("x", shape=(9, 20)), normal("w", shape=(15, 20)), normal("d", shape=(9, 15))
    y, gradients = fc.linear(x, w), fc.linear_backward(dy, x, w)
    views = [np.asfortranarray, lambda a: np.flip(np.flip(a).copy()), lambda a: np.repeat(
        np.repeat(a, 2, 0), 3, 1)[::2, ::3]]  # fmt: skip
    for view in views:
        assert_same_bits(fc.linear(view(x), view(w)), y)
        for got, right in zip(
            fc.linear_backward(view(dy), view(x), view(w)), gradients, strict=True
        ):
            assert_same_bits(got, right)
    ones = np.broadcast_to(np.float32(1), dy.shape)
    for got, right in zip(
        fc.linear_backward(ones, x, w), fc.linear_backward(ones.copy(), x, w), strict=True
    ):
        assert_same_bits(got, right)


def test_needs_selects_the_gradients():
    x, w, dy = normal("x", shape=(9, 20)), normal("w", shape=(15, 20)), normal("d", shape=(9, 15))
    full = fc.linear_backward(dy, x, w)
    for position in range(3):
        got = fc.linear_backward(dy, x, w, needs=tuple(i == position for i in range(3)))
        assert [g is not None for g in got] == [i == position for i in range(3)]
        assert_same_bits(got[position], full[position])


def test_empty_sizes():
    y = fc.linear(np.ones((3, 0), "f"), np.ones((2, 0), "f"), np.array([1, 2], "f"))
    np.testing.assert_array_equal(y, [[1, 2]] * 3)
    dx, dw, db = fc.linear_backward(
        np.ones((0, 5), "f"), np.ones((0, 4), "f"), np.ones((5, 4), "f")
    )
    assert dx.shape == (0, 4) and not dw.any() and dw.shape == (5, 4) and not db.any()


def test_bad_arguments():
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    for arguments in [
        (x, np.ones((5, 3), np.float32)),
        (x, np.ones(4, np.float32)),
        (x, w, np.ones(4, np.float32)),
        (x, w, np.ones((5, 1), np.float32)),
        (np.float32(1), w),
        (x, w.astype(np.float64)),
        (x.astype(np.float16), w),
        (x, None),
        ("x", w),
    ]:
        with pytest.raises((ValueError, TypeError)):
            fc.linear(*arguments)
    for dy in [np.ones((3, 4), "f"), np.ones((4, 5), "f"), np.ones(5, "f"), np.ones((3, 5), "d")]:
        with pytest.raises((ValueError, TypeError)):
            fc.linear_backward(dy, x, w)

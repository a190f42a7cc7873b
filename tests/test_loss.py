"""softmax, log_softmax and cross_entropy with their gradients against PyTorch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastconv as fc
from tests import reference
from tests.reference import U, as_tensor, assert_same_bits, assert_within, normal

SHAPES = [((4, 10), -1), ((4, 10), 0), ((7,), 0), ((128, 1000), 1), ((2, 5, 3, 4), 1),
          ((2, 3, 4), 1), ((3, 1), -1), ((0, 5), -1), ((33, 17), -1)]  # fmt: skip


def spread(x: np.ndarray, dim: int) -> np.ndarray:
    """|x - max|: the argument of exp is rounded to u times this."""
    return abs(x - x.max(dim, keepdims=True)) if x.size else x


def softmax_limit(x: np.ndarray, ref: np.ndarray, dim: int) -> np.ndarray:
    return (8 + np.sqrt(x.shape[dim]) + spread(x, dim)) * U * ref + 1e-37


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax(shape, dim, scale, isa):
    x = normal(shape, dim, shape=shape) * np.float32(scale)
    ref = torch.softmax(as_tensor(x), dim).numpy()
    y = fc.softmax(x, dim)
    assert_within(y, ref, softmax_limit(x, ref, dim))
    assert_within(y.sum(dim, dtype="d"), ref.sum(dim), 1e-6)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_softmax(shape, dim, scale, isa):
    x = normal(shape, dim, shape=shape) * np.float32(scale)
    ref = torch.log_softmax(as_tensor(x), dim).numpy()
    limit = (8 + np.sqrt(shape[dim])) * U * (1 + spread(x, dim) + abs(ref))
    assert_within(fc.log_softmax(x, dim), ref, limit)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_backward(name, shape, dim, isa):
    x, dy = normal(shape, dim, shape=shape), normal(shape, "dy", shape=shape)
    a = as_tensor(x, grad=True)
    y = getattr(torch, name)(a, dim)
    ref = torch.autograd.grad(y, a, as_tensor(dy))[0].numpy()
    given = y.detach().numpy().astype(np.float32)
    dx = getattr(fc, f"{name}_backward")(dy, given, dim)
    total = abs(dy).sum(dim, keepdims=True, dtype="d")
    probability = torch.softmax(as_tensor(x), dim).numpy()
    scale = abs(dy) + probability * total if name == "log_softmax" else probability * (
        abs(dy) + (abs(dy) * probability).sum(dim, keepdims=True))  # fmt: skip
    # The given y is rounded: log probabilities to u |y|, which exp passes on.
    limit = (10 + np.sqrt(shape[dim]) + abs(given)) * U * scale + 1e-37
    assert_within(dx, ref, limit)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_gradient_by_finite_differences(name):
    x = normal(name, shape=(3, 4, 2), dtype=np.float64)
    dy = normal(name, "dy", shape=x.shape, dtype=np.float64)
    function = getattr(fc, name)
    dx = getattr(fc, f"{name}_backward")(dy, function(x, 1), 1)
    reference.assert_gradient(lambda a: function(a, 1), [x], dy, [dx])


def test_softmax_of_extreme_values(isa):
    x = np.array([[1e30, 0, -1e30], [-np.inf, 0, 0], [1e4, 1e4, -1e4]], np.float32)
    np.testing.assert_allclose(fc.softmax(x), [[1, 0, 0], [0, 0.5, 0.5], [0.5, 0.5, 0]], rtol=1e-6)
    assert fc.log_softmax(x)[1, 0] == -np.inf
    x = np.zeros((2, 19), np.float32)
    x[0, 18] = np.nan
    assert np.isnan(fc.softmax(x)).any(1).tolist() == [True, False]


# -------------------------------------------------------------------------------------------------
# Cross entropy.


def batch(n: int, classes: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    logits = normal(n, classes, shape=(n, classes)) * np.float32(scale)
    return logits, reference.generator(n, classes, "t").integers(0, classes, n)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.2},
    {"ignore_index": 3},
    {"ignore_index": 3, "weight": True, "label_smoothing": 0.2},
]


def arguments(options: dict, classes: int) -> tuple[dict, dict]:
    """(for fastconv, for torch in float64)"""
    ours, theirs = dict(options), dict(options)
    if options.get("weight"):
        ours["weight"] = abs(normal("weight", shape=(classes,))) + np.float32(0.1)
        theirs["weight"] = as_tensor(ours["weight"])
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "classes"), [(8, 10), (1, 1), (5, 33), (70, 4), (128, 1000)])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_cross_entropy(n, classes, scale, reduction, options, isa):
    logits, target = batch(n, classes, scale)
    ours, theirs = arguments(options, classes)
    a = as_tensor(logits, grad=True)
    ref = F.cross_entropy(a, torch.tensor(target), reduction=reduction, **theirs)
    if not torch.isfinite(ref).all():
        pytest.skip("every target is ignored")
    loss = fc.cross_entropy(logits, target, reduction=reduction, **ours)
    rows = 1.0 if reduction == "none" else float(n if reduction == "sum" else 1)
    scale_of = (1 + spread(logits, 1).max()) * ours.get("weight", np.ones(1, "f")).max() * rows
    limit = (10 + np.sqrt(classes) + np.sqrt(n)) * U * (scale_of + abs(ref.detach().numpy()))
    assert_within(np.asarray(loss), ref.detach().numpy(), limit, "loss")

    dloss = normal("dloss", n, shape=np.shape(loss))
    (grad,) = torch.autograd.grad(ref, a, as_tensor(dloss))
    got = fc.cross_entropy_backward(dloss, logits, target, reduction=reduction, **ours)
    size = abs(grad.numpy()).max(1, keepdims=True)
    limit = (16 + np.sqrt(classes) + spread(logits, 1)) * U * (abs(grad.numpy()) + 0.1 * size)
    # Where the prediction is right, p - 1 of the target cancels to less than the roundoff of
    # float64, in which both sides compute it: an error of 2^-53 of each of its two terms.
    row = abs(dloss).max() * ours.get("weight", np.ones(1, "f")).max()
    assert_within(got, grad.numpy(), limit + 2.0**-51 * row + 1e-37, "dlogits")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_by_finite_differences(options, reduction):
    logits, target = batch(6, 5)
    logits = logits.astype(np.float64)
    ours, _ = arguments(options, 5)
    if "weight" in ours:
        ours["weight"] = ours["weight"].astype(np.float64)

    def function(a):
        return fc.cross_entropy(a, target, reduction=reduction, **ours)

    dloss = normal("dloss", shape=np.shape(function(logits)), dtype=np.float64)
    dlogits = fc.cross_entropy_backward(dloss, logits, target, reduction=reduction, **ours)
    reference.assert_gradient(function, [logits], dloss, [dlogits])


def test_cross_entropy_of_extreme_logits(isa):
    logits = np.array([[1e4, -1e4, 0], [1e30, 0, 0], [0, 0, 0]], np.float32)
    loss = fc.cross_entropy(logits, np.array([1, 0, 2]), reduction="none")
    np.testing.assert_allclose(loss, [2e4, 0, np.log(3)], rtol=1e-6)
    dlogits = fc.cross_entropy_backward(np.float32(1), logits, np.array([1, 0, 2]), reduction="sum")
    third = 1 / 3
    np.testing.assert_allclose(
        dlogits, [[1, -1, 0], [0, 0, 0], [third, third, third - 1]], atol=1e-6
    )


def test_cross_entropy_targets(isa):
    logits, target = batch(8, 10)
    loss = fc.cross_entropy(logits, target)
    for dtype in (np.int32, np.uint8):
        assert_same_bits(np.asarray(fc.cross_entropy(logits, target.astype(dtype))), loss)
    strided = np.repeat(target, 2)[::2]
    assert_same_bits(np.asarray(fc.cross_entropy(logits, strided)), loss)
    for bad in (10, -1, 2**40, -(2**63)):
        wrong = target.copy()
        wrong[5] = bad
        with pytest.raises(ValueError, match=str(bad)):
            fc.cross_entropy(logits, wrong)
        with pytest.raises(ValueError, match=str(bad)):
            fc.cross_entropy_backward(np.float32(1), logits, wrong)
    wrong[5] = -100
    assert np.isfinite(fc.cross_entropy(logits, wrong))


def test_cross_entropy_with_every_target_ignored():
    logits, target = batch(4, 5)
    target[:] = -100
    assert np.isnan(fc.cross_entropy(logits, target))
    assert fc.cross_entropy(logits, target, reduction="sum") == 0
    dlogits = fc.cross_entropy_backward(np.float32(1), logits, target, reduction="sum")
    assert not dlogits.any()


def test_cross_entropy_of_an_empty_batch():
    logits, target = np.zeros((0, 5), np.float32), np.zeros(0, np.int64)
    assert fc.cross_entropy(logits, target, reduction="sum") == 0
    assert fc.cross_entropy(logits, target, reduction="none").shape == (0,)


def test_bad_arguments():
    logits, target = batch(8, 10)
    for arguments in [
        (logits, target[:7]),
        (logits, target.astype(np.float32)),
        (logits, target[:, None]),
        (logits[0], target),
        (logits.astype(np.float16), target),
        (logits, None),
    ]:
        with pytest.raises((ValueError, TypeError)):
            fc.cross_entropy(*arguments)
    for options in [
        {"weight": np.ones(9, np.float32)},
        {"reduction": "average"},
        {"label_smoothing": 1.5},
        {"label_smoothing": -0.1},
    ]:
        with pytest.raises((ValueError, TypeError)):
            fc.cross_entropy(logits, target, **options)
    for dim in (2, -3):
        with pytest.raises((ValueError, IndexError)):
            fc.softmax(logits, dim)
    for shape in [(7,), (8, 9)]:
        with pytest.raises(ValueError):
            fc.cross_entropy_backward(np.ones(shape, np.float32), logits, target, reduction="none")

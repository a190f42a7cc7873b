"""The tape: gradients against differences, bookkeeping, layouts, memory, errors."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest

import fastconv
from fastconv import functional as F
from fastconv import models, nn
from fastconv.nn import channels_last
from fastconv.tensor import Array, Tensor, apply, form_of, is_grad_enabled, no_grad


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def check_gradients(function: Callable[..., Tensor], *arrays: Array) -> None:
    """Compares the tape with central differences, in float64, for a weighted output."""
    inputs = [Tensor(a.copy(order="K"), requires_grad=True) for a in arrays]
    y = function(*inputs)
    weights = draw(*y.shape, seed=99)
    y.backward(weights)
    step = 1e-6
    for t in inputs:
        expected = np.empty(t.shape)
        for index in np.ndindex(*t.shape):
            values = []
            for sign in (1, -1):
                moved = [Tensor(i.data.copy(order="K")) for i in inputs]
                moved[inputs.index(t)].data[index] += sign * step
                values.append(float((function(*moved).data * weights).sum()))
            expected[index] = (values[0] - values[1]) / (2 * step)
        assert t.grad is not None
        np.testing.assert_allclose(t.grad, expected, rtol=1e-6, atol=1e-7)


X = draw(2, 4, 5, 5)
ONE_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "scalars": lambda x: (2 * x - 1 + 3 - x) / 4,
    "square": lambda x: x * x,
    "sum": lambda x: x.sum(),
    "sum_dims": lambda x: x.sum((0, 2)),
    "mean_keepdim": lambda x: x.mean((2, 3), keepdim=True),
    "reshape": lambda x: x.reshape(4, 50) * 2,
    "reshape_tuple": lambda x: x.reshape((2, -1)),
    "transpose": lambda x: x.transpose(1, -1) * np.arange(20.0).reshape(5, 4),
    "flatten": lambda x: x.flatten(1) * 2,
    "cat": lambda x: F.cat([x, x * 2, x * x]),
    "diamond": lambda x: (x * 2) * (x * 3) + x,
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "global_avg_pool": F.global_avg_pool2d,
    "local_response_norm": lambda x: F.local_response_norm(x, 3, 0.5, 0.75, 2.0),
    "relu": F.relu,
    "relu6": lambda x: F.relu6(x * 5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 1.5),
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, "tanh"),
    "hardsigmoid": lambda x: F.hardsigmoid(x * 3),
    "hardswish": lambda x: F.hardswish(x * 3),
    "softmax": lambda x: F.softmax(x.flatten(1)),
    "log_softmax": lambda x: F.log_softmax(x.flatten(1)),
    "cross_entropy": lambda x: F.cross_entropy(x.flatten(1), np.array([3, 70])),
    "cross_entropy_smooth": lambda x: F.cross_entropy(
        x.flatten(1), np.array([3, 70]), label_smoothing=0.1, reduction="none"
    ),
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", ONE_INPUT)
def test_gradient_of_one_input(name: str, layout: str) -> None:
    check_gradients(ONE_INPUT[name], channels_last(X) if layout == "channels_last" else X)


W = draw(6, 4, 3, 3, seed=1)
BIAS = draw(6, seed=2)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "hardswish", "tanh"])
def test_gradient_of_conv2d(activation: str | None) -> None:
    residual = draw(2, 6, 3, 3, seed=3)
    check_gradients(
        lambda x, w, b, r: F.conv2d(
            x, w, b, stride=2, padding=1, activation=activation, residual=r
        ),
        X,
        W,
        BIAS,
        residual,
    )


def test_gradient_of_grouped_dilated_and_same_conv2d() -> None:
    check_gradients(
        lambda x, w: F.conv2d(x, w, padding="same", dilation=2, groups=2),
        X,
        draw(6, 2, 3, 3, seed=1),
    )


def test_gradient_of_conv_transpose2d() -> None:
    check_gradients(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1), X, draw(4, 3, 3, 3, seed=1), BIAS[:3]
    )


def test_gradient_of_linear() -> None:
    check_gradients(F.linear, draw(3, 5), draw(4, 5, seed=1), draw(4, seed=2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradient_of_batch_norm(activation: str | None, training: bool) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        mean, var = draw(4, seed=7), 1 + draw(4, seed=8) ** 2
        return F.batch_norm(x, mean, var, w, b, training, residual=residual, activation=activation)

    check_gradients(function, X, draw(4, seed=3), draw(4, seed=4), draw(2, 4, 5, 5, seed=5))


def test_gradient_of_dropout_is_its_mask() -> None:
    x = Tensor(np.ones((50, 50)), requires_grad=True)
    y = F.dropout(x, 0.3)
    y.backward(np.ones(y.shape))
    np.testing.assert_array_equal(x.grad, y.data)
    assert 0.65 < np.count_nonzero(y.data) / y.data.size < 0.75


def test_dropout_after_channels_last_and_flatten_keeps_mask_and_gradient_aligned() -> None:
    x = Tensor(channels_last(np.ones((2, 8, 6, 6))), requires_grad=True)
    y = F.dropout(x, 0.5)
    y.flatten(1).backward(np.ones((2, 288)))
    np.testing.assert_array_equal(x.grad, y.data)


@pytest.mark.parametrize("shape", [(5,), (4, 1, 1), (1, 4, 1, 5), ()])
def test_broadcasting_sums_gradients(shape: tuple[int, ...]) -> None:
    other = draw(*shape, seed=5)
    for function in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: b * a):
        check_gradients(function, X, other)


def test_array_operands() -> None:
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = np.arange(3, dtype=np.float32) * x + np.ones(3, np.float32)
    assert isinstance(y, Tensor)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 1, 2])


def test_numbers_do_not_change_the_dtype() -> None:
    x = Tensor([1.0, 2.0])
    assert x.dtype == np.float32
    for y in (x * 2.5, 1 - x, x / 3, x + np.float64(1), x.mean(), -x.sum() / 2):
        assert y.dtype == np.float32


def test_gradients_accumulate_in_leaves_only() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    y = x * 2
    y.sum().backward()
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 5, 5])
    assert y.grad is None and not y.is_leaf and x.is_leaf


def test_accumulation_is_in_place() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    x.sum().backward()
    first = x.grad
    x.sum().backward()
    assert x.grad is first


def test_later_gradients_are_added_to_arrays_of_their_own_only() -> None:
    """An array that a backward passes on, or gives to two inputs, must not change under anybody."""
    x = Tensor(np.ones(3), requires_grad=True)
    seen = []

    def twice(t: Tensor, u: Tensor) -> Tensor:
        def backward(dy: Array, _: object) -> tuple[Array, Array]:
            new = dy * 2
            seen.append((new, new.copy()))
            return new, new[:]

        return apply(t.data + u.data, (t, u), backward)

    a, b = x * 1.0, x * 3.0
    late = a + b  # gives both its own dy, after both have got one from `twice`
    weights = np.array([1.0, 2.0, 3.0])
    (twice(a, b) + late).backward(weights)
    np.testing.assert_array_equal(x.grad, weights * (2 + 2 * 3 + 4))
    np.testing.assert_array_equal(weights, [1, 2, 3])
    for given, copy in seen:
        np.testing.assert_array_equal(given, copy)


def test_later_gradients_are_added_in_place() -> None:
    x = Tensor(np.ones(1 << 20, np.float32), requires_grad=True)
    y = F.relu(x)
    branches = [F.relu(y) for _ in range(4)]
    total = branches[0] + branches[1] + branches[2] + branches[3]
    fastconv.empty_cache()  # blocks that other tests left are larger than what is asked for
    fastconv.reset_peak_memory_stats()
    before = fastconv.memory_stats()["bytes_in_use"]
    total.backward(np.ones(x.shape, np.float32))
    used = fastconv.memory_stats()["peak_bytes_in_use"] - before
    assert used <= 2 * x.data.nbytes + 4096, used  # the sum so far, and what is added to it
    np.testing.assert_array_equal(x.grad, 4)


def test_peak_memory_of_a_training_step() -> None:
    """A step keeps the output of every convolution and batch norm once: what their backwards need.
    Beyond that the gradients of the parameters, and two of the largest arrays in passing. Masks,
    gradients that outlive their use, or the inputs of sums would not fit.
    """
    model = models.create("resnet8_cifar")
    images = channels_last(draw(32, 3, 32, 32).astype(np.float32))
    sizes: list[int] = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    hooks = [
        layer.register_forward_hook(lambda _, __, y: sizes.append(y.data.nbytes))
        for layer in layers
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    assert len(sizes) == len(layers)
    parameters = sum(p.data.nbytes for p in model.parameters())

    def step() -> None:
        F.cross_entropy(model(images), np.arange(32) % 10).backward()

    step()
    model.zero_grad()
    gc.collect()
    fastconv.empty_cache()  # blocks that other tests left are larger than what is asked for
    fastconv.reset_peak_memory_stats()
    before = fastconv.memory_stats()["bytes_in_use"]
    step()
    used = fastconv.memory_stats()["peak_bytes_in_use"] - before
    assert used <= sum(sizes) + parameters + 2 * max(sizes), f"{used} bytes, of {sum(sizes)} kept"


def test_pooling_keeps_no_image() -> None:
    for pool in (lambda t: F.max_pool2d(t, 2), lambda t: F.avg_pool2d(t, 2), F.global_avg_pool2d):
        x = Tensor(channels_last(draw(4, 16, 64, 64)), requires_grad=True)
        fastconv.empty_cache()  # as above
        before = fastconv.memory_stats()["bytes_in_use"]
        y = pool(F.relu(F.leaky_relu(x)))
        kept = fastconv.memory_stats()["bytes_in_use"] - before
        # leaky_relu keeps x, and relu its output
        assert kept <= x.data.nbytes + 1.5 * y.data.nbytes
        y.backward(np.ones(y.shape))
        assert x.grad is not None and x.grad.any()


def test_forms_have_no_memory() -> None:
    for array in (
        draw(2, 3, 4, 5),
        channels_last(draw(2, 3, 4, 5)),
        draw(3, 4)[::-1, ::2],
        draw(3, 4).astype(">f4"),
    ):
        form = form_of(array)
        assert form.shape == array.shape and form.dtype == array.dtype.newbyteorder("=")
        assert form.flags.aligned and not form.flags.writeable
        assert (
            np.argsort(form.strides, kind="stable").tolist()
            == np.argsort(np.abs(array.strides), kind="stable").tolist()
        )
    assert form_of(draw(0, 4)).shape == (0, 4)
    large = form_of(np.broadcast_to(np.float32(1), (1 << 10, 1 << 20, 1 << 10)))
    assert large.nbytes == 1 << 42


def test_leaves_own_their_gradients() -> None:
    a, b = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    weights = np.ones(3)
    (a + b).backward(weights)
    assert a.grad is not None and b.grad is not None
    a.grad += 1
    np.testing.assert_array_equal(b.grad, [1, 1, 1])
    np.testing.assert_array_equal(weights, [1, 1, 1])
    x = Tensor(np.ones(3), requires_grad=True)
    x.backward(weights)
    assert not np.may_share_memory(x.grad, weights)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, w = Tensor(X), Tensor(W, requires_grad=True)
    seen: list[tuple[bool, ...]] = []

    def backward(dy: Array, needs: tuple[bool, ...]) -> tuple[None, Array]:
        seen.append(needs)
        return None, np.zeros(w.shape)

    apply(X[0], (x, w), backward).backward(X[0])
    assert seen == [(False, True)]
    F.conv2d(x, w).sum().backward()
    assert x.grad is None and w.grad is not None


def test_deep_chain_does_not_recurse() -> None:
    x = Tensor(np.ones(2), requires_grad=True)
    y = x
    for _ in range(20_000):
        y = y + 1
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])
    del y
    gc.collect()


def test_second_backward_is_a_clear_error() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_arrays_are_freed_by_backward() -> None:
    x = Tensor(np.ones(1000), requires_grad=True)
    y = x * 2
    held = weakref.ref(y.data)
    loss = (y * y).sum()
    del y
    assert held() is not None
    loss.backward()
    assert held() is None


def test_nothing_is_saved_without_gradients() -> None:
    for make in (lambda: Tensor(np.ones(8)), lambda: Tensor(np.ones(8), requires_grad=True)):
        x = make()
        with no_grad():
            y = x * 2
            held = weakref.ref(y.data)
            z = y * y
        assert not z.requires_grad and z.is_leaf
        del y
        assert held() is None


def test_no_grad_nests_decorates_and_is_of_one_thread() -> None:
    assert is_grad_enabled()
    with no_grad():
        with no_grad():
            pass
        assert not is_grad_enabled()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(is_grad_enabled()))
        thread.start()
        thread.join()
        assert seen == [True]
    assert is_grad_enabled()

    @no_grad()
    def countdown(n: int) -> bool:
        return is_grad_enabled() if n == 0 else countdown(n - 1)

    assert countdown(3) is False and is_grad_enabled()
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_grad_enabled()


def test_gradients_have_the_memory_order_of_their_tensors() -> None:
    x = Tensor(channels_last(X), requires_grad=True)
    w = Tensor(channels_last(W), requires_grad=True)
    F.conv2d(x, w, padding=1).flatten(1).sum().backward()
    for t in (x, w):
        assert t.grad is not None and t.grad.strides == t.data.strides


def test_backward_functions_see_the_layout_and_dtype_of_their_output() -> None:
    seen: list[Array] = []

    def backward(dy: Array, _: tuple[bool, ...]) -> tuple[Array]:
        seen.append(dy)
        return (dy,)

    x = Tensor(channels_last(X).astype(np.float32), requires_grad=True)
    y = apply(x.data * 1, (x,), backward)
    y.flatten(1).sum().backward()
    assert seen[0].strides == y.data.strides and seen[0].dtype == np.float32


def test_same_bits_on_every_run() -> None:
    def gradients() -> bytes:
        x = Tensor(X.astype(np.float32), requires_grad=True)
        y = x * 0.3
        for scale in (0.1, 0.7, 1.3):
            y = y + F.tanh(x * scale) + x * y
        y.sum().backward()
        assert x.grad is not None
        return x.grad.tobytes()

    assert gradients() == gradients()


def test_user_defined_operation() -> None:
    def square(x: Tensor) -> Tensor:
        values = x.data
        return apply(values * values, (x,), lambda dy, _: (2 * values * dy,))

    check_gradients(square, X)


def test_backward_functions_are_checked() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(RuntimeError, match="2 gradients for 1 inputs"):
        apply(x.data * 1, (x,), lambda dy, _: (dy, dy)).backward(np.ones(3))
    with pytest.raises(RuntimeError, match=r"shape \(4,\).*shape \(3,\)"):
        apply(x.data * 1, (x,), lambda dy, _: (np.ones(4),)).backward(np.ones(3))


def test_errors_name_the_values() -> None:
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        (x * 1).backward()
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        (x * 1).backward(np.ones((3, 2)))
    with pytest.raises(RuntimeError, match="no gradient"):
        Tensor(np.ones(1)).backward()
    with pytest.raises(ValueError, match="start_dim 1 comes after end_dim 0"):
        x.flatten(1, 0)
    with pytest.raises(ValueError, match="at least one"):
        F.cat([])
    with pytest.raises(ValueError, match="swish"):
        F.conv2d(X, W, activation="swish")
    with pytest.raises(ValueError, match=r"1\.5"):
        F.dropout(x, 1.5)


def test_exchange_with_numpy() -> None:
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = Tensor(data)
    assert x.numpy() is data and np.asarray(x) is data
    assert np.shares_memory(np.from_dlpack(x), data)
    assert np.asarray(x, np.float64).dtype == np.float64
    assert Tensor(3.5).item() == 3.5 and (x.shape, x.ndim) == ((2, 3), 2)
    tracked = Tensor(data, requires_grad=True)
    for convert, error in ((np.asarray, RuntimeError), (np.from_dlpack, BufferError)):
        with pytest.raises(error, match="detach"):
            convert(tracked)
    with pytest.raises(TypeError):
        np.exp(tracked)
    assert tracked.detach().numpy() is data


def test_exchange_with_torch() -> None:
    torch = pytest.importorskip("torch")
    source = torch.ones(2, 3, requires_grad=True)
    x = Tensor(source)
    x.data[0, 0] = 5
    assert source[0, 0] == 5 and x.dtype == np.float32
    assert torch.from_dlpack(x)[0, 0] == 5

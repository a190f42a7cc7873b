"""The same bits for 1, 2 and 3 threads, on repeated runs, and whatever ran before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest

import fastconv as fc
from tests.cases import CONV_CASES, ConvCase
from tests.conftest import each_algorithm
from tests.memory import channels_last
from tests.reference import assert_same_bits, conv_data, normal

# Large enough to be cut into several chunks, with sums that cross chunks.
CONV = [
    ConvCase("3x3", 5, 35, 19, 18, 40, 3, 3, padding=1),
    ConvCase("3x3_s2", 5, 35, 19, 18, 40, 3, 3, stride=2, padding=1),
    ConvCase("1x1", 6, 65, 14, 15, 70, 1, 1),
    ConvCase("depthwise", 5, 70, 19, 18, 70, 3, 3, padding=1, groups=70),
    ConvCase("groups", 5, 32, 12, 13, 48, 3, 3, padding=1, groups=4),
    ConvCase("rgb", 6, 3, 32, 30, 33, 3, 3, padding=1),
    ConvCase("one_image", 1, 130, 9, 9, 140, 3, 3, padding=1),
    ConvCase("few_channels_many_pixels", 2, 5, 90, 80, 6, 3, 3, padding=1),
]


Operations = Iterator[tuple[str, Callable[[], object]]]


def conv_operations() -> Operations:
    for case in CONV:
        x = channels_last(normal(case, "x", shape=case.x_shape))
        w, dy = normal(case, "w", shape=case.w_shape), normal(case, "dy", shape=case.y_shape)
        arguments, dy = case.arguments, channels_last(dy)
        yield f"conv2d {case}", lambda x=x, w=w, a=arguments: fc.conv2d(x, w, **a)
        for i, name in enumerate(["dx", "dw", "db"]):
            needs = tuple(j == i for j in range(3))
            yield (
                f"conv2d_backward {name} {case}",
                lambda dy=dy, x=x, w=w, a=arguments, needs=needs: fc.conv2d_backward(
                    dy, x, w, **a, needs=needs
                ),
            )


def other_operations() -> Operations:
    x = channels_last(normal("x", shape=(6, 35, 28, 30)))
    dy = channels_last(normal("dy", shape=(6, 35, 28, 30)))
    pooled = channels_last(normal("pooled", shape=(6, 35, 14, 15)))
    one = normal("one", shape=(6, 35, 1, 1))
    w, weight, bias = normal("w", shape=(35, 21, 3, 3)), abs(x[0, :, 0, 0]), x[1, :, 1, 1].copy()
    residual = channels_last(normal("residual", shape=x.shape))
    fused = {"residual": residual, "activation": "relu"}
    geometry = {"stride": 2, "padding": 1, "output_padding": 1}
    transposed = normal("t", shape=(6, 21, 56, 60))
    flat, flat_w = x.reshape(6, -1)[:, :4096], normal("f", shape=(67, 4096))
    flat_dy, flat_bias = normal("fd", shape=(6, 67)), normal("fb", shape=(67,))
    rows, target = normal("rows", shape=(700, 33)), np.arange(700) % 33
    yield "conv_transpose2d", lambda: fc.conv_transpose2d(x, w, **geometry)
    yield (
        "conv_transpose2d_backward",
        lambda: fc.conv_transpose2d_backward(transposed, x, w, **geometry),
    )
    yield "max_pool2d", lambda: fc.max_pool2d(x, 3, 2, 1, return_indices=True)
    yield "max_pool2d places", lambda: fc.max_pool2d(x, 3, 2, 1, return_places=True)
    yield "max_pool2d_backward", lambda: fc.max_pool2d_backward(pooled, x, 3, 2, 1)
    yield "avg_pool2d", lambda: fc.avg_pool2d(x, 3, 2, 1)
    yield "avg_pool2d_backward", lambda: fc.avg_pool2d_backward(pooled, x, 3, 2, 1)
    yield "adaptive_avg_pool2d", lambda: fc.adaptive_avg_pool2d(x, (5, 4))
    yield "global_avg_pool2d", lambda: fc.global_avg_pool2d(x)
    yield "global_avg_pool2d_backward", lambda: fc.global_avg_pool2d_backward(one, x)

    def train() -> object:
        mean, var = np.zeros(35, np.float32), np.ones(35, np.float32)
        return fc.batch_norm_train(x, weight, bias, mean, var, 0.1, 1e-5, **fused), mean, var

    yield "batch_norm_train", train
    yield (
        "batch_norm_max_pool_train",
        lambda: fc.batch_norm_max_pool_train(x, weight, bias, None, None, 0.1, 1e-5, 2),
    )
    y, places, mean, rstd = fc.batch_norm_max_pool_train(x, weight, bias, None, None, 0.1, 1e-5, 2)
    yield (
        "batch_norm_max_pool_backward",
        lambda: fc.batch_norm_max_pool_backward(y, x, places, weight, mean, rstd, 2, bias=bias),
    )
    yield (
        "batch_norm_backward silu",
        lambda: fc.batch_norm_backward(dy, x, weight, bias, weight, bias=bias, activation="silu"),
    )
    yield (
        "batch_norm_backward",
        lambda: fc.batch_norm_backward(dy, x, weight, bias, weight, bias=bias, **fused),
    )
    yield "local_response_norm", lambda: fc.local_response_norm(x, 5, beta=0.6)
    yield "local_response_norm_backward", lambda: fc.local_response_norm_backward(dy, x, 5)
    yield "batch_norm_moments", lambda: fc.batch_norm_moments(x)
    yield (
        "batch_norm_backward_sums",
        lambda: fc.batch_norm_backward_sums(dy, x, weight, bias, weight, bias=bias, **fused),
    )
    sums = np.ones((2, 35))
    yield (
        "batch_norm_backward_input",
        lambda: fc.batch_norm_backward_input(dy, x, weight, bias, weight, sums, 1 << 20),
    )
    yield "gelu", lambda: fc.gelu(x)
    yield "silu_backward", lambda: fc.silu_backward(dy, x)
    yield "add", lambda: fc.add(x, dy)
    yield "linear", lambda: fc.linear(flat, flat_w, flat_bias)
    yield "linear_backward", lambda: fc.linear_backward(flat_dy, flat, flat_w)
    yield (
        "linear_backward tall",
        lambda: fc.linear_backward(rows, rows, normal("r", shape=(33, 33))),
    )
    yield "dropout", lambda: fc.dropout(x, 0.5, seed=1)
    yield "stochastic_depth", lambda: fc.stochastic_depth(x, 0.5, "row", seed=1)
    yield "cat", lambda: fc.cat([x, dy, x])
    yield "cat_backward", lambda: fc.cat_backward(x, (3, 32))
    yield "channel_gate", lambda: fc.channel_gate(x, one)
    yield "channel_gate_backward", lambda: fc.channel_gate_backward(dy, x, one)
    large = channels_last(normal("large", shape=(1, 35, 80, 90)))  # several chunks an image
    yield (
        "channel_gate_backward large",
        lambda: fc.channel_gate_backward(large, large, one[:1]),
    )
    yield "softmax", lambda: fc.softmax(rows)
    yield "log_softmax", lambda: fc.log_softmax(rows, 0)
    yield "cross_entropy", lambda: fc.cross_entropy(rows, target, label_smoothing=0.1)
    yield (
        "cross_entropy_backward",
        lambda: fc.cross_entropy_backward(np.float32(1), rows, target, label_smoothing=0.1),
    )


@cache
def operations() -> dict[str, Callable[[], object]]:
    return {**dict(conv_operations()), **dict(other_operations())}


def flatten(result: object) -> list[np.ndarray]:
    if isinstance(result, tuple):
        return [a for part in result for a in flatten(part)]
    return [] if result is None else [np.asarray(result)]


def check(call: Callable[[], object], expected: object, what: str) -> None:
    for got, right in zip(flatten(call()), flatten(expected), strict=True):
        assert_same_bits(got, right, what)


@pytest.mark.parametrize("name", [name for name, _ in conv_operations()])
def test_convolution(name, isa):
    call = operations()[name]
    fc.set_num_threads(1)
    expected = dict(each_algorithm(call))
    for threads in (2, 3, 1):
        fc.set_num_threads(threads)
        for _ in range(2):
            for algorithm, got in each_algorithm(call):
                check(lambda got=got: got, expected[algorithm], f"{algorithm}, {threads} threads")


@pytest.mark.parametrize("part", range(4))
def test_every_shape_with_three_threads(part):
    """Small shapes, too: every way in which work is cut."""
    for case in CONV_CASES[part::4]:
        data = conv_data(case)

        def call(data=data, case=case) -> object:
            y = fc.conv2d(data.x, data.w, data.bias, **case.arguments)
            return y, fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments)

        fc.set_num_threads(1)
        expected = call()
        fc.set_num_threads(3)
        check(call, expected, str(case))


@pytest.mark.parametrize("name", [name for name, _ in other_operations()])
def test_other_operations(name, isa):
    call = operations()[name]
    fc.set_num_threads(1)
    expected = call()
    for threads in (2, 3, 7, 1):
        fc.set_num_threads(threads)
        for _ in range(2):
            check(call, expected, f"{threads} threads")


def test_optimizer_steps():
    shapes = [(64, 32, 3, 3), (64,), (10, 4096), (1,), (7, 5)]

    def run(threads: int) -> list[np.ndarray]:
        fc.set_num_threads(threads)
        params = [normal("p", s, shape=s) for s in shapes]
        grads = [normal("g", s, shape=s) for s in shapes]
        state = [[np.zeros(s, np.float32) for s in shapes] for _ in range(3)]
        averages = [p.copy() for p in params]
        for step in (1, 2):
            fc.ops.optimizer.sgd_step(
                params, grads, state[0], lr=0.1, momentum=0.9, dampening=0.0,
                weight_decay=1e-4, nesterov=True, first=step == 1,
            )  # fmt: skip
            fc.ops.optimizer.adamw_step(
                params, grads, state[1], state[2], step=step, lr=1e-3, beta1=0.9, beta2=0.999,
                eps=1e-8, weight_decay=0.01,
            )  # fmt: skip
            fc.ops.optimizer.move_towards(averages, params, 0.3)
        norm = np.array(fc.ops.optimizer.gradient_norm(grads))
        return [*params, *state[0], *state[1], *state[2], *averages, norm]

    expected = run(1)
    for threads in (2, 3):
        for got, right in zip(run(threads), expected, strict=True):
            assert_same_bits(got, right)


def test_results_do_not_depend_on_where_memory_comes_from(isa):
    """Cached blocks of other calls, an emptied cache, other addresses of the input."""
    case = CONV[0]
    x, w = normal(case, "x", shape=case.x_shape), normal(case, "w", shape=case.w_shape)
    y = fc.conv2d(x, w, **case.arguments)
    for other in CONV[1:]:
        fc.conv2d(np.ones(other.x_shape, "f"), np.ones(other.w_shape, "f"), **other.arguments)
        assert_same_bits(fc.conv2d(x.copy(), w.copy(), **case.arguments), y)
        fc.empty_cache()
        assert_same_bits(fc.conv2d(x, w, **case.arguments), y)

"""conv2d and its gradients: every implementation, instruction set and layout against float64."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc
from tests import reference
from tests.cases import (
    CONV_CASES,
    CONV_PADDING,
    MOBILENET_V1,
    MOBILENET_V2,
    RESNET50,
    VGG16,
    ConvCase,
    channel_tails,
    reduced_network_layers,
    spatial_tails,
)
from tests.conftest import ALGORITHMS, NAMES, WINOGRAD, each_algorithm, forced
from tests.memory import LAYOUTS, as_layout, channels_last, is_channels_last
from tests.reference import assert_conv_close, assert_same_bits, conv_data

DIRECTIONS = {"dx": (True, False, False), "dw": (False, True, False), "db": (False, False, True)}


def backward(case: ConvCase, name: str, dy: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One of the three gradients, asked for alone."""
    results = fc.conv2d_backward(dy, x, w, **case.arguments, needs=DIRECTIONS[name])
    (result,) = [r for r in results if r is not None]
    return result


def chosen(case: ConvCase, name: str) -> str | None:
    """The implementation that computes y, dx or dw; None for db."""
    directions = {"y": "forward", "dx": "backward_input", "dw": "backward_weight"}
    if name not in directions:
        return None
    rows = fc.explain("conv2d", case.x_shape, case.w_shape, **case.arguments,
                      direction=directions[name])  # fmt: skip
    return rows[-1][0]


def check(
    case: ConvCase, names: str = "y dx dw db", data: reference.ConvData | None = None
) -> None:
    """The results against the oracle: the chosen implementation with NCHW arrays, and every one
    that accepts the case with channels-last arrays."""
    data = data or conv_data(case)
    x, dy = channels_last(data.x), channels_last(data.dy)
    for name in names.split():
        limit = data.ref[name], data.abs_ref[name], case.products[name]
        if name == "y":
            dense = fc.conv2d(data.x, data.w, **case.arguments)
            runs = each_algorithm(lambda: fc.conv2d(x, data.w, **case.arguments))
        else:
            dense = backward(case, name, data.dy, data.x, data.w)
            runs = each_algorithm(lambda name=name: backward(case, name, dy, x, data.w))
        by_winograd = chosen(case, name) in WINOGRAD
        assert_conv_close(dense, *limit, f"{case} {name} NCHW", by_winograd)
        for algorithm, result in runs:
            winograd = algorithm in WINOGRAD or (algorithm == "chosen" and by_winograd)
            assert_conv_close(result, *limit, f"{case} {name} {algorithm}", winograd)


# -------------------------------------------------------------------------------------------------
# The oracle and the case list.


@pytest.mark.parametrize("case", CONV_CASES[::4] + CONV_PADDING, ids=str)
def test_oracle_agrees_with_the_definition(case):
    data = conv_data(case)
    looped = reference.loop_conv2d(data.x, data.w, data.dy, case)
    for name, result in zip(["y", "dx", "dw", "db"], looped, strict=True):
        np.testing.assert_allclose(data.ref[name], result, rtol=1e-11, atol=1e-11)


def test_error_limit_rejects_a_wrong_element():
    """The limit must notice one wrong product in one element."""
    case = CONV_CASES[1]
    data = conv_data(case)
    limit = data.abs_ref["y"], case.products["y"]
    right = data.ref["y"].astype(np.float32)
    assert_conv_close(right, data.ref["y"], *limit)
    for wrong in (right * np.float32(1 + 1e-5), np.where(right == right.max(), 0, right)):
        with pytest.raises(AssertionError):
            assert_conv_close(wrong, data.ref["y"], *limit)
    for value in (np.nan, np.inf, right[0, 0, 0, 0] + np.float32(1e-4)):
        wrong = right.copy()
        wrong[0, 0, 0, 0] = value
        with pytest.raises(AssertionError):
            assert_conv_close(wrong, data.ref["y"], *limit)


@pytest.mark.parametrize(
    ("layers", "convolutions", "macs"),
    [
        (RESNET50, 53, 4_087_136_256),
        (VGG16, 13, 15_346_630_656),
        (MOBILENET_V1, 27, 567_716_352),
        (MOBILENET_V2, 52, 299_494_272),
    ],
)
def test_network_layer_lists_have_the_published_size(layers, convolutions, macs):
    assert sum(layer.count for layer in layers) == convolutions
    assert sum(layer.count * layer.macs // layer.n for layer in layers) == macs


# -------------------------------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_forward(case, isa):
    check(case, "y")


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_gradients(case, isa):
    check(case, "dx dw db")


@pytest.mark.parametrize("sweep", channel_tails())
def test_channel_tails(sweep, isa):
    for case in channel_tails()[sweep]:
        check(case)


@pytest.mark.parametrize("sweep", spatial_tails())
def test_spatial_tails(sweep, isa):
    for case in spatial_tails()[sweep]:
        check(case)


@pytest.mark.parametrize("case", reduced_network_layers(), ids=str)
def test_network_layers(case, isa):
    """The library's choice on the channel counts of real networks."""
    data = conv_data(case)
    x, dy = channels_last(data.x), channels_last(data.dy)
    y = fc.conv2d(x, data.w, **case.arguments)
    results = (y, *fc.conv2d_backward(dy, x, data.w, **case.arguments))
    for name, result in zip(["y", "dx", "dw", "db"], results, strict=True):
        limit = data.ref[name], data.abs_ref[name], case.products[name]
        assert_conv_close(result, *limit, f"{case} {name}", chosen(case, name) in WINOGRAD)


@pytest.mark.parametrize("case", CONV_CASES[::2], ids=str)
def test_integers_are_exact(case, isa, strict):
    """Small integers make every partial sum exact in any order, so every bit must be right."""
    data = reference.integer_conv_data(case)
    x, dy = channels_last(data.x), channels_last(data.dy)
    for algorithm, y in each_algorithm(lambda: fc.conv2d(x, data.w, **case.arguments)):
        np.testing.assert_array_equal(y, data.ref["y"], f"{case} y {algorithm}")
    for name in DIRECTIONS:
        for algorithm, result in each_algorithm(
            lambda name=name: backward(case, name, dy, x, data.w)
        ):
            np.testing.assert_array_equal(result, data.ref[name], f"{case} {name} {algorithm}")


@pytest.mark.parametrize("case", CONV_CASES[::3], ids=str)
def test_float64(case):
    data = conv_data(case, np.float64)
    y = fc.conv2d(data.x, data.w, **case.arguments)
    results = (y, *fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments))
    for name, result in zip(["y", "dx", "dw", "db"], results, strict=True):
        assert result.dtype == np.float64
        assert_conv_close(result, data.ref[name], data.abs_ref[name], case.products[name], name)


GRADIENT_CASES = [
    ConvCase("sides_s2", 2, 4, 5, 4, 4, 3, 2, 2, ((1, 0), (0, 2)), 1, 2),
    ConvCase("same_dilated", 1, 2, 5, 6, 3, 3, 3, 2, "same", (1, 2)),
    ConvCase("depthwise", 1, 3, 5, 4, 6, 3, 3, 1, 1, 1, 3),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_by_finite_differences(case):
    data = conv_data(case, np.float64)

    def function(x, w, bias):
        return fc.conv2d(x, w, bias, **case.arguments)

    gradients = fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments)
    reference.assert_gradient(function, [data.x, data.w, data.bias], data.dy, list(gradients))


# -------------------------------------------------------------------------------------------------
# Bias, activation, residual.


FUSED_CASES = [
    ConvCase("3x3", 2, 19, 6, 7, 21, 3, 3, padding=1),
    ConvCase("3x3_s2", 2, 32, 7, 9, 16, 3, 3, stride=2, padding=1),
    ConvCase("1x1", 2, 19, 6, 7, 37, 1, 1),
    ConvCase("depthwise", 2, 35, 6, 7, 35, 3, 3, padding=1, groups=35),
    ConvCase("groups", 2, 10, 6, 7, 6, 3, 3, padding=1, groups=2),
    ConvCase("rgb", 2, 3, 8, 9, 33, 3, 3, padding=1),
    ConvCase("many_channels", 1, 600, 4, 5, 18, 3, 3, padding=1),
    ConvCase("empty_batch", 0, 4, 6, 7, 5, 3, 3),
]


@pytest.mark.parametrize("activation", [None, *reference.FUSED_ACTIVATIONS])
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_bias_activation_residual(case, activation, isa):
    data = conv_data(case)
    residual = reference.normal(case, "residual", shape=case.y_shape)
    x = channels_last(data.x)
    for with_bias in (False, True):
        for given in (None, channels_last(residual), residual):
            bias = data.bias if with_bias else None
            before = data.ref["y"] + (0 if given is None else residual)
            scale = data.abs_ref["y"] + (0 if given is None else abs(residual))
            if with_bias:
                before = before + data.bias[:, None, None].astype(np.float64)
                scale = scale + abs(data.bias)[:, None, None]
            ref = reference.activation(activation, before)
            terms = case.products["y"] + with_bias + (given is not None)
            for algorithm, y in each_algorithm(
                lambda bias=bias, given=given: fc.conv2d(
                    x, data.w, bias, **case.arguments, activation=activation, residual=given
                )
            ):
                if algorithm == "chosen":
                    algorithm = chosen(case, "y")
                limit = reference.conv_limit(scale, terms, winograd=algorithm in WINOGRAD)
                if activation is not None:
                    limit = limit * reference.FUSED_ACTIVATIONS[activation]
                    limit = limit + reference.activation_limit(activation, before, ref)
                what = f"{case} {algorithm} {with_bias} {given is not None}"
                reference.assert_within(y, ref, limit, what)


def test_bias_is_added_once_per_element():
    """Where no window meets data (padding beyond the kernel), the result is the bias."""
    x, w = np.ones((1, 3, 2, 2), np.float32), np.ones((5, 3, 1, 1), np.float32)
    bias = np.arange(5, dtype=np.float32)
    y = fc.conv2d(x, w, bias, padding=2)
    np.testing.assert_array_equal(y[0, :, 0, 0], bias)
    np.testing.assert_array_equal(y[0, :, 2, 2], bias + 3)


# -------------------------------------------------------------------------------------------------
# Layouts.


LAYOUT_CASES = [
    ConvCase("3x3", 2, 19, 6, 7, 21, 3, 3, padding=1),
    ConvCase("1x1_s2", 2, 19, 6, 7, 37, 1, 1, stride=2),
    ConvCase("depthwise", 2, 35, 6, 7, 35, 3, 3, padding=1, groups=35),
    ConvCase("rgb", 2, 3, 8, 9, 33, 3, 3, padding=1),
]
# Its dw is written around the caches.
LARGE_WEIGHTS = ConvCase("large_weights", 2, 272, 4, 5, 240, 3, 3, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*LAYOUT_CASES, LARGE_WEIGHTS], ids=str)
def test_layouts_do_not_change_a_bit(case, layout, isa):
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, data.bias, **case.arguments)
    expected = fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments)
    bias = as_layout(data.bias, layout if layout in ("sliced", "reversed", "unaligned") else "nchw")
    for x, w, dy in [
        (as_layout(data.x, layout), data.w, data.dy),
        (data.x, as_layout(data.w, layout), data.dy),
        (data.x, data.w, as_layout(data.dy, layout)),
        [as_layout(a, layout) for a in (data.x, data.w, data.dy)],
    ]:
        assert_same_bits(fc.conv2d(x, w, bias, **case.arguments), y, "y")
        gradients = fc.conv2d_backward(dy, x, w, **case.arguments)
        for name, got, right in zip(["dx", "dw", "db"], gradients, expected, strict=True):
            assert_same_bits(got, right, name)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_stride_zero_arrays(case, isa):
    """Broadcast arrays, as sum().backward() makes them."""
    data = conv_data(case)
    x = np.broadcast_to(data.x[:, :1], case.x_shape)
    w = np.broadcast_to(data.w[:, :, :1, :1], case.w_shape)
    dy = np.broadcast_to(np.float32(1), case.y_shape)
    dense = [np.ascontiguousarray(a) for a in (x, w, dy)]
    assert_same_bits(fc.conv2d(x, w, **case.arguments), fc.conv2d(*dense[:2], **case.arguments))
    got = fc.conv2d_backward(dy, x, w, **case.arguments)
    right = fc.conv2d_backward(dense[2], dense[0], dense[1], **case.arguments)
    for a, b in zip(got, right, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_layout_of_results_follows_the_input(case):
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, **case.arguments)
    assert y.flags.c_contiguous and not is_channels_last(y)
    dx, dw, _ = fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments)
    assert dx.flags.c_contiguous and dw.shape == data.w.shape
    y = fc.conv2d(channels_last(data.x), data.w, **case.arguments)
    assert is_channels_last(y)
    dx, _, _ = fc.conv2d_backward(channels_last(data.dy), channels_last(data.x), data.w,
                                  **case.arguments)  # fmt: skip
    assert is_channels_last(dx)


# -------------------------------------------------------------------------------------------------
# Arguments.


def test_forms_of_padding():
    case = LAYOUT_CASES[0]
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, padding=1)
    for padding in [(1, 1), [1, 1], ((1, 1), (1, 1)), np.int64(1), "same"]:
        assert_same_bits(fc.conv2d(data.x, data.w, padding=padding), y, str(padding))
    assert_same_bits(
        fc.conv2d(data.x, data.w, padding="valid"), fc.conv2d(data.x, data.w, padding=0)
    )


def test_forms_of_stride_and_dilation():
    case = LAYOUT_CASES[0]
    data = conv_data(case)
    y = fc.conv2d(data.x, data.w, None, 2, 1, 1, 1)
    assert_same_bits(fc.conv2d(data.x, data.w, None, (2, 2), (1, 1), (1, 1)), y)
    assert_same_bits(fc.conv2d(data.x, data.w, stride=[2, 2], padding=1, dilation=np.int32(1)), y)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_same_gives_ceil_size_over_stride(stride, kernel):
    for size in range(1, 12):
        x, w = np.ones((1, 1, size, size + 1), np.float32), np.ones((1, 1, kernel, kernel), "f")
        y = fc.conv2d(x, w, stride=stride, padding="same")
        assert y.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))


def test_needs_selects_the_gradients():
    case = LAYOUT_CASES[0]
    data = conv_data(case)
    full = fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments)
    for bits in range(8):
        needs = tuple(bool(bits >> i & 1) for i in range(3))
        got = fc.conv2d_backward(data.dy, data.x, data.w, **case.arguments, needs=needs)
        for wanted, result, right in zip(needs, got, full, strict=True):
            if wanted:
                assert_same_bits(result, right)
            else:
                assert result is None


def test_cross_correlation_not_flipped():
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    w = np.array([[[[1, 0], [0, -1]]]], np.float32)
    np.testing.assert_array_equal(fc.conv2d(x, w)[0, 0], [[-4, -4], [-4, -4]])


def test_nan_and_infinity_reach_exactly_their_windows(isa, strict):
    for case in LAYOUT_CASES:
        data = conv_data(case)
        for value in (np.nan, np.inf):
            x = data.x.copy()
            x[1, 0, 2, 4] = value
            ref = reference.conv2d(x, data.w, case)
            for algorithm, y in each_algorithm(
                lambda x=x, case=case, w=data.w: fc.conv2d(channels_last(x), w, **case.arguments)
            ):
                assert (np.isfinite(y) == np.isfinite(ref)).all(), (case, value, algorithm)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "sigmoid", "tanh", "hardswish"])
def test_fused_activation_keeps_nan(activation, isa, strict):
    for case in FUSED_CASES[:-1]:
        data = conv_data(case)
        x = data.x.copy()
        x[1 % case.n, 0, 2, 4] = np.nan
        expected = np.isnan(reference.conv2d(x, data.w, case))
        for algorithm, y in each_algorithm(
            lambda x=x, case=case, data=data: fc.conv2d(
                channels_last(x), data.w, data.bias, **case.arguments, activation=activation
            )
        ):
            assert (np.isnan(y) == expected).all(), (case, algorithm)


def test_explain_names_the_implementation_that_runs():
    for case in CONV_CASES:
        for direction in ("forward", "backward_input", "backward_weight"):
            rows = fc.explain("conv2d", case.x_shape, case.w_shape, **case.arguments,
                              direction=direction)  # fmt: skip
            assert rows and all(name in NAMES for name, _ in rows), rows
            chosen = [name for name, reason in rows if reason is None]
            assert chosen, rows
            assert all(isinstance(reason, str) for name, reason in rows if name not in chosen)


def test_explain_and_forcing_agree():
    for case in CONV_CASES[::3]:
        if not case.n:
            continue
        data = conv_data(case)
        rows = fc.explain("conv2d", case.x_shape, case.w_shape, **case.arguments)
        for name, reason in rows:
            with forced(name):
                if reason is None:
                    fc.conv2d(data.x, data.w, **case.arguments)
                else:
                    with pytest.raises(ValueError, match=name):
                        fc.conv2d(data.x, data.w, **case.arguments)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_implementation_is_exercised(algorithm):
    """The case list must reach each implementation often, or it tests nothing."""
    accepted = 0
    with forced(algorithm):
        for case in CONV_CASES:
            data = conv_data(case)
            calls = (
                lambda d=data, c=case: fc.conv2d(d.x, d.w, **c.arguments),
                *(
                    lambda d=data, c=case, n=needs: fc.conv2d_backward(
                        d.dy, d.x, d.w, **c.arguments, needs=n
                    )
                    for needs in ((True, False, False), (False, True, False))
                ),
            )
            accepted += any(accepts(call) for call in calls)
    assert accepted >= 8


def accepts(call) -> bool:
    """Whether the algorithm that is forced takes this call."""
    try:
        call()
    except ValueError as error:
        assert "algorithm" in str(error)
        return False
    return True


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="no_such_thing"):
        fc._C.set_algorithm("no_such_thing")

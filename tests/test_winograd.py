"""Winograd F(4x4, 3x3), F(2x2, 5x5), F(3x3, 4x4) and F(3, 4) of kernels in parts, F(5x5, 2x2) of
those at stride 2 and, on few channels, F(4, 3) along rows: sizes, channels, padding, dilation, data
of any range, and what it may not touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import fastconv as fc
from tests import reference
from tests.cases import ConvCase, ConvTransposeCase
from tests.conftest import forced
from tests.memory import channels_last, guarded
from tests.reference import assert_conv_close, assert_same_bits, conv_data


def by_rows(case: ConvCase) -> bool:
    """Few channels are transformed along the rows alone, and there is no such input gradient."""
    return case.c <= 4


def algorithm(case: ConvCase) -> str:
    return "winograd_rows" if by_rows(case) else "winograd"


def has_forward(case: ConvCase) -> bool:
    """AVX2's 16 registers hold too few tiles along rows to beat a plain convolution with FMA."""
    return not by_rows(case) or fc.isa() != "avx2"


def run(case: ConvCase, data: reference.ConvData) -> dict[str, np.ndarray]:
    """Those of y, dx and dw that are found by Winograd."""
    x, dy = channels_last(data.x), channels_last(data.dy)
    results = {}
    with forced(algorithm(case)):
        if has_forward(case):
            results["y"] = fc.conv2d(x, data.w, **case.arguments)
        needs = (not by_rows(case), True, False)
        dx, results["dw"], _ = fc.conv2d_backward(dy, x, data.w, **case.arguments, needs=needs)
    return results if by_rows(case) else {**results, "dx": dx}


def check(case: ConvCase, data: reference.ConvData | None = None) -> None:
    data = data or conv_data(case)
    for name, got in run(case, data).items():
        limit = data.ref[name], data.abs_ref[name], case.products[name]
        assert_conv_close(got, *limit, f"{case} {name}", winograd=True)


def case3x3(name: str, n: int, c: int, h: int, w: int, k: int, padding=1, groups: int = 1):
    return ConvCase(name, n, c, h, w, k, 3, 3, padding=padding, groups=groups)


@pytest.mark.parametrize("size", range(5, 25))
def test_sizes(size, isa):
    """Every mixture of tiles of 4 and 3, with and without a last tile that reaches over."""
    check(case3x3("rows", 2, 16, size, 9, 16))
    check(case3x3("columns", 1, 17, 14, size, 18))


@pytest.mark.parametrize("size", range(5, 12))
def test_sizes_of_kernels_in_parts(size, isa):
    """Every last tile, across and down."""
    check(ConvCase("7x7", 1, 16, size, 8, 17, 7, 7, padding=3))
    for r, s in ((1, 7), (7, 1)):
        if size != 7:  # where too many of the tiles' outputs are beyond the image
            check(ConvCase(f"{r}x{s}", 1, 24, size, size, 25, r, s, padding=(r // 2, s // 2)))


def strided(name: str, n: int, c: int, h: int, w: int, k: int, padding=1, groups: int = 1):
    return ConvCase(name, n, c, h, w, k, 3, 3, 2, padding, groups=groups)


@pytest.mark.parametrize("size", [8, 9, 10, *range(14, 25)])
def test_sizes_at_stride_2(size, isa):
    """Every mixture of tiles of 5 and 4, in all phases of the input gradient."""
    check(strided("rows", 2, 32, size, 16, 33))
    check(strided("columns", 1, 33, 18, size, 34))


@pytest.mark.parametrize("channels", [16, 17, 24, 31, 32, 33, 40, 48, 63, 65])
def test_channels(channels, isa):
    check(case3x3("c", 1, channels, 8, 7, 16))
    check(case3x3("k", 1, 16, 8, 7, channels))
    check(case3x3("both", 1, channels, 7, 10, channels))


CASES = [
    case3x3("padding_0", 2, 20, 9, 8, 20, 0),
    case3x3("padding_2", 2, 20, 9, 8, 20, 2),
    case3x3("padding_beyond_the_kernel", 1, 16, 6, 7, 16, 4),
    case3x3("four_sides", 1, 18, 9, 8, 20, ((0, 2), (1, 3))),
    case3x3("groups", 2, 96, 9, 8, 60, 1, 3),
    case3x3("groups_padded", 1, 34, 7, 7, 70, 2, 2),
    case3x3("many_images", 40, 16, 5, 6, 16),
    case3x3("large", 3, 130, 7, 6, 140),
    case3x3("large_groups", 2, 260, 8, 9, 280, 1, 2),
    case3x3("one_panel", 2, 600, 6, 6, 32),
]

CASES_5X5 = [
    ConvCase("5x5", 2, 20, 9, 8, 40, 5, 5, padding=2),
    ConvCase("5x5_valid", 1, 17, 11, 10, 18, 5, 5),
    ConvCase("5x5_four_sides", 1, 18, 7, 9, 20, 5, 5, padding=((0, 3), (4, 1))),
    ConvCase("5x5_groups", 2, 66, 8, 7, 36, 5, 5, padding=2, groups=2),
    ConvCase("5x5_large", 1, 130, 7, 6, 140, 5, 5, padding=2),
    ConvCase("5x5_dilated", 1, 16, 13, 14, 24, 5, 5, padding=(4, 2), dilation=(2, 1)),
]

# Kernels in parts of four taps; 7x1 is 1x7 with its axes exchanged.
CASES_7 = [
    ConvCase("7x7", 2, 20, 9, 8, 40, 7, 7, padding=3),
    ConvCase("7x7_valid", 1, 17, 13, 12, 18, 7, 7),
    ConvCase("7x7_four_sides", 1, 18, 7, 9, 20, 7, 7, padding=((0, 5), (4, 1))),
    ConvCase("7x7_groups", 2, 66, 6, 7, 36, 7, 7, padding=3, groups=2),
    ConvCase("7x7_large", 1, 130, 7, 6, 140, 7, 7, padding=3),
    ConvCase("7x7_dilated", 1, 16, 17, 14, 24, 7, 7, padding=(6, 3), dilation=(2, 1)),
    ConvCase("1x7", 2, 33, 5, 8, 40, 1, 7, padding=(0, 3)),
    ConvCase("7x1", 2, 40, 9, 5, 33, 7, 1, padding=(3, 0)),
    ConvCase("1x7_four_sides", 1, 24, 4, 9, 25, 1, 7, padding=((1, 0), (2, 4))),
    ConvCase("7x1_groups", 2, 96, 6, 5, 50, 7, 1, padding=((3, 3), (1, 2)), groups=2),
    ConvCase("1x7_large", 3, 330, 2, 9, 320, 1, 7, padding=(0, 3)),
    ConvCase("7x1_large", 1, 250, 8, 3, 210, 7, 1, padding=(3, 0)),
    ConvCase("7x1_dilated", 1, 25, 18, 4, 24, 7, 1, padding=(6, 0), dilation=(2, 3)),
]

# Grids of equal and of different sizes, larger and smaller than a tile.
CASES_DILATED = [
    ConvCase("dilated_2", 2, 20, 12, 16, 40, 3, 3, padding=2, dilation=2),
    ConvCase("dilated_2_odd", 2, 34, 13, 11, 36, 3, 3, padding=2, dilation=2, groups=2),
    ConvCase("dilated_rows", 1, 18, 15, 8, 17, 3, 3, padding=(3, 1), dilation=(3, 1)),
    ConvCase("dilated_four_sides", 1, 16, 11, 12, 33, 3, 3, 1, ((0, 3), (5, 1)), dilation=(2, 3)),
    ConvCase("dilated_valid", 1, 24, 24, 25, 16, 3, 3, dilation=4),
    ConvCase("dilated_5", 1, 130, 12, 13, 140, 3, 3, padding=5, dilation=5),
]

CASES_STRIDED = [
    strided("s2", 2, 40, 16, 17, 48),
    strided("s2_valid", 1, 34, 11, 20, 32, 0),
    strided("s2_four_sides", 1, 33, 8, 10, 36, ((0, 3), (4, 1))),
    strided("s2_groups", 2, 66, 8, 18, 70, 1, 2),
    strided("s2_large", 6, 130, 16, 18, 260),
    strided("s2_large_groups", 6, 260, 16, 17, 280, 2, 2),
    strided("s2_one_panel", 6, 600, 16, 18, 32),
]

CASES_ROWS = [
    case3x3("rows_rgb", 2, 3, 11, 18, 40),
    case3x3("rows_rgb_valid", 3, 3, 9, 9, 64, 0),
    case3x3("rows_rgb_four_sides", 1, 3, 8, 9, 33, ((0, 2), (3, 1))),
    case3x3("rows_two_channels", 2, 2, 6, 37, 20, 2),
    case3x3("rows_rgba", 2, 4, 7, 16, 17),
    case3x3("rows_of_three", 2, 3, 5, 3, 1),
    case3x3("rows_in_parts", 40, 3, 13, 7, 24),
]


@pytest.mark.parametrize("width", range(3, 37))
def test_rows_of_few_channels(width, isa):
    """Every last tile, and every number of tiles that registers take at once."""
    check(case3x3("width", 1, 2 + width % 3, 4, width, 18))


@pytest.mark.parametrize(
    "case",
    CASES + CASES_5X5 + CASES_7 + CASES_DILATED + CASES_STRIDED + CASES_ROWS,
    ids=str,
)
def test_cases(case, isa):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        case3x3("large", 2, 256, 65, 66, 72),
        case3x3("small", 1, 40, 130, 70, 40),
        ConvCase("large_in_parts", 1, 1000, 26, 40, 100, 1, 7, padding=(0, 3)),
        ConvCase("small_in_parts", 8, 24, 8, 20, 40, 1, 7, padding=(0, 3)),
        ConvCase("7x7", 30, 16, 9, 8, 17, 7, 7, padding=3),
        strided("s2_large", 16, 130, 40, 38, 140),
        strided("s2_small", 8, 32, 56, 40, 40),
    ],
    ids=str,
)
def test_more_tiles_than_fit_at_once(case):
    check(case)


@pytest.mark.parametrize("kernel", [3, 5])
def test_channels_in_parts_change_no_bit(kernel, isa):
    """Weights that are kept, or that few tiles use, are transformed some channels at a time."""
    rng = np.random.default_rng(kernel)
    x = channels_last(rng.standard_normal((14, 150, 8, 9), np.float32))
    w = rng.standard_normal((140, 150, kernel, kernel), np.float32)
    with forced("winograd"):
        y = fc.conv2d(x, w, padding=kernel // 2)
        assert_same_bits(fc.conv2d(x[:1], w, padding=kernel // 2), y[:1])
        assert_same_bits(fc.conv2d(x, channels_last(w), padding=kernel // 2), y)
        assert_same_bits(fc.PackedConv2d(w, padding=kernel // 2)(x), y)
        if kernel == 3:
            y = fc.conv2d(x, w, stride=2, padding=1)
            assert_same_bits(fc.PackedConv2d(w, stride=2, padding=1)(x), y)


def ranges(x: np.ndarray, kind: str) -> np.ndarray:
    generator = reference.generator(kind)
    changes: dict[str, Callable[[], np.ndarray]] = {
        "after_relu": lambda: np.maximum(x, 0),
        "offset": lambda: x + 100,
        "large_range": lambda: x * 10 ** generator.uniform(-3, 3, x.shape),
        "tiny": lambda: x * 1e-30,
        "huge": lambda: x * 1e30,
        "zeros": lambda: x * 0,
    }
    return changes[kind]().astype(np.float32)


@pytest.mark.parametrize("kind", ["after_relu", "offset", "large_range", "tiny", "huge", "zeros"])
def test_ranges_of_data(kind, isa):
    """The limit holds for activations, for data far from zero, and over twelve decades."""
    wide = case3x3("wide", 1, 64, 14, 13, 32), replace(CASES_5X5[0], name="5x5_wide", c=64)
    seven = replace(CASES_7[0], name="7x7_wide", c=64), *CASES_7[6:8]
    for case in (
        CASES[0],
        *wide,
        CASES[7],
        CASES_5X5[4],
        *seven,
        CASES_DILATED[0],
        CASES_STRIDED[0],
        *CASES_ROWS[:5:2],
    ):
        plain = conv_data(case)
        x = ranges(plain.x, kind)
        dy = ranges(plain.dy, kind) if kind not in ("tiny", "huge") else plain.dy
        ref = [reference.conv2d(x, plain.w, case), *reference.conv2d_backward(dy, x, plain.w, case)]
        scale = [
            reference.conv2d(abs(x), abs(plain.w), case),
            *reference.conv2d_backward(abs(dy), abs(x), abs(plain.w), case),
        ]
        names = ["y", "dx", "dw", "db"]
        data = plain.__class__(
            x,
            plain.w,
            plain.bias,
            dy,
            dict(zip(names, ref, strict=True)),
            dict(zip(names, scale, strict=True)),
        )
        check(case, data)


def test_bias_residual_activation(isa):
    cases = (
        CASES[0],
        CASES[4],
        CASES[7],
        CASES_5X5[2],
        *CASES_7[2:9:3],
        CASES_DILATED[3],
        *CASES_STRIDED[2:5:2],
        *CASES_ROWS[:4],
    )
    for case in filter(has_forward, cases):
        data = conv_data(case)
        residual = reference.normal(case, "residual", shape=case.y_shape)
        before = data.ref["y"] + residual + data.bias[:, None, None].astype(np.float64)
        scale = data.abs_ref["y"] + abs(residual) + abs(data.bias)[:, None, None]
        with forced(algorithm(case)):
            y = fc.conv2d(
                channels_last(data.x), data.w, data.bias, **case.arguments,
                activation="relu", residual=channels_last(residual),
            )  # fmt: skip
        limit = reference.conv_limit(scale, case.products["y"] + 2, winograd=True)
        reference.assert_within(y, np.maximum(before, 0), limit, str(case))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (7, 1), (3, 2)])
def test_transposed_convolution_uses_it_too(kernel, dilation, isa):
    case = ConvTransposeCase(
        "transposed", 2, 20, 9, 10, 24, kernel, kernel, padding=1, dilation=dilation
    )
    data = conv_data(case)
    with forced("winograd"):
        y = fc.conv_transpose2d(channels_last(data.x), data.w, **case.arguments)
    limit = data.ref["y"], data.abs_ref["y"], case.products["y"]
    assert_conv_close(y, *limit, winograd=True)


@pytest.mark.parametrize(
    "case",
    [
        CASES[3],
        CASES[4],
        CASES[7],
        CASES[8],
        CASES_5X5[3],
        CASES_5X5[4],
        *CASES_7[3:12:2],
        *CASES_DILATED[3:6:2],
        *CASES_STRIDED[2:6],
        CASES_ROWS[0],
        CASES_ROWS[6],
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(case, isa):
    data = conv_data(case)
    one = run(case, data)
    for threads in (2, 3, 7):
        fc.set_num_threads(threads)
        for name, got in run(case, data).items():
            assert_same_bits(got, one[name], f"{case} {name} {threads} threads")


@pytest.mark.parametrize(
    "case",
    [*CASES[1:8:2], *CASES_5X5[2:5:2], *CASES_7, *CASES_DILATED[3:], *CASES_STRIDED, *CASES_ROWS],
    ids=str,
)
@pytest.mark.parametrize("end", ["start", "end"])
def test_no_access_outside_the_arrays(case, end, isa):
    data = conv_data(case)
    x, dy = (guarded(channels_last(a), end) for a in (data.x, data.dy))
    w = guarded(data.w, end)
    with forced(algorithm(case)):
        if has_forward(case):
            fc.conv2d(x, w, **case.arguments)
        fc.conv2d_backward(dy, x, w, **case.arguments, needs=(not by_rows(case), True, True))


def test_nan_stays_within_its_tile(isa):
    """A NaN reaches every output whose window it lies in, and none beyond the tiles that read it:
    tiles of 4 overlap by 2, so three pixels further at most."""
    case = case3x3("nan", 1, 16, 24, 24, 16)
    data = conv_data(case)
    x = data.x.copy()
    x[0, 3, 10, 13] = np.nan
    with forced("winograd"):
        y = fc.conv2d(channels_last(x), data.w, padding=1)
    assert np.isnan(y[0, :, 9:12, 12:15]).all()
    touched = np.isnan(y).any((0, 1))
    touched[6:15, 9:18] = False
    assert not touched.any()


@pytest.mark.parametrize(("case", "plain"), [(CASES[0], "direct"), (CASES_ROWS[0], "first_layer")])
def test_strict_precision_refuses_it(case, plain):
    data = conv_data(case)
    shapes = case.x_shape, case.w_shape
    assert fc.get_precision() == "default"
    chosen = algorithm(case) if has_forward(case) else plain
    assert fc.explain("conv2d", *shapes, **case.arguments)[-1] == (chosen, None)
    fc.set_precision("strict")
    assert fc.get_precision() == "strict"
    rows = dict(fc.explain("conv2d", *shapes, **case.arguments))
    assert rows[algorithm(case)] == "strict precision" and rows[plain] is None
    y = fc.conv2d(data.x, data.w, **case.arguments)
    assert_conv_close(y, data.ref["y"], data.abs_ref["y"], case.products["y"])
    with pytest.raises(ValueError, match="strict precision"):
        run(case, data)
    for wrong in ("exact", "", None, 1):
        with pytest.raises(ValueError, match="precision must be"):
            fc.set_precision(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES_ROWS[:2], ids=str)
def test_forward_along_rows_declines_where_registers_are_few(case, isa):
    data = conv_data(case)
    x = channels_last(data.x)
    rows = dict(fc.explain("conv2d", case.x_shape, case.w_shape, **case.arguments))
    if isa != "avx2":
        assert rows["winograd_rows"] is None
        return
    assert "too few registers" in rows["winograd_rows"] and rows["first_layer"] is None
    with forced("winograd_rows"), pytest.raises(ValueError, match="too few registers"):
        fc.conv2d(x, data.w, **case.arguments)
    y = fc.conv2d(x, data.w, **case.arguments)
    assert_conv_close(y, data.ref["y"], data.abs_ref["y"], case.products["y"])


def test_declines_with_a_reason():
    def reason(
        c: int, h: int, k: int, r: int = 3, s: int | None = None, **arguments: object
    ) -> str | None:
        shapes = (1, c, h, h), (k, c, r, s or r)
        name = "winograd_rows" if c <= 4 else "winograd"
        return dict(fc.explain("conv2d", *shapes, **arguments))[name]

    assert reason(16, 8, 16, padding=1) is None
    assert reason(16, 8, 16, 5, padding=2) is None
    assert reason(16, 8, 16, padding=2, dilation=2) is None
    assert "one input channel" in reason(1, 8, 16)
    assert "fewer than 3 outputs" in reason(3, 4, 16)
    assert "not 3x3" in reason(3, 8, 16, 5)
    assert "stride or dilation" in reason(3, 8, 16, stride=2)
    assert "small" in reason(16, 8, 16, padding=7, dilation=7)
    assert "3x3" in reason(16, 8, 16, 4)
    assert reason(16, 8, 16, 7, padding=3) is None
    assert reason(24, 8, 24, 7, 1, padding=(3, 0)) is None
    assert "channels" in reason(23, 8, 24, 1, 7, padding=(0, 3))
    assert "small" in reason(24, 4, 24, 1, 7, padding=(0, 3))
    assert "small" in reason(24, 4, 24, 7, padding=3)
    for r, s in ((3, 7), (7, 3), (1, 5), (5, 1), (7, 2)):
        assert "7x7, 1x7" in reason(24, 9, 24, r, s, padding=(r // 2, s // 2))
    assert "stride" in reason(16, 9, 16, stride=3)
    assert "stride" in reason(32, 16, 32, 5, stride=2, padding=2)
    assert "stride" in reason(32, 16, 32, stride=2, dilation=2)
    assert "stride" in reason(32, 16, 32, stride=(1, 2), padding=1)
    assert reason(32, 16, 32, stride=2, padding=1) is None
    assert "channels" in reason(31, 16, 32, stride=2, padding=1)
    assert "small" in reason(32, 14, 32, stride=2, padding=1)
    assert "few tiles" in reason(128, 16, 256, stride=2, padding=1)
    assert "channels" in reason(15, 8, 16, padding=1)
    assert "channels" in reason(16, 8, 15, padding=1)
    assert "small" in reason(16, 2, 16, padding=1)
    assert "few tiles" in reason(256, 4, 128, padding=1)
    assert reason(128, 4, 128, padding=1) is None
    assert reason(256, 8, 128, padding=1) is None

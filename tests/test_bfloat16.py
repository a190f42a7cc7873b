"""bfloat16 in and out: the forward pass of 3x3, 5x5, 7x7, 1x7 and 7x1 convolutions at stride 1, and
of 3x3 at stride 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastconv as fc
from tests import reference
from tests.cases import ConvCase
from tests.conftest import forced
from tests.memory import channels_last, guarded
from tests.reference import assert_same_bits
from tests.test_interop import CALLS, converted

U = 2.0**-8  # of bfloat16, which has eight bits

CASES = [
    ConvCase("3x3", 2, 20, 9, 8, 24, 3, 3, padding=1),
    ConvCase("small_weights", 2, 64, 14, 15, 40, 3, 3, padding=((0, 2), (1, 3))),
    ConvCase("large_weights", 1, 130, 7, 9, 140, 3, 3, padding=1),
    ConvCase("groups", 2, 66, 8, 9, 70, 3, 3, padding=2, groups=2),
    ConvCase("5x5", 2, 17, 9, 8, 33, 5, 5, padding=2),
    ConvCase("7x7", 1, 18, 9, 11, 33, 7, 7, padding=3),
    ConvCase("7x1", 2, 33, 12, 7, 24, 7, 1, padding=(3, 0)),
    ConvCase("dilated", 1, 32, 11, 10, 24, 3, 3, padding=2, dilation=2),
    ConvCase("stride_2", 1, 33, 15, 19, 40, 3, 3, padding=1, stride=2),
]
FEW = [
    ConvCase("one_channel", 2, 1, 6, 7, 1, 3, 3, padding=1),
    ConvCase("rgb", 1, 3, 9, 8, 7, 3, 3, padding=1),
    ConvCase("tiny_image", 1, 5, 1, 2, 6, 3, 3, padding=1),
    ConvCase("depthwise", 1, 6, 5, 6, 6, 3, 3, padding=1, groups=6),
]


def tensors(case: ConvCase) -> list[torch.Tensor]:
    """x, w, bias and a residual of random bfloat16, images in channels-last memory."""
    arrays = [
        channels_last(reference.normal(case, "x", shape=case.x_shape)),
        reference.normal(case, "w", shape=case.w_shape),
        reference.normal(case, "bias", shape=case.w_shape[:1]),
        channels_last(reference.normal(case, "residual", shape=case.y_shape)),
    ]
    return [torch.from_numpy(a).bfloat16() for a in arrays]


def as_float(a: torch.Tensor) -> np.ndarray:
    return a.float().numpy()


def assert_same(got: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Bits of bfloat16 against float32 rounded to it (to nearest, ties to even)."""
    assert got.dtype == torch.bfloat16
    rounded = torch.tensor(np.ascontiguousarray(expected)).bfloat16()
    assert_same_bits(got.contiguous().view(torch.int16), rounded.view(torch.int16), what)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_float32_rounded_once(case, isa):
    """Reading bfloat16 is exact and sums are float32: the only new error is y's rounding."""
    x, w, bias, residual = tensors(case)
    y = fc.conv2d(x, w, **case.arguments)
    with forced("winograd"):
        expected = fc.conv2d(as_float(x), as_float(w), **case.arguments)
    assert_same(y, expected, f"{case}")
    y = fc.conv2d(x, w, bias, **case.arguments, activation="relu6", residual=residual)
    with forced("winograd"):
        expected = fc.conv2d(
            as_float(x), as_float(w), as_float(bias), **case.arguments,
            activation="relu6", residual=as_float(residual),
        )  # fmt: skip
    assert_same(y, expected, f"{case} epilogue")


@pytest.mark.parametrize("case", FEW + CASES, ids=str)
def test_against_float64(case, isa):
    x, w, *_ = tensors(case)
    exact = reference.conv2d(as_float(x), as_float(w), case)
    scale = reference.conv2d(abs(as_float(x)), abs(as_float(w)), case)
    limit = reference.conv_limit(scale, case.products["y"], winograd=True)
    y = fc.conv2d(x, w, **case.arguments)
    reference.assert_within(as_float(y), exact, limit + U * (abs(exact) + limit), str(case))


def test_rounding(isa):
    """Of 1 + value, around the middles between neighbours: 1 + 2^-8 lies between 1 and 1 + 2^-7."""
    values = [0.0, 2.0**-8, 3 * 2.0**-8, -(2.0**-9), 2.0**-20, 2.5, -5.0]
    expected = [1.0, 1.0, 1 + 4 * 2.0**-8, 1.0, 1.0, 3.5, -4.0]
    x = torch.zeros(1, 16, 7, 7).bfloat16()
    w = torch.zeros(len(values), 16, 3, 3).bfloat16()
    bias = torch.tensor(values).bfloat16()
    residual = torch.ones(1, len(values), 7, 7).bfloat16()
    y = fc.conv2d(x, w, bias, padding=1, residual=residual)
    assert (y.float() == torch.tensor(expected)[:, None, None]).all(), y[0, :, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_nan_and_infinity_are_kept(value, isa):
    case = CASES[0]
    x, w, *_ = tensors(case)
    bias = torch.zeros(case.k).bfloat16()
    bias[5] = value
    y = fc.conv2d(x, w, bias, **case.arguments)
    assert torch.isfinite(y[:, :5]).all() and torch.isfinite(y[:, 6:]).all()
    expected = torch.tensor(value).bfloat16().expand(y[:, 5].shape)
    assert torch.equal(y[:, 5].isnan(), expected.isnan())
    assert np.isnan(value) or torch.equal(y[:, 5], expected)


def test_layouts(isa):
    case = CASES[0]
    x, w, *_ = tensors(case)
    expected = fc.conv2d(x, w, **case.arguments)
    views = {
        "nchw": x.contiguous(),
        "sliced": torch.stack([x, x * np.nan], 4)[..., 0],
        "channel_slice": torch.cat([x, x * np.nan], 1)[:, : case.c],
        "transposed": x.swapaxes(2, 3).contiguous().swapaxes(2, 3),
    }
    for layout, view in views.items():
        y = fc.conv2d(view, w.to(memory_format=torch.channels_last), **case.arguments)
        assert torch.equal(y, expected), layout
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert fc.conv2d(views["nchw"], w, **case.arguments).is_contiguous()


@pytest.mark.parametrize("case", [*CASES, FEW[1]], ids=str)
@pytest.mark.parametrize("end", ["start", "end"])
def test_no_access_outside_the_arrays(case, end, isa):
    x, w, bias, residual = (
        torch.from_numpy(guarded(t.view(torch.int16).numpy(), end)).view(torch.bfloat16)
        for t in tensors(case)
    )
    fc.conv2d(x, w, bias, **case.arguments, residual=residual)


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_threads_do_not_change_a_bit(case, isa):
    x, w, *_ = tensors(case)
    one = fc.conv2d(x, w, **case.arguments)
    for threads in (2, 3):
        fc.set_num_threads(threads)
        assert torch.equal(fc.conv2d(x, w, **case.arguments), one)


def test_arrays_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    case = CASES[0]
    x, w, *_ = tensors(case)
    y = fc.conv2d(as_float(x).astype(bfloat16), as_float(w).astype(bfloat16), **case.arguments)
    assert isinstance(y, np.ndarray) and y.dtype == bfloat16
    assert_same_bits(y.astype(np.float32), as_float(fc.conv2d(x, w, **case.arguments)))


def test_refused_with_what_is_supported():
    case = CASES[0]
    x, w, bias, _ = tensors(case)
    one_by_one = w[:, :, :1, :1].contiguous()
    for call in (
        lambda: fc.conv2d(x, one_by_one),
        lambda: fc.conv2d(x, w, stride=3),
        lambda: fc.conv2d(x, w, padding=1, activation="silu"),
    ):
        with pytest.raises(TypeError, match="bfloat16"):
            call()
    for wrong in ((x, w.float()), (x.float(), w), (x, w, bias.float())):
        with pytest.raises(TypeError, match="bfloat16"):
            fc.conv2d(*wrong, padding=1)
    with pytest.raises(TypeError, match="requires grad"):
        fc.conv2d(x, w.requires_grad_(), padding=1)
    fc.set_precision("strict")
    with pytest.raises(TypeError, match="strict precision"):
        fc.conv2d(x, w.detach(), padding=1)


def test_explain():
    shapes = CASES[0].x_shape, CASES[0].w_shape
    assert fc.explain("conv2d", *shapes, padding=1, dtype="bfloat16")[-1] == ("winograd", None)
    refused = fc.explain("conv2d", *shapes, stride=3, dtype="bfloat16")
    assert all(reason for _, reason in refused)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "conv2d"])
def test_other_operations_refuse_it(name):
    def narrow(a: np.ndarray) -> object:
        return torch.from_numpy(a).bfloat16() if a.dtype == np.float32 else a

    with pytest.raises(TypeError, match="bfloat16"):
        getattr(fc, name)(*converted(CALLS[name], narrow))

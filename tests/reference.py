"""What the right answer is, and how far from it an implementation may be.

The oracle is float64, computed from the same rounded inputs that the implementation gets. Every
convolution is padded by numpy first, so that four-sided and "same" padding need no support from
the oracle, and done by PyTorch in float64; plain numpy loops check the oracle itself.

Limits: u is 2^-24 (2^-53 for float64), K the number of products in a sum, A the same operation on
absolute values. The bound sqrt(K) u A is the probabilistic one of Higham and Mary (SIAM J. Sci.
Comput. 41, 2019).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from tests.cases import ConvCase, ConvTransposeCase, Sides, pair

U = 2.0**-24
Array = np.ndarray


def unit(dtype: np.dtype) -> float:
    """The unit roundoff; for float64 twice that, because the oracle rounds as often."""
    return U if dtype == np.float32 else 2.0**-52


def generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on the key alone, not on which tests ran before."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(*key: object, shape: tuple[int, ...], dtype: type = np.float32) -> Array:
    return generator(*key).standard_normal(shape).astype(dtype)


def as_tensor(a: Array, grad: bool = False) -> torch.Tensor:
    """A float64 copy for the oracle."""
    return torch.tensor(np.asarray(a, np.float64), requires_grad=grad)


# -------------------------------------------------------------------------------------------------
# Error limits.


def conv_limit(abs_ref: Array, products: int, u: float = U, winograd: bool = False) -> Array:
    """What each element may be off: 2 u (sqrt K + 2) A; of Winograd, whose transforms mix the
    pixels of a tile, 8 u (sqrt K + 4) max A."""
    root = np.sqrt(products)
    if winograd:
        return np.full_like(abs_ref, 8 * u * (root + 4) * abs_ref.max(initial=0))
    return 2 * u * (root + 2) * abs_ref


def assert_conv_close(
    got: Array,
    ref: Array,
    abs_ref: Array,
    products: int,
    what: str = "",
    winograd: bool = False,
) -> None:
    """Sums of `products` products: each element within conv_limit, and the relative L2 error
    <= min(u (1 + sqrt K), 5e-5), of Winograd 2 u (sqrt K + 4). Where the result cancels, its norm
    is no measure and A / sqrt K is."""
    got = np.asarray(got)
    assert got.shape == ref.shape, f"{what}: shape {got.shape}, expected {ref.shape}"
    if not ref.size:
        return
    u, root = unit(got.dtype), np.sqrt(products)
    error = np.abs(got.astype(np.float64) - ref)
    assert_each(error, conv_limit(abs_ref, products, u, winograd), got, ref, what)
    norm = max(np.linalg.norm(ref), np.linalg.norm(abs_ref) / root) if products else 0.0
    limit = (2 * u * (root + 4) if winograd else min(u * (1 + root), 5e-5)) * norm
    total = np.linalg.norm(error)
    assert total <= limit, f"{what}: L2 error {total:.3e} above the limit {limit:.3e}"


def assert_each(error: Array, limit: Array | float, got: Array, ref: Array, what: str = "") -> None:
    """error <= limit, with a message that finds the worst element. NaN is never below a limit."""
    bad = ~(error <= limit)
    if not bad.any():
        return
    excess = np.where(bad, error / np.maximum(np.broadcast_to(limit, error.shape), 1e-300), 0)
    excess = np.where(np.isnan(excess), np.inf, excess)
    at = np.unravel_index(np.argmax(excess), error.shape)
    raise AssertionError(
        f"{what}: {bad.sum()} of {bad.size} elements off, the worst at {tuple(map(int, at))}: "
        f"got {got[at]!r}, expected {ref[at]!r}, {excess[at]:.3g} times the limit"
    )


def assert_within(got: Array, ref: Array, limit: Array | float, what: str = "") -> None:
    got = np.asarray(got)
    assert got.shape == ref.shape, f"{what}: shape {got.shape}, expected {ref.shape}"
    assert_each(np.abs(got.astype(np.float64) - ref), limit, got, ref, what)


def assert_same_bits(got: Array, expected: Array, what: str = "") -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and got.dtype == expected.dtype, what
    assert got.tobytes() == expected.tobytes(), f"{what}: not the same bits"


# -------------------------------------------------------------------------------------------------
# Convolution.


def pad(x: Array, sides: Sides) -> Array:
    return np.pad(x, ((0, 0), (0, 0), *sides))


def crop(padded: Array, sides: Sides) -> Array:
    (top, bottom), (left, right) = sides
    height, width = padded.shape[2:]
    return padded[:, :, top : height - bottom, left : width - right]


def conv2d(x: Array, w: Array, case: ConvCase) -> Array:
    """conv2d in float64, without bias."""
    padded = as_tensor(pad(x, case.sides))
    return F.conv2d(padded, as_tensor(w), None, case.stride, 0, case.dilation, case.groups).numpy()


def conv2d_backward(dy: Array, x: Array, w: Array, case: ConvCase) -> tuple[Array, Array, Array]:
    """(dx, dw, db) in float64."""
    padded, weight = as_tensor(pad(x, case.sides), grad=True), as_tensor(w, grad=True)
    y = F.conv2d(padded, weight, None, case.stride, 0, case.dilation, case.groups)
    dx, dw = torch.autograd.grad(y, (padded, weight), as_tensor(dy))
    return crop(dx.numpy(), case.sides), dw.numpy(), dy.astype(np.float64).sum((0, 2, 3))


def loop_conv2d(x: Array, w: Array, dy: Array, case: ConvCase) -> tuple[Array, Array, Array, Array]:
    """(y, dx, dw, db) straight from the definition: the check of the oracle."""
    (step_h, step_w), (spread_h, spread_w) = pair(case.stride), pair(case.dilation)
    per_group, outputs = case.c // case.groups, case.k // case.groups
    x = pad(x.astype(np.float64), case.sides)
    w, dy = w.astype(np.float64), dy.astype(np.float64)
    y, dx, dw = np.zeros(case.y_shape), np.zeros_like(x), np.zeros_like(w)
    for n, k, p, q in np.ndindex(*case.y_shape):
        first = k // outputs * per_group
        channels = slice(first, first + per_group)
        rows = p * step_h + spread_h * np.arange(case.r)[:, None]
        columns = q * step_w + spread_w * np.arange(case.s)
        window = x[n, channels][:, rows, columns]
        y[n, k, p, q] = (window * w[k]).sum()
        dw[k] += window * dy[n, k, p, q]
        dx[n, channels][:, rows, columns] += w[k] * dy[n, k, p, q]
    return y, crop(dx, case.sides), dw, dy.sum((0, 2, 3))


@dataclass(frozen=True)
class ConvData:
    """Inputs of a case, its four results in float64 and the same on absolute values."""

    x: Array
    w: Array
    bias: Array
    dy: Array
    ref: dict[str, Array]
    abs_ref: dict[str, Array]


def _results(x: Array, w: Array, dy: Array, case: ConvCase | ConvTransposeCase) -> dict[str, Array]:
    if isinstance(case, ConvTransposeCase):
        y = conv_transpose2d(x, w, case)
        gradients = conv_transpose2d_backward(dy, x, w, case)
    else:
        y = conv2d(x, w, case)
        gradients = conv2d_backward(dy, x, w, case)
    return {"y": y, "dx": gradients[0], "dw": gradients[1], "db": gradients[2]}


def _conv_data(
    case: ConvCase | ConvTransposeCase, draw: Callable[[str, tuple[int, ...]], Array]
) -> ConvData:
    x, w, dy = draw("x", case.x_shape), draw("w", case.w_shape), draw("dy", case.y_shape)
    bias = draw("bias", (case.k,))
    ref = _results(x, w, dy, case)
    return ConvData(x, w, bias, dy, ref, _results(abs(x), abs(w), abs(dy), case))


@lru_cache(maxsize=4096)
def conv_data(case: ConvCase | ConvTransposeCase, dtype: type = np.float32) -> ConvData:
    """Normally distributed data, the same for every test of the case."""
    return _conv_data(case, lambda name, shape: normal(case, name, shape=shape, dtype=dtype))


def integer_conv_data(case: ConvCase | ConvTransposeCase) -> ConvData:
    """Integers so small that every partial sum is exact in float32 in any order."""

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        return generator(case, name).integers(-8, 9, shape).astype(np.float32)

    data = _conv_data(case, draw)
    assert all(a.size == 0 or a.max() < 2**24 for a in data.abs_ref.values())
    return data


def conv_transpose2d(x: Array, w: Array, case: ConvTransposeCase) -> Array:
    return F.conv_transpose2d(as_tensor(x), as_tensor(w), None, **case.arguments).numpy()


def conv_transpose2d_backward(
    dy: Array, x: Array, w: Array, case: ConvTransposeCase
) -> tuple[Array, Array, Array]:
    a, b = as_tensor(x, grad=True), as_tensor(w, grad=True)
    y = F.conv_transpose2d(a, b, None, **case.arguments)
    dx, dw = torch.autograd.grad(y, (a, b), as_tensor(dy))
    return dx.numpy(), dw.numpy(), dy.astype(np.float64).sum((0, 2, 3))


# -------------------------------------------------------------------------------------------------
# Activations: the function in float64, and its Lipschitz constant for those that can be fused.


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Nothing cancels here, while F.gelu's x / 2 (1 + erf) is 0 below -8.3, even in float64."""
    if approximate == "none":
        return x / 2 * torch.special.erfc(-x / math.sqrt(2))
    return x * torch.sigmoid(gelu_tanh_argument(x))


def gelu_tanh_argument(x: torch.Tensor) -> torch.Tensor:
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


def hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """F.hardsigmoid's gradient is dy * float32(1 / 6), also in float64."""
    return F.relu6(x + 3) / 6


ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": gelu,
    "hardsigmoid": hardsigmoid,
    "hardswish": F.hardswish,
}
FUSED_ACTIVATIONS = {
    "relu": 1.0,
    "relu6": 1.0,
    "sigmoid": 0.25,
    "tanh": 1.0,
    "silu": 1.1,
    "hardswish": 1.5,
}


def activation(name: str | None, x: Array) -> Array:
    return x if name is None else ACTIVATIONS[name](as_tensor(x)).numpy()


def activation_backward(name: str, dy: Array, x: Array, **arguments: object) -> Array:
    a = as_tensor(x, grad=True)
    y = ACTIVATIONS[name](a, **arguments)
    return torch.autograd.grad(y, a, as_tensor(dy))[0].numpy()


def activation_limit(
    name: str | None, x: Array, y: Array, approximate: str = "none", u: float = U
) -> Array:
    """8 u |y|: every function can be computed without cancellation, a few roundings of u each.

    GELU's left tail is exp of a rounded number, z = x^2 / 2 or the argument of the logistic
    function: z has a relative error of a few u (2 for the product with 1 / sqrt 2, squared; 5 for
    the cubic), exp makes it an absolute one, z times as large.

    Where a factor of the result, or the result, is below 2^-126, it is rounded to a multiple of
    2^-149, whatever its size. The other factor is |x| (sigmoid(x) is 0 from -104 on) or 1.
    """
    amplification = np.zeros_like(y)
    if name == "gelu":
        tail = as_tensor(np.minimum(x, 0))
        if approximate == "none":
            amplification = 2 * tail.numpy() ** 2
        else:
            amplification = 5 * abs(gelu_tanh_argument(tail).numpy())
    return (8 + amplification) * u * np.abs(y) + 2.0**-149 * np.minimum(1 + np.abs(x), 128)


# -------------------------------------------------------------------------------------------------
# Gradients by finite differences.


def assert_gradient(
    function: Callable[..., Array], inputs: list[Array], dy: Array, gradients: list[Array | None]
) -> None:
    """Central differences of sum(dy * function(*inputs)) with respect to every element of every
    input whose gradient is given. Inputs must be float64."""
    step = 1e-6
    for position, gradient in enumerate(gradients):
        if gradient is None:
            continue
        numeric = np.zeros(inputs[position].shape)
        for at in np.ndindex(*numeric.shape):
            value = []
            for sign in (1, -1):
                moved = [a.copy() for a in inputs]
                moved[position][at] += sign * step
                value.append(float((dy * np.asarray(function(*moved))).sum()))
            numeric[at] = (value[0] - value[1]) / (2 * step)
        scale = max(1.0, float(np.abs(numeric).max()))
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-7 * scale)

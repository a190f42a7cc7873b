"""Differentiable functions over `Tensor`; names and argument order of torch.nn.functional.

Each calls `fastconv.ops` for the forward and hands `apply` a closure that calls the matching
`_backward`. Inputs may be tensors or arrays; shapes, dtypes and errors are those of the operation
of the same name in `fastconv.ops`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from fastconv import cuda, init, ops
from fastconv._recording import recorded
from fastconv.ops._arrays import like, pair
from fastconv.ops.conv import ConvSizes, conv2d_gradients, conv2d_of_sizes, conv_sizes
from fastconv.ops.conv_norm import conv2d_batch_norm_backward, conv2d_batch_norm_train
from fastconv.ops.dropout import check_mode, check_probability
from fastconv.tensor import (
    Array,
    Needs,
    Tensor,
    apply,
    array_of,
    as_tensor,
    form_of,
    is_computed_from,
    records,
    to_numpy,
)

if TYPE_CHECKING:
    from fastconv.distributed import Communicator

Input: TypeAlias = Any  # a Tensor, or anything `Tensor` accepts
Pair: TypeAlias = "int | tuple[int, int]"
# Of a batch, as `batch_norm` takes them: values a channel, their mean [C], the sum of their squared
# distances from it [C], both float64.
Moments: TypeAlias = "tuple[int, Array, Array]"
Padding: TypeAlias = "int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] | str"


def optional_tensor(value: Input | None) -> Tensor | None:
    """As `as_tensor`; None stays."""
    return None if value is None else as_tensor(value)


def _data(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else array_of(tensor)


def conv2d(
    x: Input,
    weight: Input,
    bias: Input | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Input | None = None,
) -> Tensor:
    """activation(cross-correlation + bias + residual).

    x[N,C,H,W], weight[K,C/groups,R,S], bias[K], residual[N,K,P,Q] -> [N,K,P,Q].
    """
    sizes = conv_sizes(stride, padding, dilation, groups)
    return convolve(x, weight, bias, sizes, activation, residual)


@recorded
def convolve(
    x: Input,
    weight: Input,
    bias: Input | None,
    sizes: ConvSizes,
    activation: str | None = None,
    residual: Input | None = None,
) -> Tensor:
    """`conv2d` by what `conv_sizes` gave for stride, padding, dilation and groups."""
    check_activation(activation)
    inputs = (as_tensor(x), as_tensor(weight), optional_tensor(bias), optional_tensor(residual))
    if activation is not None and activation not in _FROM_OUTPUT and records(inputs):
        return activate(convolve(*inputs[:3], sizes, residual=inputs[3]), activation)
    xd, wd, bd, rd = cuda.compute_operands(*map(_data, inputs))
    y = like(conv2d_of_sizes(xd, wd, bd, rd, sizes, activation), xd)

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        if activation is not None:
            dy = _FROM_OUTPUT[activation](dy, y)
        gradients = conv2d_gradients(dy, xd, wd, sizes, needs[:3])
        return *gradients, dy if needs[3] else None

    return apply(y, inputs, backward)


def conv2d_batch_norm(
    x: Input,
    weight: Input,
    bias: Input | None,
    sizes: ConvSizes,
    norm_weight: Input | None,
    norm_bias: Input | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Input | None = None,
    activation: str | None = None,
    pool: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Tensor:
    """`convolve`, then `batch_norm` in training, or `batch_norm_max_pool2d` with pool = (kernel
    size, stride) and no residual: their values, as one recorded operation.

    The gradient of the convolution's bias is zero: the batch's mean takes away what it adds. The
    operations one by one give a sum of rounding errors.
    On a CUDA device the convolution takes the statistics before it stores its result.
    """
    check_activation(activation)
    convolved = (as_tensor(x), as_tensor(weight), optional_tensor(bias))
    inputs = (*convolved, *map(optional_tensor, (norm_weight, norm_bias, residual)))
    xd, wd, bd = cuda.compute_operands(*map(_data, convolved))
    gamma, beta, rd = map(_data, inputs[3:])
    y, z, mean, rstd, places = conv2d_batch_norm_train(
        xd, wd, bd, sizes, gamma, beta, running_mean, running_var, momentum, eps,
        rd, activation, pool,
    )  # fmt: skip

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return conv2d_batch_norm_backward(
            dy, xd, wd, z, sizes, gamma, beta, mean, rstd, rd, activation, places, pool, needs
        )

    return apply(y, inputs, backward)


@recorded
def conv_transpose2d(
    x: Input,
    weight: Input,
    bias: Input | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Tensor:
    """Transposed convolution: x[N,C,H,W], weight[C,K/groups,R,S] -> [N,K,P,Q]."""
    inputs = (as_tensor(x), as_tensor(weight), optional_tensor(bias))
    xd, wd, bd = cuda.compute_operands(*map(_data, inputs))
    sizes = (stride, padding, output_padding, groups, dilation)

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return ops.conv_transpose2d_backward(dy, xd, wd, *sizes, needs=needs)

    return apply(ops.conv_transpose2d(xd, wd, bd, *sizes), inputs, backward)


@recorded
def linear(x: Input, weight: Input, bias: Input | None = None) -> Tensor:
    """x[..., in] times weight[out, in] transposed, plus bias[out]."""
    inputs = (as_tensor(x), as_tensor(weight), optional_tensor(bias))
    xd, wd, bd = cuda.compute_operands(*map(_data, inputs))

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return ops.linear_backward(dy, xd, wd, needs=needs)

    return apply(ops.linear(xd, wd, bd), inputs, backward)


@recorded
def batch_norm(
    x: Input,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Input | None = None,
    bias: Input | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Input | None = None,
    activation: str | None = None,
    communicator: Communicator | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """activation(normalised x * weight + bias + residual), x[N,C] or x[N,C,H,W].

    In training the statistics are the batch's, and the running ones are updated in place.
    communicator: the batch is that of all its processes together; one of them may have N = 0.
    moments: of x, where they are known already; not with a communicator (ValueError).
    """
    check_activation(activation)
    if communicator is not None and moments is not None:
        raise ValueError("moments are those of x alone, not of all processes of a communicator")
    inputs = (
        as_tensor(x),
        optional_tensor(weight),
        optional_tensor(bias),
        optional_tensor(residual),
    )
    xd, wd, bd, rd = map(_data, inputs)
    fused: dict[str, Any] = {"residual": rd, "activation": activation}
    if training:
        if communicator is not None:
            moments = _moments_of_all(inputs[0].data, communicator)
        y, mean, rstd = ops.batch_norm_train(
            xd, wd, bd, running_mean, running_var, momentum, eps, moments=moments, **fused
        )
    else:
        y = ops.batch_norm(xd, running_mean, running_var, wd, bd, False, momentum, eps, **fused)
        if not records(inputs):
            return Tensor(y)
        assert running_mean is not None and running_var is not None  # ops.batch_norm insists
        mean, rstd = running_mean.copy(), 1.0 / np.sqrt(running_var + running_var.dtype.type(eps))

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return ops.batch_norm_backward(
            dy, xd, wd, mean, rstd, bias=bd, training=training, needs=needs, **fused
        )

    def synchronised_backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        assert communicator is not None and moments is not None
        sums, dz = ops.batch_norm_backward_sums(dy, xd, wd, mean, rstd, bias=bd, **fused)
        # The gradients of weight and bias are those of this process, as of any other layer.
        dweight, dbias = (sums[1] * rstd).astype(rstd.dtype), sums[0].astype(rstd.dtype)
        communicator.all_reduce(sums).wait()
        undone = {"dy": dy, "activation": activation} if dz is None else {"dy": dz}
        dx = ops.batch_norm_backward_input(
            x=xd, weight=wd, mean=mean, rstd=rstd, sums=sums, count=moments[0], bias=bd, **undone
        )
        return dx, dweight, dbias, dz

    synchronised = training and communicator is not None
    return apply(y, inputs, synchronised_backward if synchronised else backward)


@recorded
def batch_norm_max_pool2d(
    x: Input,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Input | None = None,
    bias: Input | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: Pair,
    stride: Pair | None = None,
    activation: str | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """max_pool2d(batch_norm(x)) in training, for windows of at most 256 elements without overlap.

    With the bits of the two operations, which would write the image in between.
    """
    check_activation(activation)
    inputs = (as_tensor(x), optional_tensor(weight), optional_tensor(bias))
    xd, wd, bd = map(_data, inputs)
    y, places, mean, rstd = ops.batch_norm_max_pool_train(
        xd, wd, bd, running_mean, running_var, momentum, eps, kernel_size, stride,
        activation=activation, moments=moments,
    )  # fmt: skip

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return ops.batch_norm_max_pool_backward(
            dy, xd, places, wd, mean, rstd, kernel_size, stride,
            bias=bd, activation=activation, needs=needs,
        )  # fmt: skip

    return apply(y, inputs, backward)


def moments(x: Input) -> Moments:
    """What :func:`batch_norm` would find of x[N,C] or x[N,C,H,W], for several that take it."""
    x = as_tensor(x).data
    mean, squares = ops.batch_norm_moments(x)
    return x.size // max(x.shape[1], 1), mean, squares


def _moments_of_all(x: Array, communicator: Communicator) -> tuple[int, Array, Array]:
    """(count, mean, sum of squared distances) of each channel of x over all processes.

    Merged in the order of the processes: Chan, Golub and LeVeque, "Algorithms for computing the
    sample variance", The American Statistician 37, 1983, formula 2.1.
    """
    channels = x.shape[1]
    of_each = np.zeros((communicator.size, 1 + 2 * channels))
    own = of_each[communicator.rank]
    own[0], own[1 : 1 + channels], own[1 + channels :] = moments(x)
    communicator.all_reduce(of_each).wait()  # the others' rows are zeros here: a gathering
    count, mean, squares = 0.0, np.zeros(channels), np.zeros(channels)
    for row in of_each:
        added, other_mean, other_squares = row[0], row[1 : 1 + channels], row[1 + channels :]
        if added > 0:
            delta = other_mean - mean
            share = added / (count + added)
            mean += delta * share
            squares += other_squares + delta * delta * (share * count)
            count += added
    return int(count), mean, squares


@recorded
def local_response_norm(
    x: Input, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """x / (k + alpha / size * sum of x^2 over `size` neighbouring channels)^beta, x[N,C,H,W]."""
    settings = (size, alpha, beta, k)
    return _of_one(ops.local_response_norm, ops.local_response_norm_backward, x, *settings)


@overload
def max_pool2d(
    x: Input,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
) -> Tensor: ...


@overload
def max_pool2d(
    x: Input,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Array]: ...


@recorded
def max_pool2d(
    x: Input,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Array]:
    """Largest value of each window, and its flat index in the H*W plane (int64) where asked for.

    For the backward a byte is kept for each value, and nothing of x (for kernels of more than 256
    elements, x).
    """
    x = as_tensor(x)
    sizes = (kernel_size, stride, padding, dilation, ceil_mode)
    where: dict[str, Any] = {}
    if return_indices:
        y, where["indices"] = ops.max_pool2d(x.data, *sizes, return_indices=True)
    elif _keeps_places(x, kernel_size):
        y, where["places"] = ops.max_pool2d(x.data, *sizes, return_places=True)
    else:
        y = ops.max_pool2d(x.data, *sizes)
    xd = form_of(x.data) if where else x.data

    def backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        return (ops.max_pool2d_backward(dy, xd, *sizes, **where),)

    pooled = apply(y, (x,), backward)
    return (pooled, where["indices"]) if return_indices else pooled


def _keeps_places(x: Tensor, kernel_size: Pair) -> bool:
    if not records((x,)):
        return False
    return math.prod(pair(kernel_size, "kernel_size")) <= 256


@recorded
def avg_pool2d(
    x: Input,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window."""
    sizes = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _of_one_form(ops.avg_pool2d, ops.avg_pool2d_backward, x, *sizes)


@recorded
def adaptive_avg_pool2d(
    x: Input, output_size: int | tuple[int | None, int | None] | None
) -> Tensor:
    """Mean over the windows that divide the image into output_size parts."""
    forward = functools.partial(ops.adaptive_avg_pool2d, output_size=output_size)
    return _of_one_form(forward, ops.adaptive_avg_pool2d_backward, x)


@recorded
def global_avg_pool2d(x: Input) -> Tensor:
    """Mean over the whole image: [N,C,H,W] -> [N,C,1,1]."""
    return _of_one_form(ops.global_avg_pool2d, ops.global_avg_pool2d_backward, x)


def _of_one(
    forward: Callable[..., Array], backward: Callable[..., Array], x: Input, *settings: Any
) -> Tensor:
    """An operation of one tensor whose backward takes (dy, x, *settings)."""
    x = as_tensor(x)
    xd = x.data
    return apply(forward(xd, *settings), (x,), lambda dy, _: (backward(dy, xd, *settings),))


def _of_one_form(
    forward: Callable[..., Array], backward: Callable[..., Array], x: Input, *settings: Any
) -> Tensor:
    """An operation of one tensor whose backward takes x for its shape and layout alone."""
    x = as_tensor(x)
    y = forward(x.data, *settings)
    if not records((x,)):
        return Tensor(y)  # for small images the form takes longer than they do
    form = form_of(x.data)
    return apply(y, (x,), lambda dy, _: (backward(dy, form, *settings),))


def _of_one_from_output(
    forward: Callable[..., Array], backward: Callable[..., Array], x: Input, *settings: Any
) -> Tensor:
    """An operation of one tensor whose backward takes (dy, y, *settings), y its output.

    The next layer keeps that output anyway, so the input can be released.
    """
    x = as_tensor(x)
    y = forward(x.data, *settings)
    return apply(y, (x,), lambda dy, _: (backward(dy, y, *settings),))


@recorded
def relu(x: Input) -> Tensor:
    """max(x, 0)."""
    return _of_one_from_output(ops.relu, ops.relu_backward, x)


@recorded
def relu6(x: Input) -> Tensor:
    """min(max(x, 0), 6)."""
    return _of_one_from_output(ops.relu6, ops.relu6_backward, x)


@recorded
def leaky_relu(x: Input, negative_slope: float = 0.01) -> Tensor:
    """x where positive, else negative_slope * x."""
    return _of_one(ops.leaky_relu, ops.leaky_relu_backward, x, negative_slope)


@recorded
def elu(x: Input, alpha: float = 1.0) -> Tensor:
    """x where positive, else alpha * (exp(x) - 1)."""
    return _of_one(ops.elu, ops.elu_backward, x, alpha)


@recorded
def sigmoid(x: Input) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _of_one(ops.sigmoid, ops.sigmoid_backward, x)


@recorded
def tanh(x: Input) -> Tensor:
    """Hyperbolic tangent."""
    return _of_one(ops.tanh, ops.tanh_backward, x)


@recorded
def silu(x: Input) -> Tensor:
    """x * sigmoid(x)."""
    return _of_one(ops.silu, ops.silu_backward, x)


@recorded
def gelu(x: Input, approximate: str = "none") -> Tensor:
    """x times the normal distribution function, or its tanh approximation ("tanh")."""
    return _of_one(ops.gelu, ops.gelu_backward, x, approximate)


@recorded
def hardsigmoid(x: Input) -> Tensor:
    """relu6(x + 3) / 6."""
    return _of_one(ops.hardsigmoid, ops.hardsigmoid_backward, x)


@recorded
def hardswish(x: Input) -> Tensor:
    """x * hardsigmoid(x)."""
    return _of_one(ops.hardswish, ops.hardswish_backward, x)


@recorded
def softmax(x: Input, dim: int = -1) -> Tensor:
    """exp(x), scaled to sum 1 along dim."""
    return _of_one_from_output(ops.softmax, ops.softmax_backward, x, dim)


@recorded
def log_softmax(x: Input, dim: int = -1) -> Tensor:
    """Logarithm of softmax."""
    return _of_one_from_output(ops.log_softmax, ops.log_softmax_backward, x, dim)


def dropout(x: Input, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Sets each element to 0 with probability p and scales the others by 1 / (1 - p).

    The mask is a function of the library's (seed, offset), see `fastconv.manual_seed`; the backward
    draws it again. `inplace` is accepted for PyTorch's sake: a new array is returned either way.
    """
    check_probability("dropout", p)
    tensor = as_tensor(x)
    if not training or p == 0.0:
        return tensor
    seed, offset = init.default_generator.reserve_rows(tensor.shape)

    def backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        return (ops.dropout_backward(dy, p, seed=seed, offset=offset),)

    y = ops.dropout(tensor.data, p, True, seed=seed, offset=offset)
    return apply(y, (tensor,), backward)


def stochastic_depth(input: Input, p: float, mode: str, training: bool = True) -> Tensor:
    """In training, sets each input[i] to 0 with probability p and scales the others by 1 / (1 - p).

    mode: "row", or "batch": one draw for all of the input. Random numbers as in `dropout`: one
    position of the generator a row, or one in all.
    """
    check_probability("drop", p)
    check_mode(mode)
    tensor = as_tensor(input)
    if not training or p == 0.0:
        return tensor
    generator = init.default_generator
    rows = mode == "row"
    seed, offset = generator.reserve_rows(tensor.shape[:1]) if rows else generator.reserve(1)

    def backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        return (ops.stochastic_depth_backward(dy, p, mode, seed=seed, offset=offset),)

    y = ops.stochastic_depth(tensor.data, p, mode, True, seed=seed, offset=offset)
    return apply(y, (tensor,), backward)


@recorded
def cross_entropy(
    logits: Input,
    target: Any,
    weight: Any | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of softmax(logits[N,C]) and the classes target[N] (int64).

    The result is a scalar, or [N] when reduction is "none".
    """
    logits = as_tensor(logits)
    ld, td = cuda.loss_operand(logits.data), to_numpy(target)
    settings = (
        None if weight is None else to_numpy(weight),
        ignore_index,
        reduction,
        label_smoothing,
    )

    def backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        return (ops.cross_entropy_backward(dy, ld, td, *settings),)

    return apply(ops.cross_entropy(ld, td, *settings), (logits,), backward)


@recorded
def cat(tensors: Sequence[Input], dim: int = 1) -> Tensor:
    """Concatenates along `dim` (the channels by default)."""
    inputs = [as_tensor(t) for t in tensors]
    y = ops.cat([t.data for t in inputs], dim)
    sizes = [t.shape[dim] for t in inputs]
    return apply(y, inputs, lambda dy, _: ops.cat_backward(dy, sizes, dim))


@recorded
def channel_gate(x: Input, gate: Input) -> Tensor:
    """x[N,C,H,W] * gate[N,C,1,1]: one factor a channel of each image."""
    inputs = (as_tensor(x), as_tensor(gate))
    xd, gd = (t.data for t in inputs)

    def backward(dy: Array, needs: Needs) -> Sequence[Array | None]:
        return ops.channel_gate_backward(dy, xd, gd, needs=needs)

    return apply(ops.channel_gate(xd, gd), inputs, backward)


def channel_gate_by_mean(x: Input, gate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """channel_gate(x, gate_of(mean)), mean[N,C,1,1] that of each channel's plane.

    The backward writes the gradient of x once, its share through the gate and that through the mean
    together: the operations one by one would write both, and read both to add them.
    """
    x = as_tensor(x)
    if not records((x,)):
        return channel_gate(x, gate_of(adaptive_avg_pool2d(x, 1)))
    xd = x.data
    pixels = xd.shape[2] * xd.shape[3]
    outer: list[tuple[Array, Array]] = []  # dy and gate, from the backward of the product

    def mean_backward(dmean: Array, _: Needs) -> Sequence[Array | None]:
        if not outer:  # the mean without the product
            return (ops.adaptive_avg_pool2d_backward(dmean, xd),)
        dy, gate = outer.pop()
        share = ops.avg_pool2d_backward(dmean, dmean, 1, divisor_override=pixels)
        return (ops.channel_gate(dy, gate, share),)

    mean = apply(ops.adaptive_avg_pool2d(xd, 1), (x,), mean_backward)
    gate = gate_of(mean)
    if not is_computed_from(gate, mean):
        return channel_gate(x, gate)
    gd = gate.data

    def backward(dy: Array, _: Needs) -> Sequence[Array | None]:
        outer.append((dy, gd))
        return None, ops.channel_gate_backward(dy, xd, gd, needs=(False, True))[1]

    return apply(ops.channel_gate(xd, gd), (x, gate), backward)


def flatten(x: Input, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Joins the dimensions start_dim..end_dim (inclusive) into one."""
    return as_tensor(x).flatten(start_dim, end_dim)


ACTIVATIONS: dict[str, Callable[[Input], Tensor]] = {
    "relu": relu,
    "relu6": relu6,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "silu": silu,
    "hardswish": hardswish,
}
"""The activations that `conv2d` and `batch_norm` can apply to their result, by name."""

# Activations whose derivative can be told from their output: fused with a convolution in training
# too, because the output alone is kept.
_FROM_OUTPUT: dict[str, Callable[[Array, Array], Array]] = {
    "relu": lambda dy, y: ops.relu_backward(dy, y),
    "relu6": lambda dy, y: ops.relu6_backward(dy, y),
}


def check_activation(name: str | None) -> None:
    """ValueError unless `name` is None or one of ACTIVATIONS."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {name!r}, expected None or one of {sorted(ACTIVATIONS)}"
        )


def activate(x: Input, name: str | None) -> Tensor:
    """The activation called `name` applied to x; x itself for None."""
    check_activation(name)
    return as_tensor(x) if name is None else ACTIVATIONS[name](x)

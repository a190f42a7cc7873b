"""Layers: names, arguments, defaults, state_dict keys and initial distributions of PyTorch.

Parameters are float32 (`model.double()` converts). Convolution weights have the logical shape of
PyTorch and lie in channels-last memory, the layout of the kernels. `Conv2d` and the batch norms
take an `activation` (a name from `functional.ACTIVATIONS`), which they apply in the same pass;
`Sequential` finds such pairs by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from fastconv import functional as F
from fastconv import init
from fastconv.folding import KeptWeights, on_cpu
from fastconv.functional import Padding, Pair
from fastconv.init import get_rng_state, manual_seed, set_rng_state
from fastconv.module import Module, Parameter
from fastconv.ops._arrays import pair
from fastconv.ops.dropout import check_mode, check_probability
from fastconv.tensor import Array, Tensor, records, to_numpy

if TYPE_CHECKING:
    from fastconv.distributed import Communicator

__all__ = [
    "ELU",
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "Hardsigmoid",
    "Hardswish",
    "Identity",
    "LeakyReLU",
    "Linear",
    "LocalResponseNorm",
    "LogSoftmax",
    "MaxPool2d",
    "Module",
    "ModuleList",
    "Parameter",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SqueezeExcitation",
    "StochasticDepth",
    "SyncBatchNorm",
    "Tanh",
    "conv_norm",
    "get_rng_state",
    "manual_seed",
    "set_rng_state",
]

TwoInts: TypeAlias = "tuple[int, int]"
L = TypeVar("L", bound="ModuleList")


def _pair(name: str, value: Pair, least: int) -> TwoInts:
    """(height, width) of an int or a pair; ValueError when one is below `least`."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"{name} must be one or two integers >= {least}, got {value!r}")
    return pair[0], pair[1]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def channels_last(array: Array) -> Array:
    """The same logical array [A,B,H,W], dense in the order A,H,W,B."""
    result: Array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return result


def _default_bias(weight_shape: tuple[int, ...], size: int) -> Parameter:
    fan_in, _ = init.fan_in_and_out(weight_shape)
    return Parameter(init.uniform((size,), 1.0 / math.sqrt(fan_in) if fan_in else 0.0))


class _Convolution(Module):
    """What Conv2d and ConvTranspose2d share: settings, checks and parameters."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
        bias: bool,
        padding_mode: str,
        transposed: bool,
    ) -> None:
        _positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels ({in_channels}) and out_channels ({out_channels}) must be multiples "
                f"of groups ({groups})"
            )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = padding
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = groups
        first, second = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        shape = (first, second // groups, *self.kernel_size)
        self.weight = Parameter(channels_last(init.kaiming_uniform(shape, a=math.sqrt(5))))
        self.bias = _default_bias(shape, out_channels) if bias else None

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        plain = {"padding": 0, "output_padding": (0, 0), "dilation": (1, 1), "groups": 1}
        for name, default in plain.items():
            value = getattr(self, name, default)
            text += f", {name}={value!r}" if value != default else ""
        return text + (", bias=False" if self.bias is None else "")


class Conv2d(_Convolution):
    """2-d convolution (cross-correlation): [N,C,H,W] -> [N,K,P,Q].

    padding: as `fastconv.conv2d`: an int, a pair, four sides ((top, bottom), (left, right)), "same"
        or "valid".
    padding_mode: only "zeros", else ValueError.
    activation: applied to the output in the same pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str | None = None,
    ) -> None:
        F.check_activation(activation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            transposed=False,
        )
        self.activation = activation
        self._kept = KeptWeights()

    def _forget(self) -> None:
        self._kept = KeptWeights()

    def forward(self, x: Any, residual: Any = None, *, activation: str | None = None) -> Tensor:
        """activation(convolution + bias + residual); `activation` overrides the layer's own.

        In evaluation, when no gradient is recorded, the packed weights are kept for the next call.
        """
        if not self.training:
            x, residual = F.as_tensor(x), F.optional_tensor(residual)
            inputs = (x, self.weight, self.bias, residual)
            if on_cpu(*inputs) and not records(inputs):
                return self._kept.forward(self, None, x, residual, activation or self.activation)
        sizes = self._kept.sizes_of(self)
        return F.convolve(x, self.weight, self.bias, sizes, activation or self.activation, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (
            f", activation={self.activation!r}" if self.activation else ""
        )


class ConvTranspose2d(_Convolution):
    """Transposed convolution: the gradient of Conv2d as a layer. Weight [C, K/groups, R, S]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            transposed=True,
        )
        self.padding: Pair = _pair("padding", padding, 0)
        self.output_padding = _pair("output_padding", output_padding, 0)

    def forward(self, x: Any) -> Tensor:
        return F.conv_transpose2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class Linear(Module):
    """x[..., in_features] -> [..., out_features]. Weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        _positive(in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        shape = (out_features, in_features)
        self.weight = Parameter(init.kaiming_uniform(shape, a=math.sqrt(5)))
        self.bias = _default_bias(shape, out_features) if bias else None

    def forward(self, x: Any) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class _BatchNorm(Module):
    _dimensions: tuple[int, ...] = (4,)
    _optional_state = ("num_batches_tracked",)
    communicator: Communicator | None = None  # None: the statistics are those of this process

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        _positive(num_features=num_features)
        F.check_activation(activation)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.activation = activation
        self.weight = Parameter(np.ones(num_features, np.float32)) if affine else None
        self.bias = Parameter(np.zeros(num_features, np.float32)) if affine else None
        self.running_mean: Array | None
        self.running_var: Array | None
        self.num_batches_tracked: Array | None
        track = track_running_stats
        self.register_buffer("running_mean", np.zeros(num_features, np.float32) if track else None)
        self.register_buffer("running_var", np.ones(num_features, np.float32) if track else None)
        self.register_buffer("num_batches_tracked", np.array(0, np.int64) if track else None)

    def forward(
        self,
        x: Any,
        residual: Any = None,
        *,
        activation: str | None = None,
        pool: MaxPool2d | None = None,
        moments: F.Moments | None = None,
    ) -> Tensor:
        """pool(activation(normalised x + residual)); `activation` overrides the layer's own.

        moments: those of x, where they are known already, in training.
        """
        x = F.as_tensor(x)
        if x.ndim not in self._dimensions:
            dimensions = " or ".join(str(d) for d in self._dimensions)
            raise ValueError(
                f"{type(self).__name__} needs {dimensions} dimensions, got shape {x.shape}"
            )
        training = self.training or self.running_mean is None
        momentum = self._share_of_batch()
        pooled = None
        if training and self.communicator is None and residual is None:
            pooled = _fused_windows(pool)
        if pooled is not None:
            y = F.batch_norm_max_pool2d(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                momentum,
                self.eps,
                kernel_size=pooled[0],
                stride=pooled[1],
                activation=activation or self.activation,
                moments=moments,
            )
        else:
            y = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training,
                momentum,
                self.eps,
                residual=residual,
                activation=activation or self.activation,
                communicator=self.communicator,
                moments=moments,
            )
        self._count_batch()
        return y if pool is None or pooled is not None else pool(y)

    def _share_of_batch(self) -> float:
        """The share of the next batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        if not self.training or self.num_batches_tracked is None:
            return 0.0
        return 1.0 / (float(self.num_batches_tracked) + 1.0)  # the plain average of all batches

    def _count_batch(self) -> None:
        if not self.training or self.num_batches_tracked is None:
            return
        if isinstance(self.num_batches_tracked, np.ndarray):
            # In place; numpy's addition would take longer than small layers.
            self.num_batches_tracked.fill(self.num_batches_tracked.item() + 1)
        else:
            self.num_batches_tracked += 1

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, "
            f"track_running_stats={self.running_mean is not None}"
            + (f", activation={self.activation!r}" if self.activation else "")
            + (f", processes={self.communicator.size}" if self.communicator else "")
        )


class BatchNorm2d(_BatchNorm):
    """Batch normalisation over N, H, W of [N,C,H,W]: Ioffe and Szegedy 2015.

    momentum None: running statistics are the plain average over all batches.
    activation: applied in the same pass, after `residual`, which `forward` takes, has been added.
    """


class BatchNorm1d(_BatchNorm):
    """Batch normalisation over N of [N,C]; otherwise as BatchNorm2d."""

    _dimensions = (2,)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d, in training with the statistics over all processes.

    communicator: the processes, which then all run the forward and the backward of this layer in
        the same order; see `fastconv.distributed`. None: this process alone.
    """

    _dimensions = (2, 4)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        communicator: Communicator | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation=activation
        )
        self.communicator = communicator


class LocalResponseNorm(Module):
    """x / (k + alpha / size * sum of x^2 over `size` neighbouring channels)^beta, x[N,C,H,W]."""

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        _positive(size=size)
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Any) -> Tensor:
        return F.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class MaxPool2d(Module):
    """Maximum over windows; with return_indices the pair (values, indices)."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        dilation: Pair = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def forward(self, x: Any) -> Tensor | tuple[Tensor, Array]:
        return F.max_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class AvgPool2d(Module):
    """Mean over windows."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def forward(self, x: Any) -> Tensor:
        return F.avg_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AdaptiveAvgPool2d(Module):
    """Mean over the windows that divide the image into output_size parts."""

    def __init__(self, output_size: int | tuple[int | None, int | None] | None) -> None:
        self.output_size = output_size

    def forward(self, x: Any) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class Dropout(Module):
    """In training, sets elements to 0 with probability p and scales the others by 1/(1-p)."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_probability("dropout", p)
        self.p = p

    def forward(self, x: Any) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class StochasticDepth(Module):
    """In training, sets each input[i] to 0 with probability p and scales the others by 1 / (1 - p).

    As torchvision.ops.StochasticDepth (Huang et al. 2016, "Deep networks with stochastic depth").
    mode: "row", or "batch": one draw for the whole input.
    """

    def __init__(self, p: float, mode: str) -> None:
        check_probability("drop", p)
        check_mode(mode)
        self.p = p
        self.mode = mode

    def forward(self, input: Any) -> Tensor:
        return F.stochastic_depth(input, self.p, self.mode, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


class Flatten(Module):
    """Joins dimensions start_dim..end_dim, in the logical order N,C,H,W whatever the memory."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Any) -> Tensor:
        return F.flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Identity(Module):
    """Returns its input; any arguments are accepted and ignored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, x: Any) -> Tensor:
        return F.as_tensor(x)


class _NamedActivation(Module):
    """An activation that convolutions can apply; `inplace`, as in PyTorch's, is ignored."""

    name = ""

    def __init__(self, inplace: bool = False) -> None:
        pass

    def forward(self, x: Any) -> Tensor:
        return F.activate(x, self.name)


class ReLU(_NamedActivation):
    """max(x, 0)."""

    name = "relu"


class ReLU6(_NamedActivation):
    """min(max(x, 0), 6)."""

    name = "relu6"


class SiLU(_NamedActivation):
    """x * sigmoid(x)."""

    name = "silu"


class Hardswish(_NamedActivation):
    """x * hardsigmoid(x)."""

    name = "hardswish"


class Sigmoid(_NamedActivation):
    """1 / (1 + exp(-x))."""

    name = "sigmoid"


class Tanh(_NamedActivation):
    """Hyperbolic tangent."""

    name = "tanh"


class Hardsigmoid(Module):
    """relu6(x + 3) / 6; `inplace` is accepted for PyTorch's sake and ignored."""

    def __init__(self, inplace: bool = False) -> None:
        pass

    def forward(self, x: Any) -> Tensor:
        return F.hardsigmoid(x)


class LeakyReLU(Module):
    """x where positive, else negative_slope * x."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: Any) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Module):
    """x where positive, else alpha * (exp(x) - 1)."""

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        self.alpha = alpha

    def forward(self, x: Any) -> Tensor:
        return F.elu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class GELU(Module):
    """x times the normal distribution function; approximate: "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def forward(self, x: Any) -> Tensor:
        return F.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SqueezeExcitation(Module):
    """x[N,C,H,W] with each channel scaled by a gate computed from the means of all channels.

    As torchvision.ops.SqueezeExcitation (Hu, Shen, Sun 2018, "Squeeze-and-excitation networks",
    section 3): scale_activation(fc2(activation(fc1(mean)))), fc1 and fc2 1x1 convolutions.
    activation, scale_activation: what makes the two modules, a class for example.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[[], Module] = ReLU,
        scale_activation: Callable[[], Module] = Sigmoid,
    ) -> None:
        self.avgpool = AdaptiveAvgPool2d(1)
        self.fc1 = Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x: Any) -> Tensor:
        x = F.as_tensor(x)
        if self.avgpool._forward_hooks:
            return F.channel_gate(x, self._gate(self.avgpool(x)))
        return F.channel_gate_by_mean(x, self._gate)

    def _gate(self, mean: Tensor) -> Tensor:
        gate: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(mean))))
        return gate


class Softmax(Module):
    """exp(x), scaled to sum 1 along dim."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: Any) -> Tensor:
        return F.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Module):
    """Logarithm of softmax along dim."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: Any) -> Tensor:
        return F.log_softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class CrossEntropyLoss(Module):
    """Cross entropy between softmax(logits[N,C]) and classes target[N] (int64).

    weight: one number a class; ignore_index: a target that counts for nothing; reduction: "mean",
        "sum" or "none".
    """

    def __init__(
        self,
        weight: Any | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        self.weight: Array | None
        self.register_buffer("weight", None if weight is None else to_numpy(weight))
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Any, target: Any) -> Tensor:
        return F.cross_entropy(
            logits, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class ModuleList(Module):
    """A list of modules; keys "0", "1", ... It has no forward."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        for module in modules:
            self.append(module)

    def append(self: L, module: Module) -> L:
        """Adds a module at the end. TypeError when it is not a Module."""
        if not isinstance(module, Module):
            raise TypeError(f"expected a Module, got {type(module).__name__}: {module!r}")
        setattr(self, str(len(self)), module)
        return self

    def _items(self) -> list[Module]:
        return [value for value in vars(self).values() if isinstance(value, Module)]

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._items())

    def __getitem__(self, index: int) -> Module:
        return self._items()[index]


class Sequential(ModuleList):
    """Modules one after another; keys "0", "1", ...

    A `ReLU` (or another activation without settings) right behind a `Conv2d` or batch norm is
    computed in the same pass as that layer, unless one of the two has hooks: same values, one pass
    over memory less. So is a `MaxPool2d` without padding or overlap behind a `BatchNorm2d`. A batch
    norm behind a `Conv2d` is called as by `conv_norm`.
    """

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        layers = self._items()
        i = 0
        while i < len(layers):
            conv = layers[i] if i + 1 < len(layers) and _norm_of(layers[i], layers[i + 1]) else None
            i += 0 if conv is None else 1
            layer = layers[i]
            options: dict[str, Any] = {}
            i += 1
            name = _fusable(layer, layers[i]) if i < len(layers) else None
            if name is not None:
                options["activation"] = name
                i += 1
            if i < len(layers) and _poolable(layer, layers[i]):
                options["pool"] = layers[i]
                i += 1
            x = layer(x, **options) if conv is None else conv_norm(conv, layer, x, **options)
        return x


def conv_norm(
    conv: Module,
    norm: Module,
    x: Any,
    residual: Any = None,
    *,
    activation: str | None = None,
    pool: MaxPool2d | None = None,
) -> Tensor:
    """pool(activation(norm(conv(x)) + residual)).

    For a `Conv2d` and a batch norm in evaluation this is one convolution, with the batch norm
    folded into its weights, as long as no gradient is recorded and neither layer has hooks: see
    `fastconv.folding`. In training, without hooks, it is one recorded operation,
    `functional.conv2d_batch_norm`. Otherwise the layers are called one after the other.
    """
    x, residual = F.as_tensor(x), F.optional_tensor(residual)
    batch_norm = _norm_of(conv, norm)
    if batch_norm is not None and batch_norm.training and batch_norm.communicator is None:
        assert isinstance(conv, Conv2d)
        pooled = None if residual is not None else _fused_windows(pool)
        y = F.conv2d_batch_norm(
            x,
            conv.weight,
            conv.bias,
            conv._kept.sizes_of(conv),
            batch_norm.weight,
            batch_norm.bias,
            batch_norm.running_mean,
            batch_norm.running_var,
            batch_norm._share_of_batch(),
            batch_norm.eps,
            residual=residual,
            activation=activation or batch_norm.activation,
            pool=pooled,
        )
        batch_norm._count_batch()
        return y if pool is None or pooled is not None else pool(y)
    if batch_norm is not None and batch_norm.running_mean is not None:
        assert isinstance(conv, Conv2d)
        inputs = (x, residual, conv.weight, conv.bias, batch_norm.weight, batch_norm.bias)
        if on_cpu(*inputs) and not batch_norm.training and not records(inputs):
            F.check_activation(activation)
            activation = activation or batch_norm.activation
            folded = conv._kept.forward(conv, batch_norm, x, residual, activation)
            return folded if pool is None else pool(folded)
    given = {"residual": residual, "activation": activation, "pool": pool}
    options = {name: value for name, value in given.items() if value is not None}
    z: Tensor = norm(conv(x), **options)
    return z


def _norm_of(conv: Module, norm: Module) -> _BatchNorm | None:
    """`norm` if it is a batch norm that can be folded into the convolution `conv`."""
    # Exact types: a subclass may have a forward of its own.
    if type(conv) is not Conv2d or type(norm) not in (BatchNorm2d, SyncBatchNorm):
        return None
    if conv._forward_hooks or norm._forward_hooks or conv.activation is not None:
        return None
    assert isinstance(norm, _BatchNorm)
    return norm if norm.num_features == conv.out_channels else None


def _fusable(layer: Module, following: Module) -> str | None:
    """The name of the activation `following` if `layer` can apply it in its own pass."""
    # Exact types: a subclass may have a forward of its own.
    if type(layer) not in (Conv2d, BatchNorm2d, BatchNorm1d, SyncBatchNorm) or layer._forward_hooks:
        return None
    assert isinstance(layer, (Conv2d, _BatchNorm))
    if not isinstance(following, _NamedActivation) or following._forward_hooks:
        return None
    if type(following).forward is not _NamedActivation.forward or layer.activation is not None:
        return None
    return following.name


def _poolable(layer: Module, following: Module) -> bool:
    """Whether the batch norm `layer` takes the pooling `following` as its `pool`."""
    return (
        type(layer) is BatchNorm2d
        and type(following) is MaxPool2d
        and not layer._forward_hooks
        and not following._forward_hooks
        and not following.return_indices
    )


def _fused_windows(pool: MaxPool2d | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Kernel size and stride of `pool` if a batch norm can apply it in its own pass."""
    if pool is None or type(pool) is not MaxPool2d or pool._forward_hooks:
        return None
    kernel, stride = pair(pool.kernel_size, "kernel_size"), pair(pool.stride, "stride")
    fits = (
        all(s >= k for k, s in zip(kernel, stride, strict=True))
        and math.prod(kernel) <= 256
        and pool.padding in (0, (0, 0))
        and pool.dilation in (1, (1, 1))
        and not pool.return_indices
        and not pool.ceil_mode
    )
    return (kernel, stride) if fits else None

"""The compiled kernels. Arrays are numpy's, in native byte order; the package converts."""

from collections.abc import Sequence

import numpy as np

_Pair = tuple[int, int]
_Padding = str | tuple[int, int, int, int]
# dtype, x shape, w shape, stride, padding (top, bottom, left, right), dilation, groups
_Description = tuple[str, Sequence[int], Sequence[int], _Pair, _Padding, _Pair, int]
# The same as it is given out; all lists.
_Recorded = tuple[str, list[int], list[int], list[int], list[int], list[int], int]
_Gradients = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]

# Runtime
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def memory_stats() -> dict[str, int]: ...
def reset_peak_memory_stats() -> None: ...
def set_memory_limit(bytes: int) -> None: ...
def empty_cache() -> None: ...
def sole_owner(holder: object, descriptor: object) -> bool: ...
def dense_copy(x: np.ndarray, channels_last: bool) -> np.ndarray: ...
def same_bytes(arrays: Sequence[np.ndarray], copies: Sequence[np.ndarray]) -> bool: ...
def measure_fma_peak(seconds: float, threads: int) -> float: ...
def measure_bandwidth(bytes: int, threads: int) -> float: ...

# Convolution
class WeightCache:
    def __init__(self) -> None: ...

def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    activation: str,
) -> np.ndarray: ...
def conv2d_moments(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]: ...
def conv2d_batch_norm_train(
    x: np.ndarray,
    w: np.ndarray,
    conv_bias: np.ndarray | None,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    eps: float,
    residual: np.ndarray | None,
    activation: str,
    pool_kernel: _Pair | None,
    pool_stride: _Pair | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]: ...
def conv2d_batch_norm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    z: np.ndarray,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    residual: np.ndarray | None,
    activation: str,
    places: np.ndarray | None,
    pool_kernel: _Pair | None,
    pool_stride: _Pair | None,
    needs: Sequence[bool],
) -> tuple[np.ndarray | None, ...]: ...
def conv2d_cached(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    activation: str,
    scale: np.ndarray | None,
    cache: WeightCache | None,
) -> np.ndarray: ...
def conv2d_backward(
    dy: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    needs: list[bool],
) -> _Gradients: ...
def conv_transpose2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    stride: _Pair,
    padding: _Pair,
    output_padding: _Pair,
    dilation: _Pair,
    groups: int,
) -> np.ndarray: ...
def conv_transpose2d_backward(
    dy: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    stride: _Pair,
    padding: _Pair,
    output_padding: _Pair,
    dilation: _Pair,
    groups: int,
    needs: list[bool],
) -> _Gradients: ...
def conv2d_output_shape(
    x_shape: list[int],
    w_shape: list[int],
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
) -> list[int]: ...
def explain_conv2d(
    x_shape: list[int],
    w_shape: list[int],
    stride: _Pair,
    padding: _Padding,
    dilation: _Pair,
    groups: int,
    dtype: str,
    direction: str,
) -> list[tuple[str, str]]: ...
def set_algorithm(name: str) -> None: ...
def set_tuning(source: str, isa: str, choices: Sequence[tuple[_Description, str, str]]) -> None: ...
def tuning_source() -> str: ...
def start_recording() -> None: ...
def stop_recording() -> list[tuple[_Recorded, str]]: ...
def conv2d_candidates(problem: _Description, direction: str) -> list[str]: ...
def set_strict_precision(on: bool) -> None: ...
def strict_precision() -> bool: ...

# Pooling
def max_pool2d(
    x: np.ndarray,
    kernel_size: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    ceil_mode: bool,
    return_indices: bool,
    return_places: bool,
) -> tuple[np.ndarray, np.ndarray | None]: ...
def max_pool2d_backward(
    dy: np.ndarray,
    x: np.ndarray,
    kernel_size: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    ceil_mode: bool,
    indices: np.ndarray | None,
    places: np.ndarray | None,
) -> np.ndarray: ...
def avg_pool2d(
    x: np.ndarray,
    kernel_size: _Pair,
    stride: _Pair,
    padding: _Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> np.ndarray: ...
def avg_pool2d_backward(
    dy: np.ndarray,
    x: np.ndarray,
    kernel_size: _Pair,
    stride: _Pair,
    padding: _Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> np.ndarray: ...
def adaptive_avg_pool2d(x: np.ndarray, output_size: _Pair) -> np.ndarray: ...
def adaptive_avg_pool2d_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray: ...

# Batch normalisation
def batch_norm_train(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    eps: float,
    residual: np.ndarray | None,
    activation: str,
    moments: tuple[int, np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
def batch_norm_moments(x: np.ndarray) -> np.ndarray: ...
def batch_norm_eval(
    x: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    residual: np.ndarray | None,
    activation: str,
) -> np.ndarray: ...
def batch_norm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    activation: str,
    training: bool,
    needs: list[bool],
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]: ...
def batch_norm_backward_sums(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    activation: str,
) -> tuple[np.ndarray, np.ndarray | None]: ...
def batch_norm_backward_input(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    sum: np.ndarray,
    products: np.ndarray,
    count: int,
    bias: np.ndarray | None,
    activation: str,
) -> np.ndarray: ...
def batch_norm_max_pool_train(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    eps: float,
    activation: str,
    kernel_size: _Pair,
    stride: _Pair,
    moments: tuple[int, np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def batch_norm_max_pool_backward(
    dy: np.ndarray,
    x: np.ndarray,
    places: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    bias: np.ndarray | None,
    activation: str,
    kernel_size: _Pair,
    stride: _Pair,
    needs: list[bool],
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]: ...

# Local response normalisation
def local_response_norm(
    x: np.ndarray, size: int, alpha: float, beta: float, k: float
) -> np.ndarray: ...
def local_response_norm_backward(
    dy: np.ndarray, x: np.ndarray, size: int, alpha: float, beta: float, k: float
) -> np.ndarray: ...

# Elementwise
def elementwise(name: str, x: np.ndarray, parameter: float) -> np.ndarray: ...
def elementwise_backward(
    name: str, dy: np.ndarray, x: np.ndarray, parameter: float
) -> np.ndarray: ...
def add(a: np.ndarray, b: np.ndarray) -> np.ndarray: ...
def add_to(a: np.ndarray, b: np.ndarray) -> None: ...
def dropout(x: np.ndarray, p: float, seed: int, offset: int) -> np.ndarray: ...
def stochastic_depth(x: np.ndarray, p: float, rows: bool, seed: int, offset: int) -> np.ndarray: ...

# Channels
def cat(arrays: Sequence[np.ndarray], dim: int) -> np.ndarray: ...
def cat_backward(dy: np.ndarray, sizes: Sequence[int], dim: int) -> list[np.ndarray]: ...
def channel_gate(x: np.ndarray, gate: np.ndarray, bias: np.ndarray | None) -> np.ndarray: ...
def channel_gate_backward(
    dy: np.ndarray, x: np.ndarray, gate: np.ndarray, needs: list[bool]
) -> tuple[np.ndarray | None, np.ndarray | None]: ...

# Linear and losses
def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray: ...
def linear_backward(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, needs: list[bool]
) -> _Gradients: ...
def softmax(x: np.ndarray, dim: int, logarithm: bool) -> np.ndarray: ...
def softmax_backward(dy: np.ndarray, y: np.ndarray, dim: int, logarithm: bool) -> np.ndarray: ...
def cross_entropy(
    logits: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> np.ndarray: ...
def cross_entropy_backward(
    dloss: np.ndarray,
    logits: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> np.ndarray: ...

# Optimisers: everything is updated in place; a parameter whose gradient is None is left alone.
def sgd_step(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray | None],
    momenta: Sequence[np.ndarray] | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: Sequence[float],
    nesterov: bool,
    first: bool,
    gradient_scale: float,
) -> None: ...
def adamw_step(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray | None],
    exp_avg: Sequence[np.ndarray],
    exp_avg_sq: Sequence[np.ndarray],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    gradient_scale: float,
) -> None: ...
def gradient_norm(grads: Sequence[np.ndarray]) -> float: ...
def move_towards(
    averages: Sequence[np.ndarray], values: Sequence[np.ndarray], share: float
) -> None: ...

"""The compiled kernels. Arrays are numpy arrays in native byte order; the package's functions check and convert."""

import numpy as np

_Pair = tuple[int, int]
_Padding = str | tuple[int, int, int, int]
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
def measure_fma_peak(seconds: float, threads: int) -> float: ...
def measure_bandwidth(bytes: int, threads: int) -> float: ...

# Convolution
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

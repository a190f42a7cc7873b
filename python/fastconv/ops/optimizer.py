"""Optimiser steps: one call, one pass over all parameters, in place.

Parameters are float32 or float64 arrays, dense in any order of dimensions; state lies in memory as
its parameter does, gradients may have any strides. A parameter whose gradient is None is left
alone. Raises ValueError for shapes or orders of memory that do not fit and TypeError for wrong
dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import cuda
from ._arrays import Array, integer, kernels, operand
from ._inplace import writable


def _all_writable(arrays: Sequence[Array], name: str) -> list[np.ndarray]:
    return [writable(a, f"{name} {i}") for i, a in enumerate(arrays)]


def _gradients(grads: Sequence[Array | None]) -> list[np.ndarray | None]:
    return [None if g is None else operand(g, f"gradient {i}") for i, g in enumerate(grads)]


def _per_parameter(value: float | Sequence[float], count: int) -> list[float]:
    if isinstance(value, Sequence):
        return [float(v) for v in value]
    return [float(value)] * count


def _factor(gradient_scale: float | Array) -> Any:
    return gradient_scale if cuda.is_device_array(gradient_scale) else float(gradient_scale)


def sgd_step(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    momenta: Sequence[Array] | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float | Sequence[float],
    nesterov: bool,
    first: bool,
    gradient_scale: float | Array = 1.0,
) -> None:
    """Stochastic gradient descent as torch.optim.SGD.

    d = gradient_scale g + weight_decay p; m = momentum m + (1 - dampening) d;
    p -= lr m, or lr (d + momentum m) with nesterov.

    Args:
        momenta: the buffers m, or None for p -= lr d.
        weight_decay: one number, or one a parameter.
        first: this is the first step of these parameters, which sets m = d.
        gradient_scale: the factor of a clipped or summed gradient. On a CUDA device also an array
            of one float64 there, which the kernel reads; where it is NaN, nothing is changed.
    """
    kernels.sgd_step(
        _all_writable(params, "parameter"),
        _gradients(grads),
        None if momenta is None else _all_writable(momenta, "momentum"),
        float(lr),
        float(momentum),
        float(dampening),
        _per_parameter(weight_decay, len(params)),
        bool(nesterov),
        bool(first),
        _factor(gradient_scale),
    )


def adamw_step(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    exp_avg: Sequence[Array],
    exp_avg_sq: Sequence[Array],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    gradient_scale: float | Array = 1.0,
) -> None:
    """AdamW as torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    g *= gradient_scale; p *= 1 - lr weight_decay;
    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    p -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).

    Args:
        exp_avg, exp_avg_sq: m and v. step: number of this step, from 1.
        weight_decay: one number, or one a parameter.
        gradient_scale: as in :func:`sgd_step`.
    """
    kernels.adamw_step(
        _all_writable(params, "parameter"),
        _gradients(grads),
        _all_writable(exp_avg, "exp_avg"),
        _all_writable(exp_avg_sq, "exp_avg_sq"),
        integer(step, "step"),
        float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        _per_parameter(weight_decay, len(params)),
        _factor(gradient_scale),
    )


def gradient_norm(grads: Sequence[Array | None]) -> float:
    """L2 norm of all gradients taken as one vector, summed in float64; those that are None are 0.

    float32 or float64 arrays with any strides. The same bits for every number of threads.
    """
    return kernels.gradient_norm([g for g in _gradients(grads) if g is not None])


def move_towards(averages: Sequence[Array], values: Sequence[Array], share: float) -> None:
    """average += share (value - average) for each pair, in place.

    A step of an exponential moving average with decay 1 - share. The pairs are float32 or float64
    arrays of the same shape, averages dense in any order of dimensions, values with any strides.
    """
    targets = [operand(value, f"value {i}") for i, value in enumerate(values)]
    kernels.move_towards(_all_writable(averages, "average"), targets, float(share))

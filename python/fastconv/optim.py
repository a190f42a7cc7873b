"""Optimisers and learning-rate schedules, with PyTorch's names, formulas and defaults.

A step is one fused pass over all parameters of a group (`fastconv.ops.sgd_step`, `adamw_step`).
`state_dict()` has PyTorch's form: {"state": {index: {...}}, "param_groups": [{..., "params":
[index, ...]}]}.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fastconv import ops
from fastconv.module import clear_grad
from fastconv.tensor import Array, Tensor, in_form, move

Group: TypeAlias = dict[str, Any]
Params: TypeAlias = "Iterable[Tensor] | Iterable[Group]"


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:  # also refuses NaN
            raise ValueError(f"{name} must not be negative, got {value}")


class Optimizer:
    """Base of the optimisers: parameter groups, state, saving and loading.

    params: parameters, or dicts {"params": [...], "lr": ..., ...} whose other entries override the
        defaults.
    ValueError: no parameters, a parameter given twice, a setting out of range, an unknown setting.
    """

    def __init__(self, params: Params, defaults: Group) -> None:
        self.defaults = defaults
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        items = list(params)
        if not items:
            raise ValueError("an optimiser needs at least one parameter, got none")
        groups = items if isinstance(items[0], dict) else [{"params": items}]
        for group in groups:
            if not isinstance(group, dict):
                raise TypeError(
                    f"expected a dict among parameter groups, got {type(group).__name__}"
                )
            self.add_param_group(group)

    def add_param_group(self, group: Group) -> None:
        """Adds parameters with settings of their own."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for param in params:
            if not isinstance(param, Tensor):
                raise TypeError(f"can only optimise tensors, got {type(param).__name__}")
            if not param.is_leaf:
                raise ValueError("can only optimise leaf tensors, got the result of an operation")
        known = {param for other in self.param_groups for param in other["params"]}
        if len(set(params)) < len(params) or not known.isdisjoint(params):
            raise ValueError("a parameter appears twice among the parameter groups")
        unknown = group.keys() - self.defaults.keys() - {"params", "initial_lr"}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}, known: {sorted(self.defaults)}")
        complete = {**self.defaults, **group, "params": params}
        self._check(complete)
        self.param_groups.append(complete)

    def _check(self, group: Group) -> None:
        """ValueError when a setting of the group is out of range."""
        raise NotImplementedError

    def step(self, gradient_scale: float | Array = 1.0, *, count_only: bool = False) -> None:
        """Updates every parameter that has a gradient, in place.

        gradient_scale  a factor on all gradients, applied in the same pass; on a CUDA device also
                        an array of one float64 there, which changes nothing where it is NaN
        count_only      do not touch any array: a graph of the device's work is about to do that
                        (`train.GraphedStep`)
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, gradient_scale, count_only)

    def _update(
        self, group: Group, params: list[Tensor], gradient_scale: float | Array, count_only: bool
    ) -> None:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, or fills them with zeros."""
        for group in self.param_groups:
            for param in group["params"]:
                clear_grad(param, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Settings and state by parameter number. The arrays share memory with the optimiser."""
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = {param: i for i, param in enumerate(params)}
        return {
            "state": {numbers[p]: dict(self.state[p]) for p in params if p in self.state},
            "param_groups": [
                {**group, "params": [numbers[p] for p in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies what `state_dict` returned. ValueError when groups or array shapes differ."""
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in saved]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(f"parameter groups of sizes {sizes} do not fit groups of {own_sizes}")
        numbers = [number for group in saved for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        saved_state = {int(number): state for number, state in state_dict["state"].items()}
        state = {
            param: _copied_state(saved_state[number], param)
            for number, param in zip(numbers, params, strict=True)
            if number in saved_state
        }
        for group, other in zip(self.param_groups, saved, strict=True):
            settings = {key: value for key, value in other.items() if key != "params"}
            self._check({**group, **settings})
            group.update(settings)
        self.state = state

    def __repr__(self) -> str:
        lines = [
            f"  group {i}: {sum(p.data.size for p in group['params'])} numbers, "
            + ", ".join(f"{k}={v}" for k, v in group.items() if k != "params")
            for i, group in enumerate(self.param_groups)
        ]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    lr: float,
    weight_decay: float,
    *,
    lr_scale: Callable[[str], float] | None = None,
    decay_all: bool = False,
) -> list[Group]:
    """Parameter groups in which biases and norms are spared from weight decay.

    named_parameters  as of `Module.named_parameters()`; those that need no gradient are left out
    lr_scale          factor on `lr` by the name of the parameter ("layer1.0.conv1.weight"): small
                      ones for a pretrained backbone, Howard and Ruder 2018, section 3.2
    decay_all         decay the others, too

    Every parameter with fewer than two dimensions is taken for a bias or a scale: shrinking it does
    not make a network simpler (He et al. 2019, "Bag of tricks", section 3.1). There is a group for
    each pair of learning rate and decay, in the order of their first parameters.
    Raises ValueError for a negative factor.
    """
    groups: dict[tuple[float, float], Group] = {}
    for name, param in named_parameters:
        if not param.requires_grad:
            continue
        scale = 1.0 if lr_scale is None else lr_scale(name)
        _not_negative(**{f"lr_scale of {name}": scale})
        decay = weight_decay if decay_all or param.ndim > 1 else 0.0
        new = {"params": [], "lr": lr * scale, "weight_decay": decay}
        groups.setdefault((scale, decay), new)["params"].append(param)
    return list(groups.values())


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of this norm down to max_norm, 1 where it is shorter."""
    return min(max_norm / (norm + 1e-6), 1.0)  # NaN stays NaN


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, error_if_nonfinite: bool = False
) -> float:
    """Scales the gradients in place so that their common L2 norm is at most max_norm.

    Returns the norm before: torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, algorithm 1).
    `Optimizer.step(gradient_scale=...)` does the same in the pass of the optimiser. Raises
    RuntimeError for a norm that is not finite if `error_if_nonfinite`.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = ops.gradient_norm(grads)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"the norm of the gradients is {norm}, so they cannot be clipped")
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:
        with np.errstate(invalid="ignore"):  # an infinite norm makes NaN of infinite elements
            for grad in grads:
                grad *= factor
    return norm


def _copied_state(saved: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """A copy of the state of one parameter, arrays in the parameter's memory order."""
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if not hasattr(value, "ndim") or value.ndim == 0:
            state[name] = int(value)
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"{name} of shape {value.shape} does not fit a parameter of {param.shape}"
            )
        state[name] = np.empty_like(param.data)
        state[name][...] = move(value, param.device)
    return state


def _arrays(params: list[Tensor]) -> tuple[list[Array], list[Array | None]]:
    """The parameters and their gradients; each gradient in its parameter's memory order."""
    arrays: list[Array] = []
    grads: list[Array | None] = []
    for p in params:
        array, grad = p.data, p.grad
        assert grad is not None
        if grad.shape != array.shape:
            raise ValueError(
                f"a gradient of shape {grad.shape} does not fit a parameter of {array.shape}"
            )
        arrays.append(array)
        grads.append(in_form(grad, array))
    return arrays, grads


class SGD(Optimizer):
    """Stochastic gradient descent.

    g += weight_decay p; v = momentum v + (1 - dampening) g; p -= lr v. The first v is g
    itself. With nesterov p -= lr (g + momentum v): Sutskever et al. 2013, in PyTorch's form.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        _not_negative(**{key: group[key] for key in ("lr", "momentum", "weight_decay")})
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs a positive momentum and no dampening, got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )

    def _update(
        self, group: Group, params: list[Tensor], gradient_scale: float | Array, count_only: bool
    ) -> None:
        settings = {key: value for key, value in group.items() if key in self.defaults}
        settings["gradient_scale"] = gradient_scale
        if group["momentum"] == 0:
            touched = [] if count_only else params
            ops.sgd_step(*_arrays(touched), None, first=False, **settings)
            return
        fresh = [p for p in params if p not in self.state]
        started = [p for p in params if p in self.state]
        for p in fresh:
            self.state[p] = {"momentum_buffer": np.zeros_like(p.data)}
        for first, members in ((True, fresh), (False, started)):
            if members:
                touched = [] if count_only else members
                momenta = [self.state[p]["momentum_buffer"] for p in touched]
                ops.sgd_step(*_arrays(touched), momenta, first=first, **settings)


class AdamW(Optimizer):
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, algorithm 2.

    p -= lr weight_decay p; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
    p -= lr m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        _not_negative(**{key: group[key] for key in ("lr", "eps", "weight_decay")})
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")

    def _update(
        self, group: Group, params: list[Tensor], gradient_scale: float | Array, count_only: bool
    ) -> None:
        by_step: dict[
            int, list[Tensor]
        ] = {}  # parameters that got their first gradient later lag behind
        for p in params:
            state = self.state.setdefault(p, {})
            if not state:
                state.update(
                    step=0, exp_avg=np.zeros_like(p.data), exp_avg_sq=np.zeros_like(p.data)
                )
            state["step"] += 1
            by_step.setdefault(state["step"], []).append(p)
        beta1, beta2 = group["betas"]
        for step, members in by_step.items():
            touched = [] if count_only else members
            ops.adamw_step(
                *_arrays(touched),
                [self.state[p]["exp_avg"] for p in touched],
                [self.state[p]["exp_avg_sq"] for p in touched],
                step=step,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                gradient_scale=gradient_scale,
            )


class LRScheduler:
    """Base of the schedules: a learning rate as a function of the first one and the step number.

    `step()` after each epoch (or batch, as the schedule is meant) moves on by one. Because the rate
    is a function and not a running product, a schedule can be composed with others and continued
    from its step number alone.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._set()

    def rate(self, base_lr: float, epoch: int) -> float:
        """The learning rate at step `epoch` (from 0) of a group whose first one is `base_lr`."""
        raise NotImplementedError

    def step(self) -> None:
        """Moves on by one and sets the learning rates of the optimiser."""
        self.last_epoch += 1
        self._set()

    def _set(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = lr

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group at the present step."""
        return [self.rate(base, self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The step number and the first learning rates."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. ValueError: another number of groups."""
        base_lrs = [float(lr) for lr in state_dict["base_lrs"]]
        if len(base_lrs) != len(self.base_lrs):
            raise ValueError(
                f"{len(base_lrs)} learning rates do not fit {len(self.base_lrs)} groups"
            )
        self.base_lrs, self.last_epoch = base_lrs, int(state_dict["last_epoch"])
        self._set()


class LambdaLR(LRScheduler):
    """first rate times lr_lambda(step)."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Callable[[int], float]) -> None:
        self.lr_lambda = lr_lambda
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        return base_lr * self.lr_lambda(epoch)


class StepLR(LRScheduler):
    """Times gamma every step_size steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        if step_size < 1:
            raise ValueError(f"step_size must be at least 1, got {step_size}")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        return base_lr * self.gamma ** (epoch // self.step_size)


class MultiStepLR(LRScheduler):
    """Times gamma at each of the milestones."""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        return base_lr * self.gamma ** bisect.bisect_right(self.milestones, epoch)


class CosineAnnealingLR(LRScheduler):
    """Half a cosine from the first rate to eta_min in T_max steps: Loshchilov and Hutter 2017."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        if T_max < 1:
            raise ValueError(f"T_max must be at least 1, got {T_max}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        share = (1 + math.cos(math.pi * epoch / self.T_max)) / 2
        return self.eta_min + (base_lr - self.eta_min) * share


class LinearLR(LRScheduler):
    """Warm-up: start_factor to end_factor times the first rate in total_iters steps, then flat."""

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
    ) -> None:
        if not 0.0 < start_factor <= 1.0 or not 0.0 <= end_factor <= 1.0:
            raise ValueError(
                "start_factor must be in (0, 1] and end_factor in [0, 1], "
                f"got {start_factor} and {end_factor}"
            )
        if total_iters < 1:
            raise ValueError(f"total_iters must be at least 1, got {total_iters}")
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        share = min(epoch, self.total_iters) / self.total_iters
        return base_lr * (self.start_factor + (self.end_factor - self.start_factor) * share)


class SequentialLR(LRScheduler):
    """One schedule after another: schedule i begins, from its own step 0, at milestones[i-1]."""

    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int]
    ) -> None:
        if len(schedulers) != len(milestones) + 1 or list(milestones) != sorted(set(milestones)):
            raise ValueError(
                "n schedules need n - 1 increasing milestones, "
                f"got {len(schedulers)} and {list(milestones)}"
            )
        if any(scheduler.optimizer is not optimizer for scheduler in schedulers):
            raise ValueError("all schedules must belong to the optimiser of SequentialLR")
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        super().__init__(optimizer)

    def rate(self, base_lr: float, epoch: int) -> float:
        i = bisect.bisect_right(self.milestones, epoch)
        start = self.milestones[i - 1] if i else 0
        return self.schedulers[i].rate(base_lr, epoch - start)

"""Optimisers and schedules against PyTorch's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import models, nn, ops, optim
from fastconv.nn import Parameter, channels_last
from fastconv.tensor import Array
from fastconv.train.ema import EMA

SHAPES = [(4, 3, 3, 3), (7,), (5, 6)]


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def start(dtype: Any = np.float64) -> tuple[list[Parameter], list[torch.nn.Parameter]]:
    """The same parameters twice; the 4-d one of ours in channels-last memory."""
    values = [draw(*shape, seed=i).astype(dtype) for i, shape in enumerate(SHAPES)]
    ours = [Parameter(channels_last(v) if v.ndim == 4 else v.copy()) for v in values]
    return ours, [torch.nn.Parameter(torch.from_numpy(v)) for v in values]


def set_gradients(
    ours: list[Parameter], theirs: list[torch.nn.Parameter], step: int, skip: int | None = None
) -> None:
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        grad = draw(*p.shape, seed=100 * step + i).astype(p.dtype)
        p.grad = None if i == skip else grad.copy()
        q.grad = None if i == skip else torch.from_numpy(grad)


def assert_equal(
    ours: list[Parameter], theirs: list[torch.nn.Parameter], rtol: float = 1e-12
) -> None:
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=rtol, atol=rtol)


OPTIMISERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd_decay": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd_momentum": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    ),
    "sgd_nesterov": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (optim.AdamW, torch.optim.AdamW, {}),
    "adamw_settings": (
        optim.AdamW,
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_twenty_steps_agree_with_pytorch(name: str, dtype: Any) -> None:
    kind, reference_kind, settings = OPTIMISERS[name]
    ours, theirs = start(dtype)
    mine, reference = kind(ours, **settings), reference_kind(theirs, **settings)
    for step in range(20):
        set_gradients(ours, theirs, step)
        mine.step()
        reference.step()
    assert_equal(ours, theirs, 1e-12 if dtype == np.float64 else 2e-5)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_parameters_without_gradients_wait(name: str) -> None:
    """A parameter that is frozen at first starts its state with its first gradient."""
    kind, reference_kind, settings = OPTIMISERS[name]
    ours, theirs = start()
    mine, reference = kind(ours, **settings), reference_kind(theirs, **settings)
    for step in range(8):
        set_gradients(ours, theirs, step, skip=1 if step < 3 else None)
        mine.step()
        reference.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw_settings"])
def test_parameter_groups(name: str) -> None:
    kind, reference_kind, settings = OPTIMISERS[name]
    ours, theirs = start()

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.0}]

    mine, reference = kind(groups(ours), **settings), reference_kind(groups(theirs), **settings)
    for step in range(5):
        set_gradients(ours, theirs, step)
        mine.step()
        reference.step()
    assert_equal(ours, theirs)
    assert mine.param_groups[0]["lr"] == 0.5 and mine.param_groups[1]["lr"] == settings["lr"]


def test_groups_that_spare_biases_and_norms() -> None:
    """Weight decay for what has two dimensions or more; frozen parameters are left out."""
    model = models.create("resnet8_cifar")
    model.conv1.requires_grad_(False)
    named = dict(model.named_parameters())
    groups = optim.parameter_groups(
        named.items(), 0.1, 0.01, lr_scale=lambda name: 1.0 if name.startswith("fc.") else 0.1
    )
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (pytest.approx(0.01), 0.0), (pytest.approx(0.01), 0.01), (0.1, 0.01), (0.1, 0.0),
    ]  # fmt: skip
    norms, weights, *head = [{id(p) for p in group["params"]} for group in groups]
    assert head == [{id(named["fc.weight"])}, {id(named["fc.bias"])}]
    assert id(named["layer2.0.bn1.weight"]) in norms
    assert id(named["layer2.0.downsample.0.weight"]) in weights
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in named.values()} - {id(model.conv1.weight)}
    optim.SGD(groups)  # takes them

    everything = optim.parameter_groups(named.items(), 0.1, 0.01, decay_all=True)
    assert len(everything) == 1 and everything[0]["weight_decay"] == 0.01
    with pytest.raises(ValueError, match=r"lr_scale of bn1\.weight must not be negative, got -1"):
        optim.parameter_groups(named.items(), 0.1, 0.01, lr_scale=lambda name: -1.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("name", ["sgd_momentum", "adamw_settings"])
def test_clipping_agrees_with_pytorch(name: str, max_norm: float, dtype: Any) -> None:
    """In place, and as a factor in the optimiser's pass."""
    kind, reference_kind, settings = OPTIMISERS[name]
    ours, theirs = start(dtype)
    scaled, _ = start(dtype)
    mine, fused = kind(ours, **settings), kind(scaled, **settings)
    reference = reference_kind(theirs, **settings)
    for step in range(4):
        set_gradients(ours, theirs, step, skip=1 if step == 0 else None)
        set_gradients(scaled, theirs, step, skip=1 if step == 0 else None)
        expected = float(torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        norm = ops.gradient_norm([p.grad for p in scaled])
        fused.step(optim.clip_factor(norm, max_norm))
        assert optim.clip_grad_norm_(ours, max_norm) == pytest.approx(expected, rel=1e-6)
        assert norm == pytest.approx(expected, rel=1e-6)
        mine.step()
        reference.step()
    rtol = 1e-12 if dtype == np.float64 else 2e-5
    assert_equal(ours, theirs, rtol)
    assert_equal(scaled, theirs, rtol)


def test_clipping_of_gradients_that_are_no_numbers() -> None:
    ours, theirs = start()
    set_gradients(ours, theirs, 0)
    assert ours[1].grad is not None
    ours[1].grad[2] = np.inf
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert optim.clip_grad_norm_(ours, 1.0) == np.inf
    assert np.isnan(optim.clip_factor(np.nan, 1.0))
    assert optim.clip_grad_norm_([], 1.0) == 0.0


def test_norm_of_many_gradients_in_any_memory() -> None:
    """Large and small values that float32 sums would lose, none at all, strides, both types."""
    big = draw(300, 200, seed=1).astype(np.float32) * np.float32(1e25)
    grads = [big, None, draw(5, 6, 7, seed=2)[:, ::-2], np.zeros((0, 3)), np.array(3.0)]
    total = sum((g.astype(np.float64) ** 2).sum() for g in grads if g is not None)
    assert ops.gradient_norm(grads) == pytest.approx(np.sqrt(total), rel=1e-12)
    ones = [np.ones(n, np.float32) for n in range(70)]
    assert ops.gradient_norm(ones) == pytest.approx(np.sqrt(sum(range(70))), rel=1e-14)
    with pytest.raises(TypeError, match="int64"):
        ops.gradient_norm([np.ones(3, np.int64)])


# Averages


def test_moving_average_agrees_with_pytorch() -> None:
    """torch's AveragedModel with the same decay, warmed up as here, buffers too."""
    torch.manual_seed(0)
    reference = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    steps = iter(range(1, 100))

    def average(old: torch.Tensor, new: torch.Tensor, count: Any) -> torch.Tensor:
        decay = min(0.9, (1 + count) / (10 + count))
        return decay * old + (1 - decay) * new if old.is_floating_point() else new

    model.load_state_dict(reference.state_dict())
    ema = EMA(model, 0.9)
    expected = {k: v.clone() for k, v in reference.state_dict().items()}
    for count in itertools.islice(steps, 12):
        with torch.no_grad():
            for value in reference.parameters():
                value += torch.randn_like(value)
            reference(torch.randn(4, 2, 5, 5))  # changes the running statistics
        model.load_state_dict(reference.state_dict())
        ema.update(model)
        now = reference.state_dict()
        expected = {k: average(v, now[k], count) for k, v in expected.items()}
    averaged = ema.model.state_dict()
    assert list(averaged) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(averaged[key], value.numpy(), rtol=1e-5, atol=1e-6)
    assert averaged["1.num_batches_tracked"] == 12
    assert not ema.model.training and model.training
    assert averaged["0.weight"].strides == model[0].weight.data.strides
    with pytest.raises(ValueError, match="below 1, got 1"):
        EMA(model, 1)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_saved_state_continues_with_the_same_bits(name: str) -> None:
    kind, _, settings = OPTIMISERS[name]
    ours, theirs = start(np.float32)
    mine = kind(ours, **settings)
    for step in range(3):
        set_gradients(ours, theirs, step)
        mine.step()
    others = [Parameter(p.data.copy(order="K")) for p in ours]
    other = kind(others)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    for step in range(3, 6):
        for params, optimizer in ((ours, mine), (others, other)):
            set_gradients(params, theirs, step)
            optimizer.step()
    for p, q in zip(ours, others, strict=True):
        assert p.data.tobytes() == q.data.tobytes()


def test_loaded_state_is_a_copy_in_the_parameters_memory_order() -> None:
    ours, theirs = start(np.float32)
    mine = optim.AdamW(ours)
    set_gradients(ours, theirs, 0)
    mine.step()
    state = mine.state_dict()
    state["state"][0]["exp_avg"] = np.ascontiguousarray(state["state"][0]["exp_avg"])
    state["state"] = {str(number): values for number, values in state["state"].items()}  # as JSON
    mine.load_state_dict(state)
    loaded = mine.state[ours[0]]["exp_avg"]
    assert loaded is not state["state"]["0"]["exp_avg"]
    assert loaded.strides == ours[0].data.strides


def test_state_dict_has_pytorchs_form() -> None:
    ours, theirs = start()
    for name in ("sgd_momentum", "adamw"):
        kind, reference_kind, settings = OPTIMISERS[name]
        mine, reference = kind(ours, **settings), reference_kind(theirs, **settings)
        set_gradients(ours, theirs, 0)
        mine.step()
        reference.step()
        a, b = mine.state_dict(), reference.state_dict()
        assert {n: set(s) for n, s in a["state"].items()} == {
            n: set(s) for n, s in b["state"].items()
        }
        assert [g["params"] for g in a["param_groups"]] == [g["params"] for g in b["param_groups"]]


def test_zero_grad() -> None:
    ours, theirs = start()
    mine = optim.SGD(ours, 0.1)
    set_gradients(ours, theirs, 0)
    mine.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in ours)
    mine.zero_grad()
    assert all(p.grad is None for p in ours)
    before = [p.data.copy() for p in ours]
    mine.step()
    for p, old in zip(ours, before, strict=True):
        np.testing.assert_array_equal(p.data, old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.5}, r"lr.*-0\.5"),
        ({"lr": float("nan")}, "lr.*nan"),
        ({"momentum": -1}, "momentum.*-1"),
        ({"weight_decay": -2}, "weight_decay.*-2"),
        ({"nesterov": True}, "momentum=0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, r"dampening=0\.5"),
    ],
)
def test_wrong_settings_of_sgd(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.SGD(start()[0], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.5}, r"lr.*-0\.5"),
        ({"betas": (0.9, 1.0)}, r"betas.*1\.0"),
        ({"eps": -1e-8}, "eps.*-1e-08"),
        ({"weight_decay": -1}, "weight_decay.*-1"),
    ],
)
def test_wrong_settings_of_adamw(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(start()[0], **settings)


def test_wrong_parameters() -> None:
    ours, _ = start()
    with pytest.raises(ValueError, match="at least one"):
        optim.SGD([])
    with pytest.raises(ValueError, match="twice"):
        optim.SGD([ours[0], ours[0]])
    with pytest.raises(ValueError, match="leaf"):
        optim.SGD([ours[0] * 2])
    with pytest.raises(TypeError, match="ndarray"):
        optim.SGD([ours[0].data])
    with pytest.raises(ValueError, match=r"\['rate'\].*lr"):
        optim.SGD([{"params": ours, "rate": 1}])
    with pytest.raises(ValueError, match=r"\[1\].*\[3\]"):
        optim.SGD(ours).load_state_dict(optim.SGD(ours[:1]).state_dict())
    mine = optim.SGD(ours)
    ours[1].grad = np.ones(3)
    with pytest.raises(ValueError, match=r"\(3,\).*\(7,\)"):
        mine.step()


# Schedules.

Make = Callable[[Any, Any], Any]
SCHEDULES: dict[str, Make] = {
    "step": lambda o, m: m.StepLR(o, 3, 0.5),
    "multi_step": lambda o, m: m.MultiStepLR(o, [2, 7, 7], 0.1),
    "cosine": lambda o, m: m.CosineAnnealingLR(o, 10, 0.01),
    "linear": lambda o, m: m.LinearLR(o, 0.1, 1.0, 4),
    "lambda": lambda o, m: m.LambdaLR(o, lambda n: 0.9**n),
    "warmup_cosine": lambda o, m: m.SequentialLR(
        o, [m.LinearLR(o, 0.1, total_iters=4), m.CosineAnnealingLR(o, 8)], [4]
    ),
}


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_agrees_with_pytorch(name: str) -> None:
    ours, theirs = start()
    mine, reference = optim.SGD(groups_of(ours), 1.0), torch.optim.SGD(groups_of(theirs), 1.0)
    schedule = SCHEDULES[name](mine, optim)
    expected = SCHEDULES[name](reference, torch.optim.lr_scheduler)
    for _ in range(12):
        got = [group["lr"] for group in mine.param_groups]
        assert got == pytest.approx([g["lr"] for g in reference.param_groups], rel=1e-9, abs=1e-12)
        assert got == schedule.get_last_lr()
        reference.step()
        schedule.step()
        expected.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_continues_from_its_state(name: str) -> None:
    ours, _ = start()
    mine = optim.SGD(groups_of(ours), 1.0)
    schedule = SCHEDULES[name](mine, optim)
    for _ in range(5):
        schedule.step()
    state = (copy.deepcopy(mine.state_dict()), schedule.state_dict())
    fresh = optim.SGD(groups_of(ours), 1.0)
    other = SCHEDULES[name](fresh, optim)
    fresh.load_state_dict(state[0])
    other.load_state_dict(state[1])
    for _ in range(4):
        assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in mine.param_groups]
        schedule.step()
        other.step()


def test_wrong_schedules() -> None:
    mine = optim.SGD(start()[0], 1.0)
    with pytest.raises(ValueError, match=r"step_size.*0"):
        optim.StepLR(mine, 0)
    with pytest.raises(ValueError, match=r"T_max.*0"):
        optim.CosineAnnealingLR(mine, 0)
    with pytest.raises(ValueError, match=r"start_factor.*0.*2"):
        optim.LinearLR(mine, 0, 2)
    with pytest.raises(ValueError, match=r"total_iters.*0"):
        optim.LinearLR(mine, total_iters=0)
    step = optim.StepLR(mine, 1)
    with pytest.raises(ValueError, match=r"1 and \[3\]"):
        optim.SequentialLR(mine, [step], [3])
    with pytest.raises(ValueError, match="increasing"):
        optim.SequentialLR(mine, [step, step, step], [3, 3])
    with pytest.raises(ValueError, match="must belong"):
        optim.SequentialLR(optim.SGD(start()[0]), [step], [])
    with pytest.raises(ValueError, match="2 learning rates do not fit 1"):
        step.load_state_dict({"last_epoch": 1, "base_lrs": [1, 2]})

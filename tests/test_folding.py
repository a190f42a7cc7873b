"""Inference: folded batch norms, packed weights, and that nothing kept is ever out of date."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastconv as fc
from fastconv import models, nn, no_grad, optim
from fastconv.module import ARRAY_OF_PARAMETER, Parameter
from fastconv.tensor import array_of
from fastconv.train.ema import EMA
from tests.cases import CONV_GEOMETRY, CONV_GROUPS, CONV_PADDING, ConvCase
from tests.conftest import each_algorithm
from tests.memory import channels_last
from tests.reference import assert_same_bits, conv_data

# More weights than Winograd keeps in transformed form.
WIDE = ConvCase("wide", 1, 130, 6, 6, 140, 3, 3, padding=1)
# Kernels that Winograd takes in parts: kept in transformed form, and packed.
PARTS = [
    ConvCase("1x7", 1, 24, 5, 9, 40, 1, 7, padding=(0, 3)),
    ConvCase("7x7_wide", 1, 130, 6, 6, 140, 7, 7, padding=3),
]
IMAGES = channels_last(np.random.default_rng(0).standard_normal((2, 8, 9, 7), np.float32))


def randomised(model: nn.Module) -> nn.Module:
    """With batch norms that do something."""
    rng = np.random.default_rng(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean[...] = rng.normal(0, 0.3, module.num_features)
            module.running_var[...] = rng.uniform(0.3, 2, module.num_features)
            for parameter in (module.weight, module.bias):
                assert parameter is not None
                parameter.data[...] = rng.uniform(0.5, 1.5, module.num_features)
    return model.eval()


class Block(nn.Module):
    """A 3x3, a strided grouped 3x3, a 1x1 with a sum behind it, and a dense layer."""

    def __init__(self) -> None:
        self.first = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.conv = nn.Conv2d(24, 16, 3, 2, 1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 1)
        self.last_norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Any) -> fc.Tensor:
        y = nn.conv_norm(self.conv, self.norm, self.first(x), activation="silu")
        y = nn.conv_norm(self.last, self.last_norm, y, y, activation="relu")
        return self.fc(y.mean((2, 3)))


def block() -> Block:
    model = randomised(Block())
    assert isinstance(model, Block)
    return model


@no_grad()
def run(model: nn.Module, x: np.ndarray = IMAGES) -> np.ndarray:
    y: np.ndarray = model(x).data
    return y


def unfused(model: nn.Module, x: np.ndarray = IMAGES) -> np.ndarray:
    """Layer by layer, with batch norms of their own, in float64."""
    with_gradients = copy.deepcopy(model).double()
    y: np.ndarray = with_gradients(x.astype(np.float64)).data
    return y


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected))


def bytes_in_use() -> int:
    return fc.memory_stats()["bytes_in_use"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_folding_is_right(isa: str, dtype: type) -> None:
    model = block().astype(dtype)
    x = IMAGES.astype(dtype)
    first = run(model, x)
    assert first.dtype == dtype
    assert close(first, unfused(model))
    assert_same_bits(run(model, x), first)  # with what the first call kept


@pytest.mark.parametrize("name", ["resnet8_cifar", "efficientnet_b0", "efficientnet_lite0"])
def test_models_in_both_modes(name: str) -> None:
    model = randomised(models.create(name))
    x = channels_last(np.random.default_rng(0).standard_normal((2, 3, 40, 40), np.float32))
    assert close(run(model, x), unfused(model, x))


@pytest.mark.parametrize(
    "case",
    [*CONV_GEOMETRY[::3], *CONV_PADDING[::4], *CONV_GROUPS[::3], WIDE, *PARTS],
    ids=str,
)
def test_kept_weights_give_the_bits_of_fresh_ones(isa: str, case: ConvCase) -> None:
    data = conv_data(case)
    x, scale = channels_last(data.x), np.random.default_rng(3).uniform(0.5, 2, case.k)
    factors = scale.astype(np.float32)
    caches: dict[str, fc._C.WeightCache] = {}

    def kept() -> np.ndarray:
        cache = caches.setdefault("all", fc._C.WeightCache())
        settings = packed._settings
        y: np.ndarray = fc._C.conv2d_cached(x, data.w, None, None, *settings, "", factors, cache)
        return y

    packed = fc.PackedConv2d(data.w, **case.arguments)
    folded = np.asarray(data.w) * factors[:, None, None, None]
    for (_, first), (_, expected) in zip(
        each_algorithm(kept),
        each_algorithm(lambda: fc.conv2d(x, folded, **case.arguments)),
        strict=True,
    ):
        assert_same_bits(first, expected)
    for name, again in each_algorithm(kept):
        assert np.isfinite(again).all(), name
        with_plain = dict(each_algorithm(lambda: fc.conv2d(x, folded, **case.arguments)))[name]
        assert_same_bits(again, with_plain)


def test_packed_conv2d_is_a_snapshot() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 8, 3, 3), np.float32)
    mean, gamma, beta, bias = (rng.standard_normal(12).astype(np.float32) for _ in range(4))
    var = rng.uniform(0.5, 2, 12).astype(np.float32)
    packed = fc.PackedConv2d(w, bias, padding=1, batch_norm=(mean, var, gamma, beta, 1e-3))
    residual = rng.standard_normal((2, 12, 9, 7)).astype(np.float32)
    x64 = IMAGES.astype(np.float64)
    y = fc.conv2d(x64, w.astype(np.float64), bias.astype(np.float64), padding=1)
    statistics = [v.astype(np.float64) for v in (mean, var, gamma, beta)]
    y = fc.batch_norm(y, *statistics, eps=1e-3, residual=residual.astype(np.float64))
    first = packed(IMAGES, residual=residual)
    assert close(first, y)
    assert close(packed(IMAGES, residual=residual, activation="relu"), np.maximum(y, 0))
    w[...] = 0
    bias[...] = 0
    assert_same_bits(packed(IMAGES, residual=residual), first)
    tensor = packed(torch.from_numpy(IMAGES), residual=torch.from_numpy(residual))
    assert isinstance(tensor, torch.Tensor)
    assert_same_bits(tensor.numpy(), first)
    with pytest.raises(ValueError, match="None"):
        fc.PackedConv2d(w, batch_norm=(None, var, gamma, beta, 1e-3))
    with pytest.raises(ValueError, match="12"):
        fc.PackedConv2d(w, padding=1, batch_norm=(mean[:3], var[:3], None, None, 1e-3))(IMAGES)


# -------------------------------------------------------------------------------------------------
# Every way of changing weights. A change of `model` is made between two calls; both arguments of
# `change` may have been prepared before the first of them, with references to arrays kept.

Change = Callable[[], object]


def assign(model: Block) -> Change:
    def change() -> None:
        model.conv.weight.data[...] = 0.25

    return change


def multiply(model: Block) -> Change:
    def change() -> None:
        model.last.weight.data *= 1.5

    return change


def kept_array(model: Block) -> Change:
    array = model.last.weight.data
    return lambda: array.fill(0.5)


def kept_view(model: Block) -> Change:
    view = model.conv.weight.data[3:5]
    return lambda: view.fill(0.5)


def kept_memoryview(model: Block) -> Change:
    view = memoryview(model.last.weight.data[0].reshape(16))

    def change() -> None:
        view[3] = 2.5

    return change


def kept_owner(model: Block) -> Change:
    """The array below the view that the parameter is."""
    owner = model.conv.weight.data.base
    assert isinstance(owner, np.ndarray)
    return lambda: owner.fill(0.5)


def kept_state_dict(model: Block) -> Change:
    state = model.state_dict()
    return lambda: state["last.weight"].fill(0.5)


def kept_torch_tensor(model: Block) -> Change:
    tensor = torch.from_numpy(model.conv.weight.data)
    return lambda: tensor.mul_(2)


def kept_detached(model: Block) -> Change:
    tensor = model.conv.weight.detach()
    return lambda: tensor.data.fill(0.5)


def array_of_the_user(model: Block) -> Change:
    array = np.full((16, 16, 1, 1), 0.1, np.float32)
    model.last.weight = Parameter(array)
    return lambda: array.fill(0.5)


def memory_of_torch(model: Block) -> Change:
    tensor = torch.full((16, 16, 1, 1), 0.1)
    model.last.weight = Parameter(tensor)
    return lambda: tensor.fill_(0.5)


def shared_parameter(model: Block) -> Change:
    other = Parameter(model.last.weight)
    return lambda: other.data.fill(0.5)


def new_array(model: Block) -> Change:
    def change() -> None:
        model.conv.weight.data = model.conv.weight.data * 2

    return change


def new_parameter(model: Block) -> Change:
    def change() -> None:
        model.last.weight = Parameter(np.ones((16, 16, 1, 1), np.float32))

    return change


def sgd(model: Block) -> Change:
    return lambda: stepped(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def adamw(model: Block) -> Change:
    return lambda: stepped(model, optim.AdamW(model.parameters(), lr=0.1))


def stepped(model: Block, optimizer: optim.Optimizer) -> None:
    (model(IMAGES) * model(IMAGES)).sum().backward()  # in evaluation, recorded
    optimizer.step()
    model.zero_grad()


def load_state(model: Block) -> Change:
    return lambda: model.load_state_dict(randomised(Block()))


def load_scaled(model: Block) -> Change:
    def change() -> None:
        model.load_state_dict(
            {name: value * 1.5 for name, value in model.state_dict().items() if value.ndim},
        )

    return change


def running_statistics(model: Block) -> Change:
    def change() -> None:
        assert model.norm.running_var is not None
        model.norm.running_var[2] = 7

    return change


def weight_of_norm(model: Block) -> Change:
    def change() -> None:
        assert model.last_norm.weight is not None
        model.last_norm.weight.data[1] = -1

    return change


def kept_bias(model: Block) -> Change:
    assert model.last.bias is not None
    bias = model.last.bias.data
    return lambda: bias.fill(3)


def eps(model: Block) -> Change:
    return lambda: setattr(model.norm, "eps", 0.5)


def other_norm(model: Block) -> Change:
    return lambda: setattr(model, "norm", nn.BatchNorm2d(16).eval())


def training_step(model: Block) -> Change:
    """Batch statistics move the running ones."""

    def change() -> None:
        model.train()(IMAGES)
        model.eval()

    return change


CHANGES = [
    assign, multiply, kept_array, kept_view, kept_memoryview, kept_owner, kept_state_dict,
    kept_torch_tensor, kept_detached, array_of_the_user, memory_of_torch, shared_parameter,
    new_array, new_parameter, sgd, adamw, load_state, load_scaled, running_statistics,
    weight_of_norm, kept_bias, eps, other_norm, training_step,
]  # fmt: skip


@pytest.mark.parametrize("prepare", CHANGES, ids=lambda prepare: prepare.__name__)
def test_no_change_of_weights_goes_unseen(prepare: Callable[[Block], Change]) -> None:
    model = block()
    change = prepare(model)
    before = run(model)
    assert_same_bits(run(model), before)
    change()
    after = run(model)
    assert_same_bits(after, run(copy.deepcopy(model)))
    assert close(after, unfused(model))
    assert not close(after, before)
    del change  # and with it what it held
    assert_same_bits(run(model), after)
    assert_same_bits(run(model), after)


def test_a_moving_average_is_seen() -> None:
    trained = block()
    average = EMA(trained, decay=0.5)
    before = run(average.model)
    for parameter in trained.parameters():
        parameter.data[...] *= 2
    average.update(trained)
    after = run(average.model)
    assert close(after, unfused(average.model)) and not close(after, before)


def test_a_reference_that_is_gone_counts_no_more() -> None:
    parameter = Parameter(np.ones((4, 4), np.float32))

    def sole() -> bool:
        return fc._C.sole_owner(parameter, ARRAY_OF_PARAMETER)

    assert sole()
    for take in (
        lambda: parameter.data,
        lambda: parameter.data[0],
        lambda: parameter.data.T,
        lambda: memoryview(parameter.data),
        lambda: torch.from_numpy(parameter.data),
        lambda: np.from_dlpack(parameter.data),
        lambda: Parameter(parameter),
    ):
        taken = take()
        assert not sole()
        del taken
        assert sole()


def test_version_is_a_new_one_after_every_use_of_data() -> None:
    parameter = Parameter(np.ones(3, np.float32))
    seen = [parameter.version]
    for use in (
        lambda: parameter.data,
        lambda: setattr(parameter, "data", np.zeros(3, np.float32)),
        lambda: parameter.requires_grad and parameter.detach(),
        lambda: copy.copy(parameter),
        lambda: pickle.dumps(parameter),
    ):
        use()
        assert parameter.version not in seen
        seen.append(parameter.version)
    array_of(parameter)
    assert parameter.version == seen[-1]


# -------------------------------------------------------------------------------------------------
# What the user sees of it: nothing but time and memory.


def test_weights_are_packed_once_and_freed_by_train() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)).eval()
    x = channels_last(np.zeros((1, 64, 6, 6), np.float32))
    fc.empty_cache()
    start = bytes_in_use()
    run(model, x)
    kept = bytes_in_use() - start
    assert kept >= model[0].weight.data.nbytes  # type: ignore[union-attr]
    run(model, x)  # data was used: packed anew
    assert bytes_in_use() - start == kept
    model.train()
    assert bytes_in_use() == start


def test_state_and_copies_do_not_know() -> None:
    model, fresh = block(), block()
    fresh.load_state_dict(model)
    expected = {key: value.copy() for key, value in model.state_dict().items()}
    answer = run(model)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(np.array_equal(state[key], value) for key, value in expected.items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(run(other), answer)
    assert repr(model) == repr(fresh)
    assert_same_bits(model.train()(IMAGES).data, fresh.train()(IMAGES).data)


def test_hooks_see_the_true_output_of_each_layer() -> None:
    model = block()
    seen: list[np.ndarray] = []
    handle = model.conv.register_forward_hook(lambda module, inputs, y: seen.append(y.data))
    with_hook = run(model)
    handle.remove()
    expected = fc.conv2d(run(model.first), model.conv.weight.data, None, 2, 1, 1, 2)
    assert_same_bits(seen[0], expected)
    assert close(with_hook, run(model).astype(np.float64))


def test_gradients_are_recorded_in_evaluation_too() -> None:
    model = block()
    y = model(IMAGES)
    assert y.requires_grad
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.requires_grad_(False)(IMAGES).requires_grad
    assert close(model(IMAGES).data, unfused(model))


def test_settings_of_a_layer_may_change() -> None:
    conv = nn.Conv2d(8, 4, 3).eval()
    assert run(conv).shape == (2, 4, 7, 5)
    conv.padding = 1
    assert run(conv).shape == (2, 4, 9, 7)
    with pytest.raises(ValueError, match="5"):
        run(conv, np.zeros((1, 5, 9, 9), np.float32))


def test_python_threads_share_what_is_kept() -> None:
    model, answers = block(), []
    expected = run(copy.deepcopy(model))
    threads = [
        threading.Thread(target=lambda: answers.extend(run(model) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    for answer in answers:
        assert_same_bits(answer, expected)


def test_precision_and_instruction_set_choose_their_own_form(isa: str) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).eval()
    x = channels_last(np.random.default_rng(0).standard_normal((1, 64, 8, 8), np.float32))
    default = run(conv, x)
    fc.set_precision("strict")
    weight = array_of(conv.weight)
    assert_same_bits(run(conv, x), fc.conv2d(x, weight, padding=1))
    fc.set_precision("default")
    assert_same_bits(run(conv, x), default)
    for other in fc.available_isas():
        fc._C.set_isa(other)
        assert_same_bits(run(conv, x), fc.conv2d(x, weight, padding=1))

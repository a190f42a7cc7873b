"""Layers against PyTorch's: outputs, gradients, keys, initial weights; and what Module does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import functional as F
from fastconv import nn
from fastconv.nn import channels_last
from fastconv.tensor import Array, Tensor, no_grad


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


class ExactHardsigmoid(torch.nn.Module):
    """torch.nn.Hardsigmoid multiplies gradients by float32(1 / 6), also those of float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu6(x + 3) / 6


IMAGES = draw(3, 4, 9, 8)
ROWS = draw(5, 6)
# (our layer, PyTorch's layer, input)
Pair = tuple[Callable[[], nn.Module], Callable[[], torch.nn.Module], Array]
LAYERS: dict[str, Pair] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.nn.Conv2d(4, 6, 3), IMAGES),
    "conv_settings": (
        lambda: nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, False),
        lambda: torch.nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, False),
        IMAGES,
    ),
    "conv_depthwise_same": (
        lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4),
        lambda: torch.nn.Conv2d(4, 4, 3, padding="same", groups=4),
        IMAGES,
    ),
    "conv_activation": (
        lambda: nn.Conv2d(4, 6, 3, activation="relu"),
        lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU()),
        IMAGES,
    ),
    "conv_transpose": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, True, 1),
        lambda: torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, True, 1),
        IMAGES,
    ),
    "linear": (lambda: nn.Linear(6, 3), lambda: torch.nn.Linear(6, 3), ROWS),
    "linear_no_bias_images": (
        lambda: nn.Linear(8, 3, bias=False),
        lambda: torch.nn.Linear(8, 3, bias=False),
        IMAGES,
    ),
    "batch_norm": (lambda: nn.BatchNorm2d(4), lambda: torch.nn.BatchNorm2d(4), IMAGES),
    "batch_norm_settings": (
        lambda: nn.BatchNorm2d(4, 1e-3, None, False),
        lambda: torch.nn.BatchNorm2d(4, 1e-3, None, False),
        IMAGES,
    ),
    "batch_norm_untracked": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: torch.nn.BatchNorm2d(4, track_running_stats=False),
        IMAGES,
    ),
    "batch_norm_1d": (lambda: nn.BatchNorm1d(6), lambda: torch.nn.BatchNorm1d(6), ROWS),
    "local_response_norm": (
        lambda: nn.LocalResponseNorm(3, 0.5, 0.6, 2.0),
        lambda: torch.nn.LocalResponseNorm(3, 0.5, 0.6, 2.0),
        IMAGES,
    ),
    "max_pool": (
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda: torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        IMAGES,
    ),
    "avg_pool": (
        lambda: nn.AvgPool2d(3, 2, 1, True, False),
        lambda: torch.nn.AvgPool2d(3, 2, 1, True, False),
        IMAGES,
    ),
    "adaptive_avg_pool": (
        lambda: nn.AdaptiveAvgPool2d((2, 3)),
        lambda: torch.nn.AdaptiveAvgPool2d((2, 3)),
        IMAGES,
    ),
    "flatten": (nn.Flatten, torch.nn.Flatten, IMAGES),
    "identity": (nn.Identity, torch.nn.Identity, IMAGES),
    "relu": (nn.ReLU, torch.nn.ReLU, IMAGES),
    "relu6": (nn.ReLU6, torch.nn.ReLU6, 4 * IMAGES),
    "leaky_relu": (nn.LeakyReLU, torch.nn.LeakyReLU, IMAGES),
    "elu": (nn.ELU, torch.nn.ELU, IMAGES),
    "sigmoid": (nn.Sigmoid, torch.nn.Sigmoid, IMAGES),
    "tanh": (nn.Tanh, torch.nn.Tanh, IMAGES),
    "silu": (nn.SiLU, torch.nn.SiLU, IMAGES),
    "gelu": (lambda: nn.GELU("tanh"), lambda: torch.nn.GELU("tanh"), IMAGES),
    "hardsigmoid": (nn.Hardsigmoid, ExactHardsigmoid, 4 * IMAGES),
    "hardswish": (nn.Hardswish, torch.nn.Hardswish, 4 * IMAGES),
    "softmax": (lambda: nn.Softmax(1), lambda: torch.nn.Softmax(1), ROWS),
    "log_softmax": (lambda: nn.LogSoftmax(1), lambda: torch.nn.LogSoftmax(1), ROWS),
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.SiLU()
        ),
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(4, 6, 3),
            torch.nn.BatchNorm2d(6),
            torch.nn.ReLU(),
            torch.nn.Conv2d(6, 4, 1),
            torch.nn.SiLU(),
        ),
        IMAGES,
    ),
}


def build(name: str, dtype: str) -> tuple[nn.Module, torch.nn.Module, Array]:
    ours, theirs, x = LAYERS[name]
    mine, reference = ours(), theirs().to(getattr(torch, dtype))
    mine.astype(dtype)
    state = reference.state_dict()
    if name == "conv_activation":
        state = {key.removeprefix("0."): value for key, value in state.items()}
    mine.load_state_dict(state)
    return mine, reference, x.astype(dtype)


def gradients(module: Any) -> list[Array]:
    return [np.asarray(p.grad) for p in module.parameters()]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_agrees_with_pytorch(name: str, layout: str, dtype: str) -> None:
    """Two training steps (running statistics!) and an evaluation."""
    mine, reference, x = build(name, dtype)
    if layout == "channels_last" and x.ndim == 4:
        x = channels_last(x)
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == "float64" else {"rtol": 2e-4, "atol": 2e-5}
    for mode in ("train", "train", "eval"):
        getattr(mine, mode)()
        getattr(reference, mode)()
        a = Tensor(x, requires_grad=True)
        b = torch.from_numpy(x.copy(order="K")).requires_grad_()
        y, z = mine(a), reference(b)
        assert y.shape == tuple(z.shape) and y.dtype == dtype
        np.testing.assert_allclose(y.data, z.detach().numpy(), **close)
        weights = draw(*y.shape, seed=1).astype(dtype)
        mine.zero_grad()
        reference.zero_grad()
        y.backward(weights)
        z.backward(torch.from_numpy(weights))
        np.testing.assert_allclose(a.grad, b.grad.numpy(), **close)
        for got, wanted in zip(gradients(mine), gradients(reference), strict=True):
            np.testing.assert_allclose(got, wanted, **close)
    for got, wanted in zip(
        mine.state_dict().values(), reference.state_dict().values(), strict=True
    ):
        np.testing.assert_allclose(got, wanted.numpy(), **close)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv_activation"])
def test_state_dict_has_pytorchs_keys_and_shapes(name: str) -> None:
    ours, theirs, _ = LAYERS[name]
    mine = {key: value.shape for key, value in ours().state_dict().items()}
    assert list(mine.items()) == [(k, tuple(v.shape)) for k, v in theirs().state_dict().items()]


def test_max_pool_returns_indices() -> None:
    y, indices = nn.MaxPool2d(2, return_indices=True)(IMAGES)
    expected, places = torch.nn.MaxPool2d(2, return_indices=True)(torch.from_numpy(IMAGES))
    np.testing.assert_array_equal(y.data, expected.numpy())
    np.testing.assert_array_equal(indices, places.numpy())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_loss(reduction: str, smoothing: float, weighted: bool) -> None:
    target = np.array([0, 5, -1, 2, 2])
    weight = np.array([1.0, 0.5, 2.0, 1.0, 1.0, 3.0]) if weighted else None
    settings: dict[str, Any] = {
        "ignore_index": -1,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    a, b = Tensor(ROWS, requires_grad=True), torch.from_numpy(ROWS.copy()).requires_grad_()
    mine = nn.CrossEntropyLoss(weight, **settings)(a, target)
    reference = torch.nn.CrossEntropyLoss(
        None if weight is None else torch.from_numpy(weight), **settings
    )(b, torch.from_numpy(target))
    np.testing.assert_allclose(mine.data, reference.detach().numpy(), rtol=1e-10)
    seed = np.ones(mine.shape)
    mine.backward(seed)
    reference.backward(torch.from_numpy(seed))
    np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-10, atol=1e-12)


# Initial weights and random numbers.


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(16, 64, 3, groups=2),
        lambda: nn.ConvTranspose2d(64, 16, 3),
        lambda: nn.Linear(144, 64),
    ],
)
def test_initial_weights_have_pytorchs_distribution(layer: Callable[[], nn.Module]) -> None:
    module = layer()
    weight, bias = module.weight.data, module.bias.data
    bound = 1 / np.sqrt(weight[0].size)  # kaiming_uniform with a = sqrt(5): 1 / sqrt(fan in)
    for values in (weight, bias):
        assert np.abs(values).max() <= bound and np.abs(values).max() > 0.8 * bound
    assert abs(weight.std() / (bound / np.sqrt(3)) - 1) < 0.05
    assert abs(weight.mean()) < 0.05 * bound
    assert weight.dtype == bias.dtype == np.float32


def test_convolution_weights_lie_in_channels_last_memory() -> None:
    for module in (nn.Conv2d(6, 5, 3), nn.ConvTranspose2d(6, 5, 3)):
        for m in (module, copy.deepcopy(module), module.double()):
            assert m.weight.data.transpose(0, 2, 3, 1).flags.c_contiguous


def test_seed_decides_weights_and_masks() -> None:
    def numbers() -> bytes:
        return nn.Linear(5, 5).weight.data.tobytes() + F.dropout(np.ones(50)).data.tobytes()

    nn.manual_seed(7)
    first, state, second = numbers(), nn.get_rng_state(), numbers()
    nn.manual_seed(7)
    assert first != second and numbers() == first
    nn.set_rng_state(state)
    assert numbers() == second
    assert state == (7, 5 * 5 + 5 + 50)
    nn.manual_seed(8)
    assert numbers() != first


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        nn.manual_seed(seed)


def test_dropout_layer() -> None:
    layer, x = nn.Dropout(0.25), np.ones((100, 100), np.float32)
    y = layer(x).data
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert not np.array_equal(layer(x).data, y)
    np.testing.assert_array_equal(layer.eval()(x).data, x)
    np.testing.assert_array_equal(nn.Dropout(1.0)(x).data, 0 * x)


# Fusion in Sequential.


def conv_norm_relu() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()
    )


def count_calls(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the activation modules that run by themselves."""
    calls: list[str] = []
    forward = nn.ReLU.__mro__[1].forward

    def counted(self: Any, x: Any) -> Any:
        calls.append(type(self).__name__)
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU.__mro__[1], "forward", counted)
    return calls


def test_sequential_fuses_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_norm_relu()
    calls = count_calls(model, monkeypatch)
    y = model(IMAGES.astype(np.float32))
    assert calls == [] and y.data.min() == 0
    assert list(model.state_dict())[:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_hooks_prevent_fusion_and_see_true_outputs() -> None:
    model, x = conv_norm_relu().eval(), IMAGES.astype(np.float32)
    fused = model(x).data
    outputs: dict[str, Array] = {}
    handles = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: outputs.update({name: output.data})
        )
        for name, module in model.named_children()
    ]
    np.testing.assert_allclose(model(x).data, fused, rtol=1e-6)
    assert list(outputs) == ["0", "1", "2", "3", "4"]
    assert outputs["0"].min() < 0 <= outputs["1"].min()
    for handle in handles:
        handle.remove()
        handle.remove()
    outputs.clear()
    model(x)
    assert outputs == {}


def test_activation_modules_of_other_classes_are_not_fused() -> None:
    class Shifted(nn.ReLU):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x) + 1

    y = nn.Sequential(nn.Conv2d(4, 6, 3), Shifted())(IMAGES.astype(np.float32))
    assert y.data.min() == 1
    y = nn.Sequential(nn.Conv2d(4, 6, 3, activation="tanh"), nn.ReLU())(IMAGES.astype(np.float32))
    assert y.data.min() == 0 and y.data.max() <= 1


def test_hook_may_replace_the_output() -> None:
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    np.testing.assert_array_equal(layer(ROWS).data, 2 * ROWS)


# Module.


class Net(nn.Module):
    def __init__(self) -> None:
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
        self.again = self.body
        self.scale = nn.Parameter(np.ones(1, np.float32))
        self.register_buffer("nothing", None)

    def forward(self, x: Any) -> Tensor:
        return F.global_avg_pool2d(self.body(x))


def test_module_finds_what_it_holds() -> None:
    net = Net()
    assert [name for name, _ in net.named_parameters()] == [
        "scale",
        "body.0.weight",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "heads.0.weight",
        "heads.0.bias",
        "heads.1.weight",
        "heads.1.bias",
    ]
    assert [name for name, _ in net.named_modules()] == [
        "",
        "body",
        "body.0",
        "body.1",
        "heads",
        "heads.0",
        "heads.1",
    ]
    assert [name for name, _ in net.named_children()] == ["body", "heads"]
    assert [name for name, _ in net.named_buffers()] == [
        "body.1.running_mean",
        "body.1.running_var",
        "body.1.num_batches_tracked",
    ]
    assert len(list(net.parameters())) == 9 and len(list(net.buffers())) == 3
    assert [p.shape for p in net.parameters(recurse=False)] == [(1,)]
    assert len(net.heads) == 2 and net.heads[1].out_features == 3


def test_modes_gradients_and_apply() -> None:
    net = Net().eval()
    assert not any(m.training for m in net.modules())
    assert all(m.training for m in net.train().modules())
    net(IMAGES[:, :3].astype(np.float32)).sum().backward()
    grad = net.body[0].weight.grad
    assert grad is not None
    net.zero_grad(set_to_none=False)
    assert not grad.any()
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    net.requires_grad_(False)
    assert net(IMAGES[:, :3].astype(np.float32)).is_leaf
    visited: list[str] = []
    net.apply(lambda m: visited.append(type(m).__name__))
    assert visited[0] == "Conv2d" and visited[-1] == "Net"


def test_conversion_keeps_integers() -> None:
    net = Net().double()
    assert {p.dtype for p in net.parameters()} == {np.dtype(np.float64)}
    state = net.state_dict()
    assert state["body.1.running_var"].dtype == np.float64
    assert state["body.1.num_batches_tracked"].dtype == np.int64
    assert next(net.float().parameters()).dtype == np.float32


def test_state_dict_shares_memory_and_survives_a_round_trip() -> None:
    net, other = Net(), Net()
    net(IMAGES[:, :3].astype(np.float32))
    state = net.state_dict()
    assert state["scale"] is net.scale.data
    assert other.load_state_dict(state) == ([], [])
    for key, value in other.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
        assert value is not state[key]


def test_load_state_dict_reports_every_key_and_changes_nothing() -> None:
    net = Net()
    before = {key: value.copy() for key, value in net.state_dict().items()}
    state: dict[str, Any] = dict(Net().state_dict(), extra=np.zeros(2))
    del state["scale"]
    state["body.0.weight"] = np.zeros((4, 3, 5, 5))
    state["body.1.num_batches_tracked"] = np.array(0.5)
    with pytest.raises(ValueError) as caught:
        net.load_state_dict(state)
    for part in (
        "missing key 'scale'",
        "unexpected key 'extra'",
        "'body.0.weight': shape (4, 3, 5, 5) does not fit (4, 3, 3, 3)",
        "'body.1.num_batches_tracked': dtype float64 does not fit int64",
    ):
        assert part in str(caught.value)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_load_state_dict_not_strict() -> None:
    net = Net()
    report = net.load_state_dict({"scale": torch.tensor([3.0]), "extra": 1}, strict=False)
    assert report.unexpected_keys == ["extra"] and "body.0.weight" in report.missing_keys
    assert net.scale.item() == 3


def test_repr_shows_the_tree() -> None:
    text = repr(Net())
    assert "(0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))" in text
    assert text.startswith("Net(\n  (body): Sequential(\n    (0): ")


def test_inference_saves_nothing() -> None:
    with no_grad():
        assert Net()(IMAGES[:, :3].astype(np.float32)).is_leaf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(0, 4, 3), "in_channels.*0"),
        (lambda: nn.Conv2d(4, 6, 3, groups=4), r"in_channels \(4\).*out_channels \(6\).*\(4\)"),
        (lambda: nn.Conv2d(4, 4, 0), "kernel_size.*0"),
        (lambda: nn.Conv2d(4, 4, 3, stride=(1, 0)), r"stride.*\(1, 0\)"),
        (lambda: nn.Conv2d(4, 4, 3, padding_mode="reflect"), "reflect"),
        (lambda: nn.Conv2d(4, 4, 3, activation="swish"), "swish.*relu"),
        (lambda: nn.ConvTranspose2d(4, 4, 3, padding=-1), "padding.*-1"),
        (lambda: nn.Linear(4, 2.5), r"out_features.*2\.5"),
        (lambda: nn.BatchNorm2d(-3), "num_features.*-3"),
        (lambda: nn.Dropout(-0.5), r"-0\.5"),
        (lambda: nn.CrossEntropyLoss(reduction="median"), "median"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=2), "2"),
        (lambda: nn.BatchNorm2d(4)(ROWS), r"4 dimensions.*\(5, 6\)"),
        (lambda: nn.BatchNorm1d(4)(IMAGES), r"2 dimensions.*\(3, 4, 9, 8\)"),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sequential_wants_modules() -> None:
    with pytest.raises(TypeError, match="function"):
        nn.Sequential(nn.ReLU(), F.relu)


def test_sequential_pools_in_the_pass_of_the_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the layers one by one; and not where the pooling is of another kind."""
    images = draw(4, 3, 12, 10).astype(np.float32)
    calls: list[bool] = []
    fused = F.batch_norm_max_pool2d
    monkeypatch.setattr(
        F, "batch_norm_max_pool2d", lambda *a, **k: calls.append(True) or fused(*a, **k)
    )
    for pool, fuses in (
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d((2, 3), (2, 4)), True),
        (nn.MaxPool2d(3, 2), False),
        (nn.MaxPool2d(2, padding=1), False),
        (nn.MaxPool2d(2, dilation=2), False),
        (nn.MaxPool2d(5, ceil_mode=True), False),
    ):
        layers = [nn.BatchNorm2d(3), nn.ReLU(), pool]
        results = []
        for apart in (False, True):
            model = nn.Sequential(*layers)
            layers[0].zero_grad()
            x = Tensor(images, requires_grad=True)
            calls.clear()
            y = pool(layers[1](layers[0](x))) if apart else model(x)
            assert bool(calls) == (fuses and not apart)
            (y * y).sum().backward()
            results.append((y.data, x.grad, layers[0].weight.grad, layers[0].bias.grad))
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        calls.clear()
        model.eval()
        model(images)
        assert not calls


CONV_NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "activation": "relu"},
    "residual": {"residual": True, "activation": "relu"},
    "residual_pool": {"residual": True, "pool": nn.MaxPool2d(2)},
    "pool": {"pool": nn.MaxPool2d(2), "activation": "relu"},
    "padded_pool": {"pool": nn.MaxPool2d(3, 2, padding=1), "activation": "silu"},
    "no_affine": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "average_of_all_batches": {"momentum": None},
    "frozen_conv": {"frozen": "conv", "pool": nn.MaxPool2d(2)},
    "frozen_norm": {"frozen": "norm", "activation": "relu"},
    "frozen_input": {"frozen": "x"},
}


@pytest.mark.parametrize("name", CONV_NORMS)
def test_conv_norm_in_training_has_the_bits_of_the_layers(name: str) -> None:
    options = dict(CONV_NORMS[name])
    activation, pool = options.pop("activation", None), options.pop("pool", None)
    frozen, adds, bias = (options.pop(key, None) for key in ("frozen", "residual", "bias"))
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias is not None)
    norm = nn.BatchNorm2d(6, **options)
    for module, part in ((conv, "conv"), (norm, "norm")):
        for parameter in module.parameters():
            parameter.requires_grad = part != frozen
    results = []
    for apart in (False, True):
        c, n = copy.deepcopy(conv), copy.deepcopy(norm)
        x = Tensor(channels_last(IMAGES.astype(np.float32)), requires_grad=frozen != "x")
        residual = Tensor(draw(3, 6, 9, 8).astype(np.float32), requires_grad=True) if adds else None
        for _ in range(2):
            if apart:
                y = n(c(x), residual, activation=activation)
                y = y if pool is None else pool(y)
            else:
                y = nn.conv_norm(c, n, x, residual, activation=activation, pool=pool)
            (y * y).sum().backward()
        if c.bias is not None and c.bias.grad is not None:
            # The mean takes away what a bias adds. Two layers sum up dx of the norm, and rounding.
            assert apart or not c.bias.grad.any()
            np.testing.assert_allclose(c.bias.grad, 0, atol=1e-4)
            c.bias.grad = None
        grads = [p.grad for p in (x, residual, *c.parameters(), *n.parameters()) if p is not None]
        results.append([y.data, *grads, *(buffer for _, buffer in n.named_buffers())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_conv_norm_in_training_refuses_what_the_layers_refuse() -> None:
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    x = IMAGES.astype(np.float32)
    for wrong, residual, error, message in (
        (x[:, :3], None, ValueError, r"3"),
        (x[0], None, ValueError, r"\(4, 9, 8\)"),
        (x, x, ValueError, r"residual.*\(3, 4, 9, 8\)"),
        (x[:1, :, :3, :3], None, ValueError, "more than one value"),
        (x.astype(np.int64), None, TypeError, "int64"),
    ):
        with pytest.raises(error, match=message):
            nn.conv_norm(conv, norm, wrong, residual)
    with pytest.raises(ValueError, match="'gelu'"):
        nn.conv_norm(conv, norm, x, activation="gelu")
    # A batch that was refused does not count.
    assert norm.num_batches_tracked.item() == 0 and not norm.running_mean.any()


def test_a_pooling_that_overlaps_is_not_taken_into_a_batch_norm() -> None:
    norm, pool = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, padding=1)
    x = IMAGES.astype(np.float32)
    np.testing.assert_array_equal(norm(x, pool=pool).data, pool(norm(x)).data)

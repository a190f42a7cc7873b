"""Frozen models: the model's bits, a snapshot of its weights, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastconv as fc
from fastconv import functional as F
from fastconv import models, nn, no_grad
from fastconv._recording import thread
from fastconv.tensor import Tensor
from tests.memory import channels_last
from tests.reference import assert_same_bits
from tests.test_folding import randomised

IMAGES = channels_last(np.random.default_rng(0).standard_normal((2, 3, 12, 11), np.float32))

# One of each family, with the size of its images.
FAMILIES = {
    "lenet5": 32,
    "smallcnn": 32,
    "textbook_stack": 32,
    "resnet20_cifar": 32,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "alexnet_lrn": 80,
}


def evaluated(model: nn.Module, images: Any) -> Any:
    with no_grad():
        return model(images)


class Small(nn.Module):
    """A residual block with and without folding, its weights' use counted by nobody."""

    def __init__(self) -> None:
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.more = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.last_norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        y = nn.conv_norm(self.conv, self.norm, x, activation="relu")
        y = nn.conv_norm(self.more[0], self.last_norm, y, y) + 0.5 * self.more(y)
        return self.fc(F.global_avg_pool2d(F.cat([y, -y]) * 2.0).flatten(1).reshape(2, 8, 2).sum(2))


def small() -> nn.Module:
    return randomised(Small())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    size = FAMILIES[name]
    images = channels_last(np.random.default_rng(2).standard_normal((2, 3, size, size), np.float32))
    model = randomised(models.create(name, in_channels=3, image_size=size))
    frozen = fc.freeze(model, images)
    for values in (images, images[::-1]):
        expected = evaluated(model, values)
        assert_same_bits(frozen(values).data, expected.data)
    assert not frozen(images).requires_grad


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layouts_and_dtypes(layout: str, dtype: Any) -> None:
    model = small()
    if dtype is np.float64:
        for parameter in model.parameters():
            parameter.data = parameter.data.astype(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean = module.running_mean.astype(dtype)
                module.running_var = module.running_var.astype(dtype)
    images = IMAGES.astype(dtype, order="C" if layout == "NCHW" else "K")
    frozen = fc.freeze(model, images)
    assert_same_bits(frozen(images).data, evaluated(model, images).data)
    assert_same_bits(frozen(Tensor(images)).data, evaluated(model, images).data)


def test_snapshot() -> None:
    """Every weight is a copy: in place, replaced, by load_state_dict, of statistics."""
    model = small()
    frozen = fc.freeze(model, IMAGES)
    before = frozen(IMAGES).data.copy()
    for parameter in model.parameters():
        parameter.data[...] += 1
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean += 1
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items() if v.dtype.kind == "f"})
    assert_same_bits(frozen(IMAGES).data, before)
    assert not np.allclose(evaluated(model, IMAGES).data, before)
    assert not np.allclose(fc.freeze(model, IMAGES)(IMAGES).data, before)


def test_model_goes_on() -> None:
    """Freezing leaves no trace: the model's weights stay packed, and train as before."""
    model = small()
    expected = evaluated(model, IMAGES).data.copy()
    versions = [p.version for p in model.parameters()]
    fc.freeze(model, IMAGES)
    assert [p.version for p in model.parameters()] == versions
    assert_same_bits(evaluated(model, IMAGES).data, expected)
    model.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert thread.record is None


class Outputs(NamedTuple):
    logits: Tensor
    aux: dict[str, Any]


def test_outputs() -> None:
    """Tuples, lists, dicts and constants of a model's output come back as they are."""

    class Many(nn.Module):
        def forward(self, x: Any) -> Any:
            y = F.relu(x)
            return Outputs(y, {"same": [y, x], "sum": y.sum(), "name": "many", "none": None})

    frozen = fc.freeze(Many().eval(), IMAGES)
    result = frozen(IMAGES + 1)
    assert isinstance(result, Outputs) and result.aux["name"] == "many"
    assert result.aux["none"] is None and result.aux["same"][0] is result.logits
    assert_same_bits(result.logits.data, np.maximum(IMAGES + 1, 0))
    assert_same_bits(result.aux["same"][1].data, IMAGES + 1)
    assert result.aux["sum"].item() == pytest.approx(np.maximum(IMAGES + 1, 0).sum(), rel=1e-4)


def test_threads() -> None:
    model = small()
    frozen, inputs = fc.freeze(model, IMAGES), [IMAGES + i for i in range(4)]
    expected = [evaluated(model, x).data for x in inputs]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = frozen(inputs[i]).data

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, right in enumerate(expected):
        assert_same_bits(found[i], right)


def test_memory_is_freed_in_the_pass() -> None:
    """A tensor lives no longer than the last operation that reads it."""
    model = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(12)]).eval()
    images = channels_last(np.zeros((2, 8, 128, 128), np.float32))

    def peak_of(call: Callable[[], Any]) -> Any:
        fc.reset_peak_memory_stats()
        before = fc.memory_stats()["bytes_in_use"]
        result = call()
        assert fc.memory_stats()["peak_bytes_in_use"] - before < 4 * images.nbytes
        return result

    frozen = peak_of(lambda: fc.freeze(model, images))
    peak_of(lambda: frozen(images))


def test_refused() -> None:
    model = Small()
    with pytest.raises(ValueError, match=r"Small is in training: call eval\(\)"):
        fc.freeze(model, IMAGES)
    model.eval()
    model.norm.train()
    with pytest.raises(ValueError, match="BatchNorm2d 'norm' is in training"):
        fc.freeze(model, IMAGES)
    model.eval()
    handle = model.fc.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Linear 'fc' has forward hooks"):
        fc.freeze(model, IMAGES)
    handle.remove()
    with pytest.raises(TypeError, match="floating and on the CPU, got int64 on cpu"):
        fc.freeze(model, np.zeros(IMAGES.shape, np.int64))
    frozen = fc.freeze(model, IMAGES)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 12, 11\), got \(1, 3, 12, 11\)"):
        frozen(IMAGES[:1])
    with pytest.raises(TypeError, match="inputs of float32, got float64"):
        frozen(IMAGES.astype(np.float64))


class ByValue(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.relu(x) if x.data.flat[0] > 10 else F.sigmoid(x)


class Outside(nn.Module):
    """Computes with numpy what no recorded operation knows of."""

    def forward(self, x: Any) -> Any:
        return F.relu(Tensor(np.exp(x.data)))


class Indices(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.max_pool2d(x, 2, return_indices=True)


def test_what_cannot_be_noted() -> None:
    large = IMAGES.copy("K")
    large.flat[0] = 11
    for model, example in ((ByValue(), large), (Outside(), IMAGES)):
        with pytest.raises(RuntimeError, match="computes something else than the operations"):
            fc.freeze(model.eval(), example)
    with pytest.raises(RuntimeError, match="max_pool2d does not give one tensor"):
        fc.freeze(Indices().eval(), IMAGES)
    assert thread.record is None

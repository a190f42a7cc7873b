"""Arguments and auxiliary heads of GoogLeNet, Inception v3, DenseNet and EfficientNet, against
torchvision with the same arguments. The defaults: test_architectures.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import models, nn
from fastconv.models.googlenet import BasicConv2d, Inception, normalized_to_unit
from fastconv.models.googlenet import InceptionAux as GoogLeNetAux
from fastconv.models.inception import InceptionAux
from fastconv.tensor import Array, Tensor

from .architectures import without_noise
from .torchvision_models import models as torchvision


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def check_logits(model: nn.Module, reference: torch.nn.Module, x: Array) -> None:
    """In float64 and evaluation, with the reference's weights; also the order of the keys."""
    model.double().load_state_dict(reference.double().state_dict())
    assert list(model.state_dict()) == list(reference.state_dict())
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model.eval()(x).data, expected, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------------------
# GoogLeNet and Inception v3.


def test_googlenet_names_its_heads() -> None:
    reference = without_noise(torchvision.googlenet(init_weights=True, num_classes=5).double())
    model = without_noise(models.googlenet(num_classes=5).double())
    model.load_state_dict(reference.state_dict())
    x = draw(4, 3, 32, 32)
    found, expected = model(x), reference(torch.from_numpy(x))
    assert found._fields == expected._fields
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.data, right.detach().numpy(), rtol=1e-7, atol=1e-9)
    assert isinstance(model.eval()(x), Tensor)


def test_googlenet_without_auxiliary_heads() -> None:
    settings: dict[str, Any] = {"aux_logits": False, "transform_input": True, "num_classes": 5}
    model = models.googlenet(**settings)
    assert sum(p.data.size for p in models.googlenet(aux_logits=False).parameters()) == 6_624_904
    check_logits(model, torchvision.googlenet(init_weights=True, **settings), draw(2, 3, 32, 32))
    assert isinstance(model.train()(draw(2, 3, 32, 32)), Tensor)


def test_transform_input() -> None:
    settings: dict[str, Any] = {"aux_logits": False, "transform_input": True, "num_classes": 5}
    reference = torchvision.inception_v3(init_weights=True, **settings)
    check_logits(models.inception_v3(**settings), reference, draw(1, 3, 75, 75))
    x = Tensor(draw(2, 3, 4, 4), requires_grad=True)
    normalized_to_unit(x).sum().backward()
    expected = np.array([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1) / 0.5
    np.testing.assert_allclose(x.grad, np.broadcast_to(expected, x.shape), rtol=1e-12)
    for create in (models.googlenet, models.inception_v3):
        with pytest.raises(ValueError, match="got in_channels=1"):
            create(transform_input=True, in_channels=1)


def test_inception_with_its_auxiliary_head() -> None:
    reference = without_noise(torchvision.inception_v3(init_weights=True))
    model = without_noise(models.inception_v3())
    assert sum(p.data.size for p in model.parameters()) == 27_161_264
    model.load_state_dict(reference.state_dict())
    assert list(model.state_dict()) == list(reference.state_dict())
    x = draw(2, 3, 299, 299).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x))
    found = model(x)
    assert found._fields == expected._fields
    assert [head.shape for head in found] == [(2, 1000)] * 2
    right = expected.aux_logits.numpy()
    assert np.linalg.norm(found.aux_logits.data - right) < 1e-3 * np.linalg.norm(right)
    assert isinstance(model.eval()(x[:, :, :75, :75]), Tensor)


def test_the_auxiliary_head_of_inception() -> None:
    reference = torchvision.inception.InceptionAux(12, 5).double()
    head = InceptionAux(12, 5).double()
    head.load_state_dict(reference.state_dict())
    data = draw(2, 12, 17, 17)
    x, z = Tensor(data, requires_grad=True), torch.tensor(data, requires_grad=True)
    y, expected = head(x), reference(z)
    np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-9)
    weights = draw(2, 5, seed=1)
    y.backward(weights)
    expected.backward(torch.from_numpy(weights))
    np.testing.assert_allclose(x.grad, z.grad.numpy(), rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match=r"299x299.*got 16x17"):
        head(data[:, :, 1:])


def test_other_blocks() -> None:
    made = []

    class Convolution(BasicConv2d):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments, **settings)

    blocks = [Convolution, Inception, GoogLeNetAux]
    models.googlenet(blocks=blocks, init_weights=False)
    assert made == [(3, 64), (64, 64), (64, 192)]
    with pytest.raises(ValueError, match="3 classes, got 2"):
        models.googlenet(blocks=blocks[:2])
    with pytest.raises(ValueError, match="7 classes, got 3"):
        models.inception_v3(inception_blocks=blocks)


# -------------------------------------------------------------------------------------------------
# DenseNet and EfficientNet.


def test_arguments_of_densenet() -> None:
    settings: dict[str, Any] = {
        "growth_rate": 6,
        "block_config": (2, 3),
        "num_init_features": 10,
        "bn_size": 2,
        "num_classes": 7,
    }
    reference = torchvision.DenseNet(**settings)
    check_logits(models.DenseNet(**settings), reference, draw(2, 3, 32, 32))
    with pytest.raises(ValueError, match="memory_efficient=True"):
        models.densenet121(memory_efficient=True)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        models.densenet121(drop_rate=1.5)


def test_drop_rate_of_densenet_is_that_of_training() -> None:
    settings: dict[str, Any] = {"block_config": (2, 2), "num_init_features": 8, "num_classes": 3}
    x = draw(2, 3, 32, 32).astype(np.float32)
    model = models.DenseNet(drop_rate=0.5, **settings)
    without = models.DenseNet(**settings)
    without.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(model.eval()(x).data, without.eval()(x).data)
    outputs = []
    for seed in (1, 1, 2):
        nn.manual_seed(seed)
        outputs.append(model.train()(x).data)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3
    assert np.abs(outputs[0] - without.train()(x).data).max() > 1e-3


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5"])
def test_noise_and_norms_of_efficientnet(name: str) -> None:
    reference, model = torchvision.get_model(name, weights=None), models.create(name)

    def settings(layers: Any) -> list[tuple[Any, ...]]:
        values = []
        for layer in layers:
            kind = type(layer).__name__
            if kind in ("Dropout", "StochasticDepth"):
                values.append((kind, pytest.approx(layer.p), getattr(layer, "mode", None)))
            elif kind == "BatchNorm2d":
                values.append((kind, layer.eps, layer.momentum))
        return values

    found = [tuple(getattr(v, "expected", v) for v in row) for row in settings(model.modules())]
    assert found == settings(reference.modules())
    assert len(found) > 60


def test_arguments_of_efficientnet() -> None:
    stages = [(1, 3, 1, 8, 8, 1), (6, 5, 2, 8, 16, 2), (2, 3, 1, 16, 16, 1)]
    settings: dict[str, Any] = {"dropout": 0.3, "num_classes": 7, "last_channel": 24}
    norm: dict[str, float] = {"eps": 1e-2, "momentum": 0.2}
    reference = torchvision.EfficientNet(
        [torchvision.efficientnet.MBConvConfig(*stage) for stage in stages],
        norm_layer=partial(torch.nn.BatchNorm2d, **norm),
        **settings,
    )
    model = models.EfficientNet(
        [models.MBConvConfig(*stage) for stage in stages],
        norm_layer=partial(nn.BatchNorm2d, **norm),
        **settings,
    )
    check_logits(model, reference, draw(2, 3, 33, 33))
    with pytest.raises(ValueError, match="must have a stage"):
        models.EfficientNet([], 0.2)
    with pytest.raises(ValueError, match="got 3"):
        models.MBConvConfig(1, 3, 3, 8, 8, 1)


def test_stochastic_depth_of_efficientnet_follows_the_seed() -> None:
    stages = [models.MBConvConfig(1, 3, 1, 8, 8, 4)]
    model = models.EfficientNet(stages, 0.0, stochastic_depth_prob=0.9, num_classes=3)
    x = draw(6, 3, 16, 16).astype(np.float32)
    outputs = []
    for seed in (1, 1, 2):
        nn.manual_seed(seed)
        outputs.append(model(x).data)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()
    before = nn.get_rng_state()
    model.eval()(x)
    assert nn.get_rng_state() == before


@pytest.mark.parametrize(
    ("name", "least"),
    [("googlenet", 15), ("inception_v3", 75), ("densenet121", 29), ("efficientnet_b0", 1)],
)
def test_images_too_small(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{least}x{least}, got image_size={least - 1}"):
        models.create(name, image_size=least - 1)
    model = models.create(name, image_size=least, in_channels=2, num_classes=3)
    assert model.eval()(np.zeros((1, 2, least, least), np.float32)).shape == (1, 3)

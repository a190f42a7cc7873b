"""The models: sizes, keys, outputs and gradients against the same models in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastconv import models, nn
from fastconv.models import BasicBlock
from fastconv.nn import channels_last
from fastconv.tensor import Array, Tensor

from . import torch_models


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


# name: (parameters, input channels, the model in PyTorch)
MODELS: dict[str, tuple[int, int, Callable[[], torch.nn.Module]]] = {
    "lenet5": (61_706, 1, torch_models.LeNet5),
    "resnet8_cifar": (78_042, 3, lambda: torch_models.ResNet(1)),
    "resnet20_cifar": (272_474, 3, lambda: torch_models.ResNet(3)),
    "smallcnn": (545_290, 3, lambda: torch_models.SmallCNN(dropout=0.0)),
    "textbook_stack": (554_346, 3, lambda: torch_models.TextbookStack(dropout=0.0)),
}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_the_list_is_complete() -> None:
    assert models.available() == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_keys_shapes_and_parameter_count(name: str) -> None:
    count, channels, reference = MODELS[name]
    model = models.create(name, in_channels=channels)
    assert sum(p.data.size for p in model.parameters()) == count
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference().state_dict().items()}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_pytorch(name: str, layout: str) -> None:
    _, channels, make_reference = MODELS[name]
    reference = make_reference().double()
    model = without_dropout(models.create(name, in_channels=channels)).double()
    model.load_state_dict(reference.state_dict())
    x, target = draw(4, channels, 32, 32), np.array([3, 1, 4, 1])
    given = channels_last(x) if layout == "channels_last" else x
    for mode in ("train", "eval"):
        getattr(model, mode)()
        getattr(reference, mode)()
        model.zero_grad()
        reference.zero_grad()
        logits, expected = model(given), reference(torch.from_numpy(x))
        np.testing.assert_allclose(logits.data, expected.detach().numpy(), rtol=1e-7, atol=1e-9)
        nn.CrossEntropyLoss()(logits, target).backward()
        torch.nn.CrossEntropyLoss()(expected, torch.from_numpy(target)).backward()
        wanted = dict(reference.named_parameters())
        for key, parameter in model.named_parameters():
            np.testing.assert_allclose(
                parameter.grad, wanted[key].grad.numpy(), rtol=1e-6, atol=1e-9, err_msg=key
            )


@pytest.mark.parametrize(("image_size", "in_channels", "num_classes"), [(28, 1, 10), (40, 2, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_other_images_and_classes(
    name: str, image_size: int, in_channels: int, num_classes: int
) -> None:
    model = models.create(
        name, in_channels=in_channels, image_size=image_size, num_classes=num_classes
    )
    x = np.zeros((2, in_channels, image_size, image_size), np.float32)
    assert model.eval()(x).shape == (2, num_classes)


@pytest.mark.parametrize("name", MODELS)
def test_seed_decides_the_weights(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        nn.manual_seed(seed)
        states.append(models.create(name).state_dict())
    a, b, c = (b"".join(v.tobytes() for v in state.values()) for state in states)
    assert a == b != c


def test_textbook_stack_ends_in_a_softmax_at_inference() -> None:
    model = models.TextbookStack()
    model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    x = draw(3, 3, 32, 32).astype(np.float32)
    probabilities = model.predict(x)
    np.testing.assert_allclose(probabilities.data.sum(axis=1), 1, rtol=1e-6)
    assert probabilities.is_leaf and [m.training for m in model.modules()] == modes
    logits = model.eval()(x).data
    np.testing.assert_array_equal(probabilities.data.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize(("in_channels", "channels", "stride"), [(8, 8, 1), (8, 16, 2), (8, 12, 1)])
def test_residual_block(in_channels: int, channels: int, stride: int) -> None:
    reference = torch_models.BasicBlock(in_channels, channels, stride).double()
    block = BasicBlock(in_channels, channels, stride).double()
    block.load_state_dict(reference.state_dict())
    data = draw(3, in_channels, 8, 8)
    x, z = Tensor(data, requires_grad=True), torch.from_numpy(data.copy()).requires_grad_()
    y, expected = block(x), reference(z)
    np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-9, atol=1e-11)
    weights = draw(*y.shape, seed=1)
    y.backward(weights)
    expected.backward(torch.from_numpy(weights))
    np.testing.assert_allclose(x.grad, z.grad.numpy(), rtol=1e-7, atol=1e-10)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet99'.*lenet5, resnet20_cifar, resnet8_cifar"):
        models.create("resnet99")


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match="image_size=12"):
        models.create("lenet5", image_size=12)
    with pytest.raises(ValueError, match="image_size=3"):
        models.create("smallcnn", image_size=3)
    with pytest.raises(ValueError, match="0"):
        models.create("resnet8_cifar", image_size=0)

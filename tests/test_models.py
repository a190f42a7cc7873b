"""What `models.create` promises, and the pieces of the models. Each model against PyTorch:
test_architectures.py."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fastconv import functional as F
from fastconv import init, models, nn, ops
from fastconv.models.densenet import DenseBlock
from fastconv.tensor import Array, Tensor

from .torchvision_models import models as torchvision


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


# Small enough to be created many times.
MODELS = ["lenet5", "resnet8_cifar", "resnet20_cifar", "smallcnn", "textbook_stack"]


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


def test_arguments_of_a_residual_network() -> None:
    """The same as torchvision's with the same arguments, at random weights of torchvision."""
    settings: dict[str, Any] = {
        "num_classes": 7,
        "zero_init_residual": True,
        "groups": 2,
        "width_per_group": 16,
        "replace_stride_with_dilation": [False, True, True],
    }
    reference = torchvision.resnet50(**settings).eval()
    model = models.resnet50(**settings).eval()
    zero = [key for key, value in reference.state_dict().items() if not value.any()]
    assert sum(key.endswith("bn3.weight") for key in zero) == 16
    assert zero == [key for key, value in model.state_dict().items() if not value.any()]
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    model.load_state_dict(reference.state_dict())
    x = draw(1, 3, 64, 64).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model(x).data, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_residual_network_with_another_norm() -> None:
    model = models.resnet18(norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20 and all((n.eps, n.momentum) == (1e-3, 0.01) for n in norms)


def test_residual_networks_refuse() -> None:
    with pytest.raises(ValueError, match=r"3 elements, got \[True\]"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match=r"groups=1.*got 2, 64 and 1"):
        models.resnet18(groups=2)
    with pytest.raises(ValueError, match="4 positive numbers"):
        models.ResNet(models.BasicBlock, [2, 2, 2])


INITIAL = ["resnet18", "resnext50_32x4d", "densenet121", "efficientnet_b0"]
INITIAL += ["googlenet", "inception_v3"]


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_have_torchvisions_distribution(name: str) -> None:
    """Each parameter's mean and deviation, within five standard errors of either."""
    quiet = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    reference = torchvision.get_model(name, weights=None, **quiet).state_dict()
    for key, parameter in models.create(name).named_parameters():
        mine, other = parameter.data, reference[key].numpy()
        if not np.ptp(other):
            np.testing.assert_array_equal(mine, other, err_msg=key)
            continue
        error = 5 * other.std() * np.sqrt(2 / other.size)
        assert abs(mine.mean() - other.mean()) <= error, key
        assert abs(mine.std() - other.std()) <= error, key
        assert abs(abs(mine).max() / abs(other).max() - 1) < 0.5, key  # normal or uniform


class Repeating:
    """Random numbers of numpy, the same 100,003 again and again: a dense layer has 100 million."""

    def __init__(self, count: int) -> None:
        self.numbers = np.random.default_rng(count)

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> Array:
        return np.resize(self.numbers.uniform(low, high, 100_003).astype(np.float32), size)

    def normal(self, mean: float, std: float, size: tuple[int, ...]) -> Array:
        return np.resize(self.numbers.normal(mean, std, 100_003).astype(np.float32), size)


def layers_with_weights(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_dense_block_finds_shared_statistics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the results of layers that each find their own."""
    shared = DenseBlock(3, 10, 4, 8, 0.0)
    own = copy.deepcopy(shared)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 10, 7, 6), np.float32) + 20
    x = [Tensor(images, requires_grad=True) for _ in range(2)]
    seen: list[bool] = []
    plain = ops.batch_norm_train

    def spy(*args: Any, moments: Any = None, **options: Any) -> Any:
        seen.append(moments is not None)
        return plain(*args, moments=moments, **options)

    monkeypatch.setattr(ops, "batch_norm_train", spy)
    y = [shared(x[0])]
    assert seen == [True] * 3  # the second batch norm of a layer has its own, with its convolution
    features = x[1]
    for layer in own.children():
        features = F.cat([features, layer(features)])
    y.append(features)
    dy = rng.standard_normal(y[0].shape, np.float32)
    for result in y:
        result.backward(dy)
    pairs: list[tuple[Any, Any]] = [(y[0].data, y[1].data), (x[0].grad, x[1].grad)]
    pairs += zip(shared.state_dict().values(), own.state_dict().values(), strict=True)
    gradients = ([p.grad for p in block.parameters()] for block in (shared, own))
    pairs += zip(*gradients, strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, 1e-4, 1e-4)

    seen.clear()
    shared.eval()(x[0])
    first: Any = next(iter(shared.train().children()))
    first.norm1.eval()
    shared(x[0])
    assert seen == [False] * 2  # where a layer has statistics of its own kind, none are shared


def test_initial_weights_of_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's: fan out for the convolutions, 0.01 for the dense layers, biases of 0."""
    monkeypatch.setattr(init, "_numpy_generator", Repeating)
    for layer in layers_with_weights(models.vgg11()):
        convolution = isinstance(layer, nn.Conv2d)
        std = np.sqrt(2 / (9 * layer.out_channels)) if convolution else 0.01
        assert abs(layer.weight.data.std() / std - 1) < 0.05
        assert not layer.bias.data.any()


def test_initial_weights_of_the_original_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 5 of the paper: deviation 0.01; biases of 1 in layers 2, 4, 5 and the dense ones."""
    monkeypatch.setattr(init, "_numpy_generator", Repeating)
    layers = layers_with_weights(models.AlexNetLRN(num_classes=10))
    assert all(abs(layer.weight.data.std() / 0.01 - 1) < 0.02 for layer in layers)
    biases = [set(layer.bias.data.tolist()) for layer in layers]
    assert biases == [{0}, {1}, {0}, {1}, {1}, {1}, {1}, {0}]


def test_patch_embedding_is_a_matrix_for_each_patch() -> None:
    model = models.PatchEmbedding(image_size=32, patch_size=8, hidden_dim=24, in_channels=2)
    model.class_token.data[...] = draw(1, 1, 24)
    x = draw(3, 2, 32, 32).astype(np.float32)
    patches = x.reshape(3, 2, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(3, 16, 2 * 8 * 8)
    state = model.state_dict()
    matrix = state["conv_proj.weight"].reshape(24, 2 * 8 * 8)
    expected = patches.astype(np.float64) @ matrix.T + state["conv_proj.bias"]
    expected = expected + state["encoder.pos_embedding"][:, 1:]
    tokens = model(x).data
    assert tokens.shape == (3, 17, 24)
    np.testing.assert_allclose(tokens[:, 1:], expected, rtol=1e-5, atol=1e-5)
    first = state["class_token"][0, 0] + state["encoder.pos_embedding"][0, 0]
    np.testing.assert_allclose(tokens[:, 0], np.broadcast_to(first, (3, 24)), rtol=1e-6)
    with pytest.raises(ValueError, match="30 and 8"):
        models.PatchEmbedding(image_size=30, patch_size=8)


def test_patch_embedding_takes_the_weights_of_a_vision_transformer() -> None:
    """Values and gradients as inside torchvision's, in front of its first layer."""
    reference = torchvision.VisionTransformer(32, 8, 1, 2, 24, 24, num_classes=2).double()
    reference.encoder.layers = reference.encoder.ln = torch.nn.Identity()
    torch.nn.init.normal_(reference.class_token)
    model = models.PatchEmbedding(32, 8, 24).double()
    assert not model.load_state_dict(reference.state_dict(), strict=False).missing_keys
    x, weights = draw(3, 3, 32, 32), draw(3, 17, 24, seed=1)
    z = reference._process_input(torch.from_numpy(x))
    z = reference.encoder(torch.cat([reference.class_token.expand(3, -1, -1), z], dim=1))
    y = model(x)
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-9, atol=1e-9)
    z.backward(torch.from_numpy(weights))
    y.backward(weights)
    expected = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, expected[key].grad, rtol=1e-9, atol=1e-9)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet99'.*lenet5, .*smallcnn"):
        models.create("resnet99")


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match="image_size=12"):
        models.create("lenet5", image_size=12)
    with pytest.raises(ValueError, match="image_size=3"):
        models.create("smallcnn", image_size=3)
    with pytest.raises(ValueError, match="0"):
        models.create("resnet8_cifar", image_size=0)
    with pytest.raises(ValueError, match="63x63, got image_size=62"):
        models.create("alexnet", image_size=62)
    with pytest.raises(ValueError, match="32x32, got image_size=31"):
        models.create("vgg11", image_size=31)

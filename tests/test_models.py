"""What `models.create` promises, and the pieces of the models. Each model against PyTorch:
test_architectures.py."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.tensor import Array


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

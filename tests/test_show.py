"""Pictures of filters and feature maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastconv import checkpoint, data, models, show
from fastconv.nn import ReLU, Sequential

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves of a residual network for digits, untrained."""
    folder = tmp_path_factory.mktemp("run")
    model = models.create("resnet8_cifar", in_channels=1, image_size=28, num_classes=10)
    info = {
        "model": "resnet8_cifar", "data": "mnist5k", "in_channels": 1, "image_size": 28,
        "classes": list("0123456789"), "mean": [0.1], "std": [0.3],
    }  # fmt: skip
    checkpoint.save_weights(folder / "best.safetensors", model.state_dict(), info)
    return folder


def size_of(path: Path) -> tuple[int, int]:
    with image_module.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def test_show_writes_two_pictures(run_folder: Path, tmp_path: Path) -> None:
    paths = show.show(run_folder, tmp_path / "new", index=3)
    assert paths == [tmp_path / "new" / "filters.png", tmp_path / "new" / "features.png"]
    assert all(min(size_of(path)) > 300 for path in paths)
    photograph = tmp_path / "photo.png"
    image_module.new("RGB", (40, 50), (200, 10, 60)).save(photograph)
    there = show.show(run_folder / "best.safetensors", image=photograph, layers=["layer1", "bn1"])
    assert [path.parent for path in there] == [run_folder] * 2


def test_feature_maps_are_the_outputs_of_the_layers(run_folder: Path) -> None:
    model, info = show.load_model(run_folder / "best.safetensors")
    picture, title = show.read_input(info, None, 250, "test", None)
    digits = data.mnist5k("test")
    np.testing.assert_array_equal(picture, digits.images[250])
    assert title == "test image 250: 2"
    x = show.normalised(picture, info)
    np.testing.assert_allclose(x[0, 0], (picture[..., 0] / 255 - 0.1) / 0.3, rtol=1e-5, atol=1e-5)
    maps, logits = show.feature_maps(model, x, ["layer2", "conv1"])
    assert list(maps) == ["conv1", "layer2"]  # in the order of the forward pass
    np.testing.assert_array_equal(maps["conv1"], model.conv1(x).data[0])
    assert maps["layer2"].shape == (32, 14, 14)
    # Without hooks the batch norms are folded into the convolutions, which rounds differently.
    np.testing.assert_allclose(logits, model(x).data[0], rtol=1e-5, atol=1e-6)
    chosen, _ = show.feature_maps(model, x)
    assert len(chosen) == show.MOST_LAYERS
    assert next(iter(chosen)) == "conv1"
    assert not any(module._forward_hooks for module in model.modules())


def test_mosaic() -> None:
    tiles = np.arange(5 * 2 * 3 * 1).reshape(5, 2, 3, 1)
    joined = show.mosaic(tiles)
    assert joined.shape == (2 * 3 - 1, 3 * 4 - 1, 1)
    np.testing.assert_array_equal(joined[3:5, 4:7], tiles[4])
    assert (joined[2] == 1).all() and (joined[:, 3] == 1).all() and (joined[3:, 8:] == 1).all()


def test_filters_in_colour_and_in_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(show, "_draw", lambda axes, image, title: drawn.append((image, title)))
    weight = np.zeros((70, 3, 2, 2), np.float32)
    weight[0, 1, 0, 1], weight[0, 2, 1, 1] = -4, 2
    show.draw_filters(weight, tmp_path / "filters.png")
    image, title = drawn[0]
    np.testing.assert_allclose(image[0, 1], [0.5, 0, 0.5])
    np.testing.assert_allclose(image[1, 1], [0.5, 0.5, 0.75])
    assert title == "64 of 70 filters of the first layer"
    show.draw_filters(weight[:, :2], tmp_path / "filters.png")
    assert drawn[1][0].shape[2] == 1
    np.testing.assert_allclose(drawn[1][0][0, 1, 0], 0)


def test_show_refuses(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint of a run here"):
        show.show(tmp_path)
    with pytest.raises(FileNotFoundError):
        show.show(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"no layer 'layer9'; the convolutions are conv1, layer1"):
        show.show(run_folder, layers=["layer9"])
    with pytest.raises(ValueError, match=r"'fc' makes no maps"):
        show.show(run_folder, layers=["fc"])
    with pytest.raises(ValueError, match="image 1000 of 1000 test images does not exist"):
        show.show(run_folder, index=1000)
    with pytest.raises(FileNotFoundError):
        show.show(run_folder, image=tmp_path / "missing.png")
    with pytest.raises(ValueError, match="has no convolution"):
        show.first_convolution(Sequential(ReLU()))

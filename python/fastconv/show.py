"""Pictures of what a network has learned: its first filters, and what its layers see in an image.

Needs the extra `plot` (matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import data, nn
from fastconv.data import DataLoader, Dataset
from fastconv.module import HookHandle
from fastconv.tensor import Tensor, no_grad
from fastconv.train.recipe import load_model
from fastconv.train.run_folder import find_checkpoint

__all__ = ["draw_features", "draw_filters", "feature_maps", "read_input", "show"]

MOST_CHANNELS = 64  # that are drawn of a layer
MOST_LAYERS = 6  # that are drawn when none are named


def show(
    path: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    image: str | PathLike[str] | None = None,
    index: int = 0,
    split: str = "test",
    data_dir: str | PathLike[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Writes filters.png and features.png and returns their paths.

    path    a checkpoint, or the folder of a run, of which best.safetensors is taken
    out     folder for the pictures; where the checkpoint lies when not given
    image   an image file to look at; without it image `index` of the model's data set is taken
    layers  names of modules ("layer1.0.conv1"); some of the convolutions when there are none

    Raises FileNotFoundError and ValueError for what is not there, ImportError without matplotlib.
    """
    _figure(1, 1)  # before any work
    checkpoint = find_checkpoint(path)
    model, info = load_model(checkpoint)
    folder = checkpoint.parent if out is None else Path(out)
    picture, title = read_input(info, image, index, split, data_dir)
    maps, logits = feature_maps(model, normalised(picture, info), layers)
    folder.mkdir(parents=True, exist_ok=True)
    answer = info["classes"][int(logits.argmax())]
    paths = [folder / "filters.png", folder / "features.png"]
    draw_filters(first_convolution(model).weight.data, paths[0])
    draw_features(picture, maps, f"{title}, taken for {answer}", paths[1])
    return paths


def read_input(
    info: dict[str, Any],
    image: str | PathLike[str] | None,
    index: int,
    split: str,
    data_dir: str | PathLike[str] | None,
) -> tuple[NDArray[np.uint8], str]:
    """(image uint8 [H, W, C] as the model of a checkpoint takes it, a name for it)."""
    size, channels = info["image_size"], info["in_channels"]
    if image is not None:
        pixels = data.read_image(image, (size, size), "L" if channels == 1 else "RGB")
        return pixels.reshape(size, size, -1), Path(image).name
    dataset = data.load(info["data"], split, data_dir, size)
    if not 0 <= index < len(dataset):
        raise ValueError(f"image {index} of {len(dataset)} {split} images does not exist")
    label = dataset.classes[dataset.labels[index]]
    return dataset.images[index], f"{split} image {index}: {label}"


def normalised(picture: NDArray[np.uint8], info: dict[str, Any]) -> NDArray[np.float32]:
    """An image uint8 [H, W, C] as the batch [1, C, H, W] that the model was trained for."""
    dataset = Dataset(picture[None], np.zeros(1, np.int64), ("",))
    x, _ = next(iter(DataLoader(dataset, mean=info["mean"], std=info["std"])))
    return x


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """The convolution that sees the image. Raises ValueError for a model without any."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ValueError(f"{type(model).__name__} has no convolution")


def feature_maps(
    model: nn.Module, x: NDArray[np.float32], layers: Sequence[str] = ()
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """(maps [C, H, W] by layer in the order of the forward pass, logits) of one image [1, C, H, W].

    Runs the model in evaluation mode and leaves it there. Raises ValueError for a layer that is not
    there, that the forward pass does not call, or whose output is no map.
    """
    modules = dict(model.named_modules())
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    unknown = [name for name in layers if name not in modules or not name]
    if unknown:
        raise ValueError(f"no layer {unknown[0]!r}; the convolutions are {', '.join(convolutions)}")
    seen: dict[str, NDArray[np.float32]] = {}

    def watch(name: str) -> HookHandle:
        return modules[name].register_forward_hook(
            lambda module, inputs, output: seen.update({name: output.data[0]})
        )

    handles = [watch(name) for name in (layers or convolutions)]
    try:
        with no_grad():
            logits = model.eval()(Tensor(x)).data[0]
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in seen or seen[name].ndim != 3:
            raise ValueError(f"layer {name!r} makes no maps [C, H, W] of an image")
    if not layers:
        chosen = np.unique(np.linspace(0, len(seen) - 1, MOST_LAYERS).round().astype(int))
        seen = {name: seen[name] for name in np.array(list(seen))[chosen].tolist()}
    return seen, logits


def draw_filters(weight: NDArray[Any], target: Path) -> None:
    """Filters [K, C, R, S] as a PNG: in colour for three channels, else the mean over them.

    Grey, or mid-grey of each channel, is zero. A filter is scaled by its largest value.
    """
    tiles = weight[:MOST_CHANNELS].transpose(0, 2, 3, 1)
    if tiles.shape[3] != 3:
        tiles = tiles.mean(axis=3, keepdims=True)
    largest = np.abs(tiles).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + tiles / np.where(largest > 0, 2 * largest, 1)
    figure, (axes,) = _figure(1, 1)
    _draw(axes, mosaic(tiles), f"{len(tiles)} of {len(weight)} filters of the first layer")
    figure.savefig(target, dpi=120)


def draw_features(
    picture: NDArray[np.uint8], maps: dict[str, NDArray[np.float32]], title: str, target: Path
) -> None:
    """An image [H, W, C] and its maps [C, H, W] as a PNG; each map from its least to its most."""
    columns = min(3, 1 + len(maps))
    figure, axes = _figure(-(-(1 + len(maps)) // columns), columns)
    _draw(axes[0], picture / 255, title)
    for place, (name, values) in zip(axes[1:], maps.items(), strict=False):
        tiles = values[:MOST_CHANNELS, :, :, None]
        low = tiles.min(axis=(1, 2, 3), keepdims=True)
        high = tiles.max(axis=(1, 2, 3), keepdims=True)
        tiles = (tiles - low) / np.where(high > low, high - low, 1)
        text = f"{name}: {len(tiles)} of {len(values)} maps {values.shape[1]}x{values.shape[2]}"
        _draw(place, mosaic(tiles), text)
    for place in axes[1 + len(maps) :]:
        place.axis("off")
    figure.savefig(target, dpi=120)


def mosaic(tiles: NDArray[Any]) -> NDArray[Any]:
    """Tiles [N, H, W, C] side by side in a square with white lines, [rows, columns, C]."""
    count, height, width, channels = tiles.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    padded = np.ones((rows * columns, height + 1, width + 1, channels), tiles.dtype)
    padded[:count, :height, :width] = tiles
    grid = padded.reshape(rows, columns, height + 1, width + 1, channels)
    joined = grid.transpose(0, 2, 1, 3, 4).reshape(
        rows * (height + 1), columns * (width + 1), channels
    )
    return joined[:-1, :-1]


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fastconv[plot]'") from error
    figure = Figure(figsize=(4 * columns, 4.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def _draw(axes: Any, image: NDArray[Any], title: str) -> None:
    if image.shape[2] == 1:
        axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(image, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")

"""Random changes of images against PyTorch, pillow and the standard library's colours."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastconv import augment
from fastconv.augment import Augmentation, Draws


def images_of(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def draws_of(count: int, epoch: int = 0) -> Draws:
    return Draws(1, epoch, np.arange(count))


def as_torch(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64))


def from_torch(images: torch.Tensor) -> NDArray[np.float64]:
    return images.numpy().transpose(0, 2, 3, 1)


# Random numbers


def test_draws_are_uniform_and_independent_of_the_batch() -> None:
    draws = draws_of(4000)
    values = draws.uniform(augment.ANGLE, -2, 3)
    assert values.min() >= -2 and values.max() < 3
    counts = np.histogram(values, 10, (-2, 3))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 33  # chi-squared of 9 degrees, once in 10,000
    assert abs(np.corrcoef(values, draws.uniform(augment.ZOOM, 0, 1))[0, 1]) < 0.08
    some = Draws(1, 0, np.array([7, 3000])).uniform(augment.ANGLE, -2, 3)
    np.testing.assert_array_equal(some, values[[7, 3000]])
    whole = draws.below(augment.TOP, np.array([1, 3] * 2000))
    assert set(whole[::2]) == {0} and set(whole[1::2]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "crop_padding must lie between 0 and inf, got -1"),
        ({"resized_crop": 1.5}, "resized_crop must lie between 0 and 1, got 1.5"),
        ({"rotation": float("nan")}, "rotation .* got nan"),
        ({"zoom": 1.0}, "zoom must lie between 0 and 0.99, got 1.0"),
        ({"hue": 0.6}, "hue must lie between 0 and 0.5, got 0.6"),
        ({"cutout": -4}, "cutout .* got -4"),
    ],
)
def test_augmentation_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# Geometry


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6)])
def test_rotation_and_scale_agree_with_pytorch(height: int, width: int) -> None:
    images = images_of(5, height, width, 3)
    angle, scale = np.array([0, 90, 17.0, -30, 200]), np.array([1, 1, 0.7, 1.4, 1])
    matrices = []
    for degrees, factor in zip(np.radians(angle), scale, strict=True):
        # affine_grid maps the output to the input, y down, each side scaled to [-1, 1].
        cos, sin = np.cos(degrees) / factor, np.sin(degrees) / factor
        matrices.append([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    size = [5, 3, height, width]
    grid = torch.nn.functional.affine_grid(torch.tensor(matrices), size, align_corners=False)
    expected = torch.nn.functional.grid_sample(as_torch(images), grid, align_corners=False)
    found = augment.rotate_and_scale(images, angle, scale)
    np.testing.assert_allclose(found, from_torch(expected), atol=2e-3)
    np.testing.assert_allclose(found[0], images[0])
    if height == width:
        np.testing.assert_allclose(found[1], np.rot90(images[1]), atol=2e-3)


def test_scaled_boxes_agree_with_pytorch() -> None:
    images = images_of(3, 10, 9, 2)
    boxes = np.array([[0, 0, 10, 9], [2, 3, 5, 4], [9, 0, 1, 9]])
    found = augment.scale_box(images, *boxes.T)
    np.testing.assert_allclose(found[0], images[0])
    for image, (top, left, height, width), got in zip(as_torch(images), boxes, found, strict=True):
        box = image[None, :, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(box, (10, 9), mode="bilinear")
        np.testing.assert_allclose(got, from_torch(expected)[0], atol=1e-3)


def test_random_boxes_keep_area_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(augment, "scale_box", lambda images, *box: seen.append(box) or images)
    Augmentation(resized_crop=0.2).apply(images_of(500, 60, 40, 1), draws_of(500))
    top, left, height, width = seen[0]
    assert (top >= 0).all() and (top + height <= 60).all() and (top + height == 60).any()
    assert (left >= 0).all() and (left + width <= 40).all() and (left + width == 40).any()
    assert (height * width > 0.18 * 60 * 40).all()
    assert (width / height > 0.7).all() and (width / height < 1.4).all()
    assert (height * width).min() < 0.25 * 60 * 40 and (height * width).max() > 0.6 * 60 * 40


def test_cutout_is_a_square_that_the_border_may_cut() -> None:
    pixels = np.ones((400, 12, 10, 2), np.float32)
    Augmentation(cutout=4).cut(pixels, draws_of(400))
    sides = set()
    for mask in pixels[..., 0] == 0:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns) > 0
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
        sides |= {len(rows), len(columns)}
    assert sides == {2, 3, 4}
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
    covered = (pixels[..., 0] == 0).mean(0)  # of 120 places, the one of a pixel has 16 or fewer
    assert abs(covered[5, 5] - 16 / 120) < 5 * np.sqrt(16 / 120 / 400)


# Colours


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Brightness", augment.scale_brightness),
        ("Contrast", augment.scale_contrast),
        ("Color", augment.scale_saturation),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_colours_agree_with_pillow(name: str, change: object, factor: float) -> None:
    """torchvision's ColorJitter is pillow's ImageEnhance, which rounds to whole numbers."""
    image_module = pytest.importorskip("PIL.Image")
    enhance = pytest.importorskip("PIL.ImageEnhance")
    images = images_of(2, 6, 5, 3)
    factors = np.full((2, 1, 1, 1), factor, np.float32)
    found = change(images.astype(np.float32), factors)  # type: ignore[operator]
    for image, got in zip(images, found, strict=True):
        expected = getattr(enhance, name)(image_module.fromarray(image)).enhance(factor)
        assert np.abs(got - np.asarray(expected, np.float32)).max() <= 1.5


def test_hue_agrees_with_the_standard_library() -> None:
    images = images_of(3, 4, 4, 3)
    images[0, 0] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0]]
    shifts = np.array([0.0, 0.3, -0.45], np.float32)
    found = augment.shift_hue(images.astype(np.float32), shifts[:, None, None, None])
    for image, shift, got in zip(images, shifts, found, strict=True):
        for pixel, new in zip(image.reshape(-1, 3) / 255, got.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb((hue + float(shift)) % 1, saturation, value)
            np.testing.assert_allclose(new, np.array(expected) * 255, atol=1e-2)


def test_every_image_gets_a_jitter_of_its_own() -> None:
    images = np.repeat(images_of(1, 5, 5, 3), 300, 0)
    found = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4).apply(images, draws_of(300))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    assert len({image.tobytes() for image in found}) == 300
    dark = Augmentation(brightness=0.4).apply(np.full((300, 1, 1, 1), 100, np.uint8), draws_of(300))
    assert 60 <= dark.min() < 62 and 138 < dark.max() <= 140
    assert abs(dark.mean() - 100) < 5 * 80 / np.sqrt(12 * 300)


def test_the_order_of_the_changes_is_random() -> None:
    """Where brightness saturates, it matters whether it came before or after contrast."""
    images = np.repeat(images_of(1, 4, 4, 3), 200, 0)
    draws = draws_of(200)
    found = Augmentation(brightness=0.9, contrast=0.9).apply(images, draws)
    pixels = images.astype(np.float32)
    a, b = (
        draws.uniform(augment.JITTER_FACTOR + k, 0.1, 1.9).astype(np.float32)[:, None, None, None]
        for k in (0, 1)
    )
    orders = (
        augment.scale_contrast(augment.scale_brightness(pixels, a), b),
        augment.scale_brightness(augment.scale_contrast(pixels, b), a),
    )
    first, second = (np.abs(found - expected).max((1, 2, 3)) < 1e-3 for expected in orders)
    assert (first | second).all()
    assert (first & ~second).sum() > 30
    assert (second & ~first).sum() > 30


def test_grey_images_keep_saturation_and_hue() -> None:
    images = images_of(4, 5, 5, 1)
    found = Augmentation(saturation=0.5, hue=0.5).apply(images, draws_of(4))
    np.testing.assert_array_equal(found, images)
    changed = Augmentation(contrast=0.5).apply(images, draws_of(4))
    mean = images.mean((1, 2), keepdims=True)
    factor = (changed - mean) / (images - mean)  # but where a level was clipped
    clipped = (changed == 0) | (changed == 255)
    for one, cut in zip(factor, clipped, strict=True):
        np.testing.assert_allclose(one[~cut], np.median(one), rtol=1e-3)

"""Random changes of training images, as functions of (seed, epoch, index of the image).

Nothing here has a state. So an image looks the same in an epoch whatever batch it is in, whichever
thread prepares it, and whether or not the run was stopped in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["Augmentation", "Draws"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# What a random number of Draws is for. A number never changes its meaning: a run that an earlier
# version began must see the same images.
ORDER, TOP, LEFT, FLIP, CUT_TOP, CUT_LEFT, ANGLE, ZOOM = range(8)
JITTER_ORDER, JITTER_FACTOR = 16, 24  # and the 4 after each
BOX = 64  # 4 for each attempt to find a box


class Draws:
    """Random numbers for the images `indices` [B] of an epoch; `purpose` tells them apart."""

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> None:
        self._keys = (np.array([seed % 2**64], np.uint64), np.asarray(epoch), indices)

    def bits(self, purpose: int) -> NDArray[np.uint64]:
        """64 random bits for each image."""
        seed, epoch, indices = self._keys
        bits = np.zeros(1, np.uint64)
        for key in (seed, epoch, np.asarray(purpose), indices):
            bits = splitmix64(bits + key.astype(np.uint64))
        return bits

    def uniform(self, purpose: int, low: float, high: float) -> NDArray[Any]:
        """Uniform in [low, high) for each image."""
        return low + (high - low) * ((self.bits(purpose) >> np.uint64(11)) * 2.0**-53)

    def below(self, purpose: int, count: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """A whole number in [0, count) for each image."""
        # The upper half of the bits times the count, over 2^32, is uniform over the count.
        places = (self.bits(purpose) >> np.uint64(32)) * np.asarray(count).astype(np.uint64)
        return (places >> np.uint64(32)).astype(np.int64)


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The next output of the generator SplitMix64.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    bits = state + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order; 0 leaves a change out.

    crop_padding  pad each side by this many zero pixels and crop back to the size at a random place
    flip          mirror left to right, every other image at random
    resized_crop  scale a random box, of this share of the area at least and of a ratio of sides
                  between 3/4 and 4/3, to the whole image (bilinear): torchvision's
                  RandomResizedCrop, the crop of ImageNet training; 0.08 is usual there
    rotation      rotate by up to this many degrees to either side, around the centre (bilinear)
    zoom          scale by a factor between 1 - zoom and 1 + zoom, around the centre (bilinear)
    brightness, contrast, saturation
                  multiply by a factor between 1 - x and 1 + x (never below 0): the image itself,
                  its distance from its mean grey, its distance from its grey version
    hue           shift the hue by up to this share of the circle, at most 0.5. These four come in
                  a random order for each image: torchvision's ColorJitter
    cutout        a square with sides of this many pixels around a random pixel is set to the mean
                  of the data (zero after normalisation): DeVries and Taylor 2017, arXiv 1708.04552

    Images of one channel keep saturation and hue. Raises ValueError for a value out of range.
    """

    crop_padding: int = 0
    flip: bool = False
    resized_crop: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    cutout: int = 0

    def __post_init__(self) -> None:
        for names, high in (
            ("crop_padding brightness contrast saturation cutout", np.inf),
            ("resized_crop", 1),
            ("rotation", 180),
            ("zoom", 0.99),
            ("hue", 0.5),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not 0 <= value <= high:  # NaN lies nowhere
                    raise ValueError(f"{name} must lie between 0 and {high}, got {value}")

    @property
    def only_moves(self) -> bool:
        """Whether images are cropped and mirrored at most, and their bytes stay as they are."""
        return self == Augmentation(crop_padding=self.crop_padding, flip=self.flip)

    def places(self, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Top and left [B] of each image's crop in the padded image."""
        count = 2 * self.crop_padding + 1
        return draws.below(TOP, count), draws.below(LEFT, count)

    def mirrored(self, draws: Draws) -> NDArray[np.bool_]:
        """Which images [B] are mirrored."""
        return (draws.bits(FLIP) >> np.uint64(63) == 1) & self.flip

    def apply(self, images: NDArray[Any], draws: Draws) -> NDArray[Any]:
        """Everything but the cutout, on uint8 [B, H, W, C]; float32 in 0..255 where needed."""
        if self.crop_padding:
            images = _crop(images, self.crop_padding, *self.places(draws))
        if self.flip:
            mirrored = self.mirrored(draws)[:, None, None, None]
            images = np.where(mirrored, images[:, :, ::-1], images)
        if self.resized_crop:
            images = _resized_crop(images, self.resized_crop, draws)
        if self.rotation or self.zoom:
            angle = draws.uniform(ANGLE, -self.rotation, self.rotation)
            scale = draws.uniform(ZOOM, 1 - self.zoom, 1 + self.zoom)
            images = rotate_and_scale(images, angle, scale)
        return self._jitter(images, draws)

    def cut(self, pixels: Floats, draws: Draws) -> None:
        """The cutout, in place, on normalised images float32 [B, H, W, C]."""
        if not self.cutout:
            return
        _, height, width, _ = pixels.shape
        inside = []
        for purpose, size in ((CUT_TOP, height), (CUT_LEFT, width)):
            first = draws.below(purpose, size) - self.cutout // 2
            place = np.arange(size) - first[:, None]
            inside.append((place >= 0) & (place < self.cutout))
        pixels[inside[0][:, :, None] & inside[1][:, None, :]] = 0

    def _jitter(self, images: NDArray[Any], draws: Draws) -> NDArray[Any]:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        used = [k for k in range(4) if strengths[k] and (k < 2 or images.shape[3] == 3)]
        if not used:
            return images
        pixels = images.astype(np.float32)
        factors = {}
        for k in used:
            low, high = (-self.hue, self.hue) if k == 3 else (1 - strengths[k], 1 + strengths[k])
            factors[k] = draws.uniform(JITTER_FACTOR + k, low if k == 3 else max(low, 0), high)
        order = np.argsort([draws.bits(JITTER_ORDER + k) for k in used], axis=0)
        for turn in order:  # of which each image takes another change
            for place, k in enumerate(used):
                chosen = turn == place
                factor = factors[k][chosen].astype(np.float32)[:, None, None, None]
                pixels[chosen] = _JITTER[k](pixels[chosen], factor)
        return pixels


def _crop(images: Bytes, padding: int, top: NDArray[np.int64], left: NDArray[np.int64]) -> Bytes:
    count, height, width, channels = images.shape
    padded = np.zeros((count, height + 2 * padding, width + 2 * padding, channels), np.uint8)
    padded[:, padding:-padding, padding:-padding] = images
    windows = sliding_window_view(padded, images.shape[1:], axis=(1, 2, 3))
    return windows[np.arange(count), top, left, 0]


def _resized_crop(images: NDArray[Any], smallest: float, draws: Draws) -> Floats:
    """Ten attempts to find a box that lies inside; without one the image is left whole."""
    count, height, width, _ = images.shape
    box_height, box_width = np.full(count, height), np.full(count, width)
    searching = np.full(count, True)
    for attempt in range(BOX, BOX + 40, 4):
        area = height * width * draws.uniform(attempt, smallest, 1)
        ratio = np.exp(draws.uniform(attempt + 1, np.log(3 / 4), np.log(4 / 3)))
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        found = searching & (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        box_height[found], box_width[found] = h[found], w[found]
        searching &= ~found
    top = draws.below(BOX + 2, height - box_height + 1)
    left = draws.below(BOX + 3, width - box_width + 1)
    return scale_box(images, top, left, box_height, box_width)


def scale_box(
    images: NDArray[Any],
    top: NDArray[np.int64],
    left: NDArray[np.int64],
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> Floats:
    """A box of each image [B, H, W, C], scaled to H x W by bilinear interpolation."""
    places = []
    for first, length, size in ((top, height, images.shape[1]), (left, width, images.shape[2])):
        place = (np.arange(size) + 0.5) * (length / size)[:, None] - 0.5
        places.append(first[:, None] + np.clip(place, 0, (length - 1)[:, None]))
    return _bilinear(images, places[0][:, :, None], places[1][:, None, :])


def rotate_and_scale(
    images: NDArray[Any], angle: NDArray[np.float64], scale: NDArray[np.float64]
) -> Floats:
    """Each image turned counter-clockwise (degrees) and scaled around its centre; zero outside."""
    height, width = images.shape[1:3]
    y = np.arange(height)[None, :, None] - (height - 1) / 2
    x = np.arange(width)[None, None, :] - (width - 1) / 2
    cos = (np.cos(np.radians(angle)) / scale)[:, None, None]
    sin = (np.sin(np.radians(angle)) / scale)[:, None, None]
    return _bilinear(
        images, x * sin + y * cos + (height - 1) / 2, x * cos - y * sin + (width - 1) / 2
    )


def _bilinear(images: NDArray[Any], y: NDArray[np.float64], x: NDArray[np.float64]) -> Floats:
    """Images [B, H, W, C] at the places y, x [B, h, w], float32 [B, h, w, C]; zero outside."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float32)
    number = np.arange(len(images))[:, None, None]
    corners = []
    for place, size in ((y, images.shape[1]), (x, images.shape[2])):
        place = np.clip(place, -1, size)  # from there on all is zero
        low = np.minimum(np.floor(place).astype(np.int64), size - 1)
        share = (place - low).astype(np.float32)[..., None]
        corners.append(((low + 1, 1 - share), (low + 2, share)))
    (top, bottom), (left, right) = corners
    result = 0
    for row, row_share in (top, bottom):
        for column, column_share in (left, right):
            result = result + padded[number, row, column] * (row_share * column_share)
    return np.asarray(result, np.float32)


# Changes of colour: float32 pixels [B, H, W, C] in 0..255, a factor [B, 1, 1, 1].


def _blend(pixels: Floats, other: Floats | float, factor: Floats) -> Floats:
    return np.clip(other + factor * (pixels - other), 0, 255)


def _grey(pixels: Floats) -> Floats:
    """The luminance of ITU-R BT.601 [B, H, W, 1]."""
    if pixels.shape[3] == 1:
        return pixels
    red, green, blue = np.moveaxis(pixels, 3, 0)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[..., None]


def scale_brightness(pixels: Floats, factor: Floats) -> Floats:
    """The blend with black."""
    return _blend(pixels, 0.0, factor)


def scale_contrast(pixels: Floats, factor: Floats) -> Floats:
    """The blend with the mean grey of the image."""
    count, height, width, _ = pixels.shape
    mean = _grey(pixels).reshape(count, height * width).mean(axis=1)
    return _blend(pixels, mean[:, None, None, None], factor)


def scale_saturation(pixels: Floats, factor: Floats) -> Floats:
    """The blend with the image in grey."""
    return _blend(pixels, _grey(pixels), factor)


def shift_hue(pixels: Floats, shift: Floats) -> Floats:
    """The hue of HSV turned by `shift` circles; saturation and value stay."""
    red, green, blue = np.moveaxis(pixels, 3, 0)
    value = pixels.max(axis=3)
    chroma = value - pixels.min(axis=3)
    divisor = np.where(chroma > 0, chroma, 1)
    hue = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = hue[..., None] + 6 * shift
    # Each channel falls from the value by the chroma while the hue moves away from it.
    sixth = (np.array([5, 3, 1], np.float32) + turned) % 6
    fall = np.clip(np.minimum(sixth, 4 - sixth), 0, 1)
    return value[..., None] - chroma[..., None] * fall


_JITTER: tuple[Callable[[Floats, Floats], Floats], ...] = (
    scale_brightness,
    scale_contrast,
    scale_saturation,
    shift_hue,
)

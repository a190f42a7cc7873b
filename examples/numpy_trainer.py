"""A trainer in NumPy alone: fastconv's kernels, and every gradient passed on by hand.

Each operation has its backward as a function of its own, so a training step is the forward pass
read in reverse. This is what an autograd, a research framework or a C++ program would call.

    python examples/numpy_trainer.py
"""

from __future__ import annotations

import numpy as np

import fastconv
from fastconv.data import Dataset, mnist5k

Weights = dict[str, np.ndarray]


def initial_weights(rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> np.ndarray:
        fan_in = np.prod(shape[1:])
        return (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    return {
        "conv": normal(16, 1, 5, 5),
        "conv_bias": np.zeros(16, np.float32),
        "dense": normal(10, 16 * 12 * 12),
        "dense_bias": np.zeros(10, np.float32),
    }


def logits_of(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The logits, and what the backward pass needs: the convolution's output and the features."""
    y = fastconv.conv2d(x, weights["conv"], weights["conv_bias"], activation="relu")
    features = fastconv.max_pool2d(y, 2).reshape(len(x), -1)
    return fastconv.linear(features, weights["dense"], weights["dense_bias"]), y, features


def loss_and_gradients(
    weights: Weights, x: np.ndarray, labels: np.ndarray
) -> tuple[float, Weights]:
    logits, y, features = logits_of(weights, x)
    loss = fastconv.cross_entropy(logits, labels)

    dlogits = fastconv.cross_entropy_backward(np.float32(1), logits, labels)
    dfeatures, ddense, ddense_bias = fastconv.linear_backward(dlogits, features, weights["dense"])
    dpooled = dfeatures.reshape(len(x), 16, 12, 12)
    dy = fastconv.relu_backward(fastconv.max_pool2d_backward(dpooled, y, 2), y)
    _, dconv, dconv_bias = fastconv.conv2d_backward(
        dy, x, weights["conv"], needs=(False, True, True)
    )
    gradients = {
        "conv": dconv,
        "conv_bias": dconv_bias,
        "dense": ddense,
        "dense_bias": ddense_bias,
    }
    return float(loss), gradients


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28, 1] to float32 [N, 1, 28, 28] in [0, 1], still channels-last in memory."""
    return (images.astype(np.float32) / 255).transpose(0, 3, 1, 2)


def accuracy(weights: Weights, data: Dataset) -> float:
    logits, _, _ = logits_of(weights, pixels(data.images))
    return float((logits.argmax(1) == data.labels).mean())


def main(steps: int = 300, batch: int = 64, lr: float = 0.1) -> float:
    """Plain SGD on fastconv's digits; returns the accuracy on the held-out ones."""
    rng = np.random.default_rng(0)
    weights, train = initial_weights(rng), mnist5k("train")
    for _ in range(steps):
        chosen = train[rng.choice(len(train), batch, replace=False)]
        _, gradients = loss_and_gradients(weights, pixels(chosen.images), chosen.labels)
        for name, gradient in gradients.items():
            weights[name] -= lr * gradient
    return accuracy(weights, mnist5k("test"))


if __name__ == "__main__":
    print(f"accuracy on the 1,000 held-out digits: {main():.1%}")

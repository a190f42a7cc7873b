"""Convolution, batch norm and ReLU in one pass at inference: fold the norm, fuse the activation.

In evaluation batch norm is a fixed scale and shift for each channel, which the convolution before
it can take into its own weights; its ReLU runs while the output is still in registers. The weights
are brought into the kernels' form once. The models of `fastconv.nn` do all this by themselves,
after `model.eval()` and under `no_grad()`.

    python examples/fused_inference.py
"""

from __future__ import annotations

import numpy as np

import fastconv


def main() -> float:
    """The largest difference between the three separate operations and the fused one."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x = normal(2, 28, 28, 32).transpose(0, 3, 1, 2)  # logical NCHW, channels-last in memory
    w, mean, weight, bias = normal(64, 32, 3, 3), normal(64), normal(64), normal(64)
    var = np.square(normal(64)) + 0.5

    y = fastconv.conv2d(x, w, padding=1)
    separate = fastconv.relu(fastconv.batch_norm(y, mean, var, weight, bias))

    conv = fastconv.PackedConv2d(w, padding=1, batch_norm=(mean, var, weight, bias, 1e-5))
    fused = conv(x, activation="relu")
    return float(np.abs(separate - fused).max())


if __name__ == "__main__":
    print(f"largest difference: {main():.1e}")

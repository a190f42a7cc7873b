"""The convolution in front of a vision transformer: Dosovitskiy et al., "An image is worth 16x16
words", 2020, section 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastconv import functional as F
from fastconv import init
from fastconv.nn import Conv2d, Module, Parameter, channels_last
from fastconv.tensor import Tensor


class PatchEmbedding(Module):
    """Images [N, in_channels, image_size, image_size] -> tokens [N, 1 + patches, hidden_dim].

    Each patch of patch_size x patch_size pixels, times one matrix, becomes a vector: a convolution
    whose kernel and stride are the patch. The class token comes first, the others in the order of
    reading; a learned vector for each position is added (equation 1).

    The keys (class_token, conv_proj.weight, conv_proj.bias, encoder.pos_embedding) and initial
    distributions are those of torchvision's VisionTransformer, which holds more:
    `load_state_dict(state, strict=False)`. ValueError: image_size is no multiple of patch_size.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_dim: int = 768,
        *,
        in_channels: int = 3,
    ) -> None:
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}"
            )
        self.class_token = Parameter(np.zeros((1, 1, hidden_dim), np.float32))
        self.conv_proj = Conv2d(in_channels, hidden_dim, patch_size, stride=patch_size)
        # torchvision cuts this distribution off at +-2, out of reach of any draw.
        weight = self.conv_proj.weight
        std = math.sqrt(1 / math.prod(weight.shape[1:]))
        weight.data = channels_last(init.normal(weight.shape, std))
        assert self.conv_proj.bias is not None
        self.conv_proj.bias.data[...] = 0
        self.encoder = _Positions(1 + (image_size // patch_size) ** 2, hidden_dim)

    def forward(self, x: Any) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        first = self.class_token + np.zeros((len(patches.data), 1, 1), patches.dtype)
        tokens: Tensor = self.encoder(F.cat([first, patches], dim=1))
        return tokens


class _Positions(Module):
    """Adds a learned vector for each position; the rest of the encoder is no convolution."""

    def __init__(self, count: int, hidden_dim: int) -> None:
        self.pos_embedding = Parameter(init.normal((1, count, hidden_dim), 0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.pos_embedding

"""The check of image sizes that the models share."""

from __future__ import annotations


def check_image_size(model: str, image_size: int, least: int) -> None:
    """ValueError for images too small for the model's strides."""
    if image_size < least:
        raise ValueError(
            f"{model} needs images of at least {least}x{least}, got image_size={image_size}"
        )

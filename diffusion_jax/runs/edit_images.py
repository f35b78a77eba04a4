"""Image files for editing: images and masks at the size of the model."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import UserError
from diffusion_jax.storage.downloads import local_path

__all__ = ["open_image", "read_image", "read_mask"]

_THRESHOLD = 127  # of 255; pixels above it are known


def open_image(path: str, leaf: str) -> Image.Image:
    """The decoded image of a file. leaf: of `config.editing`, for messages. Raises: UserError."""
    if not path:
        raise UserError(f"editing.{leaf}=FILE is needed: the path of an image file")
    try:
        with Image.open(local_path(path)) as image:
            image.load()
            return image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"editing.{leaf}={path!r} cannot be read as an image: {error}") from None


def read_image(path: str, leaf: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """A file as uint8 [H, W, C] of this (height, width). Raises: UserError."""
    return data.fit(open_image(path, leaf), size, channels)


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """A file as bool [H, W, 1] of this (height, width), True where pixels are known. Raises: UserError.

    White is known: values above 127 of 255. A file that holds only 0 and 1, as boolean arrays are often saved, is scaled.
    """
    image = open_image(path, "mask")
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    if image.mode != "1" and not image.mode.startswith("I"):  # I: 16 bits of gray, which PIL would clip
        image = image.convert("L")
    values = np.asarray(image).astype(int)
    maximum = 1 if values.max() == 1 else 65535 if image.mode.startswith("I") else 255
    if maximum == 1:
        image = Image.fromarray(values.astype(np.uint8) * 255)
    known = data.fit(image, size, 1) > _THRESHOLD
    if known.all() or not known.any():
        color, problem = ("white", "nothing is left to paint") if known.all() else ("black", "no pixel is kept")
        note = "; transparency is ignored" if has_alpha else ""
        raise UserError(
            f"editing.mask={path!r} is {color} everywhere (values {values.min()} to {values.max()} of {maximum}{note}): "
            f"{problem}. Make the pixels to keep white (above 127 of 255; or 1 in a mask of 0 and 1) and those to paint "
            "black (0)"
        )
    return known

"""The shapes of images, and conversions between uint8 and the models' range, [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

__all__ = ["is_image_shape", "is_of_images", "to_gray_levels", "to_model_range", "to_uint8"]

Images = TypeVar("Images", jax.Array, np.ndarray)


def is_image_shape(shape: Sequence[int]) -> bool:
    """Whether examples of this shape, (*spatial, C), can be images: (H, W, C) with one or three channels."""
    return len(shape) == 3 and shape[-1] in (1, 3)


def is_of_images(x: np.ndarray | jax.Array) -> bool:
    """Whether an array [N, ...] holds images: its dtype is uint8, and its examples have the shape of an image."""
    return x.dtype == np.uint8 and is_image_shape(x.shape[1:])


def to_model_range(images: Images) -> Images:
    """Converts uint8 images of any shape to float32 in [-1, 1]; NumPy arrays stay NumPy arrays.

    Raises: ValueError for another dtype.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}; arrays in [-1, 1] need no conversion")
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """Converts float arrays in [-1, 1] to uint8 images: rounded, and clipped to 0 ... 255.

    Raises: ValueError for arrays that are not float, such as uint8 images.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"images must be float in [-1, 1], not {x.dtype}; uint8 images need no conversion")
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def to_gray_levels(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Converts float arrays in [-1, 1] to float64 gray levels of 0 to 255, neither rounded nor clipped."""
    return 127.5 * x.astype(np.float64) + 127.5

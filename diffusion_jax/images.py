"""Conversion between uint8 images and the range of the models, [-1, 1]."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

__all__ = ["to_model_range", "to_uint8"]

Images = TypeVar("Images", jax.Array, np.ndarray)


def to_model_range(images: Images) -> Images:
    """float32 in [-1, 1] of uint8 images of any shape; NumPy arrays stay NumPy arrays.

    Raises: ValueError for another dtype.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}; arrays in [-1, 1] need no conversion")
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """uint8 images of arrays in [-1, 1]: rounded, and clipped to 0 ... 255."""
    return jnp.clip(jnp.round((jnp.asarray(x) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)

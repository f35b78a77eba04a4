"""Pictures as arrays and as PNG files."""

from __future__ import annotations

import pathlib
import warnings
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from diffusion_jax.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "save", "to_array"]

Picture: TypeAlias = "np.ndarray | Figure"


def to_array(picture: Picture) -> np.ndarray:
    """The picture as uint8 [H, W, C] with one or three channels."""
    if isinstance(picture, np.ndarray):
        return picture
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here because it takes half a second

    canvas = FigureCanvasAgg(picture)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(path: pathlib.Path, picture: Picture) -> None:
    """Writes the picture as PNG, completely or not at all."""
    array = to_array(picture)
    with atomic_write(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")

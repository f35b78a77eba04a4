"""Small pictures without text, for steps of denoising: much faster than figures."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from diffusion_jax.pictures.grids import draw_grid
from diffusion_jax.pictures.samples import is_of_images

__all__ = ["array_images", "draw_frame"]

_MAX_ROWS, _MAX_POINTS, _MAX_LINES = 4, 2000, 3
_SERIES_SIZE, _VECTORS_SIZE = (220, 110), (240, 240)


def draw_frame(x: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """A picture of x [N, *spatial, C]; those of several x have the scale of the same `samples`."""
    return draw_grid(x if is_of_images(samples) else array_images(x, samples))


def array_images(x: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """x [N, *spatial, C] as images uint8 [rows, H, W, 1], dark is high; all frames have the scale of `samples`.

    Vectors are one image, of points at their first two entries. Series are lines of at most three channels. Fields, and
    the central slices of volumes, show their first channel.
    """
    low, high = float(np.nanmin(samples)), float(np.nanmax(samples))
    margin = 0.25 * (high - low) or 0.5
    scaled = np.clip((np.asarray(x, np.float64) - low + margin) / (high - low + 2 * margin), 0.0, 1.0)
    scaled = np.nan_to_num(scaled)
    if scaled.ndim == 2:
        return _points(scaled)[None, ..., None]
    scaled = scaled[:_MAX_ROWS]
    if scaled.ndim == 3:
        return np.stack([_lines(series) for series in scaled])[..., None]
    if scaled.ndim == 5:
        scaled = scaled[:, scaled.shape[1] // 2]
    return np.round(255 * (1 - scaled[..., :1])).astype(np.uint8)


def _points(vectors: np.ndarray) -> np.ndarray:
    """Points at the first two entries of vectors [N, D] in [0, 1]; of numbers, at their number in the set."""
    (width, height), shown = _VECTORS_SIZE, vectors[:_MAX_POINTS]
    second = shown[:, 1] if shown.shape[1] > 1 else np.linspace(0, 1, len(shown))
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    for a, b in zip(shown[:, 0], second, strict=True):
        column, row = a * (width - 3), (1 - b) * (height - 3)
        draw.rectangle((column, row, column + 2, row + 2), fill=0)
    return np.asarray(image)


def _lines(series: np.ndarray) -> np.ndarray:
    """A line for each channel of a series [L, C] in [0, 1], in shades of gray."""
    width, height = _SERIES_SIZE
    image = Image.new("L", (width, height), 255)
    draw, columns = ImageDraw.Draw(image), np.linspace(1, width - 2, len(series))
    for channel in range(min(series.shape[1], _MAX_LINES)):
        rows = (1 - series[:, channel]) * (height - 3) + 1
        draw.line(list(zip(columns.tolist(), rows.tolist(), strict=True)), fill=70 * channel, width=2)
    return np.asarray(image)

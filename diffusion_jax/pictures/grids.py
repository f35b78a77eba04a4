"""Image grids with captions, and conversions from pictures to arrays, PNG files and terminal text."""

from __future__ import annotations

import math
import pathlib
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GAP", "LINE", "Picture", "as_text", "draw_grid", "save", "to_array"]

Picture: TypeAlias = "np.ndarray | Figure"

GAP = 4  # gray pixels around every image in a grid
LINE = 14  # height of a text line in pixels
_MIN_SIZE = 96  # minimum size of an enlarged image in pixels, wide enough for a caption
_MIN_TITLE_WIDTH = 300  # pixels
_LETTER_WIDTH = 7  # pixels, upper bound on the mean letter width in a title
_BACKGROUND, _TEXT_GRAY = 64, 230
_SHADES = " .:-=+*#%@"


def draw_grid(
    images: np.ndarray,
    title: str = "",
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    headers: Sequence[str] | None = None,
) -> np.ndarray:
    """Draws uint8 images [N, H, W, C] as one picture [H', W', C], row by row with gaps; small images are enlarged.

    title: at the top, wrapped into lines. captions: a text line below each image. headers: a text line above each column.
    Captions and headers are shortened to the width of the images.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, _MIN_SIZE // max(height, width))
    below = LINE if captions else 0
    height, width = height * scale + GAP + below, width * scale + GAP
    tiles = np.full((rows * columns, height, width, channels), _BACKGROUND, np.uint8)
    tiles[:n, GAP : height - below, GAP:] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for tile, caption in zip(tiles, captions or (), strict=False):
        tile[height - below :, GAP:] = _line(caption, width - GAP)[..., None]
    picture = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    if headers:
        above = np.full((LINE, columns * width, channels), _BACKGROUND, np.uint8)
        for column, header in enumerate(headers):
            above[:, column * width + GAP : (column + 1) * width] = _line(header, width - GAP)[..., None]
        picture = np.concatenate([above, picture])
    if title:
        missing = max(0, _MIN_TITLE_WIDTH - picture.shape[1])
        picture = np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=_BACKGROUND)
        text_width = picture.shape[1] - GAP
        lines = [_line(line, text_width) for line in textwrap.wrap(title, text_width // _LETTER_WIDTH)]
        above = np.full((len(lines) * LINE, picture.shape[1], channels), _BACKGROUND, np.uint8)
        above[:, GAP:] = np.concatenate(lines)[..., None]
        picture = np.concatenate([above, picture])
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=_BACKGROUND)


def _line(text: str, width: int) -> np.ndarray:
    """Renders a line of text as uint8 [LINE, width]."""
    font, shown = ImageFont.load_default(LINE - 3), text
    while len(shown) > 1 and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "..."
    image = Image.new("L", (width, LINE), _BACKGROUND)
    ImageDraw.Draw(image).text((0, 0), shown, fill=_TEXT_GRAY, font=font)
    return np.asarray(image)


def as_text(images: np.ndarray) -> str:
    """Converts a row of small uint8 images [N, H, W, C] to text, with two characters for each pixel."""
    shades = (images.mean(axis=-1) * (len(_SHADES) - 1) / 255).round().astype(int)
    rows = np.concatenate(list(np.pad(shades, ((0, 0), (0, 0), (0, 2)))), axis=1)
    return "\n".join("".join(_SHADES[value] * 2 for value in row).rstrip() for row in rows)


def to_array(picture: Picture) -> np.ndarray:
    """Converts a picture to uint8 [H, W, C] with one or three channels."""
    if isinstance(picture, np.ndarray):
        return picture
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here because it takes half a second

    canvas = FigureCanvasAgg(picture)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font lacks some scripts
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(path: pathlib.Path, picture: Picture) -> None:
    """Writes a picture as PNG, completely or not at all."""
    array = to_array(picture)
    with atomic_write(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")

"""Image grids with captions, and conversions from pictures to arrays, PNG files and terminal text."""

from __future__ import annotations

import math
import pathlib
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture: TypeAlias = "np.ndarray | Figure"

GAP = 4  # gray pixels around every image in a grid
LINE = 14  # height of a text line in pixels
_MIN_SIZE = 96  # minimum size of an enlarged image in pixels, wide enough for a caption
_MIN_TITLE_WIDTH = 300  # pixels
_MAX_ROW_NAME = 160  # pixels
_LETTER_WIDTH = 7  # pixels, upper bound on the mean letter width in a title
_BACKGROUND, _TEXT_GRAY = 64, 230
_SHADES, _TEXT_GAP = " .:-=+*#%@", 4  # characters


class Block(NamedTuple):
    """Images uint8 [N, H, W, C] in a part of a picture.

    cells: int [rows, columns], the number of the image in each cell; -1 for an empty cell. captions: a text line below each
    image. headers: text lines above, which share the width of the block evenly.
    """

    images: np.ndarray
    cells: np.ndarray
    captions: Sequence[str] | None = None
    headers: Sequence[str] | None = None


def fill_cells(groups: Sequence[np.ndarray], rows: Sequence[int], columns: int) -> np.ndarray:
    """Returns cells in which group i of image numbers fills `rows[i]` rows; numbers that do not fit are left out."""
    cells = np.full((sum(rows), columns), -1)
    for group, start, count in zip(groups, np.cumsum([0, *rows]), rows, strict=False):
        chosen = group[: count * columns]
        cells[start : start + count].reshape(-1)[: len(chosen)] = chosen
    return cells


def fit_columns(count: int) -> int:
    """Returns a number of columns near sqrt(count) with which all rows are full, if there is one."""
    root = math.ceil(math.sqrt(count))
    return next((columns for columns in range(root, 2 * root + 1) if count % columns == 0), root)


def draw_grid(
    images: np.ndarray,
    title: str = "",
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    headers: Sequence[str] | None = None,
) -> np.ndarray:
    """Draws uint8 images [N, H, W, C] as one picture [H', W', C], row by row with gaps; small images are enlarged.

    title: a text at the top, wrapped into lines. captions: a text line below each image. headers: a text line above each
    column. Captions and headers are shortened to the width of the images.
    """
    n = len(images)
    columns = columns or fit_columns(n)
    cells = fill_cells([np.arange(n)], [math.ceil(n / columns)], columns)
    return draw_blocks([Block(images, cells, captions, headers)], title)


def draw_blocks(blocks: Sequence[Block], title: str = "", row_names: Sequence[str] = ()) -> np.ndarray:
    """Draws blocks with the same number of rows side by side, as `draw_grid`. row_names: texts at the left of the rows."""
    below = LINE if any(block.captions for block in blocks) else 0
    above = LINE if any(block.headers for block in blocks) else 0
    drawn = [_draw_block(block, above, below) for block in blocks]
    if any(row_names):
        drawn.insert(0, _draw_row_names(row_names, drawn[0], above))
    gap = np.full((len(drawn[0]), 3 * GAP, drawn[0].shape[-1]), _BACKGROUND, np.uint8)
    picture = np.concatenate([each for block in drawn for each in (gap, block)][1:], axis=1)
    if title:
        missing = max(0, _MIN_TITLE_WIDTH - picture.shape[1])
        picture = np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=_BACKGROUND)
        for line in reversed(textwrap.wrap(title, (picture.shape[1] - GAP) // _LETTER_WIDTH)):
            picture = np.concatenate([_line(line, *picture.shape[1:]), picture])
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=_BACKGROUND)


def _draw_block(block: Block, above: int, below: int) -> np.ndarray:
    """Draws a block with `above` pixels for headers, and `below` pixels under each image for captions."""
    _, height, width, channels = block.images.shape
    rows, columns = block.cells.shape
    scale = max(1, _MIN_SIZE // max(height, width))
    height, width = height * scale + GAP + below, width * scale + GAP
    tiles = np.full((rows * columns, height, width, channels), _BACKGROUND, np.uint8)
    for tile, i in zip(tiles, map(int, block.cells.flat), strict=True):
        if i >= 0:
            tile[GAP : height - below, GAP:] = block.images[i].repeat(scale, axis=0).repeat(scale, axis=1)
            if block.captions and i < len(block.captions):
                tile[height - below :] = _line(block.captions[i], width, channels)
    picture = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    head = np.full((above, *picture.shape[1:]), _BACKGROUND, np.uint8)
    for i, header in enumerate(block.headers or ()):
        width = picture.shape[1] // len(block.headers or ())
        head[:, i * width : (i + 1) * width] = _line(header, width, channels)
    return np.concatenate([head, picture])


def _draw_row_names(names: Sequence[str], block: np.ndarray, above: int) -> np.ndarray:
    """Draws a column of row labels for a drawn block, as wide as the longest label."""
    font = ImageFont.load_default(LINE - 3)
    width = GAP + min(_MAX_ROW_NAME, math.ceil(max(map(font.getlength, names))))
    column = np.full((len(block), width, block.shape[-1]), _BACKGROUND, np.uint8)
    height = (len(block) - above) // len(names)
    for i, name in enumerate(names):
        top = above + i * height + (height - LINE) // 2
        column[top : top + LINE] = _line(name, *column.shape[1:])
    return column


def _line(text: str, width: int, channels: int) -> np.ndarray:
    """Renders one line of text, indented by GAP: uint8 [LINE, width, channels]. A long text is shortened."""
    font, shown = ImageFont.load_default(LINE - 3), text
    while len(shown) > 1 and font.getlength(shown) > width - GAP:
        text = text[:-1]
        shown = text + "..."
    image = Image.new("L", (width, LINE), _BACKGROUND)
    ImageDraw.Draw(image).text((GAP, 0), shown, fill=_TEXT_GRAY, font=font)
    return np.asarray(image)[..., None].repeat(channels, axis=-1)


def as_text(images: np.ndarray, columns: int) -> str:
    """Converts the first uint8 images [N, H, W, C] to text of at most `columns` characters a line; "" if no image fits.

    The images are side by side. Each pixel is two characters.
    """
    images = images[: (columns + _TEXT_GAP) // (2 * images.shape[2] + _TEXT_GAP)]
    if not len(images):
        return ""
    shades = (images.mean(axis=-1) * (len(_SHADES) - 1) / 255).round().astype(int)
    rows = ["".join(_SHADES[value] * 2 for value in row) for image in shades for row in image]
    height = shades.shape[1]
    return "\n".join((" " * _TEXT_GAP).join(rows[i::height]).rstrip() for i in range(height))


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
    with atomic_write(path) as file:
        to_pillow(to_array(picture)).save(file, format="PNG")


def to_pillow(image: np.ndarray) -> Image.Image:
    """Converts uint8 [H, W, C], with one or three channels, to a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

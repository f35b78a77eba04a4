"""Pictures: grids of images, plots, and small images as text for a terminal."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.files import atomic_write

__all__ = [
    "GAP",
    "as_text",
    "grid",
    "plot_against_steps",
    "plot_neighbors",
    "plot_rate_distortion",
    "plot_terms",
    "save_png",
    "time_headers",
]

GAP = 4  # gray pixels around every image of a grid
_BACKGROUND, _TEXT_GRAY = 64, 230
_CAPTION = 14  # rows of a caption below an image
_SHADES = " .:-=+*#%@"


def grid(
    images: np.ndarray,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    headers: Sequence[str] | None = None,
    title: str = "",
) -> np.ndarray:
    """uint8 [N, H, W, C] as one picture [H', W', C], row by row with gaps; images smaller than 64 pixels are enlarged.

    captions: a line of text below each image, shortened to its width. headers: the same above each column. title: above
    everything, in as many lines as it needs.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, 64 // max(height, width))
    below = _CAPTION if captions else 0
    height, width = height * scale + GAP + below, width * scale + GAP
    tiles = np.full((rows * columns, height, width, channels), _BACKGROUND, np.uint8)
    tiles[:n, GAP : height - below, GAP:] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for tile, caption in zip(tiles, captions or (), strict=False):
        tile[height - below :, GAP:] = _text(caption, width - GAP)[..., None]
    picture = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    if headers:
        above = np.full((_CAPTION, columns * width, channels), _BACKGROUND, np.uint8)
        for column, header in enumerate(headers):
            above[:, column * width + GAP : (column + 1) * width] = _text(header, width - GAP)[..., None]
        picture = np.concatenate([above, picture])
    if title:
        lines = [_text(line, columns * width - GAP) for line in _wrap(title, columns * width - GAP)]
        above = np.full((len(lines) * _CAPTION, columns * width, channels), _BACKGROUND, np.uint8)
        above[:, GAP:] = np.concatenate(lines)[..., None]
        picture = np.concatenate([above, picture])
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=_BACKGROUND)


def time_headers(times, last: str = "image") -> list[str]:
    """Headers of the columns of x_t at these network times, followed by the images, or what `last` names."""
    return [*(f"t = {time:.4g}" for time in np.asarray(times)), last]


def _font():
    return ImageFont.load_default(_CAPTION - 3)


def _to_drawable(text: str) -> str:
    """The text with letters that the font has: a Pillow without FreeType has Latin letters only."""
    if isinstance(_font(), ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words and, if a word is longer, inside it."""
    font, lines = _font(), [""]
    for word in _to_drawable(text).split():
        while word:
            line = f"{lines[-1]} {word}".strip()
            if font.getlength(line) <= width:
                lines[-1], word = line, ""
            elif lines[-1]:
                lines.append("")
            else:
                count = max(1, sum(font.getlength(word[:n]) <= width for n in range(1, len(word) + 1)))
                lines[-1], word = word[:count], word[count:]
                lines += [""] if word else []
    return lines


def _text(text: str, width: int) -> np.ndarray:
    """A line of text as uint8 [_CAPTION, width]."""
    font, text = _font(), _to_drawable(text)
    shown = text
    while len(shown) > 1 and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "..."
    image = Image.new("L", (width, _CAPTION), _BACKGROUND)
    ImageDraw.Draw(image).text((0, 0), shown, fill=_TEXT_GRAY, font=font)
    return np.asarray(image)


def save_png(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, C] with one or three channels."""
    with atomic_write(path) as temporary:
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")


def as_text(images: np.ndarray) -> str:
    """A row of small uint8 images [N, H, W, C] as text, two characters for each pixel."""
    shades = (images.mean(axis=-1) * (len(_SHADES) - 1) / 255).round().astype(int)
    rows = np.concatenate(list(np.pad(shades, ((0, 0), (0, 0), (0, 2)))), axis=1)
    return "\n".join("".join(_SHADES[value] * 2 for value in row).rstrip() for row in rows)


def _axes(title: str):
    """A figure and its axes, drawn without a display."""
    from matplotlib.figure import Figure  # imported here because it takes half a second and only plots need it

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _save_figure(path: pathlib.Path, figure) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_terms(path: pathlib.Path, vlb: np.ndarray, title: str, unit: str = "bits per dimension") -> None:
    """The terms of the bound [T] against t, both on logarithmic axes (Improved DDPM figure 2).

    An L_0 of continuous data, which may be negative, is shown at the bottom of the axis.
    """
    figure, axes = _axes(f"Terms of the variational bound: {title}")
    t = np.arange(1, len(vlb) + 1)
    seen = np.isfinite(vlb) & (vlb > 0)
    seen[0] = False
    axes.plot(t[seen], vlb[seen], linewidth=1.2, label="transitions $L_{t-1}$")
    axes.set(xscale="log", yscale="log", xlabel="t (1 is the cleanest)", ylabel=unit)
    # An L_0 near 0 would stretch the logarithmic axis without limit, so an arrow at the bottom represents it.
    bottom = vlb[seen].min() / 3 if seen.any() else max(vlb[0], 1e-3) / 3
    above = bool(vlb[0] >= bottom)
    axes.plot(
        t[:1],
        [vlb[0] if above else bottom],
        "o" if above else "v",
        color="tab:red",
        markersize=8,
        zorder=3,
        label=f"decoder $L_0$ = {vlb[0]:.3g}" + ("" if above else ", below the axis"),
    )
    top = axes.get_ylim()[1]
    axes.set_ylim(bottom=bottom / (top / bottom) ** 0.05)  # room for the whole marker
    axes.legend(loc="upper right")
    _save_figure(path, figure)


def plot_rate_distortion(
    path: pathlib.Path,
    rate: np.ndarray,
    distortion: np.ndarray,
    lossless: float | None,
    title: str,
    units: tuple[str, str] = ("bits per dimension", "0-255"),
) -> None:
    """Root mean squared error against rate (DDPM figure 5), and the lossless rate, None if no code is lossless.

    units: of the rate and of the distortion.
    """
    figure, axes = _axes(f"Rate and distortion: {title}")
    axes.plot(rate, distortion, linewidth=1.5, label="progressive code")
    if lossless is not None:
        axes.axvline(lossless, color="tab:red", linestyle="--", label=f"lossless: {lossless:.3f} {units[0]}")
    axes.set(xlabel=f"rate ({units[0]})", ylabel=f"distortion (RMSE, {units[1]})", xlim=(0, None), ylim=(0, None))
    axes.legend()
    _save_figure(path, figure)


# 11 markers and 10 colors: no two of up to 110 lines have both in common.
_MARKERS = "os^vD<>pPX*"


def plot_neighbors(path: pathlib.Path, rows: Sequence, distances: np.ndarray, title: str) -> None:
    """Images beside their k nearest images, with the distances.

    rows: a (name, image uint8 [H, W, C], nearest images uint8 [k, H, W, C]) each. distances: [rows, k].
    """
    from matplotlib.figure import Figure

    columns, (pixel_rows, pixel_columns) = distances.shape[1] + 1, rows[0][1].shape[:2]
    height = pixel_rows / pixel_columns  # of an image of width 1
    size = 1.1 * columns, (height + 0.3) * len(rows) + 1.0
    figure = Figure(figsize=size, dpi=120)
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / size[1])
    axes = figure.add_axes((0, 0, 1, 1 - 0.7 / size[1]))
    axes.set_axis_off()
    headers = ["sample", "nearest", *(f"nearest no. {i}" for i in range(2, columns))]
    text = {"fontsize": 7, "ha": "center", "va": "center"}
    for column, header in enumerate(headers):
        axes.text(1.1 * column + 0.5, 0.15, header, **text)
    for row, ((name, image, nearest), row_distances) in enumerate(zip(rows, distances, strict=True)):
        top = -row * (height + 0.3)
        captions = [name, *(f"distance {distance:.3g}" for distance in row_distances)]
        for column, (picture, caption) in enumerate(zip([image, *nearest], captions, strict=True)):
            extent = (1.1 * column, 1.1 * column + 1, top - height, top)
            shown = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
            axes.imshow(shown, extent=extent, cmap="gray", vmin=0, vmax=255)
            axes.text(1.1 * column + 0.5, top - height - 0.12, caption, **text)
    axes.set(xlim=(-0.05, 1.1 * columns - 0.05), ylim=(-len(rows) * (height + 0.3), 0.3), aspect="equal")
    _save_figure(path, figure)


def plot_against_steps(path: pathlib.Path, curves: Mapping[str, Mapping[int, float]], metric: str) -> None:
    """A line for each label of {label: {number of sampling steps: value}}, the steps on a logarithmic axis."""
    figure, axes = _axes(f"{metric} against sampling steps")
    for i, (label, points) in enumerate(curves.items()):
        steps = sorted(points)
        color, marker = f"C{i % 10}", _MARKERS[i % len(_MARKERS)]
        axes.plot(steps, [points[n] for n in steps], color=color, marker=marker, linewidth=1.5, label=label)
    axes.set(xscale="log", xlabel="sampling steps", ylabel=metric, ylim=(0, None))
    axes.legend()
    _save_figure(path, figure)

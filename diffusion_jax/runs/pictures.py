"""Pictures for people: grids, the way from noise to image, and small images as text for a terminal."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SHADES = " .:-=+*#%@"


def to_uint8(x) -> jax.Array:
    """[-1, 1] to 0 ... 255, rounded to the nearest (OpenAI's code truncates); works in compiled code."""
    return jnp.clip(jnp.round((jnp.asarray(x) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


GAP = 4  # gray pixels around every image of a grid
_GRAY = 64


_CAPTION = 14  # rows below an image that has a caption


def grid(
    images: np.ndarray,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    headers: Sequence[str] | None = None,
) -> np.ndarray:
    """uint8 [N, H, W, C] as one picture [H', W', C], row by row with a gap between; images below 64 pixels are enlarged.

    captions: a line of text below each image, cut off where it is too wide. headers: the same above each column.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, 64 // max(height, width))
    below = _CAPTION if captions else 0
    height, width = height * scale + GAP + below, width * scale + GAP
    tiles = np.full((rows * columns, height, width, channels), _GRAY, np.uint8)
    tiles[:n, GAP : height - below, GAP:] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for tile, caption in zip(tiles, captions or (), strict=False):
        tile[height - below :, GAP:] = _text(caption, width - GAP)[..., None]
    picture = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    if headers:
        above = np.full((_CAPTION, columns * width, channels), _GRAY, np.uint8)
        for column, header in enumerate(headers):
            above[:, column * width + GAP : (column + 1) * width] = _text(header, width - GAP)[..., None]
        picture = np.concatenate([above, picture])
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=_GRAY)


def time_headers(times) -> list[str]:
    """Headers of the columns of x_t at these network times, followed by the images."""
    return [*(f"t = {time:.4g}" for time in np.asarray(times)), "image"]


def _text(text: str, width: int) -> np.ndarray:
    """A line of text as uint8 [_CAPTION, width]."""
    font = ImageFont.load_default(_CAPTION - 3)
    if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow without FreeType knows Latin letters only
        text = text.encode("latin-1", "replace").decode("latin-1")
    shown = text
    while len(shown) > 1 and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "..."
    image = Image.new("L", (width, _CAPTION), _GRAY)
    ImageDraw.Draw(image).text((0, 0), shown, fill=230, font=font)
    return np.asarray(image)


def save_png(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, C] (C 1 or 3), whole or not at all."""
    temporary = path.with_suffix(".partial")
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)


def as_text(images: np.ndarray) -> str:
    """A row of small uint8 images [N, H, W, C] as characters, two to a pixel."""
    shades = (images.mean(axis=-1) * (len(_SHADES) - 1) / 255).round().astype(int)
    rows = np.concatenate(list(np.pad(shades, ((0, 0), (0, 0), (0, 2)))), axis=1)
    return "\n".join("".join(_SHADES[value] * 2 for value in row).rstrip() for row in rows)


def _axes(title: str):
    """A figure and its axes, drawn without a display."""
    from matplotlib.figure import Figure  # half a second, and only plots need it

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _save_figure(path: pathlib.Path, figure) -> None:
    temporary = path.with_suffix(".partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def plot_terms(path: pathlib.Path, vlb: np.ndarray, title: str) -> None:
    """The terms of the bound [T] in bits per dimension against t, both on logarithmic axes (Improved DDPM figure 2)."""
    figure, axes = _axes(f"Terms of the variational bound: {title}")
    t = np.arange(1, len(vlb) + 1)
    seen = np.isfinite(vlb) & (vlb > 0)
    seen[0] = False
    axes.plot(t[seen], vlb[seen], linewidth=1.2, label="transitions $L_{t-1}$")
    axes.set(xscale="log", yscale="log", xlabel="t (1 is the cleanest)", ylabel="bits per dimension")
    # An L_0 near 0 would stretch the logarithmic axis without end, so an arrow at the bottom stands for it.
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
    path: pathlib.Path, rate: np.ndarray, distortion: np.ndarray, lossless: float, title: str
) -> None:
    """Root mean squared error (0-255) against rate in bits per dimension (DDPM figure 5), and where the code is lossless."""
    figure, axes = _axes(f"Rate and distortion: {title}")
    axes.plot(rate, distortion, linewidth=1.5, label="progressive code")
    axes.axvline(lossless, color="tab:red", linestyle="--", label=f"lossless: {lossless:.3f} bits per dimension")
    axes.set(xlabel="rate (bits per dimension)", ylabel="distortion (RMSE, 0-255)", xlim=(0, None), ylim=(0, None))
    axes.legend()
    _save_figure(path, figure)


# As many as no two lines of a plot have both their color and their marker in common, up to 110 of them.
_MARKERS = "os^vD<>pPX*"


def plot_neighbors(path: pathlib.Path, rows: Sequence, distances: np.ndarray, title: str) -> None:
    """Images beside the k images that are nearest to them, and how far these are.

    rows: (name, uint8 [H, W, C], uint8 [k, H, W, C]) each. distances: [rows, k].
    """
    from matplotlib.figure import Figure

    tall, wide = rows[0][1].shape[:2]
    columns, height = distances.shape[1] + 1, tall / wide  # of an image that is 1 wide
    size = 1.1 * columns, (height + 0.3) * len(rows) + 1.0
    figure = Figure(figsize=size, dpi=120)
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / size[1])
    axes = figure.add_axes((0, 0, 1, 1 - 0.7 / size[1]))
    axes.set_axis_off()
    heads = ["sample", "nearest", *(f"nearest no. {i}" for i in range(2, columns))]
    text = {"fontsize": 7, "ha": "center", "va": "center"}
    for column, head in enumerate(heads):
        axes.text(1.1 * column + 0.5, 0.15, head, **text)
    for row, ((name, image, near), far) in enumerate(zip(rows, distances, strict=True)):
        top = -row * (height + 0.3)
        captions = [name, *(f"{distance:.3g}" for distance in far)]
        for column, (picture, caption) in enumerate(zip([image, *near], captions, strict=True)):
            extent = (1.1 * column, 1.1 * column + 1, top - height, top)
            shown = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
            axes.imshow(shown, extent=extent, cmap="gray", vmin=0, vmax=255)
            axes.text(1.1 * column + 0.5, top - height - 0.12, caption, **text)
    axes.set(xlim=(-0.05, 1.1 * columns - 0.05), ylim=(-len(rows) * (height + 0.3), 0.3), aspect="equal")
    _save_figure(path, figure)


def plot_against_steps(path: pathlib.Path, curves: Mapping[str, Mapping[int, float]], what: str) -> None:
    """A line for each label of {label: {number of sampling steps: figure}}, the steps on a logarithmic axis."""
    figure, axes = _axes(f"{what} against sampling steps")
    for i, (label, points) in enumerate(curves.items()):
        steps = sorted(points)
        look = {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.5}
        axes.plot(steps, [points[n] for n in steps], **look, label=label)
    axes.set(xscale="log", xlabel="sampling steps", ylabel=what, ylim=(0, None))
    axes.legend()
    _save_figure(path, figure)

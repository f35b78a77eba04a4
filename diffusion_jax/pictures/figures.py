"""Figures: samples in data units, the bound's terms, and two sets' statistics as curves with standard errors.

Series are lines, fields are images with color bars, volumes are slices and projections, vectors are histograms, and images
are grids. Only a subset of large sets and arrays is drawn; the title shows what is left out, and how many values are NaN or
infinite.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffusion_jax.images import is_of_images
from diffusion_jax.metrics.of_arrays import as_examples
from diffusion_jax.pictures.grids import Picture, draw_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffusion_jax.metrics import Curves

__all__ = [
    "draw_bound_terms",
    "draw_curves",
    "draw_edit",
    "draw_neighbors",
    "draw_rate_distortion",
    "draw_samples",
    "draw_trajectory",
    "make_figure",
]

_VALUE = "value (data units)"  # the label of an axis
_MIN_WIDTH = 4.8  # inches, wide enough for titles
_PLOT_SIZE = (7.0, 4.0)  # inches, for a single plot
_LETTERS_PER_INCH = 13  # in a title
_MAX_CURVES = 16  # channels of a statistic
_MAX_ERRORS = 60  # error bars in a curve
_COLORS = "black", "C0"
_MAX_SERIES, _MAX_FIELDS, _MAX_VOLUMES = 12, 8, 4  # examples in one figure
_MAX_LINES = 6  # in a panel of series
_MAX_CHANNELS = 12  # channels of series with separate panels
_MAX_ROWS = 6  # rows of a trajectory, and channels of fields
_MAX_VOLUME_CHANNELS = 3
_MAX_TIMES = 10
_MAX_PIXELS = 256  # along each axis of an image
_MAX_HISTOGRAMS = 16  # for vectors
_MAX_VECTORS, _MAX_POINTS = 100_000, 4000  # in a histogram; in a scatter plot


def draw_edit(given: np.ndarray, results: np.ndarray, captions: Sequence[str], title: str) -> Picture:
    """Draws the given examples, then the results. captions: one for each example and result."""
    if results.ndim == 2:  # vectors share a panel
        return draw_samples(results, title + ", and the given examples (data)", reference=given)
    shown = np.concatenate([given, results])
    if not is_of_images(shown) and np.isnan(given).any():
        title += "; values to be generated are NaN"
    return draw_samples(shown, title, captions, columns=min(len(shown), 10))


def draw_neighbors(
    samples: np.ndarray, numbers: Sequence[int], nearest: np.ndarray, distances: np.ndarray, title: str
) -> Picture:
    """Draws samples [N, *spatial, C], each followed by its nearest examples [N, k, *spatial, C].

    numbers: indices of the samples in the sample file. distances: [N, k].
    """
    shown = np.concatenate([samples[:, None], nearest], axis=1).reshape(-1, *samples.shape[1:])
    captions = []
    for number, row in zip(numbers, distances, strict=True):
        captions += [f"sample {number}", *(f"distance {distance:.4g}" for distance in row)]
    return draw_samples(shown, title + "; each sample precedes its nearest examples", captions, 1 + distances.shape[1])


def draw_samples(
    x: Any, title: str, captions: Sequence[str] | None = None, columns: int | None = None, reference: Any = None
) -> Picture:
    """Draws samples x [n, *spatial, C] with at most three spatial axes.

    Images: a grid. Series: a panel for each example, with a line for each channel; if there are many channels, or channels
    differ much in scale, a panel for each channel with all examples. Fields: a column for each example and a row for each
    channel. Volumes: for each example and channel, the three central slices, and along each axis the values farthest from 0.
    Vectors: a histogram for each channel, and a scatter plot for two channels.

    Args:
      captions: a text for each example, for instance the class; not for vectors. columns: number of columns in a grid, or in
        rows of series panels. reference: for vectors, data examples [m, C] whose histograms are drawn for comparison.
    Raises: ValueError for no example, more spatial axes, or complex numbers.
    """
    x = as_examples("x", x, 1)
    if is_of_images(x):
        return draw_grid(x, title, columns, captions)
    if x.ndim > 5:
        raise ValueError(f"x has shape {x.shape}; pictures show at most three spatial axes: [n, D, H, W, C]")
    if x.ndim == 2:
        shown, notes = _select(x, _MAX_VECTORS, _MAX_HISTOGRAMS)
        sets = [shown] if reference is None else [shown, _to_plotted(reference[:_MAX_VECTORS, :_MAX_HISTOGRAMS])]
        chosen = [[i] for i in range(shown.shape[1])] + ([[0, 1]] if x.shape[1] == 2 else [])
        panels = [[values[:, channels] for values in sets] for channels in chosen]
        return _draw_vectors(title, [f"{len(x)} vectors", *notes], panels, [f"channel {i}" for i, *_ in chosen])
    if x.ndim == 3:
        by_channel = _needs_panels(x)
        if by_channel:
            shown, notes = _select(x, _MAX_LINES, _MAX_CHANNELS)
            panels, lines = _channel_names(shown), _captions(captions, len(shown))
            shown = np.moveaxis(shown, -1, 0).swapaxes(1, 2)
            columns, size = (1, (6.5, 1.6)) if len(panels) <= 3 else (2, (4.5, 1.6))
        else:
            shown, notes = _select(x, _MAX_SERIES, _MAX_LINES)
            panels, lines = _captions(captions, len(shown)), _channel_names(shown)
            columns = min(len(shown), columns or (3 if len(shown) <= 9 else 4))
            size = (6.5, 3.0) if len(shown) == 1 else (3.0, 1.7)
        return _draw_lines(title, notes, list(shown), panels, lines, columns, size, [_VALUE], not by_channel)
    if x.ndim == 4:
        shown, notes = _select(x, _MAX_FIELDS, _MAX_ROWS, _MAX_PIXELS)
        rows = list(np.moveaxis(shown, -1, 0))
        headers = _captions(captions, len(shown))
        return _draw_images(title, notes, rows, [_limits(row) for row in rows], _channel_names(shown), headers)
    shown, notes = _select(x, _MAX_VOLUMES, _MAX_VOLUME_CHANNELS, _MAX_PIXELS)
    limits = [_limits(shown[..., channel]) for channel in range(shown.shape[-1])] * len(shown)
    headers = [f"slice at the center of axis {axis}" for axis in range(3)]
    headers += [f"farthest from 0 along axis {axis}" for axis in range(3)]
    rows = [
        [volume.take(size // 2, axis) for axis, size in enumerate(volume.shape)]
        + [_farthest_from_zero(volume, axis) for axis in range(3)]
        for example in shown
        for volume in np.moveaxis(example, -1, 0)
    ]
    return _draw_images(title, notes, rows, limits, _row_names(_captions(captions, len(shown)), shown), headers)


def draw_trajectory(
    x: Any, times: Sequence[float] | np.ndarray, title: str, captions: Sequence[str] | None = None
) -> Picture:
    """Draws samples at several network times, x [columns, rows, *spatial, C] with at most three spatial axes.

    The last column has the final samples. Images are a grid, with a row for each sample. Series are lines, fields and volumes
    are colored images (for volumes, the central slice along the first axis), with a row for each sample and channel. Vectors
    are points in one panel for each time, with the first two channels as coordinates, or a histogram of a single channel.

    Noise may be much larger than samples: each column of lines and points has its own scale, and the color scale is the
    samples' range, extended by at most half the range at both ends; values beyond have the colors of the ends.

    times: for all columns except the last. captions: one for each sample. Raises: ValueError for no sample, or more spatial
    axes.
    """
    x = np.asarray(x)
    if not 3 <= x.ndim <= 6 or not x.size:
        raise ValueError(f"x has shape {x.shape}; it must be [columns, rows, *spatial, C] with at most 3 spatial axes")
    headers = [*(f"t = {time:.4g}" for time in np.asarray(times)), "sample"]
    title += "; columns: network time t"
    if is_of_images(x[0]):
        images = x.swapaxes(0, 1)
        rows, columns = images.shape[:2]
        below = [c for caption in captions[:rows] for c in [*[""] * (columns - 1), caption]] if captions else None
        return draw_grid(images.reshape(-1, *images.shape[2:]), title, columns, below, headers)
    times = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_TIMES)).round().astype(int))
    notes = [] if len(times) == len(x) else [f"{len(times)} of {len(x)} times"]
    x, headers = x[times], [headers[i] for i in times]
    separate = x.ndim > 4 or (x.ndim == 4 and _needs_panels(x[-1]))  # a row for each channel
    num_channels = min(x.shape[-1], 3) if separate else _MAX_LINES
    num_samples = _MAX_ROWS // num_channels if separate else _MAX_ROWS
    if x.ndim == 3:
        num_samples, num_channels = _MAX_POINTS, 2
    if x.ndim == 6:
        notes.append("slices at the center of axis 0")
        x = x[:, :, x.shape[2] // 2]
    drawn = [_select(column, num_samples, num_channels, _MAX_PIXELS if x.ndim > 4 else None) for column in x]
    shown, notes = np.stack([values for values, _ in drawn]), notes + drawn[0][1]
    if x.ndim == 3:
        return _draw_vectors(title, notes, [[column] for column in shown], ["channel 0"] * len(shown), headers, 5)
    captions, groups = _captions(captions, shown.shape[1], "sample"), [slice(None)]
    if separate:
        captions, groups = _row_names(captions, shown), [slice(c, c + 1) for c in range(shown.shape[-1])]
    rows = [shown[:, i, ..., group] for i in range(shown.shape[1]) for group in groups]
    if x.ndim == 4:
        panels, names = [panel for row in rows for panel in row], headers + [""] * (len(rows) - 1) * len(headers)
        lines = [] if separate else _channel_names(shown)
        share_y = False if separate else "col"
        return _draw_lines(title, notes, panels, names, lines, len(headers), (1.6, 1.4), captions, share_y)
    limits = []
    for values in np.moveaxis(shown, -1, 0):
        (low, high), (last_low, last_high) = _limits(values), _limits(values[-1])
        margin = (last_high - last_low) / 2
        limits.append((max(low, last_low - margin), min(high, last_high + margin)))
    limits *= shown.shape[1]
    return _draw_images(title, notes, [row[..., 0] for row in rows], limits, captions, headers)


# ---- Selection


def _select(
    x: np.ndarray, num_examples: int, num_channels: int, positions: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """Returns (the first examples and channels of x [n, *spatial, C], ready to plot; notes about omissions).

    positions: the maximum number of positions along each spatial axis; None for all.
    """
    n, *spatial, channels = x.shape
    stride = max(-(-size // positions) for size in spatial) if positions else 1
    steps = (slice(None, None, stride),) * len(spatial)
    shown = _to_plotted(x[(slice(num_examples), *steps, slice(num_channels))])
    notes = _note_shown(len(shown), n, "examples") + _note_shown(shown.shape[-1], channels, "channels")
    return shown, notes + ([f"1 of {stride} positions along each axis"] if stride > 1 else [])


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Returns the minimum and the maximum; (0, 1) if all values are NaN."""
    finite = values[~np.isnan(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _needs_panels(x: np.ndarray) -> bool:
    """Whether series [n, L, C] have too many channels for one axis, or a channel that spans under a tenth of the axis."""
    limits = np.array([_limits(_to_plotted(x[:_MAX_SERIES, :, channel])) for channel in range(x.shape[-1])])
    spans = np.ptp(limits, axis=1)
    return len(spans) > _MAX_LINES or bool((spans[spans > 0] < 0.1 * np.ptp(limits)).any())


def _captions(captions: Sequence[str] | None, count: int, word: str = "example") -> list[str]:
    """Returns the first `count` captions as plain text; missing captions become "word i"."""
    given = [_plain_text(caption) for caption in list(captions or ())[:count]]
    return given + [f"{word} {i}" for i in range(len(given), count)]


def _channel_names(shown: np.ndarray) -> list[str]:
    return [f"channel {i}" for i in range(shown.shape[-1])]


def _row_names(captions: Sequence[str], shown: np.ndarray) -> list[str]:
    """Returns a name for each example and channel."""
    if shown.shape[-1] == 1:
        return list(captions)
    return [f"{caption}\n{name}" for caption in captions for name in _channel_names(shown)]


def _farthest_from_zero(x: np.ndarray, axis: int) -> np.ndarray:
    """Returns the signed value with the largest magnitude along an axis; NaN if any value is NaN."""
    low, high = x.min(axis), x.max(axis)
    return np.where(high >= -low, high, low)


# ---- Panels


def _draw_lines(
    title: str,
    notes: Sequence[str],
    panels: Sequence[np.ndarray],
    names: Sequence[str],
    lines: Sequence[str],
    columns: int,
    size: tuple[float, float],
    captions: Sequence[str],
    share_y: bool | Literal["col"],
) -> Figure:
    """Draws panels of series [L, lines], which may contain NaN. captions: y-axis labels at the left, or one for all."""
    styles = [{"color": f"C{i}", "linewidth": 1.0} for i in range(panels[0].shape[-1])]
    legend = list(zip(lines, styles, strict=True)) if len(lines) > 1 else []
    notes = [*notes, *_note_invalid(*panels)]
    figure, axes = make_figure(
        title, notes, names, columns, size, labels=("position", captions[0]), legend=legend, share_y=share_y
    )
    for panel, caption in zip(axes[::columns], captions, strict=False):
        panel.set_ylabel(caption, fontsize=8)
    for panel, values in zip(axes, panels, strict=True):
        for line, style in zip(values.T, styles, strict=True):
            panel.plot(line, **style)
    return figure


def _draw_images(
    title: str,
    notes: Sequence[str],
    rows: Sequence[Any],
    limits: Sequence[tuple[float, float]],
    captions: Sequence[str],
    headers: Sequence[str],
) -> Figure:
    """Draws rows of images [H, W], which may contain NaN. Each row has limits, a caption at the left and a color bar.

    The colors are centered at 0 if positive and negative values each span at least a tenth of the limits.
    """
    import matplotlib

    notes = [*notes, "color bars in data units", *_note_invalid(*(image for row in rows for image in row))]
    ratio = rows[0][0].shape[0] / rows[0][0].shape[1]
    width = min(max(9 / len(headers), 1.0), 2.6)
    names = [textwrap.fill(header, int(13 * width)) for header in headers] + [""] * (len(rows) - 1) * len(headers)
    size = (width, 0.9 * width * min(max(ratio, 0.5), 2) + 0.1)
    figure, axes = make_figure(title, notes, names, len(headers), size)
    for i, (row, (low, high), caption) in enumerate(zip(rows, limits, captions, strict=True)):
        panels = axes[i * len(headers) : (i + 1) * len(headers)]
        centered = min(-low, high) > 0.1 * (high - low)
        if centered:
            low, high = -max(-low, high), max(-low, high)
        colors = matplotlib.colormaps["RdBu_r" if centered else "viridis"].with_extremes(bad="magenta")
        for panel, image in zip(panels, row, strict=True):
            panel.imshow(image, cmap=colors, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
            if 0.2 <= image.shape[0] / image.shape[1] <= 5:
                panel.set_aspect("equal")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
        panels[0].set_ylabel(caption, fontsize=8)
        exceeds = any(((image < low) | (image > high)).any() for image in row)
        bar = figure.colorbar(panels[0].get_images()[0], ax=panels, extend="both" if exceeds else "neither")
        bar.ax.tick_params(labelsize=7)
    return figure


def _draw_vectors(
    title: str,
    notes: Sequence[str],
    panels: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    headers: Sequence[str] = (),
    columns: int = 4,
) -> Figure:
    """Draws vectors [n, 1] as histograms or [n, 2] as points, which may contain NaN; samples and data share a panel."""
    notes = [*notes, *_note_invalid(*(panel[0] for panel in panels))]
    columns = min(len(panels), columns)
    styles = [{"color": "C0", "linewidth": 6, "alpha": 0.6}, {"color": "black", "linewidth": 1}]
    legend = list(zip(("samples", "data"), styles, strict=True)) if len(panels[0]) > 1 else []
    figure, axes = make_figure(title, notes, headers or [""] * len(panels), columns, (2.6, 2.2), legend=legend)
    for panel, sets, label in zip(axes, panels, labels, strict=True):
        panel.set_xlabel(label, fontsize=8)
        if sets[0].shape[1] == 2:
            panel.set_ylabel("channel 1", fontsize=8)
            for points, color in zip(sets[::-1], ("0.75", "C0")[-len(sets) :], strict=True):
                panel.plot(*points[:_MAX_POINTS].T, ".", color=color, markersize=3, markeredgewidth=0)
            continue
        panel.set_ylabel("density", fontsize=8)
        finite = [values[~np.isnan(values)] for values in sets]
        low, high = _limits(np.concatenate(finite))
        margin = 0.0 if high > low else max(0.5, 1e-3 * abs(low))  # for constant values
        bins = int(np.clip(math.sqrt(max(map(len, finite))), 8, 60))
        edges = np.linspace(low - margin, high + margin, bins + 1)
        for i, values in enumerate(finite):
            if len(values):
                density = np.histogram(values, edges, density=True)[0]
                panel.stairs(density, edges, fill=i == 0, color=("C0", "black")[i], alpha=(0.6, 1.0)[i])
    return figure


# ---- Plots


def draw_bound_terms(vlb: np.ndarray, title: str, unit: str = "bits per dimension") -> Figure:
    """Plots the terms of the bound [T] against t on logarithmic axes (Improved DDPM figure 2).

    If L_0 is far below all other terms, or negative (continuous data), L_0 is drawn at the bottom of the axis.
    """
    t = np.arange(1, len(vlb) + 1)
    seen = np.isfinite(vlb) & (vlb > 0)
    seen[0] = False
    bottom = vlb[seen].min() / 3 if seen.any() else max(vlb[0], 1e-3) / 3
    transitions = {"color": "C0", "linewidth": 1.2}
    decoder = {"color": "C3", "linestyle": "", "marker": "o", "markersize": 8}
    label = f"decoder $L_0$ = {vlb[0]:.3g}" + ("" if vlb[0] >= bottom else ", below the axis")
    labels = "timestep t (1 is the cleanest)", unit
    legend = [("transitions $L_{t-1}$", transitions), (label, decoder)]
    title = f"Terms of the variational bound: {title}"
    figure, (axes,) = make_figure(title, [], [""], 1, _PLOT_SIZE, labels=labels, legend=legend)
    axes.plot(t[seen], vlb[seen], **transitions)
    axes.plot(t[:1], [max(vlb[0], bottom)], **decoder, clip_on=False, zorder=3)
    axes.set(xscale="log", yscale="log")
    return figure


def draw_rate_distortion(
    rate: np.ndarray,
    distortion: np.ndarray,
    lossless: float | None,
    title: str,
    units: tuple[str, str] = ("bits per dimension", "pixel values of 0 to 255"),
) -> Figure:
    """Plots the root mean squared error against the rate (DDPM figure 5), and the lossless rate.

    lossless: None if no code is lossless. units: for the rate and for the distortion.
    """
    code: dict[str, Any] = {"color": "C0", "linewidth": 1.5}
    line: dict[str, Any] = {"color": "C3", "linestyle": "--"}
    labels = f"rate ({units[0]})", f"distortion (RMSE, {units[1]})"
    legend = [("progressive code", code)]
    if lossless is not None:
        legend.append((f"lossless code: {lossless:.3f} {units[0]}", line))
    title = f"Rate and distortion: {title}"
    figure, (axes,) = make_figure(title, [], [""], 1, _PLOT_SIZE, labels=labels, legend=legend)
    axes.plot(rate, distortion, **code)
    if lossless is not None:
        axes.axvline(lossless, **line)
    axes.set(xlim=(0, None), ylim=(0, None))
    return figure


def draw_curves(curves: Curves, title: str) -> Figure:
    """Plots a statistic of two sets with standard errors, with a panel for each of the first channels."""
    shown = [f"channel {i}" for i in range(min(curves.samples.value.shape[1], _MAX_CURVES))]
    notes = [*_note_shown(len(shown), curves.samples.value.shape[1], "channels"), "bars: standard errors"]
    names = [f"{name}\n{note}" for name, note in zip(shown, curves.notes, strict=False)] or shown
    legend = [(name, {"color": color}) for name, color in zip(("data", "samples"), _COLORS, strict=True)]
    size = (5.5, 3.6) if len(shown) == 1 else (3.8, 2.6)
    figure, axes = make_figure(title, notes, names, min(len(shown), 3), size, labels=curves.labels, legend=legend)
    for channel, panel in enumerate(axes):
        drawn = []
        for measurement, color in zip((curves.reference, curves.samples), _COLORS, strict=True):
            value, error = measurement.value[:, channel], measurement.standard_error[:, channel]
            drawn.append(value)
            if curves.x.ndim == 2:
                edges, fill = curves.x[channel], {} if color == _COLORS[0] else {"fill": True, "alpha": 0.4}
                panel.stairs(value, edges, color=color, **fill)
                panel.errorbar((edges[1:] + edges[:-1]) / 2, value, error, fmt="none", ecolor=color, elinewidth=0.9)
                continue
            every = max(1, len(value) // _MAX_ERRORS)
            panel.errorbar(curves.x, value, error, color=color, linewidth=1.0, elinewidth=0.9, errorevery=every)
        values = np.concatenate(drawn)
        if curves.x.ndim == 2:
            panel.set(ylim=(0, None))
        elif not curves.logarithmic:
            panel.axhline(0, color="0.5", linewidth=0.6, zorder=0)
        elif (values > 0).any():
            # An error bar may reach 0, which a logarithmic axis cannot show.
            panel.set(xscale="log", yscale="log", ylim=(values[values > 0].min() / 2, values.max() * 2))
    return figure


# ---- Panels and their notes


def _plain_text(text: Any, limit: int = 24) -> str:
    """Returns one line with at most `limit` characters, escaped so that Matplotlib finds no math in it."""
    text = " ".join(str(text).split())
    return (text if len(text) <= limit else text[: limit - 3] + "...").replace("$", r"\$")


def _note_shown(shown: int, total: int, word: str) -> list[str]:
    """Returns ["first 8 of 64 examples"], or [] if all are shown."""
    return [] if shown == total else [f"first {shown} of {total} {word}"]


def _note_invalid(*arrays: np.ndarray) -> list[str]:
    """Returns a note with the number of NaN values, which mark nonfinite values after `_to_plotted`; [] without NaN."""
    count, total = sum(int(np.isnan(x).sum()) for x in arrays), sum(x.size for x in arrays)
    return [f"{count} of {total} drawn values are NaN or infinite (magenta, or gaps in lines)"] if count else []


def _to_plotted(x: Any) -> np.ndarray:
    """Converts x to float64, with NaN in place of values that are not finite."""
    x = np.asarray(x, np.float64)
    return np.where(np.abs(x) < 1e300, x, np.nan)  # beyond 1e300, differences of two values may be infinite


def make_figure(
    title: str,
    notes: Sequence[str],
    names: Sequence[str],
    columns: int,
    size: tuple[float, float],
    *,
    labels: tuple[str, str] = ("", ""),
    legend: Sequence[tuple[str, Mapping[str, Any]]] = (),
    share_y: bool | Literal["col"] = False,
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, row by row.

    Args:
      notes: a second paragraph in the title. names: titles of the panels, as plain text. size: (width, height) of a panel
        with labels, in inches. labels: x-axis labels at the bottom and y-axis labels at the left.
      legend: pairs (plain text, Matplotlib line style), shown below the panels.
      share_y: as in `Figure.subplots`.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second
    from matplotlib.lines import Line2D

    rows = -(-len(names) // columns)
    width = max(columns * size[0], _MIN_WIDTH)
    letters = int(_LETTERS_PER_INCH * width)
    lines = [line for text in (title, "; ".join(notes)) for line in textwrap.wrap(text, letters)]
    entry_width = 0.45 + 0.07 * max((len(label) for label, _ in legend), default=0)
    legend_columns = max(1, min(len(legend), int(width / entry_width)))
    height = rows * size[1] + 0.16 * len(lines) + 0.2 * -(-len(legend) // legend_columns)
    figure = Figure((width, height), dpi=110, layout="constrained")
    figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=9, x=0.1 / width, ha="left")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for panel in axes[len(names) :]:
        panel.remove()
    for i, (panel, name) in enumerate(zip(axes, names, strict=False)):
        panel.set_title(name, fontsize=8)
        panel.tick_params(which="both", labelsize=7)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.set_xlabel(labels[0] if i + columns >= len(names) else "", fontsize=8)
        panel.set_ylabel(labels[1] if i % columns == 0 else "", fontsize=8)
    if legend:
        handles = [Line2D([], [], label=label, **style) for label, style in legend]
        figure.legend(handles=handles, loc="outside lower left", ncols=legend_columns, fontsize=8, frameon=False)
    return figure, axes[: len(names)]

"""Pictures of float examples [n, *spatial, C], in their own units: vectors, series, fields and volumes.

Series are lines, fields are images with color bars, volumes are slices and projections, and vectors are histograms. The title
has the number of values that are NaN or infinite, and what is left out: large sets and large arrays are drawn in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.evaluation.example_sets import as_examples
from diffusion_jax.pictures import panels
from diffusion_jax.pictures.panels import Margins
from diffusion_jax.pictures.tables import ColorScale, draw_image_table, image_stride

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MAX_POINTS",
    "draw_examples",
    "draw_histogram",
    "draw_points",
    "position_limits",
    "share_an_axis",
]

_MAX_SERIES, _MAX_FIELDS, _MAX_VOLUMES = 12, 8, 4  # examples in one figure
_MAX_CHANNELS = 8  # of fields
_MAX_OVERLAID = 6  # examples in the panel of a channel of series
_MAX_LINES = 6  # channels that share the axes of one series
_MAX_PANELS = 12  # channels of series that have a panel each
_MAX_VOLUME_CHANNELS = 3
_MAX_VOXELS = 128  # of a volume along each axis
_MAX_ENTRIES = 16  # histograms of vectors
_MAX_VECTORS = 100_000  # in a histogram
MAX_POINTS = 4000  # in a scatter plot


def draw_examples(
    x: Any, *, title: str, captions: Sequence[str] | None = None, reference: Any = None, columns: int | None = None
) -> Figure:
    """A figure of examples x [n, *spatial, C] with at most three spatial axes.

    Series: lines of all channels, an example in each panel; many channels, or channels whose values differ much in size,
    have a panel each with all examples. Fields: a row for each example and a column for each channel. Volumes: the three
    central slices of each example and channel, and along each axis the values that are farthest from 0. Vectors: a
    histogram of each entry, and the points themselves for two entries.

    Args:
      captions: of the examples, for instance their classes; vectors have none.
      reference: vectors of the data [m, C], whose histograms are drawn beside those of vectors.
      columns: of the panels of series.
    Raises: ValueError for no example, more spatial axes, or complex numbers.
    """
    x = as_examples("x", x, 1)
    if x.ndim > 5:
        raise ValueError(f"x has shape {x.shape}; pictures show at most three spatial axes: [n, D, H, W, C]")
    if x.ndim == 2:
        return _draw_vectors(x, reference, title)
    if x.ndim == 3:
        return _draw_series(x, title, captions, columns)
    return (_draw_fields if x.ndim == 4 else _draw_volumes)(x, title, captions)


# ---- Series


def _draw_series(x, title, captions, columns) -> Figure:
    """A panel for each example, with a line for each channel and one scale; or a panel for each channel with its scale."""
    n, length, channels = x.shape
    by_channel = channels > _MAX_LINES or not share_an_axis(*panels.channel_ranges(panels.to_plotted(x[:_MAX_SERIES])))
    num_examples, num_channels = min(n, _MAX_OVERLAID if by_channel else _MAX_SERIES), min(channels, _MAX_PANELS)
    shown = panels.to_plotted(x[:num_examples, :, :num_channels])
    low, high = panels.channel_ranges(shown)
    notes = panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_intervals(length) + panels.note_invalid(shown)
    panel_names = panels.make_captions(captions, num_examples, "example")
    line_names = [f"channel {i}" for i in range(num_channels)]
    if by_channel:
        shown, panel_names, line_names = shown.swapaxes(0, 2), line_names, panel_names
        limits = [panels.widen(*edges, 0.05) for edges in zip(low.tolist(), high.tolist(), strict=True)]
        columns = 1 if num_channels <= 3 else 2 if num_channels <= 8 else 3
        size = {1: (6.5, 1.2), 2: (4.0, 1.2), 3: (3.0, 1.2)}[columns]
    else:
        limits = [panels.widen(*panels.full_range(low, high), 0.05)] * num_examples
        columns = min(num_examples, columns or (3 if num_examples <= 9 else 4))
        size = (6.0, 2.6) if num_examples == 1 else (3.6, 1.8) if num_examples <= 4 else (2.6, 1.3)
    count, num_lines = len(shown), shown.shape[2]
    styles = [{"color": f"C{i}", "linewidth": 1.0} for i in range(num_lines)]
    figure, axes = panels.make_panels(
        title,
        notes,
        (-(-count // columns), columns),
        size,
        gap=(0.62 if by_channel else 0.12, 0.3),
        margins=Margins(left=0.7, right=0.15, bottom=0.45, top=0.28),
        count=count,
        legend=list(zip(line_names, styles, strict=True)) if num_lines > 1 else [],
    )
    for i, panel in enumerate(axes.reshape(-1)[:count]):
        for line, style in enumerate(styles):
            panels.draw_line(panel, shown[i, :, line], **style)
        panel.set_title(panel_names[i], fontsize=8, pad=3)
        panel.set(xlim=position_limits(length), ylim=limits[i])
        panels.label_axes(panel, "position", panels.VALUE, bottom=i + columns >= count, left=i % columns == 0)
        panel.tick_params(labelleft=by_channel or i % columns == 0)
    return figure


def share_an_axis(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether each channel that is not constant fills at least a tenth of the range of all channels."""
    spans = (high - low)[high > low]
    return not len(spans) or bool(spans.min() >= 0.1 * (np.nanmax(high) - np.nanmin(low)))


def position_limits(length: int) -> tuple[float, float]:
    """Limits of the axis of positions."""
    return panels.widen(0, length - 1, 0.02)


# ---- Fields


def _draw_fields(x, title, captions) -> Figure:
    n, height, width, channels = x.shape
    num_examples, num_channels = min(n, _MAX_FIELDS), min(channels, _MAX_CHANNELS)
    stride = image_stride(height, width)
    shown = panels.to_plotted(x[:num_examples, ::stride, ::stride, :num_channels])
    notes = [f"fields of {height} x {width}"]
    notes += panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_stride(stride) + panels.note_invalid(shown)
    return draw_image_table(
        title,
        notes,
        [[shown[i, ..., channel] for channel in range(num_channels)] for i in range(num_examples)],
        _channel_scales(shown),
        captions=panels.make_captions(captions, num_examples, "example"),
        headers=[f"channel {i}" for i in range(num_channels)],
        by_column=True,
    )


def _channel_scales(shown: np.ndarray) -> list[ColorScale]:
    """A scale for each channel of x [n, *spatial, C]."""
    edges = zip(*(edge.tolist() for edge in panels.channel_ranges(shown)), strict=True)
    return [ColorScale.of_range(low, high, shown[..., channel]) for channel, (low, high) in enumerate(edges)]


# ---- Volumes


def _draw_volumes(x, title, captions) -> Figure:
    n, *sizes, channels = x.shape
    num_examples, num_channels = min(n, _MAX_VOLUMES), min(channels, _MAX_VOLUME_CHANNELS)
    stride = max(-(-size // _MAX_VOXELS) for size in sizes)
    steps = (slice(None, None, stride),) * 3
    shown = panels.to_plotted(x[(slice(num_examples), *steps, slice(num_channels))])
    notes = [f"volumes of {' x '.join(map(str, sizes))}"]
    notes += panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_stride(stride) + panels.note_invalid(shown)
    scales = _channel_scales(shown)
    captions = panels.make_captions(captions, num_examples, "example")
    names = [f"channel {i}" for i in range(num_channels)]
    if channels > 1:
        captions = [f"{caption}\n{name}" for caption in captions for name in names]
    middles = [size // 2 for size in shown.shape[1:4]]
    directions = ["1 down, 2 right", "0 down, 2 right", "0 down, 1 right"]
    headers = [f"slice: axis {i} at {middle * stride}\n{directions[i]}" for i, middle in enumerate(middles)]
    headers += [f"farthest from 0\nalong axis {axis}" for axis in range(3)]
    volumes = [shown[i, ..., channel] for i in range(num_examples) for channel in range(num_channels)]
    rows = [
        [volume.take(middle, axis) for axis, middle in enumerate(middles)]
        + [_farthest_from_zero(volume, axis) for axis in range(3)]
        for volume in volumes
    ]
    return draw_image_table(
        title, notes, rows, scales * num_examples, captions=captions, headers=headers, by_column=False
    )


def _farthest_from_zero(x: np.ndarray, axis: int) -> np.ndarray:
    """The value with the largest magnitude along an axis, with its sign; NaN if any value is NaN."""
    low, high = x.min(axis), x.max(axis)
    return np.where(high >= -low, high, low)


# ---- Vectors


def _draw_vectors(x, reference, title) -> Figure:
    n, entries = x.shape
    num_examples, num_entries = min(n, _MAX_VECTORS), min(entries, _MAX_ENTRIES)
    shown = panels.to_plotted(x[:num_examples, :num_entries])
    data = None if reference is None else panels.to_plotted(reference[:_MAX_VECTORS, :num_entries])
    names = [f"entry {i}" for i in range(num_entries)]
    notes = (
        [f"{n} vectors" if n > 1 else "1 vector"]
        if n == num_examples
        else panels.note_shown(num_examples, n, "vectors")
    )
    notes += panels.note_shown(num_entries, entries, "entries") + panels.note_invalid(shown)
    count = 3 if entries == 2 else num_entries
    columns = min(count, 3 if count <= 6 else 4)
    samples_style = {"color": "C0", "linewidth": 6, "alpha": 0.6, "solid_capstyle": "butt"}
    legend = [("samples", samples_style), ("data", {"color": "black", "linewidth": 1})]
    figure, axes = panels.make_panels(
        title,
        notes,
        (-(-count // columns), columns),
        (2.6, 1.9) if entries != 2 else (2.8, 2.8),
        gap=(0.62 if entries != 2 else 0.85, 0.62),
        margins=Margins(left=0.7, right=0.15, bottom=0.45, top=0.15 if entries != 2 else 0.3),
        legend=[] if data is None else legend,
        count=count,
    )
    flat = axes.reshape(-1)
    for entry in range(num_entries):
        draw_histogram(flat[entry], shown[:, entry], None if data is None else data[:, entry])
        panels.label_axes(flat[entry], names[entry], "density", left=entry % columns == 0)
        flat[entry].tick_params(labelleft=True)
    if entries == 2:
        flat[2].set_title("".join(panels.note_shown(min(n, MAX_POINTS), n, "vectors")), fontsize=8, pad=3)
        draw_points(flat[2], shown, data)
        panels.label_axes(flat[2], names[0], names[1])
    return figure


def draw_histogram(axes: Axes, values: np.ndarray, reference: np.ndarray | None = None) -> None:
    """The density of values [n] with NaN, and that of the reference as a black outline, with common bins."""
    sets = [x[~np.isnan(x)] for x in ([values] if reference is None else [values, reference])]
    filled = [x for x in sets if len(x)]
    low, high = panels.widen(*panels.full_range(*filled)) if filled else (0.0, 1.0)
    bins = int(np.clip(math.sqrt(max(map(len, sets))), 8, 60))
    edges = np.linspace(low, high, bins + 1)
    for i, finite in enumerate(sets):
        if len(finite):
            density = np.histogram(finite, edges, density=True)[0]
            axes.stairs(density, edges, fill=i == 0, color=("C0", "black")[i], alpha=(0.6, 1.0)[i])
    axes.set(ylim=(0, None))


def draw_points(axes: Axes, x: np.ndarray, reference: np.ndarray | None = None) -> None:
    """The first points of x [n, 2] with NaN, over those of the reference in gray."""
    for points, color in ((reference, "0.75"), (x, "C0")):
        if points is not None:
            size = 3 if color == "0.75" or len(points) > 300 else 6
            axes.plot(*points[:MAX_POINTS].T, ".", color=color, markersize=size, markeredgewidth=0)

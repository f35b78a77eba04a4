"""Pictures of float examples [n, *spatial, C], in their own units: vectors, series, fields and volumes.

Series are lines, fields are images with color bars, volumes are slices and projections, and vectors are histograms. Values
that are NaN or infinite are counted in the title and drawn in a color that nothing else has. The title also tells what is
left out: large sets and large arrays are drawn in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.evaluation.example_sets import as_example_pair, as_examples
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
    "note_colors",
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
_MAX_COLORS = 10  # points of a color each
MAX_POINTS = 4000  # in a scatter plot
_MAX_REFERENCE = 64  # examples of the data that decide a scale


def draw_examples(
    x: Any,
    *,
    title: str,
    captions: Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    reference: Any = None,
    columns: int | None = None,
) -> Figure:
    """A figure of examples x [n, *spatial, C] with at most three spatial axes.

    Series: lines of all channels, an example in each panel; many channels, or channels whose values differ much in size,
    have a panel each with all examples. Fields: a row for each example and a column for each channel. Volumes: the three
    central slices of each example and channel, and along each axis the values that are farthest from 0. Vectors: a
    histogram of each entry, and the points themselves for two entries.

    Args:
      captions: of the examples, for instance their classes; vectors have none.
      channel_names: of the channels, or of the entries of vectors.
      reference: examples of the data [m, *spatial, C]. Their histograms are drawn beside those of vectors. Series, fields
        and volumes take their scale from the first of them, so that the pictures of several steps can be compared; the
        axes of series also contain all of x.
      columns: of the panels of series.
    Raises: ValueError for no example, more spatial axes, other shapes of the reference, or complex numbers.
    """
    x = as_examples("x", x, 1)
    if reference is not None:
        x, reference = as_example_pair(x, reference, 1)
    if x.ndim > 5:
        raise ValueError(f"x has shape {x.shape}; pictures show at most three spatial axes: [n, D, H, W, C]")
    if x.ndim == 3:
        return _draw_series(x, reference, title, captions, channel_names, columns)
    draw = {2: _draw_vectors, 4: _draw_fields, 5: _draw_volumes}[x.ndim]
    return draw(x, reference, title, captions, channel_names)


# ---- Series


def _draw_series(x, reference, title, captions, channel_names, columns) -> Figure:
    n, length, channels = x.shape
    if reference is not None:
        reference = reference[:_MAX_REFERENCE]
    by_channel = channels > _MAX_LINES or not share_an_axis(*_ranges(x[:_MAX_SERIES], reference))
    num_examples, num_channels = min(n, _MAX_OVERLAID if by_channel else _MAX_SERIES), min(channels, _MAX_PANELS)
    shown = panels.to_plotted(x[:num_examples, :, :num_channels])
    low, high = _ranges(shown, None if reference is None else reference[..., :num_channels])
    names = panels.make_names(channel_names, num_channels, "channel")
    captions = panels.make_names(captions, num_examples, "example")
    notes = panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_intervals(length) + panels.note_invalid(shown)
    if by_channel:
        limits = [panels.widen(*edges, 0.05) for edges in zip(low.tolist(), high.tolist(), strict=True)]
        return _draw_series_by_channel(shown, limits, title, notes, captions, names)
    limits = panels.widen(*panels.full_range(low, high), 0.05)
    return _draw_series_by_example(shown, limits, title, notes, captions, names, columns)


def _ranges(x: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each channel in both sets."""
    return panels.channel_ranges(*(panels.to_plotted(part) for part in (x, reference) if part is not None))


def share_an_axis(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether each channel that is not constant fills at least a tenth of the range of all channels."""
    spans = (high - low)[high > low]
    return not len(spans) or bool(spans.min() >= 0.1 * (np.nanmax(high) - np.nanmin(low)))


def _draw_series_by_example(x, limits, title, notes, captions, names, columns) -> Figure:
    """x [n, L, C]: a panel for each example, a line for each channel, and one scale."""
    n, length, channels = x.shape
    columns = min(n, columns or (3 if n <= 9 else 4))
    styles = [{"color": f"C{i}", "linewidth": 1.1} for i in range(channels)]
    legend = list(zip(names, styles, strict=True)) if channels > 1 else []
    shape, size = (-(-n // columns), columns), _panel_size(n)
    margins = Margins(left=0.7, right=0.15, bottom=0.45, top=0.28)
    figure, axes = panels.make_panels(
        title, notes, shape, size, gap=(0.12, 0.3), margins=margins, count=n, legend=legend
    )
    for i, panel in enumerate(axes.reshape(-1)[:n]):
        for channel, style in enumerate(styles):
            panels.draw_line(panel, x[i, :, channel], **style)
        panel.set_title(captions[i], fontsize=8, pad=3)
        panel.set(xlim=position_limits(length), ylim=limits)
        panels.label_axes(panel, "position", panels.VALUE, bottom=i + columns >= n, left=i % columns == 0)
    return figure


def _draw_series_by_channel(x, limits, title, notes, captions, names) -> Figure:
    """x [n, L, C]: a panel with its own scale for each channel, a line for each example."""
    n, length, channels = x.shape
    columns = 1 if channels <= 3 else 2 if channels <= 8 else 3
    styles = [{"color": f"C{i}", "linewidth": 0.9, "alpha": 0.8} for i in range(n)]
    legend = list(zip(captions, styles, strict=True)) if n > 1 else []
    shape, size = (-(-channels // columns), columns), (6.5 if columns == 1 else 4.0 if columns == 2 else 3.0, 1.2)
    margins = Margins(left=0.7, right=0.15, bottom=0.45, top=0.28)
    figure, axes = panels.make_panels(
        title, notes, shape, size, gap=(0.62, 0.3), margins=margins, count=channels, legend=legend
    )
    for channel, panel in enumerate(axes.reshape(-1)[:channels]):
        for i, style in enumerate(styles):
            panels.draw_line(panel, x[i, :, channel], **style)
        panel.set_title(names[channel], fontsize=8, pad=3)
        panel.set(xlim=position_limits(length), ylim=limits[channel])
        panels.label_axes(
            panel, "position", panels.VALUE, bottom=channel + columns >= channels, left=channel % columns == 0
        )
        panel.tick_params(labelleft=True)
    return figure


def _panel_size(count: int) -> tuple[float, float]:
    return (6.0, 2.6) if count == 1 else (3.6, 1.8) if count <= 4 else (2.6, 1.3)


def position_limits(length: int) -> tuple[float, float]:
    """Limits of the axis of positions."""
    return panels.widen(0, length - 1, 0.02)


# ---- Fields


def _draw_fields(x, reference, title, captions, channel_names) -> Figure:
    n, height, width, channels = x.shape
    num_examples, num_channels = min(n, _MAX_FIELDS), min(channels, _MAX_CHANNELS)
    stride = image_stride(height, width)
    shown = panels.to_plotted(x[:num_examples, ::stride, ::stride, :num_channels])
    if reference is not None:
        reference = reference[:_MAX_REFERENCE, ::stride, ::stride]
    notes = [f"fields of {height} x {width}"]
    notes += panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_stride(stride) + _note_scale(reference) + panels.note_invalid(shown)
    return draw_image_table(
        title,
        notes,
        [[shown[i, ..., channel] for channel in range(num_channels)] for i in range(num_examples)],
        _channel_scales(shown, reference),
        captions=panels.make_names(captions, num_examples, "example"),
        headers=panels.make_names(channel_names, num_channels, "channel"),
        by_column=True,
    )


def _note_scale(reference: Any) -> list[str]:
    return [] if reference is None else ["colors: the range of the data"]


def _channel_scales(shown: np.ndarray, reference: Any) -> list[ColorScale]:
    """A scale for each channel of x [n, *spatial, C], from the reference if it is given."""
    channels = shown.shape[-1]
    values = shown if reference is None else panels.to_plotted(reference[..., :channels])
    edges = zip(*(edge.tolist() for edge in panels.channel_ranges(values)), strict=True)
    return [ColorScale.of_range(low, high, shown[..., channel]) for channel, (low, high) in enumerate(edges)]


# ---- Volumes


def _draw_volumes(x, reference, title, captions, channel_names) -> Figure:
    n, *sizes, channels = x.shape
    num_examples, num_channels = min(n, _MAX_VOLUMES), min(channels, _MAX_VOLUME_CHANNELS)
    stride = max(-(-size // _MAX_VOXELS) for size in sizes)
    steps = (slice(None, None, stride),) * 3
    shown = panels.to_plotted(x[(slice(num_examples), *steps, slice(num_channels))])
    if reference is not None:
        reference = reference[(slice(_MAX_REFERENCE // 8), *steps)]
    notes = [f"volumes of {' x '.join(map(str, sizes))}"]
    notes += panels.note_shown(num_examples, n, "examples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_stride(stride) + _note_scale(reference) + panels.note_invalid(shown)
    scales = _channel_scales(shown, reference)
    captions = panels.make_names(captions, num_examples, "example")
    names = panels.make_names(channel_names, num_channels, "channel")
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


def _draw_vectors(x, reference, title, captions, channel_names) -> Figure:
    del captions
    n, entries = x.shape
    num_examples, num_entries = min(n, _MAX_VECTORS), min(entries, _MAX_ENTRIES)
    shown = panels.to_plotted(x[:num_examples, :num_entries])
    data = None if reference is None else panels.to_plotted(reference[:_MAX_VECTORS, :num_entries])
    names = panels.make_names(channel_names, num_entries, "entry")
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
        points = panels.note_shown(min(n, MAX_POINTS), n, "vectors") + note_colors(n)
        flat[2].set_title("".join(points), fontsize=8, pad=3)
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
    if len(sets[0]) < len(values):
        text = f"{len(values) - len(sets[0])} NaN or infinite"
        axes.text(0.97, 0.95, text, color=panels.MARK, fontsize=7, ha="right", va="top", transform=axes.transAxes)


def draw_points(axes: Axes, x: np.ndarray, reference: np.ndarray | None = None) -> None:
    """The first points of x [n, 2] with NaN, over those of the reference in gray; up to ten have a color each."""
    if reference is not None:
        points = reference[:MAX_POINTS]
        axes.plot(points[:, 0], points[:, 1], ".", color="0.75", markersize=3, markeredgewidth=0)
    for points in [x[:MAX_POINTS]] if len(x) > _MAX_COLORS else x[:, None]:
        axes.plot(points[:, 0], points[:, 1], ".", markersize=3 if len(x) > 300 else 6, markeredgewidth=0)


def note_colors(count: int) -> list[str]:
    """What the colors of `draw_points` mean for this number of points."""
    return ["a color for each vector"] if 1 < count <= _MAX_COLORS else []

"""Pictures of samples of any kind and of their trajectories: grids of images, and figures of other arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures import examples, panels
from diffusion_jax.pictures.examples import draw_examples
from diffusion_jax.pictures.grids import Picture, draw_grid
from diffusion_jax.pictures.panels import Margins
from diffusion_jax.pictures.tables import ColorScale, draw_image_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_array_trajectory", "draw_edit", "draw_neighbors", "draw_samples", "draw_trajectory", "is_of_images"]

_MAX_TIMES = 10
_MAX_ROWS = 6  # of panels
_MAX_CHANNELS = 3  # of fields, of volumes, and of series whose channels do not share an axis
_MAX_LINES = 6  # channels of series that share an axis
_MAX_PIXELS = 128  # of an image along each axis: the panels are small


def is_of_images(samples: np.ndarray) -> bool:
    """Whether arrays [N, ...] are images: uint8 [N, H, W, C] with one or three channels."""
    return samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)


def draw_samples(
    samples: np.ndarray, title: str, captions: Sequence[str] | None = None, columns: int | None = None
) -> Picture:
    """A picture of samples [N, *spatial, C]. columns: of a grid of images."""
    if is_of_images(samples):
        return draw_grid(samples, title, columns, captions)
    return draw_examples(samples, title=title, captions=captions)


def draw_edit(given: np.ndarray, results: np.ndarray, captions: Sequence[str], title: str) -> Picture:
    """A picture of given examples and, after them, the results. captions: of all of them."""
    if not is_of_images(results) and results.ndim == 2:  # a vector has no panel of its own
        return draw_examples(results, title=title + ", and what was given (data)", reference=given)
    shown = np.concatenate([given, results])
    if not is_of_images(shown) and np.isnan(given).any():
        title += "; magenta: values to be generated"
    return draw_samples(shown, title, captions, columns=min(len(shown), 10))


def draw_neighbors(
    samples: np.ndarray, numbers: Sequence[int], nearest: np.ndarray, distances: np.ndarray, title: str
) -> Picture:
    """A picture of samples [N, *spatial, C], each before its nearest examples [N, k, *spatial, C].

    numbers: of the samples in their file. distances: [N, k].
    """
    count = distances.shape[1]
    shown = np.concatenate([samples[:, None], nearest], axis=1).reshape(-1, *samples.shape[1:])
    captions = []
    for number, row in zip(numbers, distances, strict=True):
        captions += [f"sample {number}", *(f"distance {distance:.4g}" for distance in row)]
    if is_of_images(shown):
        headers = ["sample", "nearest", *(f"nearest no. {i}" for i in range(2, count + 1))]
        return draw_grid(shown, title, count + 1, captions, headers)
    title += " (after each sample)"
    return draw_examples(shown, title=title, captions=captions, columns=(count + 1) * max(1, 4 // (count + 1)))


def draw_trajectory(x: np.ndarray, times: np.ndarray, title: str, captions: Sequence[str] | None = None) -> Picture:
    """A picture of samples at several network times: a row for each sample, a column for each time.

    Args:
      x: [columns, rows, *spatial, C]. times: of the columns except the last. captions: of the rows, such as their classes.
    """
    headers = [*(f"t = {time:.4g}" for time in np.asarray(times)), "sample"]
    title += "; columns: network time t"
    if not is_of_images(x[0]):
        return draw_array_trajectory(x, headers, title=title, captions=captions)
    images = x.swapaxes(0, 1)
    rows, columns = images.shape[:2]
    below = [c for caption in captions[:rows] for c in [*[""] * (columns - 1), caption]] if captions else None
    return draw_grid(images.reshape(-1, *images.shape[2:]), title, columns, below, headers)


# ---- Trajectories of arrays


def draw_array_trajectory(
    x: Any, headers: Sequence[str], *, title: str, captions: Sequence[str] | None = None
) -> Figure:
    """A figure of samples at several times, x [columns, rows, *spatial, C] with at most three spatial axes.

    The last column has the samples themselves. Series are lines, fields and volumes are images (of volumes the central
    slices along the first axis), with a row for each sample and channel. All vectors are points of one panel for each time,
    at their first two entries, or a histogram of their only entry.

    Noise may be much larger than samples: each column of lines and points has its own scale, and the colors of images show
    at most the range of the samples and half as much at both ends; values beyond have the colors of the ends.

    Args:
      headers: of the columns, for instance "t = 999".
      captions: of the samples; vectors have none.
    Raises: ValueError for no sample, other headers than columns, or more spatial axes.
    """
    x = np.asarray(x)
    if not 3 <= x.ndim <= 6 or not x.size:
        raise ValueError(f"x has shape {x.shape}; it must be [columns, rows, *spatial, C] with at most 3 spatial axes")
    if len(headers) != len(x):
        raise ValueError(f"x has {len(x)} columns and there are {len(headers)} headers; each column needs one")
    times = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_TIMES)).round().astype(int))
    notes = [] if len(times) == len(x) else [f"{len(times)} of {len(x)} times"]
    x, shown_headers = x[times], [panels.plain_text(header) for i, header in enumerate(headers) if i in times]
    if x.ndim == 3:
        return _draw_vectors(x, shown_headers, title, notes)
    draw = _draw_series if x.ndim == 4 else _draw_images
    return draw(x, shown_headers, title, notes, captions)


def _limits(x: np.ndarray) -> list[tuple[float, float]]:
    """Limits of the axes for each column of x [columns, ...]."""
    return [panels.widen(*panels.full_range(column), 0.05) for column in x]


def _draw_series(x, headers, title, notes, captions) -> Figure:
    columns, samples, length, channels = x.shape
    separate = not examples.share_an_axis(*panels.channel_ranges(panels.to_plotted(x[-1, :_MAX_ROWS])))
    num_channels = min(channels, _MAX_CHANNELS if separate else _MAX_LINES)
    num_samples = min(samples, _MAX_ROWS // num_channels if separate else _MAX_ROWS)
    shown = panels.to_plotted(x[:, :num_samples, :, :num_channels])
    names = [f"channel {i}" for i in range(num_channels)]
    notes = notes + panels.note_shown(num_samples, samples, "samples")
    notes += panels.note_shown(num_channels, channels, "channels") + panels.note_intervals(length)
    notes += panels.note_invalid(shown)
    groups = [[channel] for channel in range(num_channels)] if separate else [list(range(num_channels))]
    captions = panels.make_captions(captions, num_samples, "sample")
    styles = [{"color": f"C{i}", "linewidth": 0.9} for i in range(num_channels)]
    limits = [_limits(shown[..., group]) for group in groups]
    rows = [(i, *group_limits) for i in range(num_samples) for group_limits in zip(groups, limits, strict=True)]
    figure, axes = panels.make_panels(
        title,
        notes,
        (len(rows), columns),
        (max(1.15, min(6 / columns, 2.4)), 1.0),
        gap=(0.45, 0.2),
        margins=Margins(left=0.8, right=0.15, bottom=0.45, top=0.25),
        legend=list(zip(names, styles, strict=True)) if num_channels > 1 else [],
    )
    for row, (i, group, group_limits) in enumerate(rows):
        for column, panel in enumerate(axes[row]):
            for channel in group:
                panels.draw_line(panel, shown[column, i, :, channel], **styles[channel])
            panel.set(xlim=examples.position_limits(length), ylim=group_limits[column])
            panel.locator_params(axis="x", integer=True)
            panels.label_axes(panel, "position", captions[i], bottom=row == len(rows) - 1, left=column == 0)
            panel.tick_params(labelleft=True)
            if row == 0:
                panel.set_title(headers[column], fontsize=8, pad=3)
    return figure


def _draw_images(x, headers, title, notes, captions) -> Figure:
    samples, *sizes, channels = x.shape[1:]
    num_channels = min(channels, _MAX_CHANNELS)
    num_samples = min(samples, _MAX_ROWS // num_channels)
    shown = x[:, :num_samples, ..., :num_channels]
    size = " x ".join(map(str, sizes))
    notes = [f"{'fields' if len(sizes) == 2 else 'volumes'} of {size}", *notes]
    if len(sizes) == 3:
        notes.append(f"slices at position {sizes[0] // 2} of axis 0")
        shown = shown[:, :, sizes[0] // 2]
    stride = max(-(-size // _MAX_PIXELS) for size in sizes[-2:])
    shown = panels.to_plotted(shown[:, :, ::stride, ::stride])
    notes += panels.note_shown(num_samples, samples, "samples") + panels.note_shown(num_channels, channels, "channels")
    notes += panels.note_stride(stride) + panels.note_invalid(shown)
    scales = []
    for channel in range(num_channels):
        values = shown[..., channel]
        (low, high), (last_low, last_high) = panels.full_range(values), panels.full_range(values[-1])
        margin = (last_high - last_low) / 2
        low, high = max(low, last_low - margin), min(high, last_high + margin)
        scales.append(ColorScale.of_range(low, high, values))
    captions = panels.make_captions(captions, num_samples, "sample")
    names = [f"channel {i}" for i in range(num_channels)]
    if channels > 1:
        captions = [f"{caption}\n{name}" for caption in captions for name in names]
    rows = [list(shown[:, i, ..., channel]) for i in range(num_samples) for channel in range(num_channels)]
    return draw_image_table(
        title, notes, rows, scales * num_samples, captions=captions, headers=headers, by_column=False
    )


def _draw_vectors(x, headers, title, notes) -> Figure:
    columns, samples, entries = x.shape
    num_samples = min(samples, examples.MAX_POINTS)
    shown = panels.to_plotted(x[:, :num_samples, :2])
    names = [f"entry {i}" for i in range(min(entries, 2))]
    notes = notes + panels.note_shown(num_samples, samples, "vectors")
    notes += panels.note_shown(min(entries, 2), entries, "entries") + panels.note_invalid(shown)
    limits = [_limits(shown[..., entry]) for entry in range(len(names))]
    per_row = min(columns, 5)
    figure, axes = panels.make_panels(
        title,
        notes,
        (-(-columns // per_row), per_row),
        (1.9, 1.9),
        gap=(0.5, 0.5),
        margins=Margins(left=0.7, right=0.15, bottom=0.45, top=0.25),
        count=columns,
    )
    for i, panel in enumerate(axes.reshape(-1)[:columns]):
        left, bottom = i % per_row == 0, i + per_row >= columns
        if entries == 1:
            examples.draw_histogram(panel, shown[i, :, 0])
            panels.label_axes(panel, names[0], "density", bottom=bottom, left=left)
        else:
            examples.draw_points(panel, shown[i])
            panels.label_axes(panel, names[0], names[1], bottom=bottom, left=left)
            panel.set_ylim(limits[1][i])
        panel.set_xlim(limits[0][i])
        panel.tick_params(labelleft=True, labelbottom=True)
        panel.set_title(headers[i], fontsize=8, pad=3)
    return figure

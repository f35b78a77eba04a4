"""Pictures of samples in data units: beside training examples, given examples or neighbors, or being denoised.

Series are lines, fields are images with color bars, volumes are slices and projections, vectors are histograms, and images
are grids. Only a subset of large sets and arrays is drawn; the title shows what is left out, and how many values are NaN or
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffusion_jax.images import is_of_images
from diffusion_jax.metrics.of_arrays import as_examples, even_indices
from diffusion_jax.pictures.channels import UNKNOWN, Channels, plain_text, to_plotted
from diffusion_jax.pictures.figures import make_figure, note_shown
from diffusion_jax.pictures.grids import Block, Picture, draw_blocks, draw_grid, fill_cells, fit_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_SERIES, _MAX_FIELDS, _MAX_VOLUMES = 12, 8, 4  # examples in one figure
_MAX_CLASSES = 20  # classes with separate rows in a grid
_MAX_LINES = 6  # in a panel of series
_MAX_CHANNELS = 12  # channels of series with separate panels
_MAX_CAPTION = 48  # letters
_MAX_ROWS = 6  # rows of a trajectory, and channels of fields
_MAX_VOLUME_CHANNELS = 3
_MAX_TIMES = 10
_MAX_PIXELS = 256  # along each axis of an image
_MAX_HISTOGRAMS = 16  # for vectors
_MAX_VECTORS, _MAX_POINTS = 100_000, 4000  # in a histogram; in a scatter plot


class Examples(NamedTuple):
    """Examples x [n, *spatial, C] that a picture shows under a name; captions and labels have an entry for each, or are None.

    pairs: int [number of samples], the index of the example to show for each sample, such as the example with the nearest
    condition; None to show the first examples.
    """

    x: np.ndarray
    captions: Sequence[str] | None = None
    labels: np.ndarray | None = None
    name: str = "training data"
    pairs: np.ndarray | None = None

    def select(self, indices: np.ndarray) -> Examples:
        """Returns the examples at some indices, without pairs."""
        names = self.captions
        captions = None if names is None else [names[int(i)] for i in indices if i < len(names)]
        labels = None if self.labels is None else self.labels[indices]
        return Examples(self.x[indices], captions, labels, self.name)


def draw_edit(
    given: np.ndarray, results: np.ndarray, captions: Sequence[str], title: str, channels: Channels = UNKNOWN
) -> Picture:
    """Draws the given examples, then the results. captions: one for each example and result."""
    if results.ndim == 2:  # vectors share a panel
        return draw_samples(results, title, examples=Examples(given, name="given examples"), channels=channels)
    shown = np.concatenate([given, results])
    if not is_of_images(shown) and np.isnan(given).any():
        title += "; values to be generated are NaN"
    return draw_samples(shown, title, captions, min(len(shown), 10), channels=channels)


def draw_neighbors(
    samples: np.ndarray,
    numbers: Sequence[int],
    nearest: np.ndarray,
    distances: np.ndarray,
    title: str,
    channels: Channels = UNKNOWN,
) -> Picture:
    """Draws samples [N, *spatial, C], each followed by its nearest examples [N, k, *spatial, C].

    numbers: indices of the samples in the sample file. distances: [N, k].
    """
    shown = np.concatenate([samples[:, None], nearest], axis=1).reshape(-1, *samples.shape[1:])
    captions = []
    for number, row in zip(numbers, distances, strict=True):
        captions += [f"sample {number}", *(f"distance {distance:.4g}" for distance in row)]
    title += "; each sample precedes its nearest examples"
    return draw_samples(shown, title, captions, 1 + distances.shape[1], channels=channels)


def draw_samples(
    x: Any,
    title: str,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    labels: np.ndarray | None = None,
    examples: Examples | None = None,
    channels: Channels = UNKNOWN,
) -> Picture:
    """Draws samples x [n, *spatial, C] with at most three spatial axes, beside examples.

    Images: a grid, with the examples in a block at the left, and with rows for each class if there are few classes. Series: a
    panel for each example, with a line for each channel; if there are many channels, or channels differ in unit or scale,
    panels for each channel with all examples. Fields: a column for each example and a row for each channel. Volumes: for each
    example and channel, the three central slices, and along each axis the values farthest from 0. Vectors: a histogram for
    each channel, and a scatter plot for two channels.

    If the examples have pairs, the picture shows evenly spread samples instead of the first samples, and each field is
    below its example.

    Args:
      captions: a text for each sample, for instance the class; not for vectors. columns: number of columns in a grid, or in
        rows of series panels. labels: int [n], the classes. channels: missing limits are fitted to the values.
    Raises: ValueError for no example, more spatial axes, or complex numbers.
    """
    x = as_examples("x", x, 1)
    sets, pairs = [Examples(x, captions, labels, "samples")], None
    if examples is not None:
        sets.insert(0, examples)
        pairs = examples.pairs
    if is_of_images(x):
        return _draw_image_sets(sets if pairs is None else [sets[0].select(pairs), sets[1]], title, columns)
    if x.ndim > 5:
        raise ValueError(f"x has shape {x.shape}; pictures show at most three spatial axes: [n, D, H, W, C]")
    channels = channels.fit(*(each.x for each in sets))
    share = channels.share_outside(x)
    notes = [f"{100 * share:.2g}% of the values are outside the limits"] if share else []
    if pairs is not None:
        most = {3: _MAX_SERIES // 2, 4: _MAX_FIELDS, 5: _MAX_VOLUMES // 2}.get(x.ndim, len(x))
        chosen = even_indices(len(x), most)
        notes += [f"{len(chosen)} of {len(x)} samples"] * (len(chosen) < len(x))
        sets = [sets[0].select(pairs[chosen]), sets[1].select(chosen)]
        if x.ndim == 4:
            return _draw_pairs_of_fields(sets, title, channels, notes)
    if x.ndim == 2:
        drawn = [_select(each.x, _MAX_VECTORS, _MAX_HISTOGRAMS) for each in reversed(sets)]
        shown = drawn[0][0]
        chosen = [[i] for i in range(shown.shape[1])] + ([[0, 1]] if x.shape[1] == 2 else [])
        panels = [[values[:, indices] for values, _ in drawn] for indices in chosen]
        names = [each.name for each in reversed(sets)]
        return _draw_vectors(title, [f"{len(x)} vectors", *drawn[0][1], *notes], panels, chosen, channels, names)
    if x.ndim == 3:
        return _draw_series(sets, title, columns, channels, notes)
    is_field = x.ndim == 4
    limits = (_MAX_FIELDS, _MAX_ROWS) if is_field else (_MAX_VOLUMES, _MAX_VOLUME_CHANNELS)
    shown, names, more = _join(sets, *limits, _MAX_PIXELS)
    notes = more + notes
    if is_field:
        rows, numbers = list(np.moveaxis(shown, -1, 0)), range(shown.shape[-1])
        return _draw_images(title, notes, rows, numbers, channels, names, list(map(channels.name, numbers)))
    headers = [f"slice at the center of axis {axis}" for axis in range(3)]
    headers += [f"farthest from 0 along axis {axis}" for axis in range(3)]
    rows = [
        [volume.take(size // 2, axis) for axis, size in enumerate(volume.shape)]
        + [_farthest_from_zero(volume, axis) for axis in range(3)]
        for example in shown
        for volume in np.moveaxis(example, -1, 0)
    ]
    numbers, names = _rows_of_channels(names, shown.shape[-1], channels)
    return _draw_images(title, notes, rows, numbers, channels, headers, names)


def draw_trajectory(
    x: Any,
    times: Sequence[float] | np.ndarray,
    title: str,
    captions: Sequence[str] | None = None,
    channels: Channels = UNKNOWN,
) -> Picture:
    """Draws samples at several network times, x [columns, rows, *spatial, C] with at most three spatial axes.

    The last column has the final samples. Images are a grid, with a row for each sample. Series are lines, fields and volumes
    are colored images (for volumes, the central slice along the first axis), with a row for each sample and channel. Vectors
    are points in one panel for each time, with the first two channels as coordinates, or a histogram of a single channel.

    Noise may exceed the limits of the channels: lines and points are cut off at the edge of the panel, and colors saturate.

    times: the network times of all columns except the last. captions: one for each sample. channels: missing limits are
    fitted to the final samples. Raises: ValueError for no sample, or more spatial axes.
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
    channels = channels.fit(x[-1])
    times = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_TIMES)).round().astype(int))
    notes = [] if len(times) == len(x) else [f"{len(times)} of {len(x)} times"]
    x, headers = x[times], [headers[i] for i in times]
    separate = x.ndim > 4 or (x.ndim == 4 and not channels.share_axis(_MAX_LINES))  # a row for each channel
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
        numbers = [list(range(shown.shape[-1]))] * len(shown)
        return _draw_vectors(title, notes, [[column] for column in shown], numbers, channels, ["samples"], headers, 5)
    names = _captions(Examples(x[-1], captions, name="samples"), shown.shape[1])
    if x.ndim > 4:
        rows = [shown[:, i, ..., c] for i in range(shown.shape[1]) for c in range(shown.shape[-1])]
        numbers, names = _rows_of_channels(names, shown.shape[-1], channels)
        return _draw_images(title, notes, rows, numbers, channels, headers, names)
    groups = [[c] for c in range(shown.shape[-1])] if separate else [list(range(shown.shape[-1]))]
    legend = [] if separate else list(map(channels.label, groups[0]))
    panels = [
        (values, "" if i or k else headers[j], "" if j else f"{name}\n{channels.axis_label(group)}", group)
        for i, name in enumerate(names)
        for k, group in enumerate(groups)
        for j, values in enumerate(shown[:, i][..., group])
    ]
    return _draw_lines(title, notes, panels, channels, legend, len(headers), (1.6, 1.4))


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
    shown = to_plotted(x[(slice(num_examples), *steps, slice(num_channels))])
    notes = note_shown(len(shown), n, "examples") + note_shown(shown.shape[-1], channels, "channels")
    return shown, notes + ([f"1 of {stride} positions along each axis"] if stride > 1 else [])


def _join(
    sets: Sequence[Examples], num_examples: int, num_channels: int, positions: int | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Returns (the first examples of all sets, ready to plot; a name for each example; notes about the last set)."""
    left, joined, names, notes = num_examples, [], [], []
    for each in sets:
        count = left if each is sets[-1] else min(len(each.x), num_examples // len(sets))
        shown, notes = _select(each.x, count, num_channels, positions)
        joined.append(shown)
        names += _captions(each, len(shown), with_name=len(sets) > 1)
        left -= count
    return np.concatenate(joined), names, notes


def _captions(examples: Examples, count: int, with_name: bool = False) -> list[str]:
    """Returns the first `count` captions as plain text; missing captions are "NAME i". with_name: adds the set's name."""
    names = [plain_text(caption, _MAX_CAPTION) for caption in list(examples.captions or ())[:count]]
    if with_name:
        names = [f"{examples.name}\n{name}" for name in names]
    return names + [f"{examples.name.removesuffix('s')} {i}" for i in range(len(names), count)]


def _rows_of_channels(names: Sequence[str], count: int, channels: Channels) -> tuple[list[int], list[str]]:
    """Returns the channel and the name of each row: `count` rows, one per channel, for each example."""
    numbers = list(range(count)) * len(names)
    if count == 1:
        return numbers, list(names)
    return numbers, [f"{name}\n{channels.name(i)}" for name in names for i in range(count)]


def _farthest_from_zero(x: np.ndarray, axis: int) -> np.ndarray:
    """Returns the signed value with the largest magnitude along an axis; NaN if any value is NaN."""
    low, high = x.min(axis), x.max(axis)
    return np.where(high >= -low, high, low)


def _note_invalid(*arrays: np.ndarray) -> list[str]:
    """Returns a note with the number of NaN values, which mark nonfinite values after `to_plotted`; [] without NaN."""
    count, total = sum(int(np.isnan(x).sum()) for x in arrays), sum(x.size for x in arrays)
    return [f"{count} of {total} drawn values are NaN or infinite (magenta, or gaps in lines)"] if count else []


# ---- Panels


def _draw_image_sets(sets: Sequence[Examples], title: str, columns: int | None) -> np.ndarray:
    """Draws a block of images for each set, side by side; with few classes, each class has its own rows."""
    samples, classes = sets[-1], None
    if samples.labels is not None:
        classes = np.unique(samples.labels)
        classes = classes if len(classes) <= min(_MAX_CLASSES, len(samples.x) - 1) else None

    def split(each: Examples) -> list[np.ndarray]:
        if classes is None or each.labels is None:
            return [np.arange(len(each.x))]
        return [np.flatnonzero(each.labels == y) for y in classes]

    groups = split(samples)
    columns = min(columns or fit_columns(len(samples.x)), max(map(len, groups)))
    row_names = []
    if classes is None:
        rows = [math.ceil(len(samples.x) / columns)]
    else:
        sizes = [len(group) for group in groups]
        size = min(sizes) if max(sizes) < 2 * min(sizes) else max(sizes)
        columns = size // max(1, round(size / columns))  # full rows for a class of this size
        rows = [max(1, len(group) // columns) for group in groups]
        if left_out := sum(max(0, len(group) - columns * height) for group, height in zip(groups, rows, strict=True)):
            title += f"; {len(samples.x) - left_out} of {len(samples.x)} samples"
        for y, group, count in zip(classes, groups, rows, strict=True):
            name = samples.captions[group[0]] if samples.captions else f"class {y}"
            row_names += [name, *[""] * (count - 1)]
    blocks = []
    for each in sets:
        parts, width, heights = split(each), columns, rows
        if each is not samples:
            heights = rows if len(parts) == len(rows) else [sum(rows)]
            counts = [len(part) // height for part, height in zip(parts, heights, strict=True)]
            width = min(columns, max(1, min(counts)))
        captions = None if row_names else each.captions
        headers = [each.name] if len(sets) > 1 else None
        blocks.append(Block(each.x, fill_cells(parts, heights, width), captions, headers))
    return draw_blocks(blocks, title, row_names)


def _draw_series(
    sets: Sequence[Examples], title: str, columns: int | None, channels: Channels, notes: list[str]
) -> Figure:
    """Draws a panel for each example, or panels for each channel with all examples."""
    if channels.share_axis(_MAX_LINES):
        shown, names, more = _join(sets, _MAX_SERIES, _MAX_LINES)
        numbers = list(range(shown.shape[-1]))
        columns = min(len(shown), columns or 3)
        size = (6.5, 3.0) if len(shown) == 1 else (3.0, 1.7)
        label = channels.axis_label(numbers)
        panels = [
            (values, name, "" if i % columns else label, numbers)
            for i, (values, name) in enumerate(zip(shown, names, strict=True))
        ]
        return _draw_lines(title, [*notes, *more], panels, channels, list(map(channels.name, numbers)), columns, size)
    drawn = [_select(each.x, _MAX_LINES, _MAX_CHANNELS) for each in sets]
    numbers, is_alone = range(drawn[0][0].shape[-1]), len(sets) == 1
    columns = 2 if not is_alone or len(numbers) > 3 else 1
    panels = [
        (values[..., c].T, channels.name(c) + ("" if is_alone else f", {each.name}"), channels.label(c), [c])
        for c in numbers
        for each, (values, _) in zip(sets, drawn, strict=True)
    ]
    legend = _captions(sets[-1], len(drawn[-1][0])) if is_alone or sets[-1].captions else []
    if not is_alone and len(sets[0].x) == len(sets[-1].x):  # the example with the nearest condition has the same color
        given = _captions(sets[0], min(len(sets[0].captions or ()), len(drawn[0][0])))
        for i, (name, other) in enumerate(zip(legend, given, strict=False)):
            legend[i] += f" ({sets[0].name}: {other})" * (name != other)
    return _draw_lines(title, [*notes, *drawn[-1][1]], panels, channels, legend, columns, (6.5 / columns + 1, 1.6))


def _draw_lines(
    title: str,
    notes: Sequence[str],
    panels: Sequence[tuple[np.ndarray, str, str, Sequence[int]]],
    channels: Channels,
    legend: Sequence[str],
    columns: int,
    size: tuple[float, float],
) -> Figure:
    """Draws panels of lines [L, lines], which may contain NaN. legend: a name for each line, or for the first lines.

    panels: (lines, title, y-axis label, the channels whose limits the panel has). Panels without a y-axis label share the
    axis of the panel at the left.
    """
    lines, titles, y_labels, numbers = zip(*panels, strict=True)
    styles = [{"color": f"C{i}", "linewidth": 1.0} for i in range(max(values.shape[-1] for values in lines))]
    entries = list(zip(legend, styles, strict=False)) if len(legend) > 1 else []
    notes = [*notes, *_note_invalid(*lines)]
    figure, axes = make_figure(title, notes, titles, columns, size, labels=("position", y_labels), legend=entries)
    for panel, values, shown in zip(axes, lines, numbers, strict=True):
        for line, style in zip(values.T, styles, strict=False):
            panel.plot(line, **style)
        panel.set_ylim(channels.range(shown))
        panel.tick_params(labelbottom=bool(panel.get_xlabel()), labelleft=bool(panel.get_ylabel()))
    return figure


def _draw_pairs_of_fields(sets: Sequence[Examples], title: str, channels: Channels, notes: list[str]) -> Figure:
    """Draws, for each channel, a row with the examples above a row with the samples."""
    count = len(sets[0].x)
    drawn = [_select(each.x, count, _MAX_ROWS // 2, _MAX_PIXELS) for each in sets]
    headers = [header for each in sets for header in _captions(each, count)]
    numbers = [c for c in range(drawn[0][0].shape[-1]) for _ in sets]
    rows = [shown[..., c] for c in numbers[::2] for shown, _ in drawn]
    names = [f"{channels.name(c)}, {each.name}" for c in numbers[::2] for each in sets]
    return _draw_images(title, notes + drawn[0][1], rows, numbers, channels, headers, names)


def _draw_images(
    title: str,
    notes: Sequence[str],
    rows: Sequence[Any],
    numbers: Sequence[int],
    channels: Channels,
    headers: Sequence[str],
    names: Sequence[str],
) -> Figure:
    """Draws rows of images [H, W], which may contain NaN. Each row has a channel, a name at the left and a color bar.

    headers: texts above the panels of the first row, or of several rows, from left to right.
    """
    import matplotlib

    notes = [*notes, *_note_invalid(*(image for row in rows for image in row))]
    ratio = rows[0][0].shape[0] / rows[0][0].shape[1]
    columns = len(rows[0])
    width = min(max(9 / columns, 1.0), 2.6)
    titles = [*headers, *[""] * (len(rows) * columns - len(headers))]
    labels = [text for name in names for text in (name, *[""] * (columns - 1))]
    size = (width, 0.9 * width * min(max(ratio, 0.5), 2) + 0.1)
    figure, axes = make_figure(title, notes, titles, columns, size, labels=("", labels))
    for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        panels = axes[i * columns : (i + 1) * columns]
        color_map, low, high = channels.colors(number)
        colors = matplotlib.colormaps[color_map].with_extremes(bad="magenta")
        for panel, image in zip(panels, row, strict=True):
            panel.imshow(image, cmap=colors, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
            if 0.2 <= image.shape[0] / image.shape[1] <= 5:
                panel.set_aspect("equal")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
        exceeds = any(((image < low) | (image > high)).any() for image in row)
        bar = figure.colorbar(panels[0].get_images()[0], ax=panels, extend="both" if exceeds else "neither")
        bar.ax.tick_params(labelsize=7)
        bar.set_label(channels.label(number).replace(" (", "\n("), fontsize=7)
    return figure


def _draw_vectors(
    title: str,
    notes: Sequence[str],
    panels: Sequence[Sequence[np.ndarray]],
    numbers: Sequence[Sequence[int]],
    channels: Channels,
    set_names: Sequence[str],
    headers: Sequence[str] = (),
    columns: int = 4,
) -> Figure:
    """Draws vectors [n, 1], as histograms, or [n, 2], as points; NaN is allowed. Samples and examples share a panel.

    numbers: the channels of each panel. set_names: the names of the samples, and of the examples if there are any.
    """
    notes = [*notes, *_note_invalid(*(panel[0] for panel in panels))]
    styles = [{"color": "C0", "linewidth": 6, "alpha": 0.6}, {"color": "black", "linewidth": 1}]
    legend = list(zip(set_names, styles, strict=True)) if len(set_names) > 1 else []
    labels = [[channels.label(shown[0]) for shown in numbers]]
    labels += [["density" if len(shown) == 1 else channels.label(shown[1]) for shown in numbers]]
    titles, columns = headers or [""] * len(panels), min(len(panels), columns)
    figure, axes = make_figure(title, notes, titles, columns, (2.6, 2.2), labels=labels, legend=legend)
    for panel, sets, shown in zip(axes, panels, numbers, strict=True):
        limits = channels.range(shown[:1])
        panel.set(xlim=limits)
        if len(shown) == 2:
            panel.set(ylim=channels.range(shown[1:]))
            for points, color in zip(sets[::-1], ("0.75", "C0")[-len(sets) :], strict=True):
                panel.plot(*points[:_MAX_POINTS].T, ".", color=color, markersize=3, markeredgewidth=0)
            continue
        finite = [values[~np.isnan(values)] for values in sets]
        bins = int(np.clip(math.sqrt(max(map(len, finite))), 8, 60))
        edges = np.linspace(*limits, bins + 1)
        for i, values in enumerate(finite):
            density = np.histogram(values, edges)[0] / (max(len(values), 1) * np.diff(edges))
            panel.stairs(density, edges, fill=i == 0, color=("C0", "black")[i], alpha=(0.6, 1.0)[i])
    return figure

"""Panels of a figure: sizes in inches, titles and notes, legends, color scales, and values that are not finite.

The figures are drawn without a display. Every size is given in inches and nothing is measured, which is much faster than
Matplotlib's automatic layouts. Given text is never read as Matplotlib's mathematical notation.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MARK",
    "VALUE",
    "Margins",
    "channel_ranges",
    "draw_line",
    "full_range",
    "label_axes",
    "make_captions",
    "make_panels",
    "note_intervals",
    "note_invalid",
    "note_shown",
    "note_stride",
    "plain_text",
    "to_plotted",
    "widen",
    "wrap",
]

MARK = "magenta"  # of values that are NaN or infinite; no color map or line here has this color
VALUE = "value (data units)"  # the label of an axis
_DPI = 110
_MIN_WIDTH = 4.8  # inches, so that titles have room
_MAX_TITLE_WIDTH = 9.0  # inches that a long word of the title may take
_LETTERS_PER_INCH = 13  # of a title
_MAX_TEXT = 24  # characters of a caption or a name
_TICK_WIDTH = 0.5  # inches between the numbers below a panel
_MAX_INTERVALS = 300  # of a line with more than twice as many positions


# ---- Text


def plain_text(text: str, limit: int = _MAX_TEXT) -> str:
    """One line of at most `limit` characters, in which Matplotlib reads no mathematical notation."""
    text = " ".join(str(text).split())
    return _escape(text if len(text) <= limit else text[: limit - 3] + "...")


def _escape(text: str) -> str:
    return text.replace("$", r"\$")


def wrap(text: str, width: int) -> str:
    """Text of several lines, each with at most `width` characters if its words are shorter."""
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line for part in text.split("\n") for line in wrapper.wrap(part))


def make_captions(captions: Sequence[str] | None, count: int, word: str) -> list[str]:
    """The first `count` captions as plain text; those that are missing are "word i"."""
    given = list(captions or ())[:count]
    return [plain_text(caption) for caption in given] + [f"{word} {i}" for i in range(len(given), count)]


def note_shown(shown: int, total: int, word: str) -> list[str]:
    """["first 8 of 64 examples"], or [] if all are shown."""
    return [] if shown == total else [f"first {shown} of {total} {word}"]


def note_stride(stride: int) -> list[str]:
    """["1 of 4 positions along each axis"] for the stride 4, or [] if all positions are drawn."""
    return [] if stride == 1 else [f"1 of {stride} positions along each axis"]


def note_invalid(*arrays: np.ndarray) -> list[str]:
    """How many values are NaN, as `to_plotted` marks those that are not finite; [] if none is."""
    count, total = sum(int(np.isnan(x).sum()) for x in arrays), sum(x.size for x in arrays)
    return [f"{count} of {total} drawn values are NaN or infinite ({MARK} in images and lines)"] if count else []


# ---- Values


def to_plotted(x: Any) -> np.ndarray:
    """x as float64, with NaN for everything that is not finite."""
    x = np.asarray(x, np.float64)
    return np.where(np.abs(x) < 1e300, x, np.nan)  # the difference of two larger values may be infinite


def channel_ranges(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each channel of arrays [..., C] with NaN; NaN if it has no value."""
    flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
    low = np.fmin.reduce([np.fmin.reduce(x, axis=0) for x in flat])
    return low, np.fmax.reduce([np.fmax.reduce(x, axis=0) for x in flat])


def full_range(*arrays: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value of arrays with NaN; NaN if there is no value."""
    low, high = channel_ranges(*(x.reshape(-1, 1) for x in arrays))
    return float(low[0]), float(high[0])


def widen(low: float, high: float, margin: float = 0.0) -> tuple[float, float]:
    """Limits of an axis: a range, larger by `margin` of itself at both ends; around a constant; (0, 1) for NaN."""
    if np.isnan(low) or np.isnan(high):
        return 0.0, 1.0
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest:
        half = max(0.5, 1e-3 * largest)
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


# ---- Lines


def draw_line(axes: Axes, values: np.ndarray, **style) -> None:
    """A line of values [L] with NaN against their positions.

    A long line has the lowest and the highest value of each of at most 300 intervals, in their order. Marks at the bottom
    show where values are NaN.
    """
    length, invalid, width = len(values), np.isnan(values), _interval_width(len(values))
    positions = np.arange(length)
    if width > 1:
        intervals = -(-length // width)
        padded = np.pad(values, (0, intervals * width - length), constant_values=np.nan).reshape(intervals, width)
        lowest = np.where(np.isnan(padded), np.inf, padded).argmin(axis=1)
        highest = np.where(np.isnan(padded), -np.inf, padded).argmax(axis=1)
        inside = np.sort(np.stack([lowest, highest], axis=1), axis=1)
        positions = (inside + width * np.arange(intervals)[:, None]).reshape(-1).clip(max=length - 1)
        starts = np.arange(0, length, width)
        marked = starts[np.logical_or.reduceat(invalid, starts)]
        values = values[positions]
    else:
        marked = positions[invalid]
    axes.plot(positions, values, **style)
    if len(marked):
        height, transform = np.full(len(marked), 0.02), axes.get_xaxis_transform()
        style = {"color": MARK, "markersize": 6, "markeredgewidth": 2, "gid": "invalid"}
        axes.plot(marked, height, "|", transform=transform, **style)


def label_axes(axes: Axes, x: str, y: str, *, bottom: bool = True, left: bool = True) -> None:
    """Labels below axes at the bottom of a figure and beside those at its left, and the thin lines of a grid."""
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.tick_params(labelsize=7, labelbottom=bottom, labelleft=left)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize(7)
    # Numbers that have room beside and below the panel.
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if axes.get_xscale() == "linear":
        axes.ticklabel_format(axis="x", scilimits=(-3, 5))
        width = axes.bbox.width / axes.figure.dpi  # inches
        axes.locator_params(axis="x", nbins=max(2, int(width / _TICK_WIDTH)))
    if bottom:
        axes.set_xlabel(x, fontsize=8, labelpad=2)
    if left:
        axes.set_ylabel(y, fontsize=8, labelpad=2)


def note_intervals(length: int) -> list[str]:
    """What `draw_line` draws of a line of this length, or [] if it draws all values."""
    width = _interval_width(length)
    return [] if width == 1 else [f"the lowest and highest of every {width} positions"]


def _interval_width(length: int) -> int:
    return 1 if length <= 2 * _MAX_INTERVALS else -(-length // _MAX_INTERVALS)


# ---- Layout


class Margins(NamedTuple):
    """Inches around all panels, below the title and the legend."""

    left: float = 0.1
    right: float = 0.1
    bottom: float = 0.1
    top: float = 0.1


def make_panels(
    title: str,
    notes: Sequence[str],
    shape: tuple[int, int],
    size: tuple[float, float],
    *,
    gap: tuple[float, float] = (0.08, 0.08),
    margins: Margins,
    legend: Sequence[tuple[str, Mapping[str, Any]]] = (),
    count: int | None = None,
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, an array [rows, columns] of objects.

    Args:
      notes: a second paragraph of the title. shape: (rows, columns). size: (width, height) of a panel in inches.
      legend: pairs of plain text and the style of a Matplotlib line, below the title.
      count: how many panels are needed, row by row; the others are None.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, columns = shape
    width = margins.left + columns * size[0] + (columns - 1) * gap[0] + margins.right
    paragraphs = [" ".join(title.split()), "; ".join(notes)]
    longest_word = max(map(len, " ".join(["-", *paragraphs]).split()))  # such as the name of a file
    width = max(width, _MIN_WIDTH, min(longest_word / _LETTERS_PER_INCH, _MAX_TITLE_WIDTH))
    letters = int(_LETTERS_PER_INCH * width + 1e-6)
    lines = [line for text in paragraphs for line in textwrap.wrap(text, letters, break_on_hyphens=False)]
    labels = [label for label, _ in legend]
    entry_width = 0.45 + 0.07 * max(map(len, labels), default=0)
    legend_columns = max(1, min(len(legend), int((width - 0.2) / entry_width)))
    above = 0.14 + 0.16 * len(lines)
    legend_height = 0.2 * -(-len(legend) // legend_columns)
    panels_top = above + legend_height + margins.top
    height = panels_top + rows * size[1] + (rows - 1) * gap[1] + margins.bottom
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.suptitle("\n".join(map(_escape, lines)), fontsize=9, x=0.1 / width, y=1 - 0.07 / height, ha="left", va="top")
    if legend:
        figure.legend(
            [Line2D([], [], **style) for _, style in legend],
            labels,
            loc="upper left",
            bbox_to_anchor=(0.1 / width, 1 - above / height),
            ncols=legend_columns,
            fontsize=8,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            labelspacing=0.2,
        )
    axes = np.full(shape, None, object)
    for i in range(rows * columns if count is None else count):
        row, column = divmod(i, columns)
        left = margins.left + column * (size[0] + gap[0])
        top = panels_top + row * (size[1] + gap[1])
        axes[row, column] = figure.add_axes(
            (left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height)
        )
    return figure, axes

"""Figures of panels: layout, plain text, notes about what is left out, and values that are not finite."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VALUE", "make_figure", "note_invalid", "note_shown", "plain_text", "to_plotted"]

VALUE = "value (data units)"  # the label of an axis
_MIN_WIDTH = 4.8  # inches, so that titles have room
_LETTERS_PER_INCH = 13  # of a title


def plain_text(text: Any, limit: int = 24) -> str:
    """One line of at most `limit` characters, in which Matplotlib reads no mathematical notation."""
    text = " ".join(str(text).split())
    return (text if len(text) <= limit else text[: limit - 3] + "...").replace("$", r"\$")


def note_shown(shown: int, total: int, word: str) -> list[str]:
    """["first 8 of 64 examples"], or [] if all are shown."""
    return [] if shown == total else [f"first {shown} of {total} {word}"]


def note_invalid(*arrays: np.ndarray) -> list[str]:
    """How many values are NaN, as `to_plotted` marks those that are not finite; [] if none is."""
    count, total = sum(int(np.isnan(x).sum()) for x in arrays), sum(x.size for x in arrays)
    return [f"{count} of {total} drawn values are NaN or infinite (magenta, or gaps in lines)"] if count else []


def to_plotted(x: Any) -> np.ndarray:
    """x as float64, with NaN for everything that is not finite."""
    x = np.asarray(x, np.float64)
    return np.where(np.abs(x) < 1e300, x, np.nan)  # the difference of two larger values may be infinite


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
    """A figure and its panels, row by row.

    Args:
      notes: a second paragraph of the title. names: titles of the panels, as plain text. size: (width, height) of a panel
        with its labels, in inches. labels: of the x-axes at the bottom and of the y-axes at the left.
      legend: pairs of plain text and the style of a Matplotlib line, below the panels.
      share_y: as `Figure.subplots`.
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

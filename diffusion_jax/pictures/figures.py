"""Figures: panels with their layout and notes, terms of the bound, and statistics of two sets with standard errors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffusion_jax.metrics import Curves

__all__ = [
    "VALUE",
    "draw_bound_terms",
    "draw_curves",
    "draw_rate_distortion",
    "make_figure",
    "note_invalid",
    "note_shown",
    "plain_text",
    "to_plotted",
]

VALUE = "value (data units)"  # the label of an axis
_MIN_WIDTH = 4.8  # inches, so that titles have room
_LETTERS_PER_INCH = 13  # of a title
_MAX_CHANNELS = 16
_MAX_ERRORS = 60  # bars of a curve
_COLORS = "black", "C0"


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


# ---- Plots


def _make_axes(
    title: str, labels: tuple[str, str], legend: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure, (axes,) = make_figure(title, [], [""], 1, (7.0, 4.0), labels=labels, legend=legend)
    return figure, axes


def draw_bound_terms(vlb: np.ndarray, title: str, unit: str = "bits per dimension") -> Figure:
    """The terms of the bound [T] against t, both on logarithmic axes (Improved DDPM figure 2).

    An L_0 that is far below the other terms, or of continuous data negative, is drawn at the bottom of the axis.
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
    figure, axes = _make_axes(f"Terms of the variational bound: {title}", labels, legend)
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
    """Root mean squared error against rate (DDPM figure 5), and the lossless rate, None if no code is lossless.

    units: of the rate and of the distortion.
    """
    code: dict[str, Any] = {"color": "C0", "linewidth": 1.5}
    line: dict[str, Any] = {"color": "C3", "linestyle": "--"}
    labels = f"rate ({units[0]})", f"distortion (RMSE, {units[1]})"
    legend = [("progressive code", code)]
    if lossless is not None:
        legend.append((f"lossless code: {lossless:.3f} {units[0]}", line))
    figure, axes = _make_axes(f"Rate and distortion: {title}", labels, legend)
    axes.plot(rate, distortion, **code)
    if lossless is not None:
        axes.axvline(lossless, **line)
    axes.set(xlim=(0, None), ylim=(0, None))
    return figure


def draw_curves(curves: Curves, title: str) -> Figure:
    """A figure of a statistic of both sets with standard errors, with a panel for each of the first channels."""
    shown = [f"channel {i}" for i in range(min(curves.samples.value.shape[1], _MAX_CHANNELS))]
    notes = [*note_shown(len(shown), curves.samples.value.shape[1], "channels"), "bars: standard errors"]
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
            # An error bar may reach 0, which has no place on a logarithmic axis.
            panel.set(xscale="log", yscale="log", ylim=(values[values > 0].min() / 2, values.max() * 2))
    return figure

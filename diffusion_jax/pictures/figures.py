"""Figures with labeled panels: the bound's terms, rate and distortion, and two sets' statistics with standard errors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures.channels import UNKNOWN, Channels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffusion_jax.metrics import Curves

_MIN_WIDTH = 4.8  # inches, wide enough for titles
_PLOT_SIZE = (7.0, 4.0)  # inches, for a single plot
_LETTERS_PER_INCH = 13  # in a title
_MAX_CURVES = 16  # channels of a statistic
_MAX_ERRORS = 60  # error bars in a curve
_COLORS = "black", "C0"


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

    lossless: None for continuous data, which have no lossless code. units: the units of the rate and of the distortion.
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


def draw_curves(curves: Curves, title: str, channels: Channels = UNKNOWN) -> Figure:
    """Plots a statistic of two sets with standard errors, with a panel for each of the first channels."""
    from matplotlib.ticker import LogLocator, NullLocator

    shown = [channels.name(i) for i in range(min(curves.samples.value.shape[1], _MAX_CURVES))]
    notes = [*note_shown(len(shown), curves.samples.value.shape[1], "channels"), "bars: standard errors"]
    names = [f"{name}\n{note}" for name, note in zip(shown, curves.notes, strict=False)] or shown
    legend = [(name, {"color": color}) for name, color in zip(("data", "samples"), _COLORS, strict=True)]
    size = (5.5, 3.6) if len(shown) == 1 else (3.8, 2.6)
    labels: Sequence[Any] = curves.labels
    if channels.units:  # each panel has its own unit
        units = [channels.unit(channel) or "1" for channel in range(len(shown))]
        labels = [[label.replace("data units", unit) for unit in units] for label in labels]
    figure, axes = make_figure(title, notes, names, min(len(shown), 3), size, labels=labels, legend=legend)
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
            panel.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator()
            )
    return figure


def note_shown(shown: int, total: int, word: str) -> list[str]:
    """Returns ["first 8 of 64 examples"], or [] if all are shown."""
    return [] if shown == total else [f"first {shown} of {total} {word}"]


def make_figure(
    title: str,
    notes: Sequence[str],
    names: Sequence[str],
    columns: int,
    size: tuple[float, float],
    *,
    labels: Sequence[str | Sequence[str]] = ("", ""),
    legend: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, row by row.

    Args:
      notes: a second paragraph in the title. names: titles of the panels, as plain text. size: (width, height) of a panel
        with labels, in inches.
      labels: (x-axes, y-axes), each one text, which is shown at the bottom or left panels only, or a text for each panel.
        Titles and labels are wrapped to the size of a panel.
      legend: pairs (plain text, Matplotlib line style), shown below the panels.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second
    from matplotlib.lines import Line2D

    def wrap(text: str, inches: float) -> str:
        return "\n".join(textwrap.fill(line, int(_LETTERS_PER_INCH * inches)) for line in text.split("\n"))

    rows = -(-len(names) // columns)
    width = max(columns * size[0], _MIN_WIDTH)
    lines = [line for text in (title, "; ".join(notes)) for line in wrap(text, width).split("\n") if line]
    entry_width = 0.45 + 0.07 * max((len(label) for label, _ in legend), default=0)
    legend_columns = max(1, min(len(legend), int(width / entry_width)))
    height = rows * size[1] + 0.16 * len(lines) + 0.2 * -(-len(legend) // legend_columns)
    figure = Figure((width, height), dpi=160, layout="constrained")
    figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=9, x=0.1 / width, ha="left")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes[len(names) :]:
        panel.remove()
    for i, (panel, name) in enumerate(zip(axes, names, strict=False)):
        panel.set_title(wrap(name, size[0]), fontsize=8)
        panel.tick_params(which="both", labelsize=7)
        panel.grid(alpha=0.3, linewidth=0.5)
        is_at_edge = i + columns >= len(names), i % columns == 0
        shown = [
            (label if at_edge else "") if isinstance(label, str) else label[i]
            for label, at_edge in zip(labels, is_at_edge, strict=True)
        ]
        panel.set_xlabel(wrap(shown[0], size[0]), fontsize=8)
        panel.set_ylabel(wrap(shown[1], size[1]), fontsize=8)
    if legend:
        handles = [Line2D([], [], label=label, **style) for label, style in legend]
        figure.legend(handles=handles, loc="outside lower left", ncols=legend_columns, fontsize=8, frameon=False)
    return figure, axes[: len(names)]

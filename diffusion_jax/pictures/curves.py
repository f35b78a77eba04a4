"""Curves of the likelihood, and of metrics against the number of sampling steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_against_steps", "draw_bound_terms", "draw_rate_distortion"]

_MAX_TICKS = 10
_MARKERS = "os^vD<>pPX*"  # with 10 colors, no two of up to 110 lines have the same marker and color


def _make_axes(title: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes. lines: pairs of a label and a style, for the legend."""
    margins = panels.Margins(left=0.8, right=0.2, bottom=0.5, top=0.1)
    figure, axes = panels.make_panels(title, [], (1, 1), (6.0, 3.6), margins=margins, legend=lines)
    return figure, axes[0, 0]


def draw_bound_terms(vlb: np.ndarray, title: str, unit: str = "bits per dimension") -> Figure:
    """The terms of the bound [T] against t, both on logarithmic axes (Improved DDPM figure 2).

    An L_0 of continuous data, which may be negative, is shown at the bottom of the axis.
    """
    t = np.arange(1, len(vlb) + 1)
    seen = np.isfinite(vlb) & (vlb > 0)
    seen[0] = False
    # An L_0 near 0 would stretch the logarithmic axis without limit, so an arrow at the bottom represents it.
    bottom = vlb[seen].min() / 3 if seen.any() else max(vlb[0], 1e-3) / 3
    above = bool(vlb[0] >= bottom)
    transitions = {"color": "C0", "linewidth": 1.2}
    decoder = {"color": "C3", "linestyle": "", "marker": "o" if above else "v", "markersize": 8}
    label = f"decoder $L_0$ = {vlb[0]:.3g}" + ("" if above else ", below the axis")
    figure, axes = _make_axes(
        f"Terms of the variational bound: {title}", [("transitions $L_{t-1}$", transitions), (label, decoder)]
    )
    axes.plot(t[seen], vlb[seen], **transitions)
    axes.set(xscale="log", yscale="log")
    axes.plot(t[:1], [vlb[0] if above else bottom], zorder=3, **decoder)
    top = axes.get_ylim()[1]
    axes.set_ylim(bottom=bottom / (top / bottom) ** 0.05)  # room for the whole marker
    panels.label_axes(axes, "timestep t (1 is the cleanest)", unit)
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
    lossless_entry = [] if lossless is None else [(f"lossless code: {lossless:.3f} {units[0]}", line)]
    figure, axes = _make_axes(f"Rate and distortion: {title}", [("progressive code", code), *lossless_entry])
    axes.plot(rate, distortion, **code)
    if lossless is not None:
        axes.axvline(lossless, **line)
    axes.set(xlim=(0, None), ylim=(0, None))
    panels.label_axes(axes, f"rate ({units[0]})", f"distortion (RMSE, {units[1]})")
    return figure


def draw_against_steps(curves: Mapping[str, Mapping[int, float]], metric: str) -> Figure:
    """A line for each label of {label: {number of sampling steps: value}}, the steps on a logarithmic axis."""
    styles = [
        {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.5} for i in range(len(curves))
    ]
    labels = [panels.plain_text(label, 100) for label in curves]
    figure, axes = _make_axes(f"{metric} against sampling steps", list(zip(labels, styles, strict=True)))
    for points, style in zip(curves.values(), styles, strict=True):
        steps = sorted(points)
        axes.plot(steps, [points[n] for n in steps], **style)
    axes.set(xscale="log", ylim=(0, None))
    counts = sorted({n for points in curves.values() for n in points})
    if len(counts) <= _MAX_TICKS:
        axes.set_xticks(counts, labels=[f"{n:,}" for n in counts])
        axes.minorticks_off()
    panels.label_axes(axes, "sampling steps", metric)
    return figure

"""Plots: terms of the bound, metrics against steps, and statistics of two sets of float arrays with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures import panels
from diffusion_jax.pictures.panels import Margins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffusion_jax.evaluation.array_metrics import MarginalHistograms
    from diffusion_jax.evaluation.array_statistics import Autocorrelation, PowerSpectrum

__all__ = [
    "draw_autocorrelation",
    "draw_bound_terms",
    "draw_histograms",
    "draw_rate_distortion",
    "draw_spectra",
]

_MAX_CHANNELS = 16
_MAX_POINTS = 120  # of a curve with error bars
_COLORS = "black", "C0"
_ERRORS = "bars: standard errors"


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


# ---- Statistics of arrays


def draw_histograms(histograms: MarginalHistograms, *, title: str) -> Figure:
    """A figure of the marginal histograms of a reference and of samples, with a panel and the distance for each channel."""
    figure, axes, captions = _make_figure(title, len(histograms.edges))
    distance, error = (np.asarray(part) for part in histograms.distance)
    for channel, panel in enumerate(axes):
        edges = histograms.edges[channel]
        for measurement, color in zip((histograms.reference, histograms.samples), _COLORS, strict=True):
            shares, errors = measurement.value[channel], measurement.standard_error[channel]
            fill = {"fill": True, "alpha": 0.4} if color != _COLORS[0] else {}
            panel.stairs(shares, edges, color=color, **fill)
            centers = (edges[1:] + edges[:-1]) / 2
            panel.errorbar(centers, shares, errors, fmt="none", ecolor=color, elinewidth=0.9)
        difference = f"total variation {distance[channel]:.3g} ± {error[channel]:.2g}"
        expected = f"expected for equal laws: {histograms.same_law[channel]:.2g}"
        panel.set_title(f"{captions[channel]}: {difference}\n{expected}", fontsize=8, pad=3)
        panel.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
        panels.label_axes(panel, panels.VALUE, "share of the values")
    return figure


def draw_spectra(reference: PowerSpectrum, samples: PowerSpectrum, *, title: str) -> Figure:
    """A figure of two radial power spectra on logarithmic axes, with a panel for each channel.

    The frequency 0 has no place on the axis: its power is in the title of the panel, that of the reference first.

    Args:
      reference: of the data, or of a known law with the standard errors 0.
    """
    frequencies = np.asarray(samples.frequencies)
    positive = np.flatnonzero(frequencies > 0)
    spaced = np.geomspace(1, max(len(positive), 1), _MAX_POINTS).round().astype(int) - 1
    chosen = positive[np.unique(spaced)] if len(positive) > _MAX_POINTS else positive
    figure, axes, captions = _make_figure(
        title, samples.value.shape[1], _note_points(len(chosen), len(positive), "frequencies")
    )
    for channel, panel in enumerate(axes):
        _draw_curves(panel, frequencies, reference, samples, chosen, channel)
        drawn = np.concatenate([spectrum.value[chosen, channel] for spectrum in (reference, samples)])
        if (drawn > 0).any():
            # An error bar may reach 0, which has no place on a logarithmic axis.
            low, high = drawn[drawn > 0].min(), drawn.max()
            panel.set_yscale("log", nonpositive="clip")
            panel.set_ylim(low / 2 * (low / high) ** 0.03, high * 2 * (high / low) ** 0.03)
            _set_ticks(panel.yaxis, high / low)
        if len(chosen):
            panel.set_xscale("log")
            _set_ticks(panel.xaxis, float(frequencies[chosen].max() / frequencies[chosen].min()))
        heading = captions[channel]
        for zero in np.flatnonzero(frequencies == 0):
            power = (
                f"{s.value[zero, channel]:.3g} ± {s.standard_error[zero, channel]:.2g}" for s in (reference, samples)
            )
            heading += "\nat frequency 0: " + ", ".join(power)
        panel.set_title(heading, fontsize=8, pad=3)
        panels.label_axes(panel, "frequency (cycles per position)", "power (data units squared)")
    return figure


def draw_autocorrelation(reference: Autocorrelation, samples: Autocorrelation, *, title: str) -> Figure:
    """A figure of two autocorrelations against the lag, with a panel for each channel.

    Args:
      reference: of the data, or of a known law with the standard errors 0.
    """
    lags = np.asarray(samples.lags)
    chosen = np.unique(np.linspace(0, len(lags) - 1, min(len(lags), _MAX_POINTS)).round().astype(int))
    figure, axes, captions = _make_figure(title, samples.value.shape[1], _note_points(len(chosen), len(lags), "lags"))
    for channel, panel in enumerate(axes):
        _draw_curves(panel, lags, reference, samples, chosen, channel)
        panel.axhline(0, color="0.5", linewidth=0.6, zorder=1)
        panel.set_title(captions[channel], fontsize=8, pad=3)
        panels.label_axes(panel, "lag (positions)", "autocorrelation")
    return figure


def _set_ticks(axis: Any, ratio: float) -> None:
    """Labels at the powers of ten of a logarithmic axis from a value to `ratio` times it, or between them on a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if ratio < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio > 3 else range(1, 10)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _note_points(shown: int, total: int, word: str) -> list[str]:
    return [] if shown == total else [f"{shown} of {total} {word}"]


def _make_figure(title: str, channels: int, notes: Sequence[str] = ()) -> tuple[Figure, np.ndarray, list[str]]:
    """A figure, the axes of the channels that are shown, and the names of these channels."""
    count = min(channels, _MAX_CHANNELS)
    columns = min(count, 3 if count <= 9 else 4)
    size = (4.8, 3.0) if count == 1 else (3.2, 2.2)
    figure, axes = panels.make_panels(
        title,
        [*panels.note_shown(count, channels, "channels"), *notes, _ERRORS],
        (-(-count // columns), columns),
        size,
        gap=(0.7, 0.85),
        margins=Margins(left=0.8, right=0.15, bottom=0.45, top=0.4),
        legend=[(name, {"color": color}) for name, color in zip(("data", "samples"), _COLORS, strict=True)],
        count=count,
    )
    return figure, axes.reshape(-1)[:count], [f"channel {i}" for i in range(count)]


def _draw_curves(axes: Axes, x: np.ndarray, reference: Any, samples: Any, chosen: np.ndarray, channel: int) -> None:
    """Both statistics [K, C] at the chosen positions, with error bars."""
    for i, (statistic, color) in enumerate(zip((reference, samples), _COLORS, strict=True)):
        value, error = statistic.value[chosen, channel], statistic.standard_error[chosen, channel]
        axes.errorbar(x[chosen], value, error, color=color, linewidth=1.0, elinewidth=0.9, zorder=2 + i)

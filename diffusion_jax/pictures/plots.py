"""Plots: terms of the bound, metrics against steps, and statistics of two sets of float arrays with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures.figures import VALUE, make_figure, note_shown

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
_MAX_ERRORS = 60  # bars of a curve
_COLORS = "black", "C0"


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


# ---- Statistics of arrays


def draw_histograms(histograms: MarginalHistograms, *, title: str) -> Figure:
    """A figure of the marginal histograms of a reference and of samples, with a panel and the distance for each channel."""
    distance, error = (np.asarray(field) for field in histograms.distance)
    names = [
        f"total variation {distance[channel]:.3g} ± {error[channel]:.2g}\n"
        f"expected for equal laws: {histograms.same_law[channel]:.2g}"
        for channel in range(len(distance))
    ]
    figure, axes = _make_panels(title, names, (VALUE, "share of the values"))
    for channel, panel in enumerate(axes):
        edges = histograms.edges[channel]
        for measurement, color in zip((histograms.reference, histograms.samples), _COLORS, strict=True):
            shares, errors = measurement.value[channel], measurement.standard_error[channel]
            fill = {"fill": True, "alpha": 0.4} if color != _COLORS[0] else {}
            panel.stairs(shares, edges, color=color, **fill)
            centers = (edges[1:] + edges[:-1]) / 2
            panel.errorbar(centers, shares, errors, fmt="none", ecolor=color, elinewidth=0.9)
        panel.set(ylim=(0, None))
    return figure


def draw_spectra(reference: PowerSpectrum, samples: PowerSpectrum, *, title: str) -> Figure:
    """A figure of two radial power spectra on logarithmic axes, with a panel for each channel.

    The frequency 0 has no place on the axis: its power is in the title of the panel, that of the reference first.
    """
    names = [
        "at frequency 0: "
        + ", ".join(f"{s.value[0, channel]:.3g} ± {s.standard_error[0, channel]:.1g}" for s in (reference, samples))
        for channel in range(samples.value.shape[1])
    ]
    labels = "frequency (cycles per position)", "power (data units squared)"
    figure, axes = _make_panels(title, names, labels)
    for channel, panel in enumerate(axes):
        _draw_curves(panel, samples.frequencies, reference, samples, slice(1, None), channel)
        drawn = np.concatenate([spectrum.value[1:, channel] for spectrum in (reference, samples)])
        if (drawn > 0).any():
            # An error bar may reach 0, which has no place on a logarithmic axis.
            panel.set(xscale="log", yscale="log", ylim=(drawn[drawn > 0].min() / 2, drawn.max() * 2))
    return figure


def draw_autocorrelation(reference: Autocorrelation, samples: Autocorrelation, *, title: str) -> Figure:
    """A figure of two autocorrelations against the lag, with a panel for each channel."""
    names = [""] * samples.value.shape[1]
    figure, axes = _make_panels(title, names, ("lag (positions)", "autocorrelation"))
    for channel, panel in enumerate(axes):
        panel.axhline(0, color="0.5", linewidth=0.6)
        _draw_curves(panel, samples.lags, reference, samples, slice(None), channel)
    return figure


def _make_panels(title: str, names: Sequence[str], labels: tuple[str, str]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each of the first channels. names: a second line of their titles."""
    shown = [f"channel {i}" + (f"\n{name}" if name else "") for i, name in enumerate(names[:_MAX_CHANNELS])]
    notes = [*note_shown(len(shown), len(names), "channels"), "bars: standard errors"]
    legend = [(name, {"color": color}) for name, color in zip(("data", "samples"), _COLORS, strict=True)]
    size = (5.5, 3.6) if len(shown) == 1 else (3.8, 2.6)
    return make_figure(title, notes, shown, min(len(shown), 3), size, labels=labels, legend=legend)


def _draw_curves(axes: Axes, x: np.ndarray, reference: Any, samples: Any, chosen: slice, channel: int) -> None:
    """Both statistics [K, C] at the chosen positions, with error bars."""
    for statistic, color in zip((reference, samples), _COLORS, strict=True):
        value, error = statistic.value[chosen, channel], statistic.standard_error[chosen, channel]
        every = max(1, len(value) // _MAX_ERRORS)
        axes.errorbar(x[chosen], value, error, color=color, linewidth=1.0, elinewidth=0.9, errorevery=every)

"""Pictures of posterior samples and of their calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_jax.pictures.channels import UNKNOWN, Channels, to_plotted
from diffusion_jax.pictures.figures import make_figure, note_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAMPLES, _MAX_CHANNELS, _MAX_QUANTITIES = 4, 4, 12
_MAX_Z = 4.0  # deviations at the ends of the color scale
_GRAY_LEVELS = Channels(names=("gray levels",), units=("",), limits=np.tile([0.0, 255.0], (3, 1)))


def draw_posterior(
    samples: np.ndarray,
    measurement: np.ndarray,
    caption: str,
    truth: np.ndarray | None,
    title: str,
    channels: Channels = UNKNOWN,
    is_image: bool = False,
) -> Figure:
    """Draws samples [N, *spatial, C] of one posterior: mean, deviation, four samples, and the error in deviations.

    All arrays are in data units, images in gray levels. Series are lines, and vectors are lines over their channels; fields
    are colored images, and volumes are central slices along the first axis. Color images have one row, with the largest
    deviation and error of the three channels.

    measurement: an example with NaN where nothing is measured, or an array [*other, C]. truth: None if unknown.
    """
    x, y = to_plotted(samples), to_plotted(measurement)
    x_0 = None if truth is None else to_plotted(truth)
    mean, deviation = x.mean(axis=0), x.std(axis=0, ddof=1)
    z = None if x_0 is None else (x_0 - mean) / np.maximum(deviation, 1e-12)
    arrays = {} if x_0 is None else {"truth": x_0}
    arrays |= {caption: y, "mean": mean} | {f"sample {i + 1}": each for i, each in enumerate(x[:_SAMPLES])}
    numbers = list(range(min(x.shape[-1], _MAX_CHANNELS)))
    notes = note_shown(len(numbers), x.shape[-1], "channels")
    if is_image:
        channels, numbers = _GRAY_LEVELS, [0]
        notes = ["deviation and error are the largest of the three channels"] * (x.shape[-1] == 3)
    channels = channels.fit(x, *([] if x_0 is None else [x_0[None]]))
    if x.ndim == 2:
        notes, numbers = [], [0]
    if x.ndim <= 3:
        return _draw_lines(title, notes, arrays, caption, mean, deviation, z, numbers, channels)
    if x.ndim == 5:
        notes.append("slices at the center of axis 0")
        arrays, deviation, z = (
            {name: each[len(each) // 2] if each.ndim == 4 else each for name, each in arrays.items()},
            deviation[len(deviation) // 2],
            None if z is None else z[len(z) // 2],
        )
    return _draw_fields(title, notes, arrays, deviation, z, numbers, channels, is_image and x.shape[-1] == 3)


def _draw_lines(
    title: str,
    notes: list[str],
    arrays: Mapping[str, np.ndarray],
    caption: str,
    mean: np.ndarray,
    deviation: np.ndarray,
    z: np.ndarray | None,
    numbers: list[int],
    channels: Channels,
) -> Figure:
    """Draws a row of panels for each channel: the values with a band of two deviations, and the error in deviations."""
    is_vector = mean.ndim == 1
    styles: dict[str, Any] = {
        "truth": {"color": "black", "linewidth": 1.2},
        "mean": {"color": "C0", "linewidth": 1.2},
        "sample": {"color": "C0", "linewidth": 0.5, "alpha": 0.6},
        caption: {"color": "C3", "linestyle": "", "marker": "o", "markersize": 4, "zorder": 4},
    }
    names, labels = [], ([], [])
    for c in numbers:
        for panel in ["samples" if is_vector else channels.name(c)] + ["error"] * (z is not None):
            names.append(panel)
            labels[0].append("channel" if is_vector else "position")
            of_values = "value (data units)" if is_vector else channels.label(c)
            labels[1].append("(truth - mean) / deviation" if panel == "error" else of_values)
    legend = [
        (name if name != "sample" else "samples", style)
        for name, style in styles.items()
        if name in arrays or name == "sample"
    ]
    legend.append(("mean ± 2 deviations", {"color": "C0", "linewidth": 6, "alpha": 0.2}))
    columns = 1 + (z is not None)
    figure, axes = make_figure(title, notes, names, columns, (5.2, 2.4), labels=labels, legend=legend)
    for row, c in enumerate(numbers):
        panel = axes[row * columns]

        def of_channel(array: np.ndarray, c: int = c) -> np.ndarray:
            return array if is_vector else array[..., c]

        middle, spread = of_channel(mean), 2 * of_channel(deviation)
        panel.fill_between(np.arange(len(middle)), middle - spread, middle + spread, color="C0", alpha=0.2, linewidth=0)
        for name, array in arrays.items():
            panel.plot(of_channel(array), **styles["sample" if name.startswith("sample ") else name])
        panel.locator_params("x", integer=True)
        if not is_vector:
            low, high = channels.range([c])
            panel.set_ylim(min(low, np.nanmin(middle - spread)), max(high, np.nanmax(middle + spread)))
        if z is not None:
            error = of_channel(z)
            axes[row * columns + 1].plot(error, ".-", color="black", linewidth=0.6, markersize=4)
            for level in (-2, 0, 2):
                axes[row * columns + 1].axhline(level, color="0.6", linewidth=0.8, linestyle="--" if level else "-")
            axes[row * columns + 1].locator_params("x", integer=True)
            bound = max(3.0, 1.1 * np.nanmax(np.abs(error)))
            axes[row * columns + 1].set_ylim(-bound, bound)
    return figure


def _draw_fields(
    title: str,
    notes: list[str],
    arrays: Mapping[str, np.ndarray],
    deviation: np.ndarray,
    z: np.ndarray | None,
    numbers: list[int],
    channels: Channels,
    is_color: bool,
) -> Figure:
    """Draws a row of images for each channel: values, then the deviation and the error with separate color bars."""
    import matplotlib

    def of_channel(array: np.ndarray, c: int) -> np.ndarray:
        if is_color:
            return np.take_along_axis(array, np.abs(array).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
        return array[..., c]

    errors = {} if z is None else {"error / deviation": z}
    drawn = {**arrays, "deviation": deviation, **errors}
    is_image, shape = channels is _GRAY_LEVELS, deviation.shape[:2]
    labels = [text for c in numbers for text in ("" if is_image else channels.name(c), *[""] * (len(drawn) - 1))]
    names = [*drawn, *[""] * (len(drawn) * (len(numbers) - 1))]
    figure, axes = make_figure(title, notes, names, len(drawn), (1.35, 1.75), labels=("", labels))
    for i, c in enumerate(numbers):
        color_map, low, high = channels.colors(c)
        unit = channels.unit(c) or channels.name(c)
        values, same, bars = None, [], []
        for panel, (header, array) in zip(axes[i * len(drawn) :], drawn.items(), strict=False):
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            is_value = header in arrays and array.shape[:2] == shape
            if is_color and is_value:
                panel.imshow(np.where(np.isnan(array), 127, array).clip(0, 255) / 255)
                continue
            shown, unit_shown = of_channel(array, c), unit
            options: dict[str, Any] = {"cmap": "gray" if is_image else color_map, "vmin": low, "vmax": high}
            if header == "deviation":
                options = {"cmap": "viridis", "vmin": 0, "vmax": float(shown.max())}
            elif header in errors:
                options, unit_shown = {"cmap": "RdBu_r", "vmin": -_MAX_Z, "vmax": _MAX_Z}, "deviations"
            elif not is_value:  # sums along rays have another range
                options, shown = {"cmap": "viridis", "aspect": "auto"}, array.mean(axis=-1) if is_color else shown
            cmap = matplotlib.colormaps[options.pop("cmap")].with_extremes(bad="0.85")
            image = panel.imshow(shown, cmap=cmap, interpolation="nearest", **options)
            if is_value:
                values = image
                same.append(panel)
            else:
                bars.append((image, [panel], unit_shown))
        if values is not None:
            bars.append((values, same, channels.label(c)))
        for image, where, label in bars:
            aspect = 8 * len(where) + 4
            bar = figure.colorbar(image, ax=where, location="bottom", fraction=0.08, aspect=aspect, pad=0.03)
            bar.ax.tick_params(labelsize=6)
            bar.set_label(label, fontsize=7)
    return figure


def draw_calibration(shares: Mapping[str, np.ndarray], error: float, title: str, names: Mapping[str, str]) -> Figure:
    """Draws, for each quantity, the share of the ranks in each bin, with the band that uniform ranks would have.

    shares: {quantity: shares [bins]}. error: the standard error of a share for uniform ranks. names: a text for each panel.
    """
    shown = list(shares)[:_MAX_QUANTITIES]
    notes = [
        *note_shown(len(shown), len(shares), "quantities"),
        "line and band: calibrated samples, ± 2 standard errors",
    ]
    labels = "rank of the truth / (samples + 1)", "share"
    titles = [names[name] for name in shown]
    figure, axes = make_figure(title, notes, titles, min(len(shown), 4), (2.6, 2.2), labels=labels)
    top = max(float(shares[name].max()) for name in shown)
    for panel, name in zip(axes, shown, strict=True):
        bins = len(shares[name])
        panel.axhspan(1 / bins - 2 * error, 1 / bins + 2 * error, color="0.85", zorder=0)
        panel.axhline(1 / bins, color="0.5", linewidth=0.8)
        panel.stairs(shares[name], np.linspace(0, 1, bins + 1), color="C0", linewidth=1.4)
        panel.set(xlim=(0, 1), ylim=(0, 1.1 * max(top, 1 / bins + 2 * error)))
    return figure

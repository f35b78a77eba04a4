"""Tables of images of float arrays, with a color bar for each row or column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffusion_jax.pictures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ColorScale", "draw_image_table", "image_stride"]

_MAX_PIXELS = 256  # of an image along each axis


class ColorScale(NamedTuple):
    """The colors of the values between `low` and `high`; values beyond have the colors of the ends.

    centered: a diverging map with white at 0. extend: which ends have values beyond, as Matplotlib's color bars name them.
    """

    low: float
    high: float
    centered: bool
    extend: str

    @classmethod
    def of_range(cls, low: float, high: float, values: np.ndarray) -> ColorScale:
        """A scale of a range for these values, centered at 0 if both signs are at least a tenth of the range."""
        centered = bool(min(-low, high) > 0.1 * (high - low))
        if centered:
            high = max(-low, high)
            low = -high
        low, high = panels.widen(low, high)
        lowest, highest = panels.full_range(values)
        ends = lowest < low, highest > high
        names = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        return cls(low, high, centered, names[ends])

    def draw(self, axes: Axes, image: np.ndarray, aspect: Any, largest: tuple[int, int]) -> Any:
        """An image [H, W] with NaN, without ticks, in the middle of axes for images of the size `largest`."""
        import matplotlib

        colors = matplotlib.colormaps["RdBu_r" if self.centered else "viridis"].with_extremes(bad=panels.MARK)
        axes.set_axis_off()
        drawn = axes.imshow(
            image, cmap=colors, vmin=self.low, vmax=self.high, aspect=aspect, interpolation="nearest", origin="upper"
        )
        (height, width), (largest_height, largest_width) = image.shape, largest
        axes.set_xlim(width / 2 - largest_width / 2 - 0.5, width / 2 + largest_width / 2 - 0.5)
        axes.set_ylim(height / 2 + largest_height / 2 - 0.5, height / 2 - largest_height / 2 - 0.5)
        return drawn

    def draw_bar(self, axes: Axes, image: Any, orientation: Any) -> None:
        """The color bar of an image that `draw` returned, with labels at its ends, and at 0 if it is centered."""
        bar = axes.figure.colorbar(image, cax=axes, orientation=orientation, extend=self.extend)
        ticks = [self.low, 0.0, self.high] if self.centered else [self.low, self.high]
        order = math.floor(math.log10(self.high - self.low))
        labels = [_format_tick(tick, order) for tick in ticks]
        bar.set_ticks(ticks, labels=labels)
        axes.tick_params(labelsize=7)
        # The outer labels end where the bar ends, so that they do not meet those of the neighbors.
        if orientation == "horizontal":
            texts = axes.get_xticklabels()
            texts[0].set_horizontalalignment("left")
            texts[-1].set_horizontalalignment("right")
        else:
            texts = axes.get_yticklabels()
            texts[0].set_verticalalignment("bottom")
            texts[-1].set_verticalalignment("top")


def _format_tick(tick: float, order: int) -> str:
    """A number with three digits of a range of the size 10^order, which are at most eight of the number itself."""
    rounded = round(tick, 2 - order) if abs(order) < 300 else tick
    digits = 3 if rounded == 0 else math.floor(math.log10(abs(rounded))) - order + 3
    text = f"{rounded:.{min(max(digits, 1), 8)}g}"
    return f"{rounded:.0f}" if "e" in text and 1 <= abs(rounded) < 1e6 else text


def image_stride(*sizes: int) -> int:
    """Every how many positions along each axis of images of these sizes are drawn."""
    return max(-(-size // _MAX_PIXELS) for size in sizes)


def draw_image_table(
    title: str,
    notes: Sequence[str],
    images: Sequence[Sequence[np.ndarray]],
    scales: Sequence[ColorScale],
    *,
    captions: Sequence[str],
    headers: Sequence[str],
    by_column: bool,
) -> Figure:
    """Rows of images [H, W] with NaN, with captions at the left, headers above the columns, and color bars.

    scales: of each column if `by_column`, with color bars below; otherwise of each row, with color bars at the right.
    captions, headers: plain text.
    """
    rows, columns = len(images), len(images[0])
    largest = tuple(max(image.shape[axis] for row in images for image in row) for axis in (0, 1))
    ratio = largest[0] / largest[1]
    aspect = "equal" if 0.2 <= ratio <= 5 else "auto"
    ratio = float(np.clip(ratio, 0.25, 2))
    width = max(min(9 / columns, 9 / (rows * ratio), 2.6), 0.8)
    headers = [panels.wrap(header, max(int(14 * width), 6)) for header in headers]
    header_lines = max(header.count("\n") + 1 for header in headers)
    left = 0.2 + 0.07 * max(map(len, captions))
    margins = panels.Margins(left, 0.15 if by_column else 0.85, 0.4 if by_column else 0.1, 0.1 + 0.14 * header_lines)
    gap = 0.14 if by_column else 0.06
    notes = [*notes, "color bars in data units"]
    figure, axes = panels.make_panels(
        title, notes, (rows, columns), (width, width * ratio), gap=(gap, 0.06), margins=margins
    )
    figure_width, figure_height = figure.get_size_inches()
    for row, row_images in enumerate(images):
        for column, image in enumerate(row_images):
            panel, scale = axes[row, column], scales[column if by_column else row]
            drawn = scale.draw(panel, image, aspect, largest)
            if row == 0:
                panel.set_title(headers[column], fontsize=8, pad=3)
            box = panel.get_position(original=True)
            if column == 0:
                y = (box.y0 + box.y1) / 2
                figure.text(box.x0 - 0.08 / figure_width, y, captions[row], fontsize=8, ha="right", va="center")
            if by_column and row == rows - 1:
                bar = figure.add_axes((box.x0, box.y0 - 0.18 / figure_height, box.width, 0.09 / figure_height))
                scale.draw_bar(bar, drawn, "horizontal")
            elif not by_column and column == columns - 1:
                bar = figure.add_axes((box.x1 + 0.08 / figure_width, box.y0, 0.09 / figure_width, box.height))
                scale.draw_bar(bar, drawn, "vertical")
    return figure

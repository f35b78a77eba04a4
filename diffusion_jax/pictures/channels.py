"""Names, units, limits and colors of channels, which all pictures of a run share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_MARGIN = 0.1  # share of the value range that is added to the limits at each end


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels of arrays that are not images.

    names, units: a text for each channel; () for the names "channel NUMBER", and for "data units". limits: [C, 2], the ends
    of the axes and color scale of each channel; None until `fit`.
    """

    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    limits: np.ndarray | None = None

    def fit(self, *sets: Any, quantile: float = 0.0) -> Channels:
        """Returns channels with limits that suit sets of examples [n, *spatial, C]; existing limits are kept.

        quantile: share of the values beyond each limit, before a margin is added; nonfinite values do not count.
        """
        if self.limits is not None:
            return self
        limits = []
        for channel in range(sets[0].shape[-1]):
            values = np.concatenate([to_plotted(x[..., channel]).ravel() for x in sets])
            values = values[~np.isnan(values)]
            low, high = np.quantile(values, [quantile, 1 - quantile]).tolist() if values.size else (0.0, 1.0)
            margin = _MARGIN * (high - low) or max(0.5, 1e-3 * abs(low))  # for constant values
            limits.append((low - margin, high + margin))
        return dataclasses.replace(self, limits=np.array(limits))

    def name(self, channel: int) -> str:
        """Returns the name as plain text."""
        return plain_text(self.names[channel]) if self.names else f"channel {channel}"

    def unit(self, channel: int) -> str:
        """Returns the unit as plain text; "" for a channel without a unit."""
        return plain_text(self.units[channel]) if self.units else "data units"

    def label(self, channel: int) -> str:
        """Returns the name with the unit, for axes and color bars."""
        unit = self.unit(channel)
        return f"{self.name(channel)} ({unit})" if unit else self.name(channel)

    def axis_label(self, channels: Sequence[int]) -> str:
        """Returns the label of an axis that several channels of one unit share."""
        unit = self.unit(channels[0])
        return self.label(channels[0]) if len(channels) == 1 else f"value ({unit})" if unit else "value"

    def range(self, channels: Sequence[int]) -> tuple[float, float]:
        """Returns the ends of an axis that several channels share."""
        assert self.limits is not None
        limits = self.limits[list(channels)]
        return float(limits.min()), float(limits.max())

    def share_axis(self, most: int) -> bool:
        """Whether one axis suits all channels: at most `most`, with one unit, each spanning at least a tenth of the axis."""
        assert self.limits is not None
        spans = np.ptp(self.limits, axis=1)
        return len(spans) <= most and len(set(self.units)) < 2 and not (spans < 0.1 * np.ptp(self.limits)).any()

    def share_outside(self, x: np.ndarray) -> float:
        """Returns the share of values in x [n, *spatial, C] outside the limits."""
        assert self.limits is not None
        low, high = self.limits.T
        return float(((x < low) | (x > high)).mean())

    def colors(self, channel: int) -> tuple[str, float, float]:
        """Returns (color map, low, high): symmetric about 0 if each sign covers more than a tenth of the limits."""
        assert self.limits is not None
        low, high = self.limits[channel].tolist()
        if min(-low, high) <= 0.1 * (high - low):
            return "viridis", low, high
        return "RdBu_r", -max(-low, high), max(-low, high)


UNKNOWN = Channels()  # numbers as names, and limits that suit each picture


def plain_text(text: Any, limit: int = 24) -> str:
    """Returns one line with at most `limit` characters, escaped so that Matplotlib finds no math in it."""
    text = " ".join(str(text).split())
    return (text if len(text) <= limit else text[: limit - 3] + "...").replace("$", r"\$")


def to_plotted(x: Any) -> np.ndarray:
    """Converts x to float64, with NaN in place of values that are not finite."""
    x = np.asarray(x, np.float64)
    return np.where(np.abs(x) < 1e300, x, np.nan)  # beyond 1e300, differences of two values may be infinite

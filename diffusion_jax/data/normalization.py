"""Standardization of float data: constants per channel, and a source with standardized values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer

from diffusion_jax.config import check, resolve
from diffusion_jax.data.sources import DerivedSource, Progress, Source
from diffusion_jax.errors import DataError
from diffusion_jax.metrics.of_arrays import relative_rounding

_MAX_FLOAT32_RATIO = 1000  # offset / scale; float32 then has 14 of its 24 bits left for the scale
_RANGE_MARGIN = 0.1  # conditions may exceed the training range by this share without a note
_BLOCK = 256  # examples that are read at a time while the statistics are computed

_Values = TypeVar("_Values", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """x = (data - offset) / scale for each channel: offset and scale, tuples of C numbers in data units.

    low, high: the training range, for conditions only; () if unknown; used only for notes.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...] = dataclasses.field(default=(), compare=False)
    high: tuple[float, ...] = dataclasses.field(default=(), compare=False)

    @property
    def data_dtype(self) -> np.dtype:
        """The dtype of data units: float32, or float64 if an offset is more than 1000 times its scale."""
        large = np.any(np.abs(self.offset) > _MAX_FLOAT32_RATIO * np.abs(self.scale))
        return np.dtype(np.float64 if large else np.float32)

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Converts data [n, *spatial, C] to float32 x. Computes in float64, because float32 would round a large offset."""
        x = np.subtract(data, np.asarray(self.offset), dtype=np.float64)
        x /= np.asarray(self.scale)
        return x.astype(np.float32)

    def invert(self, x: _Values) -> _Values:
        """Converts x [n, *spatial, C] to data units: `data_dtype`, or float64 for a float64 x.

        If `data_dtype` is float64, the result is a NumPy array, even for a jax array. Traced arrays keep their dtype.
        """
        dtype = np.result_type(self.data_dtype, x.dtype)
        if isinstance(x, np.ndarray) or (self.data_dtype == np.float64 and not isinstance(x, Tracer)):
            # float64, because float32 products would be rounded once more.
            data = np.asarray(x, np.float64) * np.asarray(self.scale) + np.asarray(self.offset)
            return cast(_Values, data.astype(dtype))
        return x * np.asarray(self.scale, x.dtype) + np.asarray(self.offset, x.dtype)

    def describe_outside(self, conditions: np.ndarray) -> str:
        """Returns a note about conditions [N, ..., C] outside of [low, high] widened by a tenth; "" if none is outside."""
        if not self.low:
            return ""
        low, high = np.asarray(self.low), np.asarray(self.high)
        margin = _RANGE_MARGIN * (high - low)
        excess = np.maximum(low - margin - conditions, conditions - high - margin).reshape(len(conditions), -1)
        rows = np.flatnonzero((excess > 0).any(axis=1))
        if not rows.size:
            return ""
        position = int(np.nanargmax(excess[rows[0]]))
        value, entry = conditions[rows[0]].reshape(-1)[position], position % len(low)
        return (
            f"{rows.size:,} of {len(conditions):,} conditions are far outside the training data; samples may be noise: "
            f"condition {rows[0]} has {value:g} at entry {entry}, and the training data have {low[entry]:g} to "
            f"{high[entry]:g}; use conditions in this range"
        )

    def to_json(self) -> dict[str, list[float]]:
        """Returns the lists that data.json stores."""
        return {name: list(values) for name, values in dataclasses.asdict(self).items() if values}

    @classmethod
    def from_json(cls, stored: Mapping[str, Sequence[float]]) -> Normalization:
        """Inverts `to_json`."""
        return cls(**{name: tuple(map(float, values)) for name, values in stored.items()})


def to_model_units(data: np.ndarray, normalization: Normalization | None) -> np.ndarray:
    """Converts data [n, *spatial, C] to float32 x; without a normalization the numbers are unchanged."""
    return data.astype(np.float32) if normalization is None else normalization.apply(data)


def to_data_units(x: _Values, normalization: Normalization | None) -> _Values:
    """Converts x [n, *spatial, C] to data units; without a normalization x is unchanged."""
    return x if normalization is None else normalization.invert(x)


# The normalization of each float array in a source, by name: "x" and "condition". Other arrays are used unchanged.
Normalizations = Mapping[str, Normalization]


class Normalized(DerivedSource):
    """A source with float32, standardized "x" and "condition"; other arrays are unchanged.

    A condition is 0 where "condition_missing" is True.

    normalizations: by array name; an array without a normalization is only converted to float32.
    bounded: names of arrays that must lie in [-1, 1] after normalization, because limits were given.
    """

    def __init__(self, source: Source, normalizations: Normalizations, bounded: Iterable[str] = ()):
        super().__init__(source)
        self.normalizations, self._bounded = dict(normalizations), tuple(bounded)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads and standardizes examples. Raises: DataError for values that are not finite, or outside the limits."""
        batch = dict(self.source.read(indices))
        for name in [name for name in ("x", "condition") if name in batch]:
            values, x = batch[name], to_model_units(batch[name], self.normalizations.get(name))
            if name == "condition" and "condition_missing" in batch:
                x[batch["condition_missing"]] = 0
            _check_finite(name, x, indices)
            if name in self._bounded and (outside := np.argwhere(np.abs(x) > 1 + 1e-6)).size:  # more than rounding
                value = values[tuple(outside[0])]
                raise DataError(
                    f"example {indices[outside[0, 0]]} has the value {value:g}, outside data.limits; widen them"
                )
            batch[name] = x
        return batch


def _check_finite(name: str, values: np.ndarray, indices: Sequence[int] | np.ndarray) -> None:
    """Raises DataError for the first of n examples with values that are not finite."""
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        what = "" if name == "x" else f" in its {name}"
        advice = "" if name == "x" else ", or mark it in the array condition_missing, bool [N]"
        raise DataError(
            f"example {indices[bad[0, 0]]} has values that are not finite{what}; remove or repair it{advice}"
        )


def find_normalizations(
    config: Mapping, source: Source, progress: Progress = lambda sizes, total: sizes
) -> Normalizations:
    """Computes the normalizations that `config.data` describes, from the source of the training split.

    `data.normalization` applies to float data: auto standardizes each channel by its mean and standard deviation, in one pass
    over the source; limits maps `data.limits` to [-1, 1]; none does nothing. auto and limits also standardize conditions.

    progress: called only if the source is read in a pass.
    Raises: ConfigError for settings that contradict each other; DataError for values that are not finite, a constant channel,
    or conditions that are all missing.
    """
    config = resolve({"data": config})["data"]
    check({"data": config}, "data")
    mode, first, found = config["normalization"], source.read([0]), dict[str, Normalization]()
    if mode == "none":
        return found
    if mode == "limits":
        (low, high), channels = config["limits"], first["x"].shape[-1]
        found["x"] = Normalization(((low + high) / 2,) * channels, ((high - low) / 2,) * channels)
    names = [name for name in ("x", "condition") if name in first and name not in found]
    totals: dict[str, _Totals] = {}

    def add(start):
        indices = np.arange(start, min(start + _BLOCK, len(source)))
        batch = source.read(indices)
        for name in names:
            values, rows = np.asarray(batch[name], np.float64), indices
            if name == "condition" and "condition_missing" in batch:
                given = ~batch["condition_missing"]
                values, rows = values[given], rows[given]
            _check_finite(name, values, rows)
            if len(values):
                totals.setdefault(name, _Totals(batch[name].dtype)).add(values.reshape(-1, values.shape[-1]))
        return len(indices)

    for _ in progress(map(add, range(0, len(source), _BLOCK)), len(source)) if names else ():
        pass
    if names and names[-1] not in totals:
        raise DataError("condition_missing is True for every example; remove the conditions from the data")
    return found | {name: _standardization(name, total) for name, total in totals.items()}


class _Totals:
    """Running mean and sum of squared deviations, by a method that loses no digits for a large mean (Chan et al. 1979).

    low, high: the range of the values. dtype: the dtype before conversion to float64.
    """

    def __init__(self, dtype: np.dtype):
        self.dtype, self.count, self.mean, self.squares = dtype, 0, np.zeros(1), np.zeros(1)
        self.low, self.high = np.full(1, np.inf), np.full(1, -np.inf)

    def add(self, values: np.ndarray) -> None:
        """Adds values, float64 [rows, C], to the totals."""
        rows, mean = len(values), values.mean(axis=0)
        squares, difference = np.square(values - mean).sum(axis=0), mean - self.mean
        total = self.count + rows
        self.squares = self.squares + squares + np.square(difference) * (self.count * rows / total)
        self.mean = self.mean + difference * (rows / total)
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        self.count = total


def _standardization(name: str, total: _Totals) -> Normalization:
    """Returns the normalization to mean 0, deviation 1. Raises: DataError for channels that are constant up to rounding."""
    mean, deviation = total.mean, np.sqrt(total.squares / total.count)
    constant = np.flatnonzero(deviation <= relative_rounding(total.dtype) * np.maximum(-total.low, total.high))
    if constant.size:
        channel = int(constant[0])
        what = f"channel {channel} of the data" if name == "x" else f"entry {channel} of the condition"
        advice = "remove it, or use data.normalization=limits or none" if name == "x" else "remove it"
        raise DataError(
            f"{what} is constant up to rounding ({mean[channel]:g} everywhere), so it cannot be standardized; {advice}"
        )
    limits = (total.low, total.high) if name == "condition" else ()
    return Normalization(*(tuple(values.tolist()) for values in (mean, deviation, *limits)))

"""The metrics of samples of continuous data by name: which suit the data, what they mean, and their values.

Each metric is 0, or has a stated value, for equal laws, and comes with its standard error. `array_metrics` and
`array_statistics` define them; here they are computed of standardized data, with bounds on time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.data import Normalization
from diffusion_jax.evaluation import array_metrics, array_statistics
from diffusion_jax.evaluation.array_metrics import MarginalHistograms
from diffusion_jax.evaluation.array_sets import MAX_EXAMPLES, even_indices, select
from diffusion_jax.evaluation.array_statistics import Autocorrelation, MeanAndCovariance, Measurement, PowerSpectrum
from diffusion_jax.evaluation.example_blocks import LazyExamples
from diffusion_jax.evaluation.metrics import Neighbors
from diffusion_jax.evaluation.named_metrics import memorization_report

__all__ = [
    "ARRAY_METRICS",
    "DEFINITIONS",
    "FEATURE_METRICS",
    "MIN_EXAMPLES",
    "ArrayComparison",
    "compare_arrays",
    "suitable_metrics",
    "unit_of_standardized",
]

_GROUPS = 20  # of the jackknives
# The smallest number of examples in each set, by metric.
MIN_EXAMPLES = {
    "energy_distance": 4,
    "sliced_wasserstein": 2 * _GROUPS,
    "marginal_histograms": 2 * _GROUPS,
    "mean_and_covariance": 2,
    "power_spectrum": 2,
    "autocorrelation": 2,
    "memorization": 2,
}
ARRAY_METRICS = tuple(MIN_EXAMPLES)
# Metrics of `named_metrics` for the user's own features of arrays.
FEATURE_METRICS = ("fid", "kid", "precision_recall", "density_coverage")
_AXES = {
    "power_spectrum": (1, 2, 3),
    "autocorrelation": (1,),
}  # spatial axes that a metric needs; others take any number
DEFINITIONS = {
    "energy_distance": "2 E|X - Y| - E|X - X'| - E|Y - Y'| of standardized data, unbiased: 0 for equal laws, within "
    "a few same_law_std",
    "sliced_wasserstein": "(mean over directions of W_2^2)^(1/2) of standardized data; for equal laws about same_law",
    "marginal_histograms": "total variation of the histograms of a channel, the largest of all channels; for equal laws "
    "about same_law",
    "mean_and_covariance": "samples minus data, of standardized channels at one position, where |z| is largest",
    "power_spectrum": "samples / data - 1, at the frequency and channel where |z| is largest",
    "autocorrelation": "samples minus data, at the lag and channel where |z| is largest",
    "memorization": "distances of samples to the nearest examples, Euclidean, of standardized data",
}
_ENERGY_EXAMPLES, _ENERGY_PRODUCTS = 10_000, 3e11  # examples of a set; products of two numbers in all distances
_NEIGHBORS, _NEIGHBOR_PRODUCTS, _NEIGHBOR_BYTES = 5, 1e13, 2**31
_MAX_COVARIANCE_CHANNELS = 512
_BINS, _PROJECTIONS, _SLICED_EXAMPLES = 50, 256, 20_000
_Examples = np.ndarray | LazyExamples


def suitable_metrics(spatial_axes: int, has_features: bool) -> tuple[str, ...]:
    """The metrics for arrays with so many spatial axes. has_features: whether the user gives a feature extractor."""
    metrics = tuple(name for name in ARRAY_METRICS if spatial_axes in _AXES.get(name, (spatial_axes,)))
    return metrics + (FEATURE_METRICS if has_features else ())


def unit_of_standardized(normalization: Normalization | None) -> str:
    """The unit of standardized data in reports."""
    return "units of the data" if normalization is None else "(data - offset) / scale, as data.json of the run has them"


class ArrayComparison(NamedTuple):
    """values: the metrics and their settings, as a record has them. The other fields: None if they are not measured.

    The statistics are in the units of the data; pairs are (reference, samples). neighbors: among the reference, of the
    samples `neighbor_samples` [m].
    """

    values: dict[str, Any]
    histograms: MarginalHistograms | None = None
    moments: tuple[MeanAndCovariance, MeanAndCovariance] | None = None
    spectra: tuple[PowerSpectrum, PowerSpectrum] | None = None
    autocorrelations: tuple[Autocorrelation, Autocorrelation] | None = None
    neighbors: Neighbors | None = None
    neighbor_samples: np.ndarray | None = None


def compare_arrays(
    key: jax.Array,
    reference: _Examples,
    samples: _Examples,
    metric_names: Sequence[str],
    normalization: Normalization | None = None,
    periodic: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> ArrayComparison:
    """The metrics of ARRAY_METRICS with these names.

    reference, samples: standardized [n, *spatial, C]. normalization: of both, None if they are in the units of the data.
    periodic: whether series are periodic. log: called with notes. Raises: ValueError for sets that cannot be compared.
    """
    values: dict[str, Any] = {}
    found: dict[str, Any] = {}
    if "energy_distance" in metric_names:
        values |= _energy_distance(reference, samples)
    if "sliced_wasserstein" in metric_names:
        values |= _sliced_wasserstein(key, reference, samples)
    if "marginal_histograms" in metric_names:
        # Samples beyond the range of the reference, which could widen the bins at will, do not count.
        limits = array_metrics.common_range(reference)
        histograms = array_metrics.marginal_histograms(reference, samples, _BINS, limits=limits, groups=_GROUPS)
        values |= _histogram_values(histograms)
        found["histograms"] = _histograms_of_data(histograms, normalization)
    if "mean_and_covariance" in metric_names:
        # Time and memory grow as the square of the number of channels.
        channels = even_indices(reference.shape[-1], _MAX_COVARIANCE_CHANNELS)
        one, other = (array_statistics.mean_and_covariance(_with_channels(x, channels)) for x in (reference, samples))
        values |= _moment_values(one, other, channels)
        found["moments"] = tuple(_moments_of_data(moments, normalization, channels) for moments in (one, other))
    if "power_spectrum" in metric_names:
        pair = [array_statistics.power_spectrum(x) for x in (reference, samples)]
        values |= _spectrum_values(*pair)
        found["spectra"] = tuple(_spectrum_of_data(spectrum, normalization) for spectrum in pair)
    if "autocorrelation" in metric_names:
        try:
            pair = [array_statistics.autocorrelation(x, periodic=periodic) for x in (reference, samples)]
        except ValueError as error:  # a constant channel, which the other metrics allow
            log(f"Note: no autocorrelation: {error}.")
        else:
            values |= _autocorrelation_values(*pair)
            found["autocorrelations"] = tuple(pair)
    if "memorization" in metric_names:
        values["memorization"], found["neighbors"], found["neighbor_samples"] = _memorization(reference, samples)
    return ArrayComparison(values, **found)


def _energy_distance(reference: _Examples, samples: _Examples) -> dict[str, Any]:
    """Of at most 10,000 examples, and fewer of large ones, because the time grows as the square of their number."""
    dimensions = math.prod(reference.shape[1:])
    count = int(min(_ENERGY_EXAMPLES, max(math.sqrt(_ENERGY_PRODUCTS / dimensions), 500)))
    sets = [select(x, count) for x in (reference, samples)]
    found = array_metrics.energy_distance(*sets)
    return {
        "energy_distance": found.value,
        "energy_distance_standard_error": found.standard_error,
        "energy_distance_same_law_std": found.same_law_std,
        "energy_distance_num_examples": [len(x) for x in sets],
    }


def _sliced_wasserstein(key: jax.Array, reference: _Examples, samples: _Examples) -> dict[str, Any]:
    """Of at most 20,000 examples."""
    one, other = (select(x, _SLICED_EXAMPLES) for x in (reference, samples))
    found = array_metrics.sliced_wasserstein(key, one, other, projections=_PROJECTIONS, groups=_GROUPS)
    return {
        "sliced_wasserstein": found.value,
        "sliced_wasserstein_standard_error": found.standard_error,
        "sliced_wasserstein_same_law": found.same_law,
        "sliced_wasserstein_same_law_std": found.same_law_std,
        "sliced_wasserstein_projections": _PROJECTIONS,
        "sliced_wasserstein_num_examples": [len(one), len(other)],
    }


def _histogram_values(histograms: MarginalHistograms) -> dict[str, Any]:
    distance, errors = histograms.distance
    channel = int(np.argmax(distance))
    return {
        "histogram_distance": float(distance[channel]),
        "histogram_distance_standard_error": float(errors[channel]),
        "histogram_distance_same_law": float(histograms.same_law[channel]),
        "histogram_distance_channel": channel,
        "histogram_distance_bins": _BINS,
    }


def _histograms_of_data(histograms: MarginalHistograms, normalization: Normalization | None) -> MarginalHistograms:
    if normalization is None:
        return histograms
    offset, scale = (np.asarray(part)[:, None] for part in (normalization.offset, normalization.scale))
    return histograms._replace(edges=histograms.edges * scale + offset)


def _with_channels(x: _Examples, channels: np.ndarray) -> _Examples:
    if len(channels) == x.shape[-1]:
        return x
    return LazyExamples(lambda rows: x[rows][..., channels], (*x.shape[:-1], len(channels)))


def _moment_values(one: MeanAndCovariance, other: MeanAndCovariance, channels: np.ndarray) -> dict[str, Any]:
    mean = _deviation("mean", one.mean, other.mean)
    index = mean.pop("index")[0]
    covariance = _deviation("covariance", one.covariance, other.covariance)
    pair = covariance.pop("index")
    count = len(channels) * (len(channels) + 3) // 2  # of different numbers
    return {
        **mean,
        "mean_channel": int(channels[index]),
        **covariance,
        "covariance_channels": [int(channels[i]) for i in pair],
        "mean_and_covariance_z_limit": _largest_z(count),
        "mean_and_covariance_num_channels": len(channels),
    }


def _moments_of_data(
    moments: MeanAndCovariance, normalization: Normalization | None, channels: np.ndarray
) -> MeanAndCovariance:
    if normalization is None:
        return moments
    offset, scale = (np.asarray(part)[channels] for part in (normalization.offset, normalization.scale))
    products = np.outer(scale, scale)
    mean, covariance = moments
    return MeanAndCovariance(
        Measurement(mean.value * scale + offset, mean.standard_error * np.abs(scale)),
        Measurement(covariance.value * products, covariance.standard_error * np.abs(products)),
    )


def _spectrum_values(one: PowerSpectrum, other: PowerSpectrum) -> dict[str, Any]:
    values = _deviation("power_spectrum", one, other, relative=True)
    shell, channel = values.pop("index")
    return {
        **values,
        "power_spectrum_frequency": float(one.frequencies[shell]),
        "power_spectrum_channel": channel,
        "power_spectrum_z_limit": _largest_z(one.value.size),
    }


def _spectrum_of_data(spectrum: PowerSpectrum, normalization: Normalization | None) -> PowerSpectrum:
    if normalization is None:
        return spectrum
    squares = np.square(normalization.scale)
    return spectrum._replace(value=spectrum.value * squares, standard_error=spectrum.standard_error * squares)


def _autocorrelation_values(one: Autocorrelation, other: Autocorrelation) -> dict[str, Any]:
    values = _deviation("autocorrelation", one, other)
    lag, channel = values.pop("index")
    return {
        **values,
        "autocorrelation_lag": int(one.lags[lag]),
        "autocorrelation_channel": channel,
        "autocorrelation_z_limit": _largest_z(max(one.value[1:].size, 1)),
    }


def _deviation(name: str, reference: Any, samples: Any, relative: bool = False) -> dict[str, Any]:
    """The deviation of the samples where its |z| is largest, with its standard error, z-score and index."""
    z = array_statistics.z_scores(samples, reference)
    index = np.unravel_index(int(np.argmax(np.abs(np.nan_to_num(z, nan=0.0)))), z.shape)
    (x, x_error), (y, y_error) = (
        (float(part.value[index]), float(part.standard_error[index])) for part in (reference, samples)
    )
    deviation, error = y - x, math.hypot(x_error, y_error)
    if relative:
        deviation, error = (y / x - 1, math.hypot(y_error, x_error * y / x) / x) if x else (math.inf, math.inf)
    values = {f"{name}_deviation": deviation, f"{name}_deviation_standard_error": error, f"{name}_z": float(z[index])}
    # JSON has no infinity: there is none unless a number of the data is 0, or has no error.
    finite: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return finite | {"index": tuple(map(int, index))}


def _largest_z(count: int) -> float:
    """What the largest |z| of `count` independent z-scores exceeds with a probability of 5% if the laws are equal.

    z-scores that depend on each other exceed it less often.
    """
    return NormalDist().inv_cdf((1 + 0.95 ** (1 / count)) / 2)


def _memorization(reference: _Examples, samples: _Examples) -> tuple[dict[str, Any], Neighbors, np.ndarray]:
    """The report, the neighbors, and which samples they are of; of at most 50,000 examples, and fewer of large ones."""
    dimensions = math.prod(reference.shape[1:])
    count = min(MAX_EXAMPLES, max(math.sqrt(_NEIGHBOR_PRODUCTS / dimensions), 1000), _NEIGHBOR_BYTES / (4 * dimensions))
    count = max(int(count), MIN_EXAMPLES["memorization"])
    rows = [even_indices(len(x), count) for x in (reference, samples)]
    one, other = (np.asarray(x[i]).reshape(len(i), -1) for x, i in zip((reference, samples), rows, strict=True))
    report, neighbors = memorization_report(one, other, _NEIGHBORS)
    report |= {"num_reference": len(one), "num_samples": len(other)}
    return report, neighbors._replace(indices=rows[0][neighbors.indices]), rows[1]

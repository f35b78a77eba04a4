"""The metrics of samples by name: the sizes of sets that each needs, the names in reports, what they mean, and their values.

Images have metrics of features. Other arrays have metrics without features, which `array_metrics` and `array_statistics`
define; here they are computed of standardized data, with bounds on time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.data import Normalization
from diffusion_jax.evaluation import array_metrics, array_statistics, metrics
from diffusion_jax.evaluation.array_metrics import MarginalHistograms
from diffusion_jax.evaluation.array_statistics import Autocorrelation, MeanAndCovariance, PowerSpectrum
from diffusion_jax.evaluation.example_sets import MAX_EXAMPLES, LazyExamples, even_indices, select
from diffusion_jax.evaluation.features import FeatureExtractor, SetFeatures
from diffusion_jax.evaluation.metrics import Neighbors

__all__ = [
    "ARRAY_METRICS",
    "ARRAY_METRICS_OF_FEATURES",
    "DEFINITIONS",
    "METRICS",
    "MIN_EXAMPLES",
    "ArrayComparison",
    "compare_arrays",
    "compute_metrics",
    "memorization_report",
    "reported_name",
    "suitable_metrics",
    "unavailable_metrics",
]

_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020
_IS_SPLIT_SIZE = 5000
_MANIFOLD_K, _DENSITY_K = 3, 5
_GROUPS = 20  # of the jackknives
# Metrics of arrays that have no features.
_ENERGY_EXAMPLES, _ENERGY_PRODUCTS = 10_000, 3e11  # examples of a set; products of two numbers in all distances
_NEIGHBORS, _NEIGHBOR_PRODUCTS, _NEIGHBOR_BYTES = 5, 1e13, 2**31
_MAX_COVARIANCE_CHANNELS = 512
_BINS, _PROJECTIONS, _SLICED_EXAMPLES = 50, 256, 20_000
_Examples = np.ndarray | LazyExamples

# The smallest number of examples in each set, by metric.
MIN_EXAMPLES = {
    "fid": 2,
    "sfid": 2,
    "kid": 8,
    "is": 1,
    "precision_recall": _MANIFOLD_K + 1,
    "density_coverage": _DENSITY_K + 1,
    "memorization": 2,
    "energy_distance": 4,
    "sliced_wasserstein": 2 * _GROUPS,
    "marginal_histograms": 2 * _GROUPS,
    "mean_and_covariance": 2,
    "power_spectrum": 2,
    "autocorrelation": 2,
}
METRICS = ("fid", "sfid", "kid", "is", "precision_recall", "density_coverage", "memorization")  # of images
ARRAY_METRICS = (
    "energy_distance",
    "sliced_wasserstein",
    "marginal_histograms",
    "mean_and_covariance",
    "power_spectrum",
    "autocorrelation",
    "memorization",
)
ARRAY_METRICS_OF_FEATURES = ("fid", "kid", "precision_recall", "density_coverage")  # with the user's own features
_AXES = {
    "power_spectrum": (1, 2, 3),
    "autocorrelation": (1,),
}  # spatial axes that a metric needs; others take any number
_FRECHET = "distance of Gaussians with the mean and covariance of the features of the two sets; 0 for equal ones"
# What the numbers of a record mean, by their reported names without the name of a resize.
DEFINITIONS = {
    "fid": f"Frechet Inception distance: {_FRECHET}. Lower is better; it falls with the number of samples",
    "frechet_distance": f"{_FRECHET}. Lower is better; it falls with the number of samples",
    "sfid": f"the same for spatial features of Inception: {_FRECHET}",
    "spatial_frechet_distance": f"of spatial features: {_FRECHET}",
    "kid": "kernel Inception distance: unbiased squared MMD of the features, with a cubic kernel; about 0 for equal laws",
    "kernel_distance": "unbiased squared MMD of the features, with a cubic kernel; about 0 for equal laws",
    "inception_score": "exp of the mean divergence of Inception's classes of an image from those of all; higher is better",
    "precision": "share of samples within the manifold of the reference (nearest-neighbor balls): fidelity",
    "recall": "share of reference images within the manifold of the samples: diversity",
    "density": "mean number of reference balls that hold a sample, over k: fidelity, 1 for equal laws",
    "coverage": "share of reference images whose ball holds a sample: diversity",
    "close_share": "share of samples nearer to a reference image than 99% of the reference images are to each other: about "
    "0.01 for new images, near 1 for copies",
    "memorization": "distances of samples to the nearest examples, Euclidean: of the features of images, or of standardized "
    "arrays",
    "energy_distance": "2 E|X - Y| - E|X - X'| - E|Y - Y'| of standardized data, unbiased: 0 for equal laws, within "
    "a few same_law_std",
    "sliced_wasserstein": "(mean over directions of W_2^2)^(1/2) of standardized data; for equal laws about same_law",
    "marginal_histograms": "total variation of the histograms of a channel, the largest of all channels; for equal laws "
    "about same_law",
    "mean_and_covariance": "samples minus data, of standardized channels at one position, where |z| is largest",
    "power_spectrum": "samples / data - 1, at the frequency and channel where |z| is largest",
    "autocorrelation": "samples minus data, at the lag and channel where |z| is largest",
}


def reported_name(metric: str, extractor: FeatureExtractor) -> str:
    """The name of a metric in reports.

    FID, sFID and KID are names for the published Inception only, and a resize other than TensorFlow 1's is part of the name.
    """
    suffix = "" if extractor.resize in (None, "tf1") else f"_{extractor.resize}"
    substitutes = {"fid": "frechet_distance", "sfid": "spatial_frechet_distance", "kid": "kernel_distance"}
    names = {"is": "inception_score"} if extractor.published else substitutes
    return names.get(metric, metric) + suffix


def unavailable_metrics(
    statistics_only: bool, has_spatial: bool, extractor: FeatureExtractor, metric_names: Sequence[str]
) -> dict[str, str]:
    """The reason for each of the metrics that cannot be computed.

    statistics_only: whether the reference has no images. has_spatial: whether it has statistics of spatial features.
    """
    reasons = {}
    if extractor.name != "inception":
        reasons["sfid"] = "only Inception has spatial features"
    elif not has_spatial:
        reasons["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
    if not extractor.published:
        reasons["is"] = "it needs the classes of the published Inception"
    if statistics_only:
        others = ("kid", "precision_recall", "density_coverage", "memorization")
        reasons |= dict.fromkeys(others, "the reference has statistics only")
    return {metric: reasons[metric] for metric in metric_names if metric in reasons}


def compute_metrics(
    reference: SetFeatures,
    samples: SetFeatures,
    extractor: FeatureExtractor,
    metric_names: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The metrics by their reported names, with the options on which they depend.

    metric_names: of METRICS without the `unavailable_metrics`. log: called with notes about the results.
    Raises: ValueError for features that cannot be compared.
    """
    results: dict[str, Any] = {}
    pools: tuple[Any, Any] = reference.pool, samples.pool  # None only without metrics that need them

    def add(metric: str, value: float, **options) -> None:
        name = reported_name(metric, extractor)
        results[name] = value
        results.update({f"{name}_{option}": option_value for option, option_value in options.items()})

    if "fid" in metric_names:
        add("fid", metrics.frechet_distance(reference.moments, samples.moments))
        count, dimensions = samples.moments.count, len(samples.moments.mean)
        if count <= dimensions:
            log(
                f"Note: {count:,} samples for {dimensions} dimensions: the distance is larger than with more samples; "
                "compare it at equal numbers of samples only."
            )
    if "sfid" in metric_names:
        assert reference.spatial is not None and samples.spatial is not None
        add("sfid", metrics.frechet_distance(reference.spatial, samples.spatial))
    if "is" in metric_names:
        assert extractor.head is not None
        score = metrics.inception_score(pools[1] @ extractor.head, _IS_SPLIT_SIZE)
        add("is", score.mean, std=score.std, split_size=_IS_SPLIT_SIZE)
    if "kid" in metric_names:
        # A quarter of small sets, because the variance over subsets that are nearly a whole set is not informative.
        size = min(_KID_SUBSET_SIZE, min(map(len, pools)) // 4)
        kid = metrics.kid(*pools, _KID_SUBSETS, size, _KID_SEED)
        settings = {"subsets": _KID_SUBSETS, "subset_size": size, "seed": _KID_SEED}
        add("kid", kid.mean, standard_error=kid.standard_error, std=kid.std, **settings)
    if "precision_recall" in metric_names:
        shares = metrics.precision_recall(*pools, _MANIFOLD_K)
        results |= shares._asdict() | {"precision_recall_k": _MANIFOLD_K}
    if "density_coverage" in metric_names:
        shares = metrics.density_coverage(*pools, _DENSITY_K)
        results |= shares._asdict() | {"density_coverage_k": _DENSITY_K}
    return results


def memorization_report(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[dict[str, float], Neighbors]:
    """(a report of whether samples are copies of reference images, the samples' k nearest neighbors).

    reference, samples: features [N, D]. close_distance is the 1% quantile of the distances between reference images and their
    nearest others; close_share is the share of samples at most that far from a reference image: about 0.01 for new images,
    near 1 for copies.
    """
    neighbors = metrics.nearest_neighbors(reference, samples, min(k, len(reference)))
    reference_distances = metrics.nearest_neighbors(reference, reference, others=True).distances[:, 0]
    distinct = reference_distances[reference_distances > 0]  # duplicates do not show which distances are small
    limit = np.quantile(distinct, 0.01) if distinct.size else 0.0
    report = {
        "nearest_distance_median": float(np.median(neighbors.distances[:, 0])),
        "reference_nearest_distance_median": float(np.median(reference_distances)),
        "close_distance": float(limit),
        "close_share": float(np.mean(neighbors.distances[:, 0] <= limit)),
    }
    return report, neighbors


# ---- Arrays


def suitable_metrics(spatial_axes: int, has_features: bool) -> tuple[str, ...]:
    """The metrics for arrays with so many spatial axes. has_features: whether the user gives a feature extractor."""
    metrics = tuple(name for name in ARRAY_METRICS if spatial_axes in _AXES.get(name, (spatial_axes,)))
    return metrics + (ARRAY_METRICS_OF_FEATURES if has_features else ())


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
    pair, num_channels = (reference, samples), reference.shape[-1]
    offset, scale = np.zeros(num_channels), np.ones(num_channels)
    if normalization is not None:
        offset, scale = np.asarray(normalization.offset), np.asarray(normalization.scale)
    if "energy_distance" in metric_names:
        # The time grows as the square of the number of examples.
        count = int(min(_ENERGY_EXAMPLES, max(math.sqrt(_ENERGY_PRODUCTS / math.prod(reference.shape[1:])), 500)))
        sets = [select(x, count) for x in pair]
        values |= _named("energy_distance", array_metrics.energy_distance(*sets))
        values["energy_distance_num_examples"] = [len(x) for x in sets]
    if "sliced_wasserstein" in metric_names:
        sets = [select(x, _SLICED_EXAMPLES) for x in pair]
        distance = array_metrics.sliced_wasserstein(key, *sets, projections=_PROJECTIONS, groups=_GROUPS)
        values |= _named("sliced_wasserstein", distance)
        values["sliced_wasserstein_projections"] = _PROJECTIONS
        values["sliced_wasserstein_num_examples"] = [len(x) for x in sets]
    if "marginal_histograms" in metric_names:
        # Samples beyond the range of the reference, which could widen the bins at will, do not count.
        limits = array_metrics.value_range(reference)
        histograms = array_metrics.marginal_histograms(*pair, _BINS, limits=limits, groups=_GROUPS)
        distances, errors = histograms.distance
        channel = int(np.argmax(distances))
        values["histogram_distance"] = float(distances[channel])
        values["histogram_distance_standard_error"] = float(errors[channel])
        values["histogram_distance_same_law"] = float(histograms.same_law[channel])
        values |= {"histogram_distance_channel": channel, "histogram_distance_bins": _BINS}
        found["histograms"] = histograms._replace(edges=histograms.edges * scale[:, None] + offset[:, None])
    if "mean_and_covariance" in metric_names:
        # Time and memory grow as the square of the number of channels.
        channels = even_indices(num_channels, _MAX_COVARIANCE_CHANNELS)
        shape = (*reference.shape[1:-1], len(channels))
        sets = [LazyExamples(lambda rows, x=x: x[rows][..., channels], (len(x), *shape)) for x in pair]
        moments = [array_statistics.mean_and_covariance(x) for x in sets]
        mean, (channel,) = _deviation("mean", [each.mean for each in moments])
        covariance, indices = _deviation("covariance", [each.covariance for each in moments])
        values |= mean | covariance
        values["mean_channel"] = int(channels[channel])
        values["covariance_channels"] = [int(channels[i]) for i in indices]
        values["mean_and_covariance_z_limit"] = _largest_z(len(channels) * (len(channels) + 3) // 2)
        values["mean_and_covariance_num_channels"] = len(channels)
        shift, factor = offset[channels], scale[channels]
        found["moments"] = tuple(
            MeanAndCovariance(_rescaled(each.mean, factor, shift), _rescaled(each.covariance, np.outer(factor, factor)))
            for each in moments
        )
    if "power_spectrum" in metric_names:
        spectra = [array_statistics.power_spectrum(x) for x in pair]
        deviation, (shell, channel) = _deviation("power_spectrum", spectra, relative=True)
        values |= deviation
        values["power_spectrum_frequency"] = float(spectra[0].frequencies[shell])
        values["power_spectrum_channel"] = channel
        values["power_spectrum_z_limit"] = _largest_z(spectra[0].value.size)
        found["spectra"] = tuple(_rescaled(each, scale**2) for each in spectra)
    if "autocorrelation" in metric_names:
        try:
            correlations = [array_statistics.autocorrelation(x, periodic=periodic) for x in pair]
        except ValueError as error:  # a constant channel, which the other metrics allow
            log(f"Note: no autocorrelation: {error}.")
        else:
            deviation, (lag, channel) = _deviation("autocorrelation", correlations)
            values |= deviation
            values["autocorrelation_lag"] = int(correlations[0].lags[lag])
            values["autocorrelation_channel"] = channel
            values["autocorrelation_z_limit"] = _largest_z(max(correlations[0].value[1:].size, 1))
            found["autocorrelations"] = tuple(correlations)
    if "memorization" in metric_names:
        values["memorization"], found["neighbors"], found["neighbor_samples"] = _memorization(reference, samples)
    return ArrayComparison(values, **found)


def _named(name: str, distance: NamedTuple) -> dict[str, Any]:
    """{name: value, name_standard_error: ...} of a distance."""
    return {name if field == "value" else f"{name}_{field}": x for field, x in distance._asdict().items()}


def _rescaled(statistic: Any, factor: np.ndarray, shift: Any = 0.0) -> Any:
    """A statistic of factor * x + shift."""
    value, error = statistic.value * factor + shift, statistic.standard_error * np.abs(factor)
    return statistic._replace(value=value, standard_error=error)


def _deviation(name: str, pair: Sequence[Any], relative: bool = False) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(deviation of the samples where its |z| is largest, with its standard error and z-score; the index there).

    pair: the statistic of the reference and of the samples.
    """
    z = array_statistics.z_scores(pair[1], pair[0])
    index = np.unravel_index(int(np.argmax(np.abs(np.nan_to_num(z, nan=0.0)))), z.shape)
    (x, x_error), (y, y_error) = ((float(part.value[index]), float(part.standard_error[index])) for part in pair)
    deviation, error = y - x, math.hypot(x_error, y_error)
    if relative:
        deviation, error = (y / x - 1, math.hypot(y_error, x_error * y / x) / x) if x else (math.inf, math.inf)
    values = {f"{name}_deviation": deviation, f"{name}_deviation_standard_error": error, f"{name}_z": float(z[index])}
    # JSON has no infinity: there is none unless a number of the data is 0, or has no error.
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return finite, tuple(map(int, index))


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

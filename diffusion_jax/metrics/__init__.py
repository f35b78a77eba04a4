"""Metrics that compare samples with a reference: pure functions of arrays, and `METRICS`, which maps config names to them.

`of_features` compares features [N, D] of two sets, and `of_arrays` compares the examples, float arrays [n, *spatial, C].

A metric is a function (reference, samples, options) -> `Result` with an entry in `METRICS`. A new entry needs no change of
the code for records, pictures and reports. The setting `evaluation.metrics` and the option `--metrics` accept the names in
this table, and "module:function" for a user's function.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.functions import find_function
from diffusion_jax.metrics import classifier, of_arrays, of_features
from diffusion_jax.metrics.of_arrays import Curve, LazyExamples, ValueAndError, even_indices, select, subset_indices
from diffusion_jax.metrics.of_features import Moments, Neighbors

MAX_EXAMPLES = 50_000  # limit for a set of arrays, and for the features of images in memory
# The parameters of a user's function that take the labels and conditions of a set.
_CONDITIONS = ("reference_label", "samples_label", "reference_condition", "samples_condition")
_KID_SUBSET_SIZE = 1000
_IS_SPLIT_SIZE = 5000
_FEW_PER_DIMENSION = 10  # with fewer samples per dimension, the bias of the Frechet distance is noticeable
_GROUPS = 20  # for the jackknives
_ENERGY_EXAMPLES, _ENERGY_PRODUCTS = 10_000, 3e11  # limits: examples, multiplications for all distances
_CLASSIFIER_EXAMPLES, _CLASSIFIER_NUMBERS = 4096, 2**23  # limits of each set: examples, numbers
_NEIGHBORS, _NEIGHBOR_PRODUCTS, _NEIGHBOR_BYTES = 5, 1e13, 2**31
_MAX_COVARIANCE_CHANNELS = 512
_BINS, _PROJECTIONS, _SLICED_EXAMPLES = 50, 256, 20_000
_Examples = np.ndarray | LazyExamples


class Options(NamedTuple):
    """The options of a metric, besides the two sets.

    seed: for the directions of `sliced_wasserstein`. normalization: maps standardized examples to data units,
    examples * scale + offset; None if the examples are already in data units. periodic: whether spatial axes are periodic.
    conditions: {parameter: array} for a user's function (`Metric.conditions`), with one row for each example.
    """

    seed: int = 0
    normalization: Any = None
    periodic: bool = False
    conditions: Mapping[str, np.ndarray] = {}

    def units(self, num_channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (offset, scale) for each channel [C]."""
        if self.normalization is None:
            return np.zeros(num_channels), np.ones(num_channels)
        return np.asarray(self.normalization.offset), np.asarray(self.normalization.scale)


class Curves(NamedTuple):
    """A statistic of both sets to draw, with one panel per channel, in data units.

    name: the picture's name. x: float [K], or bin edges [C, K + 1]. reference, samples: the statistic of each set, `value`
    [K, C] and `standard_error`. labels: the labels of the axes. notes: a text for each channel, or (). logarithmic: whether
    both axes are logarithmic.
    """

    name: str
    x: np.ndarray
    reference: ValueAndError | Curve
    samples: ValueAndError | Curve
    labels: tuple[str, str]
    notes: Sequence[str] = ()
    logarithmic: bool = False


class Result(NamedTuple):
    """The result of a metric.

    values: numbers and settings for the record. arrays: statistics of both sets in data units. curves: a picture
    of these statistics. neighbors: the nearest reference examples of the samples with the indices `rows`. note: a text for
    the user.
    """

    values: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = {}
    curves: Curves | None = None
    neighbors: Neighbors | None = None
    rows: np.ndarray | None = None
    note: str = ""


class Metric(NamedTuple):
    """A metric that compares samples with a reference.

    compute: (reference, samples, options) -> Result; `needs` names its inputs:
      moments, spatial: `Moments` of features and of Inception's spatial features. pool: features [N, D].
      logits: Inception's class logits [N, classes]. examples: standardized arrays [n, *spatial, C]; images are not
        standardized, but gray levels of 0 to 255.
      data: the examples in data units, float32, or float64 if an offset is more than 1000 times its scale.
      vectors: the features of images, or the examples for other data.
    minimum: required number of examples in each set. spatial_axes: allowed numbers of spatial axes. names: (the name in
    records for features from the published Inception, the name for other features), to which the keys of `Result.values` are
    appended; None if the keys are complete names. conditions: the parameters of a user's function that take labels or
    conditions, {name: whether it is required}.
    """

    compute: Callable[[Any, Any, Options], Result]
    needs: str
    minimum: int
    spatial_axes: tuple[int, ...] = (0, 1, 2, 3)
    names: tuple[str, str] | None = None
    conditions: Mapping[str, bool] = {}


def find_metric(name: str) -> Metric:
    """Returns the entry of `METRICS` with this name, or a metric for a user's "module:function". Raises: ValueError."""
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise ValueError(f"metrics: {name!r} is unknown; known: {', '.join(METRICS)}, or module:function")
    function = find_function(name, "evaluation.metrics")
    parameters = inspect.signature(function).parameters
    conditions = {key: parameters[key].default is inspect.Parameter.empty for key in _CONDITIONS if key in parameters}
    return Metric(functools.partial(_own_metric, name, function), "data", 1, conditions=conditions)


def _own_metric(name: str, function: Callable, reference: _Examples, samples: _Examples, options: Options) -> Result:
    """Calls function(reference, samples, **conditions) -> a number or {name: number}, with at most 50,000 examples each."""
    sets = (np.asarray(x[subset_indices(len(x), MAX_EXAMPLES)]) for x in (reference, samples))
    value = function(*sets, **options.conditions)
    found = dict(value) if isinstance(value, Mapping) else {name.rpartition(":")[2]: value}
    values = {}
    for key, number in found.items():
        try:
            values[str(key)] = float(number)
        except (TypeError, ValueError):
            values[str(key)] = math.nan
        if not math.isfinite(values[str(key)]):
            raise ValueError(f"{name} returned {key}={number!r}; a metric is a finite number, or {{name: number}}")
        if str(key) in MEANINGS or str(key) in METRICS:
            raise ValueError(f"{name} returned {key}, the name of another metric; choose another name")
    return Result(values)


def reported_name(metric: str, published: bool, resize: str | None = None) -> str:
    """Returns the name of a metric in reports.

    Only the published Inception gives FID, sFID and KID; a resize other than TensorFlow 1's is part of the name.
    """
    names = find_metric(metric).names
    return metric if names is None else names[not published] + ("" if resize in (None, "tf1") else f"_{resize}")


def needs_features(names: Iterable[str], of_images: bool) -> bool:
    """Returns whether any of the metrics needs features. of_images: whether the examples are images."""
    kinds = {find_metric(name).needs for name in names} - {"data", "examples"}
    return bool(kinds if of_images else kinds - {"vectors"})


def choose_metrics(
    requested: Sequence[str] | None, spatial_axes: int, of_images: bool, has_features: bool
) -> tuple[str, ...]:
    """Returns the requested metrics; by default, feature metrics for images and all suitable metrics for other examples.

    spatial_axes: number of the examples' spatial axes. has_features: whether the examples' features are available.
    Raises: ValueError for a requested metric that does not suit the examples.
    """
    suitable = [
        name
        for name, metric in METRICS.items()
        if spatial_axes in metric.spatial_axes and (has_features or not needs_features([name], of_images))
    ]
    for name in requested or ():
        find_metric(name)
        if ":" not in name and name not in suitable:
            what = f"data with {spatial_axes} spatial axes"
            if needs_features([name], of_images):
                what += " and without features=module:function"
            raise ValueError(f"metrics: {name} is not for {what}; use names from {', '.join(suitable)}")
    return tuple(requested or (name for name in suitable if not of_images or needs_features([name], True)))


# ---- Features


def _frechet_distance(reference: Moments, samples: Moments, options: Options) -> Result:
    count, dimensions, note = samples.count, len(samples.mean), ""
    if 0 < count < _FEW_PER_DIMENSION * dimensions:
        note = (
            f"{count:,} samples for {dimensions} dimensions: the distance is larger than with more samples; "
            "compare it at equal numbers of samples only"
        )
    return Result({"": of_features.frechet_distance(reference, samples)}, note=note)


def _kid(reference: np.ndarray, samples: np.ndarray, options: Options) -> Result:
    # A subset has at most a quarter of a set, because the variance over nearly whole sets is not informative.
    size = min(_KID_SUBSET_SIZE, min(len(reference), len(samples)) // 4)
    settings = {"subsets": 100, "subset_size": size, "seed": 2020}
    kid = of_features.kid(reference, samples, **settings)
    numbers = {"": kid.mean, "_standard_error": kid.standard_error, "_std": kid.std}
    return Result(numbers | {f"_{name}": value for name, value in settings.items()})


def _inception_score(reference: np.ndarray, samples: np.ndarray, options: Options) -> Result:
    score = of_features.inception_score(samples, _IS_SPLIT_SIZE)
    return Result({"": score.mean, "_std": score.std, "_split_size": _IS_SPLIT_SIZE})


def _shares(function: Callable, k: int) -> Metric:
    """Returns a metric of two numbers, whose names are the two words in the function's name, such as precision_recall."""
    name = function.__name__

    def compute(reference: np.ndarray, samples: np.ndarray, options: Options) -> Result:
        return Result(dict(zip(name.split("_"), function(reference, samples, k), strict=True)) | {f"{name}_k": k})

    return Metric(compute, "pool", k + 1)


def _memorization(reference: _Examples, samples: _Examples, options: Options) -> Result:
    """Uses at most 50,000 examples, and fewer if they are large."""
    dimensions = math.prod(reference.shape[1:])
    count = min(MAX_EXAMPLES, max(math.sqrt(_NEIGHBOR_PRODUCTS / dimensions), 1000), _NEIGHBOR_BYTES / (4 * dimensions))
    count = max(int(count), METRICS["memorization"].minimum)
    rows = [subset_indices(len(x), count) for x in (reference, samples)]
    one, other = (np.asarray(x[i]).reshape(len(i), -1) for x, i in zip((reference, samples), rows, strict=True))
    report, neighbors = of_features.memorization_report(one, other, _NEIGHBORS)
    report |= {"num_reference": len(one), "num_samples": len(other)}
    neighbors = neighbors._replace(indices=rows[0][neighbors.indices])
    return Result({"memorization": report}, neighbors=neighbors, rows=rows[1])


# ---- Examples


def _energy_distance(reference: _Examples, samples: _Examples, options: Options) -> Result:
    # Time is quadratic in the number of examples.
    count = int(min(_ENERGY_EXAMPLES, max(math.sqrt(_ENERGY_PRODUCTS / math.prod(reference.shape[1:])), 500)))
    sets = [select(x, count) for x in (reference, samples)]
    distance = of_arrays.energy_distance(*sets)
    return Result(_named("energy_distance", distance, num_examples=[len(x) for x in sets]))


def _classifier(reference: _Examples, samples: _Examples, options: Options) -> Result:
    count = int(min(_CLASSIFIER_EXAMPLES, max(_CLASSIFIER_NUMBERS / math.prod(reference.shape[1:]), 100)))
    sets = [np.asarray(select(x, count)[:]) for x in (reference, samples)]
    found = classifier.classifier_two_sample(*sets)
    return Result(_named("classifier", found, num_examples=[len(x) for x in sets]))


def _sliced_wasserstein(reference: _Examples, samples: _Examples, options: Options) -> Result:
    sets, key = [select(x, _SLICED_EXAMPLES) for x in (reference, samples)], jax.random.key(options.seed)
    distance = of_arrays.sliced_wasserstein(key, *sets, projections=_PROJECTIONS, groups=_GROUPS)
    settings = {"projections": _PROJECTIONS, "num_examples": [len(x) for x in sets], "seed": options.seed}
    return Result(_named("sliced_wasserstein", distance, **settings))


def _marginal_histograms(reference: _Examples, samples: _Examples, options: Options) -> Result:
    # Values outside the reference's range count in the outermost bins, because samples could widen the bins without limit.
    limits = of_arrays.value_range(reference)
    histograms = of_arrays.marginal_histograms(reference, samples, _BINS, limits=limits, groups=_GROUPS)
    distance = histograms.distance
    channel = int(np.argmax(distance.value))
    of_channel = ValueAndError(*(None if x is None else float(x[channel]) for x in distance))
    values = _named("histogram_distance", of_channel, channel=channel, bins=_BINS)
    offset, scale = options.units(reference.shape[-1])
    pair, edges = (histograms.reference, histograms.samples), histograms.edges * scale[:, None] + offset[:, None]
    arrays = {"histogram_edges": edges, **_named("histogram_distance", distance), **_both("histogram", pair)}
    notes = [
        f"total variation {format_value(value, error)}\nexpected for equal distributions: {same_distribution:.2g}"
        for value, error, same_distribution in zip(*distance[:3], strict=True)
    ]
    one, other = (ValueAndError(np.transpose(each.value), np.transpose(each.standard_error)) for each in pair)
    labels = "value (data units)", "share of the values"
    return Result(values, arrays, Curves("histograms", edges, one, other, labels, notes))


def _mean_and_covariance(reference: _Examples, samples: _Examples, options: Options) -> Result:
    # Time and memory are quadratic in the number of channels.
    channels = even_indices(reference.shape[-1], _MAX_COVARIANCE_CHANNELS)
    shape = (*reference.shape[1:-1], len(channels))
    sets = [
        LazyExamples(lambda rows, x=x: x[rows][..., channels], (len(x), *shape), x.dtype) for x in (reference, samples)
    ]
    moments = [of_arrays.mean_and_covariance(x) for x in sets]
    means, covariances = ([getattr(each, name) for each in moments] for name in ("mean", "covariance"))
    sizes = len(reference), len(samples)
    values, (channel,) = _deviation("mean", means, sizes)
    of_covariance, indices = _deviation("covariance", covariances, sizes)
    values |= of_covariance
    values["mean_channel"] = int(channels[channel])
    values["covariance_channels"] = [int(channels[i]) for i in indices]
    values["mean_and_covariance_z_limit"] = largest_z(len(channels) * (len(channels) + 3) // 2)
    values["mean_and_covariance_num_channels"] = len(channels)
    offset, scale = (each[channels] for each in options.units(reference.shape[-1]))
    arrays = _both("mean", [_rescaled(each, scale, offset) for each in means])
    arrays |= _both("covariance", [_rescaled(each, np.outer(scale, scale)) for each in covariances])
    return Result(values, arrays)


def _power_spectrum(reference: _Examples, samples: _Examples, options: Options) -> Result:
    spectra = [of_arrays.power_spectrum(x, periodic=options.periodic) for x in (reference, samples)]
    values, (shell, channel) = _deviation("power_spectrum", spectra, (len(reference), len(samples)), relative=True)
    frequencies = spectra[0].x
    values["power_spectrum_frequency"] = float(frequencies[shell])
    values["power_spectrum_channel"] = channel
    values["power_spectrum_z_limit"] = largest_z(spectra[0].value.size)
    _, scale = options.units(reference.shape[-1])
    spectra = [_rescaled(each, scale**2) for each in spectra]
    arrays = {"spectrum_frequencies": frequencies, **_both("spectrum", spectra)}
    notes = [  # a logarithmic axis has no frequency 0
        "at frequency 0: " + ", ".join(format_value(s.value[0, c], s.standard_error[0, c]) for s in spectra)
        for c in range(len(scale))
    ]
    one, other = (ValueAndError(each.value[1:], each.standard_error[1:]) for each in spectra)
    labels = "frequency (cycles per position)", "power (data units squared)"
    return Result(values, arrays, Curves("spectrum", frequencies[1:], one, other, labels, notes, logarithmic=True))


def _autocorrelation(reference: _Examples, samples: _Examples, options: Options) -> Result:
    try:
        found = [of_arrays.autocorrelation(x, periodic=options.periodic) for x in (reference, samples)]
    except ValueError as error:  # a constant channel; other metrics allow it
        return Result({}, note=f"no autocorrelation: {error}")
    values, (lag, channel) = _deviation("autocorrelation", found, (len(reference), len(samples)))
    values["autocorrelation_lag"] = int(found[0].x[lag])
    values["autocorrelation_channel"] = channel
    values["autocorrelation_z_limit"] = largest_z(max(found[0].value[1:].size, 1))
    arrays = {"autocorrelation_lags": found[0].x, **_both("autocorrelation", found)}
    curves = Curves("autocorrelation", found[0].x, *found, labels=("lag (positions)", "autocorrelation"))
    return Result(values, arrays, curves)


def _named(name: str, distance: ValueAndError, **settings: Any) -> dict[str, Any]:
    """Returns {name: value, name_standard_error: ..., name_SETTING: ...} for a distance and its settings."""
    numbers = {field: x for field, x in distance._asdict().items() if x is not None} | settings
    return {name if field == "value" else f"{name}_{field}": x for field, x in numbers.items()}


def _both(name: str, pair: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns {array name: values or standard errors} for the statistics of the reference and of the samples."""
    return {
        f"{name}_{side}{end}": np.asarray(getattr(statistic, field))
        for side, statistic in zip(("reference", "samples"), pair, strict=True)
        for field, end in (("value", ""), ("standard_error", "_standard_error"))
    }


def _rescaled(statistic: Any, factor: np.ndarray, shift: Any = 0.0) -> Any:
    """Returns the statistic for factor * x + shift."""
    value, error = statistic.value * factor + shift, statistic.standard_error * np.abs(factor)
    return statistic._replace(value=value, standard_error=error)


def _deviation(
    name: str, pair: Sequence[Any], sizes: tuple[int, int], relative: bool = False
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Returns (the deviation of the samples where |z| is largest, with standard error and z-score; the index of this |z|).

    pair: the statistics of the reference and of the samples. sizes: the numbers of examples in these two sets.
    """
    (x, x_error), (y, y_error) = ((part.value, part.standard_error) for part in pair)
    n, m = sizes
    # For equal distributions, both sets estimate one variance. A small set whose value is low underestimates this variance.
    variance = (np.square(n * x_error) + np.square(m * y_error)) / (n + m)
    with np.errstate(divide="ignore", invalid="ignore"):  # equal numbers without an error have the z-score 0
        z = np.where(y == x, 0.0, (y - x) / np.sqrt(variance * (1 / n + 1 / m)))
    index = np.unravel_index(int(np.argmax(np.abs(np.nan_to_num(z, nan=0.0)))), z.shape)
    x, x_error, y, y_error = (float(each[index]) for each in (x, x_error, y, y_error))
    deviation, error = y - x, math.hypot(x_error, y_error)
    if relative:
        deviation, error = (y / x - 1, math.hypot(y_error, x_error * y / x) / x) if x else (math.inf, math.inf)
    values = {f"{name}_deviation": deviation, f"{name}_deviation_standard_error": error, f"{name}_z": float(z[index])}
    # JSON has no infinity. Values are infinite only if the reference's value is 0, or if both standard errors are 0.
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return finite, tuple(map(int, index))


def largest_z(count: int) -> float:
    """Returns the bound that the largest of `count` independent |z| exceeds with 5% probability for equal distributions.

    Dependent z-scores exceed the bound less often.
    """
    return NormalDist().inv_cdf((1 + 0.95 ** (1 / count)) / 2)


# ---- The table of all metrics

METRICS: dict[str, Metric] = {
    "fid": Metric(_frechet_distance, "moments", 2, names=("fid", "frechet_distance")),
    "sfid": Metric(_frechet_distance, "spatial", 2, names=("sfid", "spatial_frechet_distance")),
    "kid": Metric(_kid, "pool", 8, names=("kid", "kernel_distance")),
    "is": Metric(_inception_score, "logits", 1, names=("inception_score", "inception_score")),
    "precision_recall": _shares(of_features.precision_recall, k=3),
    "density_coverage": _shares(of_features.density_coverage, k=5),
    "energy_distance": Metric(_energy_distance, "examples", 4),
    "classifier": Metric(_classifier, "examples", 8),
    "sliced_wasserstein": Metric(_sliced_wasserstein, "examples", 2 * _GROUPS),
    "marginal_histograms": Metric(_marginal_histograms, "examples", 2 * _GROUPS),
    "mean_and_covariance": Metric(_mean_and_covariance, "examples", 2),
    "power_spectrum": Metric(_power_spectrum, "examples", 2, spatial_axes=(1, 2, 3)),
    "autocorrelation": Metric(_autocorrelation, "examples", 2, spatial_axes=(1,)),
    "memorization": Metric(_memorization, "vectors", 2),
}


# ---- Names, directions and meanings of the numbers in records: every text that people read uses this table


class Meaning(NamedTuple):
    """The description of a number in records.

    name: the name with the unit. better: "lower", "higher" or "closer to 0"; "" for a number that does not rank models. text:
    the definition.
    """

    name: str
    better: str
    text: str


_DISTANCE = "distance between Gaussians with the mean and covariance of each set's features; 0 for equal Gaussians"
_FALLS = "it falls with the number of samples"
_MMD = "unbiased squared MMD of the features, with a cubic kernel; about 0 for equal distributions"
_Z = (
    "z-score of the deviation; with 1,000 samples, |z| is below the limit in about 19 of 20 measurements of equal "
    "distributions"
)

# Keys: names in metrics.json, without the suffix of a resize.
MEANINGS = {
    "fid": Meaning("Frechet Inception distance (FID)", "lower", f"{_DISTANCE}; {_FALLS}"),
    "frechet_distance": Meaning("Frechet distance", "lower", f"{_DISTANCE}; {_FALLS}"),
    "sfid": Meaning("spatial FID (sFID)", "lower", f"for Inception's spatial features: {_DISTANCE}"),
    "spatial_frechet_distance": Meaning("spatial Frechet distance", "lower", f"for spatial features: {_DISTANCE}"),
    "kid": Meaning("kernel Inception distance (KID)", "lower", _MMD),
    "kernel_distance": Meaning("kernel distance", "lower", _MMD),
    "inception_score": Meaning(
        "Inception Score", "higher", "exp(mean KL(p(class | image) || p(class))), by Inception's class probabilities"
    ),
    "precision": Meaning(
        "precision", "higher", "fidelity: share of samples inside the reference's manifold (nearest-neighbor balls)"
    ),
    "recall": Meaning("recall", "higher", "diversity: share of reference images inside the samples' manifold"),
    "density": Meaning(
        "density",
        "higher",
        "fidelity: mean number of reference balls that contain a sample, divided by k; 1 for equal distributions",
    ),
    "coverage": Meaning("coverage", "higher", "diversity: share of reference images whose ball contains a sample"),
    "close_share": Meaning(
        "share of near copies",
        "lower",
        "share of samples nearer to a reference image than 99% of the reference images are to each other: about "
        "0.01 for new images, near 1 for copies",
    ),
    "energy_distance": Meaning(
        "energy distance",
        "lower",
        "2 E|X - Y| - E|X - X'| - E|Y - Y'| of standardized arrays, or of images in gray levels of 0 to 255, "
        "unbiased: 0 for equal distributions, within a few same_distribution_std",
    ),
    "classifier": Meaning(
        "area under a classifier's ROC curve",
        "lower",
        "probability that a classifier of components and energies scores a sample above an example of the data; 0.5 for "
        "equal distributions",
    ),
    "sliced_wasserstein": Meaning(
        "sliced Wasserstein distance",
        "lower",
        "root of the mean W_2^2 over directions, for standardized arrays, or images in gray levels of 0 to 255; for "
        "equal distributions about same_distribution",
    ),
    "histogram_distance": Meaning(
        "histogram distance",
        "lower",
        "total variation between a channel's histograms, the largest over all channels; for equal distributions about "
        "same_distribution, or up to a third more with many channels",
    ),
    "mean_deviation": Meaning(
        "deviation of the mean",
        "closer to 0",
        "samples minus data, for standardized channels (of images: gray levels), where |z| is largest",
    ),
    "mean_z": Meaning("z of the mean", "closer to 0", _Z),
    "covariance_deviation": Meaning(
        "deviation of the covariance",
        "closer to 0",
        "samples minus data, for standardized channels (of images: gray levels) at one position, where |z| is largest",
    ),
    "covariance_z": Meaning("z of the covariance", "closer to 0", _Z),
    "power_spectrum_deviation": Meaning(
        "relative deviation of the power spectrum",
        "closer to 0",
        "samples / data - 1, at the frequency and channel where |z| is largest",
    ),
    "power_spectrum_z": Meaning("z of the power spectrum", "closer to 0", _Z),
    "autocorrelation_deviation": Meaning(
        "deviation of the autocorrelation",
        "closer to 0",
        "samples minus data, at the lag and channel where |z| is largest",
    ),
    "autocorrelation_z": Meaning("z of the autocorrelation", "closer to 0", _Z),
    "bits_per_dim": Meaning("bits per dimension", "lower", "total bound, upper bound of the negative log-likelihood"),
    "nats_per_dim": Meaning("nats per dimension", "lower", "the same in nats"),
    "prior": Meaning("prior (bits per dimension)", "", "KL of q(x_T | x_0) from the standard normal"),
    "transitions": Meaning("transitions (bits per dimension)", "", "sum of the terms for the steps between"),
    "decoder": Meaning("decoder (bits per dimension)", "", "L_0, the code of x_0 given x_1"),
    "ode_bits_per_dim": Meaning("bits per dimension of the ODE", "lower", "by the probability-flow ODE, no bound"),
    "ode_nats_per_dim": Meaning("nats per dimension of the ODE", "lower", "the same in nats"),
}
_RESIZES = ("_pytorch", "_clean")
# Suffixes of entries that describe another number.
_DETAILS = ("_std", "_standard_error", "_same_distribution", "_limit", "_frequency")


def find_meaning(key: str) -> Meaning | None:
    """Returns the meaning of a record's entry, also with a resize suffix ("fid_clean"); None for an unknown entry."""
    if key in MEANINGS:
        return MEANINGS[key]
    for resize in _RESIZES:
        if (found := MEANINGS.get(key.removesuffix(resize))) is not None:
            return found._replace(name=f"{found.name}, {resize[1:]} resize")
    return None


def heading(key: str) -> str:
    """Returns the name and direction of an entry, as in "Frechet distance, lower is better"; an unknown key is unchanged."""
    name, better, _ = find_meaning(key) or Meaning(key, "", "")
    return f"{name}, {better} is better" if better else name


def reported_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a record, without the entries that describe a metric."""
    values = {key: value for key, value in record.items() if isinstance(value, float) and not key.endswith(_DETAILS)}
    if "memorization" in record:
        values["close_share"] = record["memorization"]["close_share"]
    return values


def format_value(value: float, error: float | None = None) -> str:
    """Formats a number, or "number ± error", both rounded to the error's first digit, or to its second if the first is 1."""
    if not error or not math.isfinite(error):
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
    first = math.floor(math.log10(error))  # the place of the error's first digit
    decimals = max(0, -first + (error < 2 * 10**first))  # two digits of an error that begins with 1
    if decimals > 6 or abs(value) >= 1e6:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"

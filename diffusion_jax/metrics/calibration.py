"""Calibration of posterior samplers and conditional models: whether held-out truths look like draws from the sampler.

For N held-out examples with L samples each, the rank of the truth among the samples is uniform on 0 ... L if the sampler
draws from the posterior (simulation-based calibration, Talts et al. 2018). Ranks of single quantities reveal samples that are
too narrow, too wide or shifted; ranks of the distance to a reference point (TARP, Lemos et al. 2023) also reveal samples that
ignore the measurement, if the reference point depends on the measurement.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.metrics.classifier import classifier_scores

_FALSE_ALARM = 0.0027  # probability, for all tests together; three standard deviations for a single test


def ranks(
    truth: Float[np.ndarray, "N *shape"], samples: Float[np.ndarray, "L N *shape"], seed: int = 0
) -> Int[np.ndarray, "N *shape"]:
    """Returns the number of samples below the truth, 0 ... L; equal numbers are ordered at random, by `seed`.

    Raises: ValueError for samples in another shape, or numbers that are not finite.
    """
    truth, samples = np.asarray(truth), np.asarray(samples)
    if samples.shape[1:] != truth.shape or not len(samples) or not len(truth):
        raise ValueError(
            f"samples must be [L, *truth.shape], L samples for each truth; got {samples.shape}, {truth.shape}"
        )
    if not (np.isfinite(truth).all() and np.isfinite(samples).all()):
        raise ValueError("truth or samples hold numbers that are not finite")
    below, equal = np.sum(samples < truth, axis=0), np.sum(samples == truth, axis=0)
    return below + np.random.default_rng(seed).integers(0, equal + 1)


def distance_ranks(
    truth: Float[np.ndarray, "N *shape"],
    samples: Float[np.ndarray, "L N *shape"],
    references: Float[np.ndarray, "N *shape"],
    seed: int = 0,
) -> Int[np.ndarray, "N"]:
    """Returns the rank of each truth's distance to a reference point among the distances of its samples (TARP).

    references: a reference point for each truth, in the same units; a point that depends on the measurement, such as an
    estimate of the truth, reveals samples that ignore the measurement. Larger numbers have more weight in the distance.
    """
    truth, samples, references = map(np.asarray, (truth, samples, references))
    if references.shape != truth.shape:
        raise ValueError(f"references must have the shape of truth, {truth.shape}; got {references.shape}")

    def distance(x):
        return np.sqrt(np.sum(np.square(x - references), axis=tuple(range(x.ndim - references.ndim + 1, x.ndim))))

    return ranks(distance(truth), distance(samples), seed)


def histogram(found: Int[np.ndarray, "N"], num_samples: int, bins: int) -> tuple[Float[np.ndarray, "bins"], float]:
    """Returns (the share of ranks in each bin, the standard error of a share if ranks are uniform).

    Raises: ValueError if `bins` does not divide num_samples + 1, because the bins would have different numbers of ranks.
    """
    if bins < 1 or (num_samples + 1) % bins:
        raise ValueError(f"bins={bins} must divide the {num_samples + 1} ranks of {num_samples} samples")
    counts = np.bincount(np.asarray(found) * bins // (num_samples + 1), minlength=bins)
    return counts / len(found), float(np.sqrt((1 - 1 / bins) / bins / len(found)))


def is_covered(found: Int[np.ndarray, "*shape"], num_samples: int, level: float = 0.9) -> Bool[np.ndarray, "*shape"]:
    """Whether each truth is in the central interval of its samples. found, level: as `coverage`. Raises: as `coverage`."""
    outside = (1 - level) / 2 * (num_samples + 1)
    if not 0 < level < 1 or abs(outside - round(outside)) > 1e-6 or round(outside) < 1:
        raise ValueError(
            f"an interval of {level} needs (1 - level) / 2 * (samples + 1) to be a whole number above 0, and it is "
            f"{outside:g} for {num_samples} samples; use 19 or 99 samples for 0.9"
        )
    found = np.asarray(found)
    return (found >= round(outside)) & (found <= num_samples - round(outside))


def coverage(found: Int[np.ndarray, "N"], num_samples: int, level: float = 0.9) -> tuple[float, float]:
    """Returns (the share of truths in the central interval of the samples, its standard error).

    found: ranks, as from `ranks`. level: the share that a calibrated sampler has. The interval leaves out (1 - level) / 2 of
    the num_samples + 1 ranks at each end.
    Raises: ValueError if the interval would leave out 0 ranks or part of a rank, as for 0.9 and 10 samples; use 19 or 99.
    """
    share = float(is_covered(found, num_samples, level).mean())
    return share, float(np.sqrt(max(share * (1 - share), 1 / len(found)) / len(found)))


class RankTest(NamedTuple):
    """The mean and the variance of ranks, with standard errors, scaled to mean 0.5 and variance 1 for uniform ranks.

    z_mean, z_variance: the differences from 0.5 and 1 in standard errors.
    """

    mean: float
    mean_error: float
    variance: float
    variance_error: float
    z_mean: float
    z_variance: float


def rank_test(found: Int[np.ndarray, "N"], num_samples: int) -> RankTest:
    """Compares the ranks' mean and variance with the values for uniform ranks on 0 ... num_samples.

    Raises: ValueError for fewer than 2 samples.
    """
    if num_samples < 2:
        raise ValueError(f"a test of ranks needs at least 2 samples of each example, better 19; got {num_samples}")
    levels = np.arange(num_samples + 1) - num_samples / 2
    variance, fourth = np.mean(levels**2), np.mean(levels**4)
    centered = np.asarray(found) - num_samples / 2
    mean_error = float(np.sqrt(variance / len(centered)))
    variance_error = float(np.sqrt((fourth - variance**2) / len(centered)) / variance)
    mean, spread = float(centered.mean()), float(centered.var() / variance)
    return RankTest(
        0.5 + mean / num_samples,
        mean_error / num_samples,
        spread,
        variance_error,
        mean / mean_error,
        (spread - 1) / variance_error,
    )


def cross_predict(
    inputs: Float[np.ndarray, "N M"], quantities: Float[np.ndarray, "N Q"], penalty: float = 0.1
) -> Float[np.ndarray, "N Q"]:
    """Predicts the quantities of each example from its inputs by ridge regression on the other half of the examples.

    A prediction depends on the inputs (the measurement or condition) and not on the example's own truth, so it can be a
    reference point for `distance_ranks`. NaN counts as 0. penalty: added to the diagonal of x x^T / M, x standardized inputs.
    """
    inputs, quantities = np.nan_to_num(np.asarray(inputs, np.float64)), np.asarray(quantities, np.float64)
    x = inputs - inputs.mean(axis=0)
    x /= np.maximum(x.std(axis=0), 1e-12)
    kernel, found, is_even = x @ x.T / x.shape[1], np.empty_like(quantities), np.arange(len(x)) % 2 == 0
    for own, other in ((is_even, ~is_even), (~is_even, is_even)):
        mean = quantities[other].mean(axis=0)
        matrix = kernel[np.ix_(other, other)] + penalty * np.eye(other.sum())
        found[own] = mean + kernel[np.ix_(own, other)] @ np.linalg.solve(matrix, quantities[other] - mean)
    return found


def detectable_errors(num_examples: int, num_samples: int, num_quantities: int = 1) -> tuple[float, float, float]:
    """Returns the smallest errors that `find_calibration` detects in at least 95% of repetitions, for Gaussian posteriors.

    Returns: (the smallest shift, in posterior deviations; the largest ratio of the sampled to the exact deviation that is
    detected as too narrow; the smallest ratio that is detected as too wide). A ratio is 0 or infinite if none is detected.
    Assumes at least 50 examples, an error in one quantity, and `references`, whose three tests raise the limit.
    """
    test = rank_test(np.zeros(num_examples, int), num_samples)  # for its standard errors
    normal = statistics.NormalDist()
    # 0.96 instead of 0.95, because the statistics are skewed; Monte Carlo with 100 examples or more finds 95 to 96%.
    limit, margin = _limit(2 * num_quantities + 3), normal.inv_cdf(0.96) / math.sqrt(num_examples)
    truths = [normal.inv_cdf((i + 0.5) / 200) for i in range(200)]
    uniform = num_samples * (num_samples + 2) / 12  # variance of uniform ranks

    def excess(shift: float, ratio: float) -> tuple[float, float, float]:
        """Returns how far beyond its limit the test of a shift, of too narrow and of too wide samples is."""
        p = np.array([normal.cdf((truth - shift) / ratio) for truth in truths])  # the rank of a truth is Binomial(L, p)
        d, v = num_samples * (p - 0.5), num_samples * p * (1 - p)
        first, second = float(d.mean()), float(np.mean(v + d**2))
        fourth = np.mean(v * (1 + 3 * (num_samples - 2) * p * (1 - p)) + 4 * v * (1 - 2 * p) * d + 6 * v * d**2 + d**4)
        variance = second * (1 - 1 / num_examples) - uniform  # centering lowers the variance
        needed = limit * test.variance_error * uniform + margin * math.sqrt(fourth - second**2)
        mean = -first - limit * test.mean_error * num_samples - margin * math.sqrt(second - first**2)
        return mean, variance - needed, -variance - needed

    sizes = np.geomspace(1e-3, 8, 1000).tolist()
    narrow = next((math.exp(-size) for size in sizes if excess(0, math.exp(-size))[1] > 0), 0.0)
    wide = next((math.exp(size) for size in sizes if excess(0, math.exp(size))[2] > 0), math.inf)
    return next((size for size in sizes if excess(size, 1)[0] > 0), math.inf), narrow, wide


def _limit(num_tests: int) -> float:
    """Returns the bound that the largest |z| of `num_tests` tests exceeds in 0.27% of cases, for exact samples."""
    return statistics.NormalDist().inv_cdf(1 - _FALSE_ALARM / 2 / num_tests)


class Calibration(NamedTuple):
    """The result of `find_calibration`.

    ranks: {quantity: ranks [N]}, with "distance", and "classifier" for half of the truths (`classifier_scores`).
    tests: {the same names: `RankTest`}. coverage: {quantity: (share, standard error)} of 90% intervals, {} if the number of
    samples does not allow them. sentence: the result in words.
    """

    ranks: dict[str, Int[np.ndarray, "N"]]
    tests: dict[str, RankTest]
    coverage: dict[str, tuple[float, float]]
    sentence: str


def find_calibration(
    truth: Float[np.ndarray, "N Q"],
    samples: Float[np.ndarray, "L N Q"],
    references: Float[np.ndarray, "N Q"] | None = None,
    names: Sequence[str] = (),
) -> Calibration:
    """Tests the ranks of Q quantities, and with `references` the ranks of distances and of a classifier's scores.

    A test fails if |z| is above the limit that the largest |z| of all tests exceeds in 0.27% of cases for an exact sampler.
    names: the names of the quantities. Raises: ValueError for arrays in other shapes, numbers that are not finite, fewer than
    2 samples, and names that do not fit.
    """
    truth, samples = np.asarray(truth), np.asarray(samples)
    if truth.ndim != 2:
        raise ValueError(f"truth must be [N, Q], Q numbers for each example; got {truth.shape}")
    count, names = len(samples), list(names) or [f"quantity {i}" for i in range(truth.shape[1])]
    if len({*names, "distance", "classifier"}) != truth.shape[1] + 2 or len(names) != truth.shape[1]:
        raise ValueError(
            f"names must be {truth.shape[1]} different names other than distance and classifier; got {names}"
        )
    found = dict(zip(names, ranks(truth, samples).T, strict=True))
    covered = {}
    if (count + 1) % 20 == 0:
        covered = {name: coverage(each, count) for name, each in found.items()}
    tests = {name: rank_test(each, count) for name, each in found.items()}
    limit = _limit(2 * len(names) + 3 * (references is not None))
    faults = []
    for name, test in tests.items():
        if abs(test.z_mean) > limit:
            faults.append(
                f"{name} is shifted (its true values are {'above' if test.z_mean > 0 else 'below'} the samples)"
            )
        elif abs(test.z_variance) > limit:
            faults.append(f"{name} is too {'narrow' if test.z_variance > 0 else 'wide'}")
    if references is not None:
        found["distance"] = distance_ranks(truth, samples, references)
        found["classifier"] = ranks(*classifier_scores(truth, samples))
        tests |= {name: rank_test(found[name], count) for name in ("distance", "classifier")}
        distance, classifier = tests["distance"], tests["classifier"]
        if not faults and max(abs(distance.z_mean), abs(distance.z_variance)) > limit:
            faults.append("the samples ignore the measurement, or the dependence between the quantities is wrong")
        if classifier.z_mean > limit:
            faults.append(f"a classifier tells the true values from the samples (ROC area {classifier.mean:.2f})")
    sentence = "; ".join(faults[:3]) + f"; and {len(faults) - 3} more" * (len(faults) > 3)
    calibrated = f"no error found with {len(truth):,} examples of {count} samples"
    return Calibration(found, tests, covered, sentence or calibrated)

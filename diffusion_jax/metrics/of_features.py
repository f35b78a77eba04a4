"""Metrics that compare samples with a reference, as pure functions of feature arrays.

Sums and matrix roots are computed in float64 with NumPy on every backend; comparisons of every sample with every reference
image run on a device, in blocks. Features are [N, D] from any extractor; a Frechet distance is the FID only for features from
the published Inception.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import require_number
from diffusion_jax.metrics.of_arrays import as_examples

_BLOCK = 512  # rows whose distances are on the device at once


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean [D] and covariance [D, D] (unbiased) of `count` features, float64.

    Raises: ValueError for other shapes, or numbers that are not finite.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    def __post_init__(self):
        if self.mean.ndim != 1 or self.covariance.shape != self.mean.shape * 2:
            raise ValueError(
                f"a mean {list(self.mean.shape)} and a covariance {list(self.covariance.shape)} are not [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("moments are not finite; check the features")


def moments(features) -> Moments:
    """Computes the moments of features [N, D]. Raises: ValueError for fewer than two, or values that are not finite."""
    return moments_of_chunks([features])


def _merge(one: Moments, other: Moments) -> Moments:
    """Merges the moments of two sets into their union's moments (Chan et al. 1979)."""
    _check_widths(one.mean, other.mean)
    count, shift = one.count + other.count, other.mean - one.mean
    scatter = one.covariance * (one.count - 1) + other.covariance * (other.count - 1)
    scatter += np.outer(shift, shift) * (one.count * other.count / count)
    return Moments(one.mean + shift * (other.count / count), scatter / (count - 1), count)


def moments_of_chunks(chunks: Iterable[np.ndarray]) -> Moments:
    """Computes moments from chunks of features [n, D], so that a large set needs no array of all features.

    Raises: as `moments`.
    """
    parts = []
    for chunk in chunks:
        features = _checked(chunk, 1).astype(np.float64)
        mean = features.mean(axis=0)
        centered = features - mean
        parts.append(Moments(mean, centered.T @ centered / max(len(features) - 1, 1), len(features)))
    if sum(part.count for part in parts) < 2:
        raise ValueError(f"{sum(part.count for part in parts)} images are too few: a covariance needs 2")
    return functools.reduce(_merge, parts)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), between the Gaussians of two `Moments` (Heusel et al. 2017, eq. 6).

    tr (C_1 C_2)^(1/2) sums the singular values of C_1^(1/2) C_2^(1/2). The singular values are exact up to rounding even for
    singular covariances (fewer images than dimensions); the eigenvalues of C_1 C_2, their squares, lose half the digits.
    Raises: ValueError for moments with different dimensions, or matrices that are no covariances.
    """
    _check_widths(one.mean, other.mean)
    shift = one.mean - other.mean
    cross = np.linalg.svd(_root(one.covariance).T @ _root(other.covariance), compute_uv=False).sum()
    distance = shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross
    return max(float(distance), 0.0)  # rounding may give a number below 0 for equal moments


def _root(covariance: np.ndarray) -> np.ndarray:
    """Returns R [D, r] with R R^T = C, without directions where C is zero up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    if values[0] < -1e-6 * max(values[-1], 0) or values[-1] < 0:
        raise ValueError(f"the covariance has the eigenvalue {values[0]:.3g}; its eigenvalues must be at least 0")
    nonzero = values > rounding
    return vectors[:, nonzero] * np.sqrt(values[nonzero])


class Estimate(NamedTuple):
    """The mean of a metric over subsets of the images, the standard deviation over subsets, and the mean's standard error."""

    mean: float
    std: float
    standard_error: float


def kid(reference, samples, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Estimate:
    """Kernel inception distance: the unbiased squared MMD of the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    The mean is over random subsets of both sets, drawn as in torch-fidelity. The standard error accounts for overlapping
    subsets; it is NaN if a subset is a whole set. Raises: ValueError if a set has fewer images than a subset.
    """
    reference, samples = _checked(reference, 2), _checked(samples, 2)
    _check_widths(reference, samples)
    fewest = min(len(reference), len(samples))
    require_number("subset_size of the KID", subset_size, 2, fewest)
    # NumPy's legacy generator has frozen streams; the sample set is drawn first, as in torch-fidelity.
    rng = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (subset_size * (subset_size - 1))
        values[i] = within - 2 * xy.mean()
    # Two random subsets with m of n images share a fraction m/n of each subset, so two estimates have the correlation m/n
    # (less for equal distributions, whose error is then too large), and the variance over subsets lacks this fraction.
    std, share = values.std(), subset_size / fewest
    error = np.sqrt(std**2 / (1 - share) * (share + (1 - share) / subsets)) if share < 1 else np.nan
    return Estimate(values.mean(), std, error)


def inception_score(logits, split_size: int = 5000) -> Estimate:
    """Computes exp(mean KL(p(y|x) | p(y))) (Salimans et al. 2016) over consecutive splits of the images, as ADM's evaluator.

    logits: [N, classes], without the bias, as in ADM's evaluator and torch-fidelity. The last split may be smaller.
    """
    logits = _checked(logits, 1).astype(np.float64)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for start in range(0, len(logits), split_size):
        part = log_p[start : start + split_size]
        # Adds logarithms, because the mean probability may underflow float64.
        log_mean = np.logaddexp.reduce(part, axis=0) - np.log(len(part))
        divergence = (np.exp(part) * (part - log_mean)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)), float(np.std(scores) / np.sqrt(len(scores))))


def precision_recall(reference, samples, k: int = 3) -> tuple[float, float]:
    """Returns precision, the share of samples in the reference's manifold, and recall, the share of the reference in theirs.

    Kynkaanniemi et al. 2019. A set's manifold is the union of balls around the members; a ball's radius is the distance to
    the k-th nearest other member. Distances that are equal up to rounding count as equal, so that repeated points and
    members of both sets lie inside. Raises: ValueError for fewer than k + 1 images.
    """
    reference, samples, _ = _for_distances(reference, samples, k)
    inside = functools.partial(_compare, lambda d, slack, radii: (d <= radii + slack).any())
    precise = inside(samples, reference, _radii(reference, k))
    return float(np.mean(precise)), float(np.mean(inside(reference, samples, _radii(samples, k))))


def density_coverage(reference, samples, k: int = 5) -> tuple[float, float]:
    """Returns density and coverage (Naeem et al. 2020, eq. 4 and 6).

    density: the mean number of reference balls that contain a sample, divided by k; about 1 for equal distributions.
    coverage: the share of reference balls that contain a sample. Arguments and errors: as `precision_recall`.
    """
    reference, samples, _ = _for_distances(reference, samples, k)
    radii = _radii(reference, k)
    balls = _compare(lambda d, slack, radii: (d <= radii + slack).sum(), samples, reference, radii)
    is_covered = _compare(lambda d, slack, _, r: (d <= r + slack).any(), reference, samples, np.zeros(1), radii)
    return float(np.mean(balls) / k), float(np.mean(is_covered))


class Neighbors(NamedTuple):
    """The nearest reference features for each query, nearest first: indices int [N, k] and distances [N, k]."""

    indices: np.ndarray
    distances: np.ndarray


def nearest_neighbors(reference, queries, k: int = 1, others: bool = False) -> Neighbors:
    """Finds the k nearest reference features for each query.

    others: whether the queries are the reference itself, so that no query is its own neighbor. Raises: ValueError if the
    reference has fewer than k features, or fewer than k + 1 with `others`.
    """
    reference, queries, scale = _for_distances(reference, queries, k, minimums=(k + 1 if others else k, 1))
    excluded = np.arange(len(queries)) if others else np.full(len(queries), -1)
    indices = _compare(lambda d, _, __, number: _smallest(d, k, number)[1], queries, reference, np.zeros(1), excluded)
    # Computed from differences, because the formula with products, which gave the indices, is inaccurate for a copy.
    distances = np.stack([np.linalg.norm(reference[column] - queries, axis=1) for column in indices.T], axis=1)
    order = distances.argsort(axis=1, kind="stable")
    return Neighbors(np.take_along_axis(indices, order, 1), scale * np.take_along_axis(distances, order, 1))


def memorization_report(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[dict[str, float], Neighbors]:
    """Returns (a report on samples that copy reference images, the samples' k nearest neighbors).

    reference, samples: features [N, D]. k: limited to the number of reference images. close_distance is the 1% quantile of
    the nearest-neighbor distances above 0 in the reference (0 means duplicates); 0 if all distances are 0. close_share is the
    share of samples within close_distance of a reference image: about 0.01 for new images, near 1 for copies.
    """
    neighbors = nearest_neighbors(reference, samples, min(k, len(reference)))
    reference_distances = nearest_neighbors(reference, reference, others=True).distances[:, 0]
    distinct = reference_distances[reference_distances > 0]  # duplicates do not show what a small distance is
    limit = np.quantile(distinct, 0.01) if distinct.size else 0.0
    report = {
        "nearest_distance_median": float(np.median(neighbors.distances[:, 0])),
        "reference_nearest_distance_median": float(np.median(reference_distances)),
        "close_distance": float(limit),
        "close_share": float(np.mean(neighbors.distances[:, 0] <= limit)),
    }
    return report, neighbors


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Returns the squared distance [N] to the k-th nearest other feature."""
    numbers = np.arange(len(features))
    return _compare(lambda d, _, __, i: _smallest(d, k, i)[0][-1], features, features, np.zeros(1), numbers)


def _smallest(d, k: int, excluded):
    """Returns (values, indices) for the k smallest entries of d [N], in order, without the index `excluded`."""
    values, indices = jax.lax.top_k(-jnp.where(jnp.arange(len(d)) == excluded, jnp.inf, d), k)
    return -values, indices


def _compare(function: Callable, rows: np.ndarray, columns: np.ndarray, column_values, *row_values) -> np.ndarray:
    """Evaluates function(squared distances from a row to all columns, slack, column_values, *row_values) per row, in blocks.

    column_values: an array that every call gets whole. row_values: arrays with one value per row. slack: the rounding error
    of the difference between two squared distances.
    """
    # A bound for the rounding of D-term products and sums in two distances; the measured error is below half the bound.
    slack = float(np.finfo(rows.dtype).eps) * (8 + rows.shape[1] ** 0.5)

    def compare_row(row, columns, norms, column_values):
        u, *values = row
        both = (u * u).sum() + norms
        d = jnp.maximum(both - 2 * jnp.dot(columns, u, precision="highest"), 0)
        return function(d, slack * both, column_values, *values)

    @jax.jit
    def compare(rows, columns, column_values):
        norms = (columns**2).sum(axis=1)
        return jax.lax.map(lambda row: compare_row(row, columns, norms, column_values), rows, batch_size=_BLOCK)

    return np.asarray(compare((rows, *row_values), columns, column_values))


def _for_distances(
    reference, samples, k: int, minimums: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns (reference, samples, scale): both sets minus the reference's mean, divided by scale, as device floats.

    scale is the largest absolute entry, so that products are accurate and squares stay in float32's range. minimums: the
    required numbers of images, by default k + 1. Raises: ValueError.
    """
    require_number("k", k, 1)
    reference, samples = map(_checked, (reference, samples), minimums or (k + 1, k + 1))
    _check_widths(reference, samples)
    center, dtype = reference.mean(axis=0, dtype=np.float64), jax.dtypes.canonicalize_dtype(np.float64)
    reference, samples = reference - center, samples - center
    scale = max(float(np.abs(reference).max()), float(np.abs(samples).max())) or 1.0
    if not np.isfinite(scale):
        raise ValueError("features are too far apart for float64: scale them down")
    return (reference / scale).astype(dtype), (samples / scale).astype(dtype), scale


def _checked(features, minimum: int) -> np.ndarray:
    """Returns features [N, D] from at least `minimum` images, as real numbers in float32 or better. Raises: ValueError."""
    features = as_examples("features", features, minimum)
    if features.ndim != 2:
        raise ValueError(f"features of shape {features.shape} are not [N, D]")
    if features.dtype.itemsize < 4:
        features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"features of {(~np.isfinite(features)).any(axis=1).sum()} images are not finite")
    return features


def _check_widths(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"the features have {one.shape[-1]} and {other.shape[-1]} dimensions; use one extractor for both sets"
        )

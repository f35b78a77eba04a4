"""Metrics of samples against a reference, as pure functions of arrays of features.

Sums and matrix roots are float64 NumPy, whatever the accelerator; what compares every sample with every reference image runs
on the devices, in blocks. Features are [N, D], of any extractor; only those of the published Inception make a Frechet
distance the FID.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_BLOCK = 512  # rows whose distances to all others a device holds at once


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (unbiased) of `count` features, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def moments(features) -> Moments:
    """Of features [N, D]. Raises: ValueError for fewer than two, or for numbers that are not finite."""
    return _moments(_checked(features, 2))


def _moments(features: np.ndarray) -> Moments:
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / max(len(features) - 1, 1), len(features))


def merge(one: Moments, other: Moments) -> Moments:
    """The moments of both sets together, so that a large set needs no array of all its features (Chan et al. 1979)."""
    count, shift = one.count + other.count, other.mean - one.mean
    scatter = one.covariance * (one.count - 1) + other.covariance * (other.count - 1)
    scatter += np.outer(shift, shift) * (one.count * other.count / count)
    return Moments(one.mean + shift * (other.count / count), scatter / (count - 1), count)


def moments_of_chunks(chunks: Iterable[np.ndarray]) -> Moments:
    """Of features that come in chunks [n, D]. Raises: as `moments`."""
    found = functools.reduce(merge, (_moments(_checked(chunk, 1)) for chunk in chunks))
    if found.count < 2:
        raise ValueError("1 image is too few: a covariance needs 2")
    return found


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), between the Gaussians of two moments (Heusel et al. 2017, eq. 6).

    tr (C_1 C_2)^(1/2) is the sum of the singular values of C_1^(1/2) C_2^(1/2). These are exact to rounding also where the
    covariances are singular (fewer images than dimensions); eigenvalues of C_1 C_2, their squares, lose half the digits.
    Raises: ValueError for moments of different dimensions.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"moments of {len(one.mean)} and of {len(other.mean)} dimensions are of different features")
    shift = one.mean - other.mean
    cross = np.linalg.svd(_root(one.covariance).T @ _root(other.covariance), compute_uv=False).sum()
    return float(shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [D, r] with R R^T = C, without the directions in which C is zero to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])


class Estimate(NamedTuple):
    """A mean over subsets of the images, the standard deviation over these, and what the mean is uncertain by."""

    mean: float
    std: float
    standard_error: float


def kid(reference, samples, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Estimate:
    """Kernel inception distance: the unbiased squared MMD of the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    Averaged over random subsets of both sets, drawn as torch-fidelity draws them. Those overlap, so that the standard error
    counts only as many subsets as are disjoint. Raises: ValueError where there are fewer images than a subset has.
    """
    reference, samples = _checked(reference, 2), _checked(samples, 2)
    _check_widths(reference, samples)
    fewest = min(len(reference), len(samples))
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"a subset of {subset_size} for the KID must lie in 2 ... {fewest}, the number of images")
    # NumPy's legacy generator, whose streams are frozen, and torch-fidelity's order of draws: sample set first.
    rng = np.random.RandomState(seed)
    found = np.empty(subsets)
    for i in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        found[i] = _squared_mmd(x.astype(np.float64), y.astype(np.float64))
    std = found.std()
    return Estimate(found.mean(), std, std / np.sqrt(min(subsets, fewest // subset_size)))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    m, dimensions = x.shape
    xx, yy, xy = ((a @ b.T / dimensions + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def inception_score(logits, split_size: int = 5000) -> Estimate:
    """exp of the mean KL(p(y|x) | p(y)) (Salimans et al. 2016), over splits of the images in their order, as ADM's evaluator.

    logits: [N, classes], without the bias, as its and torch-fidelity's. The last split may be smaller.
    """
    logits = _checked(logits, 1).astype(np.float64)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for start in range(0, len(logits), split_size):
        part = log_p[start : start + split_size]
        divergence = (np.exp(part) * (part - np.log(np.exp(part).mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)), float(np.std(scores) / np.sqrt(len(scores))))


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference, samples, k: int = 3, devices: Sequence[jax.Device] | None = None) -> PrecisionRecall:
    """The share of samples in the reference's manifold, and of reference images in the samples' (Kynkaanniemi et al. 2019).

    A set's manifold is the union of the balls about its members that reach to their k-th nearest other member. devices: that
    share the work; all of this process's unless given. Raises: ValueError where a set has no k others.
    """
    reference, samples = _for_distances(reference, samples, k)
    inside = functools.partial(_compare, lambda d, radii: (d <= radii).any(), devices=devices)
    return PrecisionRecall(
        float(np.mean(inside(samples, reference, _radii(reference, k, devices)))),
        float(np.mean(inside(reference, samples, _radii(samples, k, devices)))),
    )


class DensityCoverage(NamedTuple):
    """density >= 0, about 1 for samples of the reference's distribution; coverage in [0, 1]."""

    density: float
    coverage: float


def density_coverage(reference, samples, k: int = 5, devices: Sequence[jax.Device] | None = None) -> DensityCoverage:
    """How many of the reference's balls a sample lies in, over k, and the share of balls that hold a sample
    (Naeem et al. 2020, eq. 4 and 6). Arguments and what raises: as `precision_recall`.
    """
    reference, samples = _for_distances(reference, samples, k)
    radii = _radii(reference, k, devices)
    balls = _compare(lambda d, radii: (d <= radii).sum(), samples, reference, radii, devices=devices)
    nearest = _compare(lambda d, _: d.min(), reference, samples, np.zeros(len(samples)), devices=devices)
    return DensityCoverage(float(np.mean(balls) / k), float(np.mean(nearest <= radii)))


class Neighbours(NamedTuple):
    """Of each query, its nearest reference features, nearest first: indices int [N, k] and distances [N, k]."""

    indices: np.ndarray
    distances: np.ndarray


def nearest_neighbours(
    reference, queries, k: int = 1, others: bool = False, devices: Sequence[jax.Device] | None = None
) -> Neighbours:
    """The k nearest reference features of each query. others: the queries are the reference; none is its own neighbour."""
    reference, queries = _for_distances(reference, queries, k if others else k - 1)
    own = np.arange(len(queries)) if others else np.full(len(queries), -1)

    def nearest(d, number):
        d = jnp.where(jnp.arange(len(d)) == number, jnp.inf, d)
        return jax.lax.top_k(-d, k)[1]

    indices = _compare(lambda d, _, number: nearest(d, number), queries, reference, np.zeros(1), own, devices=devices)
    # From the differences themselves: the products that found them cancel where a query is a copy.
    distances = np.stack([np.linalg.norm(reference[column] - queries, axis=1) for column in indices.T], axis=1)
    return Neighbours(indices, distances)


def _radii(features: np.ndarray, k: int, devices) -> np.ndarray:
    """Squared distance to the k-th nearest other: the (k + 1)-th smallest, each being nearest to itself."""
    return _compare(lambda d, _: -jax.lax.top_k(-d, k + 1)[0][-1], features, features, np.zeros(1), devices=devices)


def _compare(function: Callable, rows: np.ndarray, columns: np.ndarray, beside, *numbers, devices=None) -> np.ndarray:
    """function(squared distances of a row to all columns, beside, *number of the row) of every row, a block at a time.

    The rows are spread over the devices, each of which holds all columns.
    """
    mesh = jax.make_mesh(
        (len(devices or jax.local_devices()),),
        ("rows",),
        devices=devices or jax.local_devices(),
        axis_types=(AxisType.Auto,),
    )
    split, whole = PartitionSpec("rows"), PartitionSpec()
    count, padding = len(rows), -len(rows) % mesh.size
    rows = tuple(np.concatenate([a, a[:1].repeat(padding, axis=0)]) for a in (rows, *numbers))

    def each(row, columns, norms, beside):
        u, *number = row
        d = jnp.maximum(u @ u - 2 * jnp.dot(columns, u, precision="highest") + norms, 0)
        return function(d, beside, *number)

    def block(rows, columns, beside):
        norms = (columns**2).sum(axis=1)
        return jax.lax.map(lambda row: each(row, columns, norms, beside), rows, batch_size=_BLOCK)

    spread = jax.shard_map(block, mesh=mesh, in_specs=(split, whole, whole), out_specs=split, check_vma=False)
    placed = jax.device_put((rows, columns, beside), tuple(NamedSharding(mesh, spec) for spec in (split, whole, whole)))
    return np.asarray(jax.jit(spread)(*placed))[:count]


def _for_distances(reference, samples, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Both about the reference's mean, where products lose least, in the precision that the devices have."""
    reference, samples = _checked(reference, k + 1), _checked(samples, k + 1)
    _check_widths(reference, samples)
    centre, dtype = reference.mean(axis=0, dtype=np.float64), jax.dtypes.canonicalize_dtype(np.float64)
    return (reference - centre).astype(dtype), (samples - centre).astype(dtype)


def _checked(features, least: int) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"features of shape {features.shape} are not [N, D]")
    if len(features) < least:
        raise ValueError(f"{len(features)} images are too few: this needs {least}")
    if not np.isfinite(features).all():
        raise ValueError(f"features of {(~np.isfinite(features)).any(axis=1).sum()} images are not finite")
    return features


def _check_widths(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"features of {one.shape[1]} and of {other.shape[1]} dimensions are of different extractors")

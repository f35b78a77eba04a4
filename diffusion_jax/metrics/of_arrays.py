"""Statistics for sets of float arrays [n, *spatial, C], and distances between two sets, without a feature network.

Vectors, series, fields and volumes are not rescaled: if channels have different units, divide each by its standard
deviation first. Examples are independent draws, but the positions in an example may depend on each other, so every standard
error is computed from the scatter over examples. Sums are computed in float64 with NumPy, one block of examples at a time, so
a set may be `LazyExamples`, or a memory map that is larger than memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1024  # examples
_MAX_BLOCK_BYTES = _MAX_PROJECTED_BYTES = 2**26


# ---- Sets that may be larger than memory


def even_indices(total: int, count: int) -> np.ndarray:
    """Returns `count` evenly spread indices below `total`, or all indices if there are fewer."""
    return np.arange(total) if count >= total else np.arange(count) * total // count


def subset_indices(total: int, count: int) -> np.ndarray:
    """Returns the sorted indices of a subset, one from each of `count` equal parts, or all indices if there are fewer.

    The place in a part is pseudorandom and always the same: evenly spread indices would miss some of labels that cycle.
    """
    edges = even_indices(total, count)
    return edges + (np.random.default_rng(0).random(len(edges)) * np.diff(edges, append=total)).astype(int)


def select(x: np.ndarray | LazyExamples, count: int) -> np.ndarray | LazyExamples:
    """Selects the examples of `subset_indices`, or all examples of a smaller set."""
    indices = subset_indices(len(x), count)
    if isinstance(x, LazyExamples):
        return LazyExamples(lambda rows: x[indices[rows]], (len(indices), *x.shape[1:]), x.dtype)
    return x if len(indices) == len(x) else x[indices]


class LazyExamples:
    """Examples [n, *spatial, C] that are read on indexing; this module's functions accept it like an array.

    read: (indices int [b]) -> examples [b, *spatial, C] of the dtype. shape: the shape of the whole set.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: np.dtype):
        self._read, self.shape, self.ndim, self.dtype = read, shape, len(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        return self._read(np.arange(len(self))[key])


def as_examples(name: str, x: Any, minimum: int) -> np.ndarray:
    """Returns x as an array [n, *spatial, C] with at least `minimum` examples; NumPy arrays are not copied.

    name: the name of x in the error message. Raises: ValueError for another shape, complex numbers, or fewer examples.
    """
    x = x if isinstance(x, LazyExamples) else np.asarray(x)
    if x.ndim < 2 or not all(x.shape[1:]):
        raise ValueError(f"{name} has shape {x.shape}; it must be [n, *spatial, C], vectors for instance [n, C]")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(f"{name} is {x.dtype}; it must have real numbers, float32 for instance")
    if len(x) < minimum:
        raise ValueError(f"{name} has {len(x)} examples; this needs at least {minimum}")
    return cast(np.ndarray, x)


def as_example_pair(reference: Any, samples: Any, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets as arrays. Raises: ValueError as `as_examples`, and for examples with different shapes."""
    reference, samples = as_examples("reference", reference, minimum), as_examples("samples", samples, minimum)
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(
            f"reference has examples of shape {reference.shape[1:]}, but samples has {samples.shape[1:]}; "
            "the shapes must be equal"
        )
    return reference, samples


def read_blocks(x: Any, floats_per_example: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields consecutive blocks: (index of the first example, examples float64 [b, *spatial, C]).

    floats_per_example: the number of floats that the caller computes per example, if the example has fewer; limits b.
    Raises: ValueError for values that are not finite.
    """
    width = max(math.prod(x.shape[1:]), floats_per_example or 0)
    size = min(max(_MAX_BLOCK_BYTES // (8 * width), 1), _BLOCK)
    for start in range(0, len(x), size):
        block = np.asarray(x[start : start + size], np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"example {start + finite.argmin()} has values that are not finite; remove or repair it")
        yield start, block


# ---- Statistics of one set


def relative_rounding(dtype: np.dtype) -> float:
    """Returns the largest ratio of standard deviation to magnitude that rounding can cause in a constant channel of a dtype.

    The ratio is the dtype's precision, but at least 1e-12, because sums of float64 values are also rounded.
    """
    return max(1e-12, float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0)


class ValueAndError(NamedTuple):
    """An estimate and its standard error: numbers, or arrays with the same shape.

    same_distribution, same_distribution_std: for a distance, the mean and standard deviation that `value` would have if both
    sets had the same distribution, for comparison. The standard error assumes different distributions and is too large for
    equal distributions.
    """

    value: Any
    standard_error: Any
    same_distribution: Any = None
    same_distribution_std: Any = None


class MeanAndCovariance(NamedTuple):
    """mean: the mean of each channel [C]. covariance: the covariance between the channels at one position [C, C]."""

    mean: ValueAndError
    covariance: ValueAndError


def mean_and_covariance(x: Any) -> MeanAndCovariance:
    """Computes the mean of each channel and the covariance of channels over the examples and positions of x [n, *spatial, C].

    The covariance is E (x_c - mean_c)(x_d - mean_d) at one position, unbiased; for vectors it equals `numpy.cov`.
    Raises: ValueError for fewer than two examples, or values that are not finite.
    """
    x = as_examples("x", x, 2)
    count, channels = len(x), x.shape[-1]
    mean, covariance_of_mean = _channel_means(x)
    total, squares = np.zeros((channels, channels)), np.zeros((channels, channels))
    for _, block in read_blocks(x, channels**2):
        flat = (block - mean).reshape(len(block), -1, channels)
        products = np.matmul(flat.swapaxes(1, 2), flat) / flat.shape[1]
        total += products.sum(axis=0)
        squares += np.square(products).sum(axis=0)
    error = _standard_error(total, squares, count)
    # The estimated mean lies closer to the data than the true mean; the covariance of the estimated mean corrects this.
    return MeanAndCovariance(
        ValueAndError(mean, np.sqrt(np.diag(covariance_of_mean))),
        ValueAndError(total / count + covariance_of_mean, error),
    )


class Curve(NamedTuple):
    """A statistic of each channel, `value` [K, C] with its `standard_error`, at x [K]: frequencies or lags."""

    x: np.ndarray
    value: np.ndarray
    standard_error: np.ndarray


def power_spectrum(x: Any, *, periodic: bool = False) -> Curve:
    """Computes the power spectrum of x [n, *spatial, C] with one spatial axis or more, after subtracting each channel's mean.

    With F(k) = sum_r (x(r) - mean) exp(-2 pi i k.r) and N positions, the spectrum is E |F(k)|^2 / N, averaged over shells of
    frequencies, each as wide as the lowest frequency; k and -k share a shell. For white noise it equals the variance at every
    frequency, and its mean over all frequencies is the variance (Parseval).

    periodic: whether the last position along each axis lies beside the first. Other examples are multiplied by a Hann window
    with mean square 1 along each axis: without it, the step from the last to the first position would give power at all
    frequencies, which hides small powers. A window averages each frequency with its neighbors.

    Returns: Curve at the mean absolute frequency in each shell, in cycles per position.
    Raises: ValueError for vectors, fewer than two examples, or values that are not finite.
    """
    x = as_examples("x", x, 2)
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}; a power spectrum needs at least one spatial axis: [n, L, C]")
    count, spatial, channels = len(x), x.shape[1:-1], x.shape[-1]
    axes = tuple(range(1, len(spatial) + 1))
    frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, spatial), indexing="ij"), axis=-1)
    lengths = np.linalg.norm(frequencies, axis=-1).reshape(-1)
    shell = np.round(lengths * max(spatial)).astype(int)
    order = np.argsort(shell, kind="stable")  # makes the frequencies in a shell neighbors
    _, starts, sizes = np.unique(shell[order], return_index=True, return_counts=True)
    mean, _ = _channel_means(x)
    windows = [np.ones(n) if periodic else np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in spatial]
    windows = [window / np.sqrt(np.mean(window**2)) for window in windows]
    window = functools.reduce(np.multiply.outer, windows)[..., None]
    total, squares = np.zeros((2, len(starts), channels))
    for _, block in read_blocks(x, 4 * math.prod(spatial) * channels):
        transform = np.fft.fftn(window * (block - mean), axes=axes).reshape(len(block), -1, channels)
        power = (np.square(transform.real) + np.square(transform.imag)) / math.prod(spatial)
        # The estimated mean lies closer to the data than the true mean, which lowers the power at frequency 0.
        power[:, 0] *= count / (count - 1)
        power = np.add.reduceat(power[:, order], starts, axis=1) / sizes[:, None]
        total += power.sum(axis=0)
        squares += np.square(power).sum(axis=0)
    error = _standard_error(total, squares, count)
    return Curve(np.add.reduceat(lengths[order], starts) / sizes, total / count, error)


def autocorrelation(x: Any, *, periodic: bool = False) -> Curve:
    """Returns the autocorrelation of series x [n, L, C]: E (x(s) - mean)(x(s + lag) - mean) / variance, lags up to L / 2.

    Assumes that series are stationary: uses one mean and one variance for all positions, and averages over positions.
    periodic: whether position L equals position 0, so that every lag has L pairs; otherwise lag h has L - h pairs.

    Returns: Curve over the lags (int), whose value at lag 0 is exactly 1.
    Raises: ValueError for another shape, fewer than two examples, values that are not finite, or a constant channel.
    """
    x = as_examples("x", x, 2)
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {x.shape}; an autocorrelation needs series [n, L, C], fields have `power_spectrum`"
        )
    count, length, channels = x.shape
    lags = np.arange(length // 2 + 1)
    pairs = np.full(len(lags), length) if periodic else length - lags
    padded = length if periodic else 2 * length  # zeros separate the ends of a series
    mean, covariance_of_mean = _channel_means(x)
    total, squares, with_variance = np.zeros((3, len(lags), channels))
    for _, block in read_blocks(x, 4 * padded * channels):
        transform = np.fft.rfft(block - mean, padded, axis=1)
        power = np.square(transform.real) + np.square(transform.imag)
        products = np.fft.irfft(power, padded, axis=1)[:, : len(lags)] / pairs[:, None]
        total += products.sum(axis=0)
        squares += np.square(products).sum(axis=0)
        with_variance += (products * products[:, :1]).sum(axis=0)
    # The estimated mean lies closer to the data than the true mean; the variance of the estimated mean corrects this.
    covariance = total / count + np.diag(covariance_of_mean)
    variance = covariance[0]
    varies = variance > np.square(relative_rounding(x.dtype) * mean)
    if not varies.all():
        raise ValueError(f"channel {int(np.argmin(varies))} is constant; it has no autocorrelation: leave it out")
    value = covariance / variance
    # Delta method: a ratio of means has the error of mean(product at the lag - value * product at lag 0), divided by the
    # variance.
    centered = squares - 2 * value * with_variance + value**2 * squares[0]
    error = _standard_error(total - value * total[0], centered, count) / variance
    error[0] = 0.0
    return Curve(lags, value, error)


def _channel_means(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each channel's mean [C], and the covariance between these estimates [C, C]."""
    channels = x.shape[-1]
    means = np.concatenate([block.reshape(len(block), -1, channels).mean(axis=1) for _, block in read_blocks(x)])
    mean = means.mean(axis=0)
    centered = means - mean
    return mean, centered.T @ centered / ((len(x) - 1) * len(x))


def _standard_error(total: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    """Returns the standard error of total / count, from the summed squares of the summands."""
    return np.sqrt(np.maximum(squares - np.square(total) / count, 0) / (count * (count - 1)))


# ---- Energy distance


def energy_distance(reference: Any, samples: Any) -> ValueAndError:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013): 0 for equal distributions, otherwise above 0.

    The estimate is unbiased (a U-statistic), so it may be below 0. |x - y| is the Euclidean norm over all entries of an
    example. Hoeffding's decomposition gives the errors: same_distribution_std from the second-order terms, the only terms for
    equal distributions, and the standard error from both orders. Time is quadratic in the number of examples.

    Returns: ValueAndError with same_distribution_std; in one dimension, about 2% of the values for equal distributions exceed
      three times this number.
    Raises: ValueError for fewer than four examples, different example shapes, or values that are not finite.
    """
    reference, samples = as_example_pair(reference, samples, 4)
    center = np.asarray(sum(block.sum(axis=0) for _, block in read_blocks(reference))) / len(reference)
    n, m = len(reference), len(samples)
    rows, columns, squares = _distance_sums(reference, samples, center)
    within = []
    for x in (reference, samples):
        sums, _, squared = _distance_sums(x, None, center)
        within.append((sums, squared))
    mean = rows.sum() / (n * m)
    value = 2 * mean - sum(sums.sum() / (len(sums) * (len(sums) - 1)) for sums, _ in within)
    # Doubly centered distances have the variance of the kernel's second-order terms, which depend on both examples of a pair.
    centered = squares - (rows**2).sum() / m - (columns**2).sum() / n + n * m * mean**2
    cross = centered / ((n - 1) * (m - 1))
    inner = [_centered_variance(sums, squared) for sums, squared in within]
    second = 4 * cross / (n * m) + sum(2 * v / (k * (k - 1)) for v, k in zip(inner, (n, m), strict=True))
    first = 0.0
    for across, (sums, _), v, k, other in zip((rows, columns), within, inner, (n, m), (m, n), strict=True):
        projection = across / other - sums / (k - 1)
        first += 4 * (projection.var(ddof=1) - cross / other - v * (k - 2) / (k - 1) ** 2) / k
    second = max(second, 0.0)
    error = np.sqrt(max(first, 0.0) + second)
    return ValueAndError(float(value), float(error), same_distribution_std=float(np.sqrt(second)))


def _distance_sums(x: np.ndarray, y: np.ndarray | None, center: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the sums of |x_i - y_j| over j [n], over i [m], and of all squares; None for y sums |x_i - x_j|, i != j."""
    columns_of = x if y is None else y
    rows, columns, total = np.zeros(len(x)), np.zeros(len(columns_of)), 0.0
    for i, x_block in read_blocks(x):
        a = (x_block - center).reshape(len(x_block), -1)
        for j, y_block in read_blocks(columns_of):
            b = (y_block - center).reshape(len(y_block), -1)
            squares = np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)
            if y is None and i == j:
                np.fill_diagonal(squares, 0)
            distances = np.sqrt(squares)
            rows[i : i + len(a)] += distances.sum(axis=1)
            columns[j : j + len(b)] += distances.sum(axis=0)
            total += squares.sum()
    return rows, columns, total


def _centered_variance(sums: np.ndarray, squares: float) -> float:
    """Returns the unbiased variance of doubly centered distances in a set (U-centering, Szekely and Rizzo 2014)."""
    n = len(sums)
    centered = squares - 2 * (sums**2).sum() / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return centered / (n * (n - 3))


# ---- Sliced Wasserstein


def sliced_wasserstein(
    key: jax.Array, reference: Any, samples: Any, *, projections: int = 256, groups: int = 20, permutations: int = 20
) -> ValueAndError:
    """(E_u W_2(u.X, u.Y)^2)^(1/2) over random unit vectors u (Bonneel et al. 2015).

    W_2 is the exact Wasserstein distance between the projected sets, whose sizes may differ. The distance between finite sets
    is above 0 even for equal distributions.

    Args:
      key: draws the directions, the groups and the permutations.
      projections: the number of directions, at least 2.
      groups: the standard error is a jackknife over `groups` groups of examples from both sets, plus the error from the
        choice of directions.
      permutations: how often the examples of both sets are permuted, for `same_distribution`.
    Raises: ValueError for too few examples for the groups, different example shapes, or values that are not finite.
    """
    reference, samples = as_example_pair(reference, samples, 2 * groups)
    n, m, dimensions = len(reference), len(samples), math.prod(reference.shape[1:])
    key_directions, key_groups, key_permutations = jax.random.split(key, 3)
    is_sample = np.arange(n + m) >= n
    rng = np.random.default_rng(np.asarray(jax.random.bits(key_groups, (4,))))
    group = np.concatenate([rng.permutation(size) % groups for size in (n, m)])
    # The set of each example, 0 or 1; -1 leaves the example out.
    assignments = [is_sample.astype(int)]
    assignments += [np.where(group == g, -1, is_sample) for g in range(groups)]
    rng = np.random.default_rng(np.asarray(jax.random.bits(key_permutations, (4,))))
    assignments += [rng.permutation(is_sample).astype(int) for _ in range(permutations)]

    def draw(i):  # a direction that depends on the key and the index only
        return jax.random.normal(jax.random.fold_in(key_directions, i), (dimensions,), jnp.float32)

    powers = np.empty((len(assignments), projections))  # W_2^2 for every assignment and direction
    width = max(dimensions, n + m)
    size = max(_MAX_PROJECTED_BYTES // (8 * width), 1)
    for start in range(0, projections, size):
        indices = np.arange(start, min(start + size, projections))
        directions = np.asarray(jax.vmap(draw)(indices), np.float64).T
        directions = directions / np.linalg.norm(directions, axis=0)
        blocks = (block.reshape(len(block), -1) for x in (reference, samples) for _, block in read_blocks(x))
        projected = np.concatenate([block @ directions for block in blocks])
        order_of_values = projected.argsort(axis=0)
        values = np.take_along_axis(projected, order_of_values, axis=0)
        for i, assignment in enumerate(assignments):
            powers[i, indices] = _wasserstein_power(values, assignment[order_of_values])
    distances = np.sqrt(powers.mean(axis=1))
    value, left_out, permuted = distances[0], distances[1 : groups + 1], distances[groups + 1 :]
    data_variance = (groups - 1) * left_out.var()
    direction_error = powers[0].std(ddof=1) / np.sqrt(projections)
    if value > 0:
        direction_error /= 2 * value
    error = np.sqrt(data_variance + direction_error**2)
    return ValueAndError(float(value), float(error), float(permuted.mean()), float(permuted.std(ddof=1)))


def _wasserstein_power(values: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Returns W_2^2 [P] between sets 0 and 1 of the sorted numbers [N, P]; assignment [N, P]: the set, or -1 for none."""
    columns = values.shape[1]
    x, y = (values.T[(assignment == i).T].reshape(columns, -1) for i in (0, 1))
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return np.square(x - y).mean(axis=1)
    # Quantile functions are constant between multiples of 1/n and 1/m, here in units of 1 / (n m).
    ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    lengths = np.diff(ends, prepend=0)
    differences = np.square(x[:, (ends - 1) // m] - y[:, (ends - 1) // n])
    return differences @ (lengths / (n * m))


# ---- Histograms


class MarginalHistograms(NamedTuple):
    """edges: bin edges [C, bins + 1]. reference, samples: the share of values in each bin [C, bins].

    distance: the total variation between the histograms, sum |p - q| / 2, in [0, 1] [C]; its same_distribution is
    the distance that the errors of the shares alone would give.
    """

    edges: np.ndarray
    reference: ValueAndError
    samples: ValueAndError
    distance: ValueAndError


def marginal_histograms(
    reference: Any, samples: Any, bins: int = 50, *, limits: Any, groups: int = 20
) -> MarginalHistograms:
    """Computes histograms of each channel's values at all positions, with common bins of equal width, and their distances.

    Args:
      limits: (low, high) of the bins, numbers or arrays [C]; values outside count in the outermost bins.
      groups: the distance's standard error is a jackknife over `groups` groups of examples. The standard errors of the shares
        come from the scatter over examples.
    Raises: ValueError for too few examples for the groups, different example shapes, or values that are not finite.
    """
    reference, samples = as_example_pair(reference, samples, 2 * groups)
    low, high = (np.broadcast_to(np.asarray(edge, np.float64), reference.shape[-1:]) for edge in limits)
    channels = reference.shape[-1]
    counts, histograms, sums = [], [], []
    for x in (reference, samples):
        group = np.arange(len(x)) % groups
        total, squares = np.zeros((groups, channels, bins)), np.zeros((channels, bins))
        for start, block in read_blocks(x, channels * bins):
            values = block.reshape(len(block), -1, channels)
            index = np.clip(np.floor((values - low) / (high - low) * bins), 0, bins - 1).astype(np.int64)
            index += bins * (np.arange(channels) + channels * np.arange(len(block))[:, None, None])
            counted = np.bincount(index.reshape(-1), minlength=len(block) * channels * bins)
            shares = counted.reshape(len(block), channels, bins) / values.shape[1]
            np.add.at(total, group[start : start + len(block)], shares)
            squares += np.square(shares).sum(axis=0)
        mean = total.sum(axis=0) / len(x)
        variance = np.maximum(squares / len(x) - mean**2, 0) / (len(x) - 1)
        histograms.append(ValueAndError(mean, np.sqrt(variance)))
        sums.append(total)
        counts.append(np.bincount(group, minlength=groups))

    def distance(one, other):
        return 0.5 * np.abs(one - other).sum(axis=-1)

    left_out = distance(
        *(
            (total.sum(axis=0) - total) / (count.sum() - count)[:, None, None]
            for total, count in zip(sums, counts, strict=True)
        )
    )
    value, error = distance(*(h.value for h in histograms)), np.sqrt((groups - 1) * left_out.var(axis=0))
    # E|z| of a normal z is its standard deviation times sqrt(2 / pi).
    noise = np.hypot(*(h.standard_error for h in histograms))
    same_distribution = np.sqrt(0.5 / np.pi) * noise.sum(axis=-1)
    edges = np.linspace(low, high, bins + 1, axis=-1)
    return MarginalHistograms(edges, histograms[0], histograms[1], ValueAndError(value, error, same_distribution))


def value_range(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns each channel's (lowest, highest) value [C] in examples [n, *spatial, C]; a constant channel has width 1."""
    blocks = (block.reshape(-1, block.shape[-1]) for _, block in read_blocks(x))
    ranges = np.array([(block.min(axis=0), block.max(axis=0)) for block in blocks])
    low, high = ranges[:, 0].min(axis=0), ranges[:, 1].max(axis=0)
    constant = low == high
    return np.where(constant, low - 0.5, low), np.where(constant, high + 0.5, high)

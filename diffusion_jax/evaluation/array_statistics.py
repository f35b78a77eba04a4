"""Mean, covariance, power spectrum and autocorrelation of sets of float arrays [n, *spatial, C], with standard errors.

Each function describes one set; `z_scores` compares the statistics of two sets, or of a set with a known law. Examples are
independent draws, but the positions of an example may depend on each other: every standard error comes from the scatter
over examples. Sums are float64 NumPy, over blocks of examples, so a set may be a memory map that is larger than memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.normalization import relative_rounding
from diffusion_jax.evaluation.example_sets import as_examples, read_blocks

__all__ = [
    "Autocorrelation",
    "MeanAndCovariance",
    "Measurement",
    "PowerSpectrum",
    "autocorrelation",
    "mean_and_covariance",
    "power_spectrum",
    "z_scores",
]


class Measurement(NamedTuple):
    """Estimated numbers and their standard errors, of one shape."""

    value: Any
    standard_error: Any


def z_scores(one: Any, other: Any) -> np.ndarray:
    """(one - other) / standard error of the difference, of two independent statistics.

    one, other: values with the fields `value` and `standard_error`; `other` may be an array, the numbers of a known law.
    z-scores of one statistic are correlated with each other, for example those of neighboring lags. Two equal numbers without
    an error have the z-score 0.
    """
    exact = not hasattr(other, "standard_error")
    difference = np.asarray(one.value) - np.asarray(other if exact else other.value)
    error = np.hypot(one.standard_error, 0.0 if exact else other.standard_error)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / error)


class MeanAndCovariance(NamedTuple):
    """mean: of each channel [C]. covariance: of the channels at one position [C, C]."""

    mean: Measurement
    covariance: Measurement


def mean_and_covariance(x: Any) -> MeanAndCovariance:
    """The mean of each channel and the covariance between channels, over all examples and positions of x [n, *spatial, C].

    The covariance is E (x_c - mean_c)(x_d - mean_d) at one position, unbiased: for vectors it is that of `numpy.cov`.
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
    # The estimated mean lies closer to the data than the true one, by its own covariance.
    return MeanAndCovariance(
        Measurement(mean, np.sqrt(np.diag(covariance_of_mean))), Measurement(total / count + covariance_of_mean, error)
    )


class PowerSpectrum(NamedTuple):
    """A spectrum, averaged over K shells of frequencies as wide as the lowest frequency, in which k and -k meet.

    frequencies: the mean of a shell's absolute frequencies, in cycles per position [K]. value, standard_error: [K, C].
    num_averaged: how many frequencies each shell has [K].
    """

    frequencies: np.ndarray
    value: np.ndarray
    standard_error: np.ndarray
    num_averaged: np.ndarray


def power_spectrum(x: Any) -> PowerSpectrum:
    """The power spectrum of x [n, *spatial, C] with one spatial axis or more, after subtracting the mean of each channel.

    With F(k) = sum_r (x(r) - mean) exp(-2 pi i k.r) and N positions it is E |F(k)|^2 / N: that of white noise is its
    variance at every frequency, and the mean over all frequencies, sum(num_averaged * value) / sum(num_averaged), is the
    variance (Parseval). It is the spectrum of a periodic field. For other data it is the expected periodogram, whose lags are
    weighted by 1 - |lag| / length. Raises: ValueError for vectors, fewer than two examples, or values that are not finite.
    """
    x = as_examples("x", x, 2)
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}; a power spectrum needs at least one spatial axis: [n, L, C]")
    count, spatial, channels = len(x), x.shape[1:-1], x.shape[-1]
    axes = tuple(range(1, len(spatial) + 1))
    frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, spatial), indexing="ij"), axis=-1)
    lengths = np.linalg.norm(frequencies, axis=-1).reshape(-1)
    shell = np.round(lengths * max(spatial)).astype(int)
    order = np.argsort(shell, kind="stable")  # frequencies of a shell are neighbors
    _, starts, sizes = np.unique(shell[order], return_index=True, return_counts=True)
    mean, _ = _channel_means(x)
    total, squares = np.zeros((2, len(starts), channels))
    for _, block in read_blocks(x, 4 * math.prod(spatial) * channels):
        transform = np.fft.fftn(block - mean, axes=axes).reshape(len(block), -1, channels)
        power = _squared_magnitude(transform) / math.prod(spatial)
        # The estimated mean lies closer to the data than the true one, which lowers the power at frequency 0.
        power[:, 0] *= count / (count - 1)
        power = np.add.reduceat(power[:, order], starts, axis=1) / sizes[:, None]
        total += power.sum(axis=0)
        squares += np.square(power).sum(axis=0)
    error = _standard_error(total, squares, count)
    return PowerSpectrum(np.add.reduceat(lengths[order], starts) / sizes, total / count, error, sizes)


class Autocorrelation(NamedTuple):
    """lags: int [K]. value, standard_error: of each channel [K, C]; at lag 0 exactly 1."""

    lags: np.ndarray
    value: np.ndarray
    standard_error: np.ndarray


def autocorrelation(x: Any, *, periodic: bool = False) -> Autocorrelation:
    """The autocorrelation of series x [n, L, C]: E (x(s) - mean)(x(s + lag) - mean) / variance, for lags up to L / 2.

    It assumes a stationary series: one mean and variance for all positions, over which it averages. periodic: whether
    position L is position 0 again, so that every lag has L pairs; otherwise lag h has L - h.

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
    padded = length if periodic else 2 * length  # zeros, so that the ends of a series do not meet
    mean, covariance_of_mean = _channel_means(x)
    total, squares, with_variance = np.zeros((3, len(lags), channels))
    for _, block in read_blocks(x, 4 * padded * channels):
        transform = np.fft.rfft(block - mean, padded, axis=1)
        power = _squared_magnitude(transform)
        products = np.fft.irfft(power, padded, axis=1)[:, : len(lags)] / pairs[:, None]
        total += products.sum(axis=0)
        squares += np.square(products).sum(axis=0)
        with_variance += (products * products[:, :1]).sum(axis=0)
    # The estimated mean lies closer to the data than the true one, by its own variance.
    covariance = total / count + np.diag(covariance_of_mean)
    variance = covariance[0]
    varies = variance > np.square(relative_rounding(x.dtype) * mean)
    if not varies.all():
        raise ValueError(f"channel {int(np.argmin(varies))} is constant; it has no autocorrelation: leave it out")
    value = covariance / variance
    # Delta method: the ratio of two means has the error of the mean of (product at the lag - value * product at lag 0), over
    # the variance.
    centered = squares - 2 * value * with_variance + value**2 * squares[0]
    error = _standard_error(total - value * total[0], centered, count) / variance
    error[0] = 0.0
    return Autocorrelation(lags, value, error)


def _channel_means(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each channel [C], and the covariance of these means as estimates [C, C]."""
    channels = x.shape[-1]
    means = np.concatenate([block.reshape(len(block), -1, channels).mean(axis=1) for _, block in read_blocks(x)])
    mean = means.mean(axis=0)
    centered = means - mean
    return mean, centered.T @ centered / ((len(x) - 1) * len(x))


def _squared_magnitude(x: np.ndarray) -> np.ndarray:
    """|x|^2 of complex numbers, without the square root."""
    return np.square(np.real(x)) + np.square(np.imag(x))


def _standard_error(total: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    """The standard error of total / count, from the sum of the squares of the summands."""
    return np.sqrt(np.maximum(squares - np.square(total) / count, 0) / (count * (count - 1)))

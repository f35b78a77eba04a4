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
from diffusion_jax.evaluation.example_blocks import as_examples, read_blocks

__all__ = [
    "WINDOWS",
    "Autocorrelation",
    "MeanAndCovariance",
    "Measurement",
    "PowerSpectrum",
    "autocorrelation",
    "mean_and_covariance",
    "power_spectrum",
    "z_scores",
]

WINDOWS = ("none", "hann")


class Measurement(NamedTuple):
    """Estimated numbers and their standard errors, of one shape. Those of a complex value are of its two parts."""

    value: Any
    standard_error: Any


def z_scores(one: Any, other: Any) -> np.ndarray:
    """(one - other) / standard error of the difference, of two independent statistics.

    one, other: values with the fields `value` and `standard_error`; `other` may be an array, the numbers of a known law.
    z-scores of one statistic are correlated with each other, for example those of neighboring lags. Complex values have
    complex z-scores, one for each part. Two equal numbers without an error have the z-score 0.
    """
    exact = not hasattr(other, "standard_error")
    values = np.asarray(one.value) - np.asarray(other if exact else other.value)
    error = np.asarray(one.standard_error)
    other_error = np.zeros_like(error) if exact else np.asarray(other.standard_error)

    def divide(difference, error, other_error):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(difference == 0, 0.0, difference / np.hypot(error, other_error))

    if not np.iscomplexobj(values):
        return divide(values, np.real(error), np.real(other_error))
    z = np.empty(np.broadcast_shapes(values.shape, error.shape), complex)
    # Not real + 1j * imaginary, in which an infinite imaginary part makes the real part NaN.
    z.real, z.imag = (divide(part(values), part(error), part(other_error)) for part in (np.real, np.imag))
    return z


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
    """A spectrum at K frequencies, or on the grid of the Fourier transform, where `*K` is the shape of the spatial axes.

    frequencies: cycles per position; of a shell, the mean of its absolute frequencies [K]; of the grid [*K, axes].
    value, standard_error: [*K, C], or [*K, C, C] with cross=True (complex on the grid).
    num_averaged: how many frequencies of the grid each entry averages [*K].
    """

    frequencies: np.ndarray
    value: np.ndarray
    standard_error: np.ndarray
    num_averaged: np.ndarray


def power_spectrum(x: Any, *, radial: bool = True, cross: bool = False, window: str = "none") -> PowerSpectrum:
    """The power spectrum of x [n, *spatial, C] with one spatial axis or more, after subtracting the mean of each channel.

    With F(k) = sum_r (x(r) - mean) exp(-2 pi i k.r) and N positions it is E |F(k)|^2 / N: that of white noise is its
    variance at every frequency, and the mean over all frequencies, sum(num_averaged * value) / sum(num_averaged), is the
    variance (Parseval). It is the spectrum of a periodic field. For other data it is the expected periodogram, whose lags are
    weighted by 1 - |lag| / length; a window reduces the leakage from strong into weak frequencies.

    Args:
      radial: average over shells of |k| as wide as the lowest frequency, in which k and -k meet; False: every frequency, in
        the order of `numpy.fft.fftfreq` along each axis.
      cross: the spectra of all pairs of channels, E F_c(k) conj(F_d(k)) / N; their average over a shell is real.
      window: "none", or "hann" along each axis, for data that are not periodic; it keeps the spectrum of white noise. The
        estimate is unbiased for either, so with very few examples a windowed frequency near 0 may be below 0.
    Raises: ValueError for vectors, fewer than two examples, values that are not finite, or an unknown window.
    """
    x = as_examples("x", x, 2)
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}; a power spectrum needs at least one spatial axis: [n, L, C]")
    if window not in WINDOWS:
        raise ValueError(f"unknown window {window!r}; known: {', '.join(WINDOWS)}")
    count, spatial, channels = len(x), x.shape[1:-1], x.shape[-1]
    axes = tuple(range(1, len(spatial) + 1))
    frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, spatial), indexing="ij"), axis=-1)
    weights = _window(spatial, window)
    order, starts, sizes = _shells(frequencies) if radial else _single_frequencies(frequencies)
    mean, _ = _channel_means(x)
    entry_shape = (channels, channels) if cross else (channels,)
    dtype = np.complex128 if cross and not radial else np.float64
    total, squares = np.zeros((2, len(starts), *entry_shape), dtype)
    transformed_weights = np.fft.fftn(weights[..., 0]).reshape(-1, 1)
    for _, block in read_blocks(x, 4 * math.prod(spatial) * math.prod(entry_shape)):
        block = block - mean
        transform = np.fft.fftn(block * weights, axes=axes).reshape(len(block), -1, channels)
        # Subtracting the mean of the examples lowers the power where the window has one. With F the transform and F_i that of
        # an example minus its own mean, E (n |F|^2 - |F_i|^2) / (n - 1) is the power around the true mean.
        around_own_mean = transform - transformed_weights * block.mean(axis=axes)[:, None]
        power: Any = count * _products(transform, cross) - _products(around_own_mean, cross)
        power = (power.real if radial else power) / ((count - 1) * math.prod(spatial))
        if radial:
            power = np.add.reduceat(power[:, order], starts, axis=1) / sizes.reshape(-1, *(1 for _ in entry_shape))
        total += power.sum(axis=0)
        squares += _square_parts(power).sum(axis=0)
    value, error = total / count, _standard_error(total, squares, count)
    if radial:
        lengths = np.linalg.norm(frequencies, axis=-1).reshape(-1)
        return PowerSpectrum(np.add.reduceat(lengths[order], starts) / sizes, value, error, sizes)
    grid = (*spatial, *entry_shape)
    return PowerSpectrum(frequencies, value.reshape(grid), error.reshape(grid), sizes.reshape(spatial))


class Autocorrelation(NamedTuple):
    """lags: int [K]. value, standard_error: of each channel [K, C]; at lag 0 exactly 1."""

    lags: np.ndarray
    value: np.ndarray
    standard_error: np.ndarray


def autocorrelation(x: Any, max_lag: int | None = None, *, periodic: bool = False) -> Autocorrelation:
    """The autocorrelation of series x [n, L, C]: E (x(s) - mean)(x(s + lag) - mean) / variance, of each channel.

    It assumes a stationary series: one mean and variance for all positions, over which it averages.

    Args:
      max_lag: the largest lag; None for half of the length.
      periodic: whether position L is position 0 again, so that every lag has L pairs; otherwise lag h has L - h.
    Raises: ValueError for another shape, fewer than two examples, values that are not finite, a constant channel, or a lag
      that is not below L.
    """
    x = as_examples("x", x, 2)
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {x.shape}; an autocorrelation needs series [n, L, C], fields have `power_spectrum`"
        )
    count, length, channels = x.shape
    largest = length // 2 if max_lag is None else max_lag
    if not isinstance(largest, int | np.integer) or not 0 <= largest < length:
        raise ValueError(
            f"max_lag={largest} must lie in 0 ... {length - 1}, a whole number below the length of the series"
        )
    lags = np.arange(largest + 1)
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
    # The ratio of two means, to first order: (product at the lag - value * product at lag 0) / variance of each example.
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


def _products(transform: np.ndarray, cross: bool) -> np.ndarray:
    """|F_c|^2 of transforms [..., C], or F_c conj(F_d) of all pairs of channels [..., C, C]."""
    if cross:
        return transform[..., :, None] * transform[..., None, :].conj()
    return _squared_magnitude(transform)


def _squared_magnitude(x: np.ndarray) -> np.ndarray:
    """|x|^2 of complex numbers, without the square root."""
    return np.square(np.real(x)) + np.square(np.imag(x))


def _square_parts(x: np.ndarray) -> np.ndarray:
    """The square of real numbers; of complex ones, the squares of the real and the imaginary part."""
    return np.square(np.real(x)) + 1j * np.square(np.imag(x)) if np.iscomplexobj(x) else np.square(x)


def _standard_error(total: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    """The standard error of total / count, from the sum of the squares of the summands."""
    scatter = squares - _square_parts(total) / count
    if np.iscomplexobj(scatter):
        parts = (np.sqrt(np.maximum(part, 0) / (count * (count - 1))) for part in (scatter.real, scatter.imag))
        real, imag = parts
        return real + 1j * imag
    return np.sqrt(np.maximum(scatter, 0) / (count * (count - 1)))


def _window(spatial: tuple[int, ...], window: str) -> np.ndarray:
    """Weights [*spatial, 1] with a mean square of 1."""
    weights = np.ones((*spatial, 1))
    for axis, size in enumerate(spatial if window == "hann" else ()):
        shape = [1] * weights.ndim
        shape[axis] = size
        weights = weights * np.square(np.sin(np.pi * (np.arange(size) + 0.5) / size)).reshape(shape)
    return weights / np.sqrt(np.mean(np.square(weights)))


def _shells(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which the frequencies of a shell are neighbors, the start of each shell, and its number of frequencies."""
    lengths = np.linalg.norm(frequencies, axis=-1).reshape(-1)
    shell = np.round(lengths * max(frequencies.shape[:-1])).astype(int)
    order = np.argsort(shell, kind="stable")
    _, starts, sizes = np.unique(shell[order], return_index=True, return_counts=True)
    return order, starts, sizes


def _single_frequencies(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_shells`, with each frequency alone."""
    indices = np.arange(math.prod(frequencies.shape[:-1]))
    return indices, indices, np.ones_like(indices)

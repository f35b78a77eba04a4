"""Stationary Gaussian laws with exact covariances, spectra and entropies: series, and periodic fields and volumes.

Arrays are float64 NumPy. A law is a frozen dataclass, so `dataclasses.replace(law, ...)` is another law of the same kind.
Spectra have the convention of `evaluation.power_spectrum`: with F_c(k) = sum_r (x_c(r) - mean_c) exp(-2 pi i k.r) and N
positions they are E F_c(k) conj(F_d(k)) / N, in the order of `numpy.fft.fftfreq`. Entropies are in nats per dimension.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["FieldLaw", "SeriesLaw"]

_HALF_LOG_2_PI_E = 0.5 * math.log(2 * math.pi * math.e)


@dataclasses.dataclass(frozen=True)
class SeriesLaw:
    """A stationary Gaussian series of C channels: a damped oscillation that reaches them with delays, and rough noise.

    x_c(s) = mean_c + scale_c (a_c u(s - delay_c) + sqrt(1 - a_c^2) v_c(s)), a_c = oscillating_c, with
    E u(s + h) u(s) = exp(-|h| / damping) cos(2 pi frequency h), and rough parts v (Matern processes of smoothness 1/2) with
    E v_c(s + h) v_d(s) = rho_cd exp(-|h| / roughness), rho_cd = correlation for c != d, else 1. The delays make the cross
    covariance of two channels asymmetric. The series has no period.

    frequency: cycles per position. damping, roughness, delays: in positions. scales: the standard deviation of each channel.
    """

    means: tuple[float, ...] = (3.0, -1.0)
    scales: tuple[float, ...] = (2.0, 0.5)
    oscillating: tuple[float, ...] = (0.8, 0.6)
    delays: tuple[float, ...] = (0.0, 2.0)
    frequency: float = 0.125
    damping: float = 16.0
    roughness: float = 6.0
    correlation: float = 0.5

    def cross_covariance(self, lags: np.ndarray) -> np.ndarray:
        """E (x_c(s + h) - mean_c) (x_d(s) - mean_d) at lags h [K]; [K, C, C]."""
        lags = np.asarray(lags, np.float64)[:, None, None]
        delays, amplitudes, scales = (np.array(v) for v in (self.delays, self.oscillating, self.scales))
        shifted = lags - delays[:, None] + delays
        oscillation = np.exp(-np.abs(shifted) / self.damping) * np.cos(2 * np.pi * self.frequency * shifted)
        rough = np.exp(-np.abs(lags) / self.roughness) * np.where(np.eye(len(scales)) == 1, 1.0, self.correlation)
        rest = np.sqrt(1 - amplitudes**2)
        return np.outer(scales, scales) * (
            np.outer(amplitudes, amplitudes) * oscillation + np.outer(rest, rest) * rough
        )

    def covariance(self, length: int) -> np.ndarray:
        """The covariance [L, C, L, C] of a whole series."""
        positions = np.arange(length)
        lags = np.subtract.outer(positions, positions)
        table = self.cross_covariance(np.arange(1 - length, length))
        return table[lags + length - 1].transpose(0, 2, 1, 3)

    def spectrum(self, length: int) -> np.ndarray:
        """The expected periodogram of a series of L positions: complex [L, C, C]."""
        lags = np.arange(1 - length, length)
        covariance = self.cross_covariance(lags)
        waves = np.exp(-2j * np.pi * np.outer(np.fft.fftfreq(length), lags)) * (1 - np.abs(lags) / length)
        return np.einsum("kh,hcd->kcd", waves, covariance)

    def entropy(self, length: int) -> float:
        """The differential entropy of a series of L positions, in nats per dimension."""
        size = length * len(self.means)
        _, log_determinant = np.linalg.slogdet(self.covariance(length).reshape(size, size))
        return _HALF_LOG_2_PI_E + 0.5 * float(log_determinant) / size

    def sample(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """`count` independent series [count, L, C]."""
        size = length * len(self.means)
        factor = np.linalg.cholesky(self.covariance(length).reshape(size, size))
        series = rng.standard_normal((count, size)) @ factor.T
        return series.reshape(count, length, -1) + np.array(self.means)


@dataclasses.dataclass(frozen=True)
class FieldLaw:
    """A stationary Gaussian field of C channels on a torus of any size, with as many spatial axes as `lengths` has columns.

    x_c(r) = mean_c + scale_c (sum_j mixing_cj u_j(r - shift_c) + sqrt(noise) w_c(r)), with white noise w of variance 1 and
    independent fields u_j of variance 1, whose spectrum is proportional to (1 + sum_a (2 pi k_a lengths_ja)^2)^-exponent_j at
    frequency k, in cycles per position. The shifts, whole positions on each axis, make cross spectra complex.
    """

    means: tuple[float, ...]
    scales: tuple[float, ...]
    mixing: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[float, ...], ...]
    exponents: tuple[float, ...]
    shifts: tuple[tuple[int, ...], ...]
    noise: float

    def _transfer(self, shape: tuple[int, ...]) -> np.ndarray:
        """From the white noises of the fields u to the channels, without the scales: complex [*K, C, J]."""
        if len(shape) != len(self.lengths[0]):
            raise ValueError(f"shape={shape} must have {len(self.lengths[0])} spatial axes, as this law")
        frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"), axis=-1)
        squares = np.square(2 * np.pi * frequencies) @ np.square(self.lengths).T
        power = (1 + squares) ** -np.array(self.exponents)
        power /= power.mean(axis=tuple(range(len(shape))))
        phases = np.exp(-2j * np.pi * frequencies @ np.transpose(self.shifts))
        return phases[..., :, None] * np.array(self.mixing) * np.sqrt(power)[..., None, :]

    def spectrum(self, shape: tuple[int, ...]) -> np.ndarray:
        """The spectra of all pairs of channels on a grid of this shape: complex [*K, C, C]."""
        transfer = self._transfer(shape)
        standardized = transfer @ transfer.conj().swapaxes(-1, -2) + self.noise * np.eye(len(self.means))
        return standardized * np.outer(self.scales, self.scales)

    def cross_covariance(self, shape: tuple[int, ...]) -> np.ndarray:
        """E (x_c(s + r) - mean_c) (x_d(s) - mean_d) at every lag r, modulo the shape: [*shape, C, C]."""
        return np.fft.ifftn(self.spectrum(shape), axes=tuple(range(len(shape)))).real

    def entropy(self, shape: tuple[int, ...]) -> float:
        """The differential entropy of a field of this shape, in nats per dimension."""
        _, log_determinants = np.linalg.slogdet(self.spectrum(shape))
        return _HALF_LOG_2_PI_E + 0.5 * float(log_determinants.mean()) / len(self.means)

    def sample(self, rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> np.ndarray:
        """`count` independent fields [count, *shape, C]."""
        axes = tuple(range(1, len(shape) + 1))
        transfer = self._transfer(shape)
        transform = np.fft.fftn(rng.standard_normal((count, *shape, len(self.exponents))), axes=axes)
        fields = np.fft.ifftn(np.einsum("...cj,n...j->n...c", transfer, transform), axes=axes).real
        fields += math.sqrt(self.noise) * rng.standard_normal(fields.shape)
        return fields * np.array(self.scales) + np.array(self.means)

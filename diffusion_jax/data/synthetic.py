"""Data sets with exactly known distributions, as references for samples and likelihoods.

| `data.dataset` | spatial axes, channels | distribution |
|---|---|---|
| `diffusion_jax.data.synthetic:series` | 1, 2 | `SERIES`: a stationary Gaussian process |
| `diffusion_jax.data.synthetic:field` | 2, 5 | `FIELD`: a periodic Gaussian field |
| `diffusion_jax.data.synthetic:volume` | 3, 1 | `VOLUME`: a periodic Gaussian field |
| `diffusion_jax.data.synthetic:moons` | 0, 2 | `MOONS`: two half circles with noise |
| `diffusion_jax.data.synthetic:conditional` | 0, 2 | `CONDITIONAL`: a Gaussian that depends on a continuous condition |

Spatial axes have any size. Each data set has a split "train" with 20,000 examples and a split "test" with 4,000, drawn
independently. The methods return the exact covariance, spectrum, density or conditional mean, the entropy, and samples.

    --config.data.dataset=diffusion_jax.data.synthetic:series --config.data.image_size="(64,)" --config.data.channels=2

Distributions return float64 NumPy arrays. A distribution is a frozen dataclass; `dataclasses.replace` makes another
distribution of the same kind. Densities and entropies are in nats, entropies per dimension. Spectra follow
`metrics.of_arrays.power_spectrum(periodic=True)`: with F_c(k) = sum_r (x_c(r) - mean_c) exp(-2 pi i k.r) and N positions they
are E F_c(k) conj(F_d(k)) / N, in the order of `numpy.fft.fftfreq`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.data.sources import InMemory, example_shape
from diffusion_jax.errors import DataError

__all__ = [
    "CONDITIONAL",
    "FIELD",
    "MOONS",
    "SERIES",
    "VOLUME",
    "ConditionalDistribution",
    "FieldDistribution",
    "MoonsDistribution",
    "SeriesDistribution",
]

_HALF_LOG_2_PI_E = 0.5 * math.log(2 * math.pi * math.e)
_BLOCK = 4096
_NUM_EXAMPLES = {"train": 20_000, "test": 4_000}


@dataclasses.dataclass(frozen=True)
class SeriesDistribution:
    """A stationary Gaussian series with C channels: a damped oscillation, delayed in each channel, plus rough noise.

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
        """Returns E (x_c(s + h) - mean_c) (x_d(s) - mean_d) at lags h [K]: [K, C, C]."""
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
        """Returns the covariance [L, C, L, C] of a whole series."""
        positions = np.arange(length)
        lags = np.subtract.outer(positions, positions)
        table = self.cross_covariance(np.arange(1 - length, length))
        return table[lags + length - 1].transpose(0, 2, 1, 3)

    def spectrum(self, length: int) -> np.ndarray:
        """Returns the expected periodogram for L positions: complex [L, C, C]."""
        lags = np.arange(1 - length, length)
        covariance = self.cross_covariance(lags)
        waves = np.exp(-2j * np.pi * np.outer(np.fft.fftfreq(length), lags)) * (1 - np.abs(lags) / length)
        return np.einsum("kh,hcd->kcd", waves, covariance)

    def entropy(self, length: int) -> float:
        """Returns the differential entropy for L positions, in nats per dimension."""
        size = length * len(self.means)
        _, log_determinant = np.linalg.slogdet(self.covariance(length).reshape(size, size))
        return _HALF_LOG_2_PI_E + 0.5 * float(log_determinant) / size

    def sample(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Draws `count` independent series [count, L, C]."""
        size = length * len(self.means)
        factor = np.linalg.cholesky(self.covariance(length).reshape(size, size))
        series = rng.standard_normal((count, size)) @ factor.T
        return series.reshape(count, length, -1) + np.array(self.means)


@dataclasses.dataclass(frozen=True)
class FieldDistribution:
    """A stationary Gaussian field with C channels on a torus of any size; `lengths` has a column for each spatial axis.

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
        """Returns the filter from the fields' J white noises to the channels, without the scales: complex [*K, C, J]."""
        if len(shape) != len(self.lengths[0]):
            raise ValueError(f"shape={shape} must have {len(self.lengths[0])} spatial axes, like this distribution")
        frequencies = np.stack(np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"), axis=-1)
        squares = np.square(2 * np.pi * frequencies) @ np.square(self.lengths).T
        power = (1 + squares) ** -np.array(self.exponents)
        power /= power.mean(axis=tuple(range(len(shape))))
        phases = np.exp(-2j * np.pi * frequencies @ np.transpose(self.shifts))
        return phases[..., :, None] * np.array(self.mixing) * np.sqrt(power)[..., None, :]

    def spectrum(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the spectra of all channel pairs on a grid with this shape: complex [*K, C, C]."""
        transfer = self._transfer(shape)
        standardized = transfer @ transfer.conj().swapaxes(-1, -2) + self.noise * np.eye(len(self.means))
        return standardized * np.outer(self.scales, self.scales)

    def cross_covariance(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns E (x_c(s + r) - mean_c) (x_d(s) - mean_d) at every lag r, modulo the shape: [*shape, C, C]."""
        return np.fft.ifftn(self.spectrum(shape), axes=tuple(range(len(shape)))).real

    def entropy(self, shape: tuple[int, ...]) -> float:
        """Returns the differential entropy of a field with this shape, in nats per dimension."""
        _, log_determinants = np.linalg.slogdet(self.spectrum(shape))
        return _HALF_LOG_2_PI_E + 0.5 * float(log_determinants.mean()) / len(self.means)

    def sample(self, rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> np.ndarray:
        """Draws `count` independent fields [count, *shape, C]."""
        axes = tuple(range(1, len(shape) + 1))
        transfer = self._transfer(shape)
        transform = np.fft.fftn(rng.standard_normal((count, *shape, len(self.exponents))), axes=axes)
        fields = np.fft.ifftn(np.einsum("...cj,n...j->n...c", transfer, transform), axes=axes).real
        fields += math.sqrt(self.noise) * rng.standard_normal(fields.shape)
        return fields * np.array(self.scales) + np.array(self.means)


@dataclasses.dataclass(frozen=True)
class MoonsDistribution:
    """Two half circles in the plane, with equal weights, plus Gaussian noise: vectors [n, 2].

    The upper moon is (cos a, sin a), the lower (1 - cos a, 1/2 - sin a), with a uniform in [0, pi].
    noise: the standard deviation in each direction.
    """

    noise: float = 0.1

    def _centers(self, angles: np.ndarray) -> np.ndarray:
        """Returns points on both half circles [2, K, 2]."""
        x, y = np.cos(angles), np.sin(angles)
        return np.stack([np.stack([x, y], axis=-1), np.stack([1 - x, 0.5 - y], axis=-1)])

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Returns log p(x) for vectors [n, 2]; Gauss-Legendre quadrature with 200 nodes integrates over the angle."""
        nodes, weights = np.polynomial.legendre.leggauss(200)
        centers = self._centers((nodes + 1) * (np.pi / 2)).reshape(-1, 2)
        constant = np.log(np.tile(weights, 2) / 4) - math.log(2 * math.pi * self.noise**2)
        blocks = np.array_split(x, len(x) // _BLOCK + 1)  # the full distance array would take much memory
        squares = (np.square(block[:, None] - centers).sum(axis=-1) for block in blocks)
        return np.concatenate([np.logaddexp.reduce(constant - s / (2 * self.noise**2), axis=-1) for s in squares])

    def entropy(self) -> float:
        """Returns the differential entropy in nats per dimension: a sum over a grid, with an error far below 1e-6."""
        step, margin = self.noise / 4, 9 * self.noise
        axes = [np.arange(low - margin, high + margin, step) for low, high in ((-1, 2), (-0.5, 1))]
        log_density = self.log_density(np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2))
        return float(-(np.exp(log_density) * log_density).sum()) * step**2 / 2

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws `count` independent vectors [count, 2]."""
        moon, angles = rng.integers(2, size=count), rng.uniform(0, np.pi, count)
        return self._centers(angles)[moon, np.arange(count)] + self.noise * rng.standard_normal((count, 2))


@dataclasses.dataclass(frozen=True)
class ConditionalDistribution:
    """Vectors x [n, 2] around a spiral, at a place determined by a condition c [n, 1].

    c is uniform in [low, high]. Given c, x is Gaussian with the mean c (cos 2c, sin 2c), the standard deviation
    `noise` + `noise_slope` c in both dimensions, and the correlation `correlation` between them.
    """

    low: float = 0.0
    high: float = 4.0
    noise: float = 0.1
    noise_slope: float = 0.05
    correlation: float = 0.6

    def mean(self, condition: np.ndarray) -> np.ndarray:
        """Returns E(x | c), [n, 2], for conditions c [n, 1]."""
        return condition * np.concatenate([np.cos(2 * condition), np.sin(2 * condition)], axis=-1)

    def standard_deviation(self, condition: np.ndarray) -> np.ndarray:
        """Returns the standard deviation of x given c in each dimension, [n, 2], for conditions c [n, 1]."""
        return np.repeat(self.noise + self.noise_slope * condition, 2, axis=-1)

    def entropy(self) -> float:
        """Returns the differential entropy of x given c, averaged over c, in nats per dimension, in closed form."""
        narrow, wide = (self.noise + self.noise_slope * c for c in (self.low, self.high))
        # The mean of log s over s uniform in [narrow, wide].
        mean_log = (wide * math.log(wide) - narrow * math.log(narrow)) / (wide - narrow) - 1
        return _HALF_LOG_2_PI_E + mean_log + 0.25 * math.log(1 - self.correlation**2)

    def sample_conditions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws `count` independent conditions [count, 1]."""
        return rng.uniform(self.low, self.high, (count, 1))

    def sample(self, rng: np.random.Generator, condition: np.ndarray) -> np.ndarray:
        """Draws a vector for each condition. condition: [n, 1]. Returns: float64 [n, 2]."""
        factor = np.linalg.cholesky(np.array([[1.0, self.correlation], [self.correlation, 1.0]]))
        noise = rng.standard_normal((len(condition), 2)) @ factor.T
        return self.mean(condition) + self.standard_deviation(condition) * noise


SERIES = SeriesDistribution()
FIELD = FieldDistribution(
    means=(280.0, 5.0, 0.0, 1000.0, -2.0),
    scales=(10.0, 2.0, 1.0, 20.0, 0.5),
    mixing=(
        (0.9, 0.3, 0.0, 0.2, 0.0),
        (0.6, 0.7, 0.0, 0.0, 0.3),
        (0.0, 0.5, 0.8, 0.0, 0.2),
        (-0.7, 0.0, 0.3, 0.6, 0.0),
        (0.3, 0.0, -0.5, 0.3, 0.7),
    ),
    lengths=((3.0, 1.5), (2.0, 2.0), (1.0, 2.0), (1.5, 1.5), (0.7, 0.7)),
    exponents=(2.0, 1.5, 1.5, 1.5, 1.0),
    shifts=((0, 0), (0, 2), (1, 0), (0, 0), (-2, 1)),
    noise=0.05,
)
VOLUME = FieldDistribution(
    means=(0.5,),
    scales=(0.2,),
    mixing=((1.0,),),
    lengths=((2.0, 1.2, 0.8),),
    exponents=(1.5,),
    shifts=((0, 0, 0),),
    noise=0.05,
)
MOONS, CONDITIONAL = MoonsDistribution(), ConditionalDistribution()


def _load(
    name: str,
    axes: int,
    draw: Callable[[np.random.Generator, int, tuple[int, ...]], Mapping[str, np.ndarray]],
    config: Mapping[str, Any],
) -> InMemory:
    """Returns a split of a data set with this number of spatial axes, as float32: 20,000 or 4,000 examples.

    draw: (rng, number of examples, spatial shape) -> arrays. Raises: DataError for a split other than train and test, or
    an image_size with another number of axes.
    """
    split, shape = config["split"], example_shape(config)[:-1]
    if split not in _NUM_EXAMPLES:
        raise DataError(f"data.split={split!r}: the data set {name!r} has 'train' and 'test'")
    if len(shape) != axes:
        raise DataError(
            f"data.image_size={config['image_size']!r}: the data set {name!r} has {axes} spatial axes; use for example "
            f"data.image_size={(16,) * axes}"
        )
    arrays = draw(np.random.default_rng((0, int(split == "test"), *name.encode())), _NUM_EXAMPLES[split], shape)
    return InMemory({name: array.astype(np.float32) for name, array in arrays.items()})


def _draw_in_blocks(distribution, rng, count, shape):  # because float64 samples of all examples would take much memory
    blocks = (distribution.sample(rng, 1000, shape).astype(np.float32) for _ in range(count // 1000))
    return {"x": np.concatenate(list(blocks))}


def _draw_conditional(rng, count, shape):
    condition = CONDITIONAL.sample_conditions(rng, count).astype(np.float32)
    return {"x": CONDITIONAL.sample(rng, condition.astype(np.float64)), "condition": condition}


# The functions that data.dataset names; each takes config.data.
series = functools.partial(_load, "series", 1, lambda rng, count, shape: {"x": SERIES.sample(rng, count, *shape)})
field = functools.partial(_load, "field", 2, functools.partial(_draw_in_blocks, FIELD))
volume = functools.partial(_load, "volume", 3, functools.partial(_draw_in_blocks, VOLUME))
moons = functools.partial(_load, "moons", 0, lambda rng, count, shape: {"x": MOONS.sample(rng, count)})
conditional = functools.partial(_load, "conditional", 0, _draw_conditional)

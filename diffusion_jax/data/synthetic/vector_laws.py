"""Laws of vectors with exact densities: two moons, a mixture of Gaussians, and Gaussians that depend on a condition.

Arrays are float64 NumPy. Densities and entropies are in nats, entropies per dimension.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

__all__ = ["ConditionalLaw", "Estimate", "MixtureLaw", "MoonsLaw"]

_LOG_2_PI = math.log(2 * math.pi)
_BLOCK = 4096


class Estimate(NamedTuple):
    """A Monte Carlo estimate and its standard error."""

    value: float
    standard_error: float


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log of the sum of exp over the last axis."""
    largest = values.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(values - largest).sum(axis=-1))


@dataclasses.dataclass(frozen=True)
class MoonsLaw:
    """Two half circles in the plane, with equal weights, plus Gaussian noise: vectors [n, 2].

    The upper moon is (cos a, sin a), the lower (1 - cos a, 1/2 - sin a), with a uniform in [0, pi].
    noise: the standard deviation in each direction.
    """

    noise: float = 0.1

    def _centers(self, angles: np.ndarray) -> np.ndarray:
        """Points of both half circles [2, K, 2]."""
        x, y = np.cos(angles), np.sin(angles)
        return np.stack([np.stack([x, y], axis=-1), np.stack([1 - x, 0.5 - y], axis=-1)])

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of vectors [n, 2]; the integral over the angle by 200 nodes of Gauss and Legendre."""
        nodes, weights = np.polynomial.legendre.leggauss(200)
        centers = self._centers((nodes + 1) * (np.pi / 2)).reshape(-1, 2)
        constant = np.log(np.tile(weights, 2) / 4) - _LOG_2_PI - 2 * math.log(self.noise)

        def of_block(block):
            squares = np.square(block[:, None] - centers).sum(axis=-1)
            return _log_sum_exp(constant - squares / (2 * self.noise**2))

        return np.concatenate([of_block(x[i : i + _BLOCK]) for i in range(0, len(x), _BLOCK)])

    def entropy(self) -> float:
        """The differential entropy in nats per dimension: -p log p on a grid, whose error is far below 1e-6."""
        step, margin = self.noise / 4, 9 * self.noise
        axes = [np.arange(low - margin, high + margin, step) for low, high in ((-1, 2), (-0.5, 1))]
        log_density = self.log_density(np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2))
        return float(-(np.exp(log_density) * log_density).sum()) * step**2 / 2

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` independent vectors [count, 2]."""
        moon, angles = rng.integers(2, size=count), rng.uniform(0, np.pi, count)
        return self._centers(angles)[moon, np.arange(count)] + self.noise * rng.standard_normal((count, 2))


@dataclasses.dataclass(frozen=True)
class MixtureLaw:
    """A mixture of K Gaussians in D dimensions, vectors [n, D].

    Mode k has the weight weights_k, the mean `spacing` * signs_k, the standard deviation scales_k in every dimension and the
    correlation correlations_k between any two of them. Modes whose signs differ in m entries have means
    2 spacing sqrt(m) apart.
    """

    weights: tuple[float, ...] = (0.36, 0.26, 0.18, 0.12, 0.08)
    signs: tuple[str, ...] = ("++++++++++", "+++++-----", "---++++---", "+-+-+-+-+-", "----------")
    spacing: float = 1.5
    scales: tuple[float, ...] = (0.5, 0.3, 0.4, 0.25, 0.6)
    correlations: tuple[float, ...] = (0.0, 0.5, -0.05, 0.7, 0.3)

    @property
    def means(self) -> np.ndarray:
        """The mean of each mode [K, D]."""
        return self.spacing * np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in self.signs])

    @property
    def covariances(self) -> np.ndarray:
        """The covariance of each mode [K, D, D]."""
        dimensions = len(self.signs[0])
        correlations = np.array(self.correlations)[:, None, None]
        equal = np.eye(dimensions) * (1 - correlations) + correlations
        return np.square(self.scales)[:, None, None] * equal

    def log_joint(self, x: np.ndarray) -> np.ndarray:
        """log of weight times density of each mode at vectors [n, D]; [n, K]."""
        rows = []
        for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True):
            factor = np.linalg.cholesky(covariance)
            standardized = np.linalg.solve(factor, (x - mean).T)
            log_scale = np.log(np.diag(factor)).sum() + 0.5 * len(mean) * _LOG_2_PI
            rows.append(math.log(weight) - 0.5 * np.square(standardized).sum(axis=0) - log_scale)
        return np.stack(rows, axis=-1)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of vectors [n, D]."""
        return _log_sum_exp(self.log_joint(x))

    def mode_of(self, x: np.ndarray) -> np.ndarray:
        """The most probable mode of vectors [n, D]; int [n]."""
        return self.log_joint(x).argmax(axis=-1)

    def entropy(self, rng: np.random.Generator, count: int) -> Estimate:
        """The differential entropy in nats per dimension, estimated from `count` vectors."""
        values = -self.log_density(self.sample(rng, count)) / len(self.signs[0])
        return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)))

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` independent vectors [count, D]."""
        modes = rng.choice(len(self.weights), size=count, p=self.weights)
        factors = np.linalg.cholesky(self.covariances)
        noise = rng.standard_normal((count, len(self.signs[0])))
        return self.means[modes] + np.einsum("nij,nj->ni", factors[modes], noise)


@dataclasses.dataclass(frozen=True)
class ConditionalLaw:
    """Vectors x [n, 2] around a spiral, at the place that a condition c [n, 1] gives.

    c is uniform in [low, high]. Given c, x is Gaussian with the mean c (cos 2c, sin 2c), the standard deviation
    `noise` + `noise_slope` c in both dimensions, and the correlation `correlation` between them.
    """

    low: float = 0.0
    high: float = 4.0
    noise: float = 0.1
    noise_slope: float = 0.05
    correlation: float = 0.6

    def mean(self, condition: np.ndarray) -> np.ndarray:
        """E(x | c) at conditions [n, 1]; [n, 2]."""
        return condition * np.concatenate([np.cos(2 * condition), np.sin(2 * condition)], axis=-1)

    def standard_deviation(self, condition: np.ndarray) -> np.ndarray:
        """The standard deviation of x given c in each dimension, at conditions [n, 1]; [n, 2]."""
        return np.repeat(self.noise + self.noise_slope * condition, 2, axis=-1)

    def _factor(self) -> np.ndarray:
        """The Cholesky factor of the correlation matrix."""
        return np.linalg.cholesky(np.array([[1.0, self.correlation], [self.correlation, 1.0]]))

    def log_density(self, x: np.ndarray, condition: np.ndarray) -> np.ndarray:
        """log p(x | c) of vectors [n, 2] at conditions [n, 1]; [n]."""
        deviation = self.standard_deviation(condition)
        standardized = np.linalg.solve(self._factor(), ((x - self.mean(condition)) / deviation).T)
        log_scale = np.log(deviation).sum(axis=-1) + 0.5 * math.log(1 - self.correlation**2) + _LOG_2_PI
        return -0.5 * np.square(standardized).sum(axis=0) - log_scale

    def entropy(self) -> float:
        """The differential entropy of x given c, averaged over c, in nats per dimension; closed form."""
        narrow, wide = (self.noise + self.noise_slope * c for c in (self.low, self.high))
        # The mean of log s over s uniform in [narrow, wide].
        mean_log = (wide * math.log(wide) - narrow * math.log(narrow)) / (wide - narrow) - 1
        return 0.5 * (_LOG_2_PI + 1) + mean_log + 0.25 * math.log(1 - self.correlation**2)

    def sample_conditions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` independent conditions [count, 1]."""
        return rng.uniform(self.low, self.high, (count, 1))

    def sample(self, rng: np.random.Generator, condition: np.ndarray) -> np.ndarray:
        """One vector for each of the conditions [n, 1]; [n, 2]."""
        noise = rng.standard_normal((len(condition), 2)) @ self._factor().T
        return self.mean(condition) + self.standard_deviation(condition) * noise

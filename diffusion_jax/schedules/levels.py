"""`NoiseLevel`, the noise in x_t = alpha x_0 + sigma eps, and `Transition`, a step from one noise level to another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class NoiseLevel(NamedTuple):
    """The noise level of x_t = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1: one for each row, or one for all rows.

    alpha, sigma, and log_snr = log(alpha^2 / sigma^2): [B, 1, ..., 1] or [], which broadcast against x_t. time: the network
    time, [B] or [].
    """

    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    log_snr: Float[Array, "..."]
    time: Float[Array, "..."]

    @property
    def lam(self) -> Float[Array, "..."]:
        """lambda = log(alpha / sigma), half the log SNR."""
        return self.log_snr / 2

    @property
    def snr(self) -> Float[Array, "..."]:
        """alpha^2 / sigma^2."""
        return jnp.square(self.alpha / self.sigma)

    @property
    def has_signal(self) -> Array:
        """Whether x_t contains digits of x_0. For alpha below 1e-10, x_t / alpha would consist of rounding errors."""
        return self.alpha > 1e-10

    @classmethod
    def at_log_snr(cls, log_snr: Float[Array, "..."], time: Float[Array, "..."]) -> NoiseLevel:
        """Returns the level at a log SNR; `Path.at_log_snr` finds the network time, too."""
        return cls(jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr)), log_snr, time)

    @property
    def level(self) -> NoiseLevel:
        """The level itself, so that `at.level` is a level for a `NoiseLevel` and a `Transition`."""
        return self

    def times(self, x_t: Float[Array, "B *shape"]) -> Float[Array, "B"]:
        """Returns the network time of each row, in the dtype of x_t."""
        return jnp.broadcast_to(self.time, x_t.shape[:1]).astype(x_t.dtype)

    def where(self, condition: Array, other: NoiseLevel) -> NoiseLevel:
        """Returns this level where `condition`, in alpha's shape, is true, and `other` elsewhere."""
        pairs = zip(self, other, strict=True)
        return NoiseLevel(*(jnp.where(condition.reshape(new.shape), new, old) for new, old in pairs))


class Transition(NamedTuple):
    """A step from x_t, at one noise level, to x_{t-1} at another: the two levels and q(x_{t-1} | x_t, x_0), DDPM eq. 7.

    level, target: the noise levels of x_t and x_{t-1}. The last step of a chain ends at x_0, without noise; its
      `target.time` has no meaning and equals `level.time`.
    beta: the variance of q(x_t | x_{t-1}).
    posterior_variance: beta-tilde; 0 for a step to x_0. posterior_log_variance: log beta-tilde; for a step to x_0, the
      decoder's log variance. posterior_mean_coef_x_0, posterior_mean_coef_x_t: c_0 and c_t in mu-tilde = c_0 x_0 + c_t x_t.
    fixed_large_variance: beta; for a step to x_0, the decoder's variance.
    path: the `Path` with the noise levels between `level` and `target`; None if unknown.

    `Schedule.transition` reads the steps of a schedule from its tables, and `between` makes any other step.
    """

    level: NoiseLevel
    target: NoiseLevel
    beta: Float[Array, "..."]
    posterior_variance: Float[Array, "..."]
    posterior_log_variance: Float[Array, "..."]
    posterior_mean_coef_x_0: Float[Array, "..."]
    posterior_mean_coef_x_t: Float[Array, "..."]
    fixed_large_variance: Float[Array, "..."]
    path: Any = None

    @property
    def alpha(self) -> Float[Array, "..."]:
        """alpha of `level`."""
        return self.level.alpha

    @property
    def sigma(self) -> Float[Array, "..."]:
        """sigma of `level`."""
        return self.level.sigma

    @classmethod
    def between(cls, level: NoiseLevel, target: NoiseLevel, path: Any = None) -> Transition:
        """Returns the step between any two noise levels; it is accurate even if the levels are close.

        Only a step to less noise has variances; `sampling.encode` takes steps to more noise. With r = SNR / SNR'
        (primes mark the target), c_0 = alpha' (1 - r), c_t = sqrt(r) sigma' / sigma, beta = sigma^2 (1 - r) and beta-tilde =
        sigma'^2 (1 - r). The decoder's variance is sigma^2 / alpha^2, as on a `Path`.
        """
        lost = -jnp.expm1(level.log_snr - target.log_snr)  # 1 - r
        is_last = target.sigma == 0
        variance, beta = target.sigma**2 * lost, level.sigma**2 * lost
        decoder_variance = (level.sigma / jnp.where(is_last & level.has_signal, level.alpha, 1.0)) ** 2
        return cls(
            level,
            target,
            beta,
            variance,
            jnp.log(jnp.where(is_last, decoder_variance, variance)),
            target.alpha * lost,
            jnp.exp(level.lam - target.lam) * target.sigma / level.sigma,
            jnp.where(is_last, decoder_variance, beta),
            path,
        )

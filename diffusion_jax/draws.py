"""Random times on a path, whose noise levels a batch trains on.

A draw is a function `(key, batch_size, path) -> (time, log_density)`: network times float [B], and the log density with
which the log SNR of each time is drawn. The draw is part of the objective: `losses.simple` does not divide by the density, so
levels that are drawn more often have more weight. `losses.continuous_vlb` divides by the density, and has the same mean for
every draw.

By default, draws are stratified (Kingma et al. 2021, appendix I.1): the batch shares one uniform offset, so that its levels
cover the distribution evenly, which reduces the variance of the mean. Levels outside of the path's interval are never drawn;
the density accounts for it. `DRAWS` maps config names to draws.

Times and densities are float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, Key

from diffusion_jax.schedules import Path
from diffusion_jax.types import LevelDraw

__all__ = ["DRAWS", "draw_by_name", "log_normal", "logit_normal", "uniform", "uniform_log_snr"]

_SMALLEST = 2.0**-24  # half the float32 spacing below 1, so that no draw is at a distribution's infinite end


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Draw:
    """stratified: False draws each level independently."""

    stratified: bool = True

    def _probabilities(self, key: Key[Array, ""], batch_size: int) -> Float[Array, "B"]:
        """Returns uniform numbers in (0, 1)."""
        if self.stratified:
            strata = jnp.arange(batch_size, dtype=jnp.float32) / batch_size
            numbers = (jax.random.uniform(key, dtype=jnp.float32) + strata) % 1.0
        else:
            numbers = jax.random.uniform(key, (batch_size,), jnp.float32)
        return jnp.clip(numbers, _SMALLEST, 1 - _SMALLEST)

    def _times(self, path: Path, log_snr: Float[Array, "B"]) -> Float[Array, "B"]:
        first, last = (jnp.asarray(end, jnp.float32) for end in path.interval)
        return jnp.clip(path.time_at_log_snr(log_snr), first, last)


@dataclasses.dataclass(frozen=True)
class uniform(_Draw):
    """Times that are uniform over the path's interval (DDPM in continuous time, flow matching)."""

    def __call__(self, key: Key[Array, ""], batch_size: int, path: Path) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        first, last = (jnp.asarray(end, jnp.float32) for end in path.interval)
        time = first + (last - first) * self._probabilities(key, batch_size)
        _, slope = jax.jvp(path.log_snr, (time,), (jnp.ones_like(time),))
        return time, -jnp.log(last - first) - jnp.log(-slope)


@dataclasses.dataclass(frozen=True)
class uniform_log_snr(_Draw):
    """Log SNRs that are uniform between the ends of the path's interval (Kingma & Gao 2023).

    Raises: ValueError, when called, for a path with an infinite log SNR at an end.
    """

    def __call__(self, key: Key[Array, ""], batch_size: int, path: Path) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        first, last = path.check_finite_ends("a uniform draw of the log SNR")
        log_snr = first - (first - last) * self._probabilities(key, batch_size)
        return self._times(path, log_snr), jnp.full(batch_size, -jnp.log(first - last))


@dataclasses.dataclass(frozen=True)
class log_normal(_Draw):
    """log(sigma / alpha) is normal: EDM's draw (Karras et al. 2022, table 1), with its constants for images.

    mean, std: of log(sigma / alpha). EDM's -1.2 is for data with standard deviation 0.5; the same draw for another standard
    deviation d has the mean -1.2 + log(d / 0.5), which is -0.51 for standardized data.
    Raises: ValueError for a standard deviation that is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be above 0, got {self.std}")

    def __call__(self, key: Key[Array, ""], batch_size: int, path: Path) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        # log(sigma / alpha) at the ends, in standard deviations; infinite where the log SNR is.
        low, high = (
            (-0.5 * path.log_snr(jnp.asarray(end, jnp.float32)) - self.mean) / self.std for end in path.interval
        )
        inside = ndtr(high) - ndtr(low)
        z = ndtri(ndtr(low) + inside * self._probabilities(key, batch_size))
        log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(2 * self.std * inside)
        return self._times(path, -2 * (self.mean + self.std * z)), log_density


def logit_normal(mean: float = 0.0, std: float = 1.0, *, stratified: bool = True) -> log_normal:
    """logit(tau) is normal, tau = sigma / (alpha + sigma) the time of flow matching: SD3's draw (Esser et al. 2024, eq. 19).

    The same family as `log_normal`, because logit(tau) = log(sigma / alpha).
    """
    return log_normal(mean, std, stratified=stratified)


# name -> draw with the published constants
DRAWS: dict[str, Callable[..., LevelDraw]] = {
    "uniform": uniform,
    "log_normal": log_normal,
    "logit_normal": logit_normal,
    "uniform_log_snr": uniform_log_snr,
}


def draw_by_name(name: str) -> LevelDraw:
    """Returns the draw with a name in `DRAWS`. Raises: ValueError for an unknown name."""
    if name not in DRAWS:
        raise ValueError(
            f"unknown draw {name!r}; known: {', '.join(DRAWS)}, or a function (key, batch_size, path) -> "
            "(time, log_density)"
        )
    return DRAWS[name]()

"""Timestep samplers: which noise levels a batch trains on.

A timestep sampler is a function `(key, batch_size, levels) -> (t, density)`:

| `levels` | t [B] | density [B] |
|---|---|---|
| T, the number of a schedule's steps | indices, int32 | the weight 1 / (T p(t)), which multiplies the loss |
| a `Path` | network times | log p(log SNR), the log density with which the log SNR of each time is drawn |

With the weight, the mean of the losses estimates the mean over all T steps, for every sampler. On a path, the sampler is part
of the objective: `losses.simple` does not divide by the density, so levels that are drawn more often have more weight in the
loss. `losses.continuous_vlb` divides by the density, and has the same mean for every sampler.

`uniform` and `stratified` are for schedules and paths, `antithetic` and `loss_second_moment` only for schedules,
`log_normal`, `logit_normal` and `uniform_log_snr` only for paths. No level outside a path's interval is drawn; the density is
normalized over the interval. `TIMESTEP_SAMPLERS` maps config names to timestep samplers.

Results are int32 and float32, with x64 on or off.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, Int32, Integer, Key

from diffusion_jax.arrays import as_array
from diffusion_jax.errors import require_number
from diffusion_jax.schedules import Path
from diffusion_jax.types import TimestepSampler

_SMALLEST = 2.0**-24  # the float32 spacing below 1, so that no time is at a distribution's infinite end
# t and the density, as in the table above
_Drawn: TypeAlias = tuple[Int32[Array, "B"] | Float[Array, "B"], Float[Array, "B"]]


def _positions(key, batch_size, stratified):
    """Returns uniform numbers in (0, 1), float32 [B]; stratified: one shared offset and B equal strides, modulo 1."""
    if stratified:
        strides = jnp.arange(batch_size, dtype=jnp.float32) / batch_size
        position = (jax.random.uniform(key, dtype=jnp.float32) + strides) % 1.0
    else:
        position = jax.random.uniform(key, (batch_size,), jnp.float32)
    return jnp.clip(position, _SMALLEST, 1 - _SMALLEST)


def _uniform_times(path, position):
    first, last = (jnp.asarray(end, jnp.float32) for end in path.interval)
    time = first + (last - first) * position
    _, slope = jax.jvp(path.log_snr, (time,), (jnp.ones_like(time),))
    return time, -jnp.log(last - first) - jnp.log(-slope)


def uniform(key: Key[Array, ""], batch_size: int, levels: int | Path) -> _Drawn:
    """Draws independent steps uniformly (DDPM Algorithm 1), or network times uniformly over a path's interval."""
    if isinstance(levels, Path):
        return _uniform_times(levels, _positions(key, batch_size, stratified=False))
    return jax.random.randint(key, (batch_size,), 0, levels, jnp.int32), jnp.ones(batch_size, jnp.float32)


def stratified(key: Key[Array, ""], batch_size: int, levels: int | Path) -> _Drawn:
    """Draws each t as `uniform`, but so that the batch covers all levels evenly (Kingma et al. 2021, appendix I.1).

    The batch shares one uniform offset, which reduces the variance of the batch mean.
    """
    position = _positions(key, batch_size, stratified=True)
    if isinstance(levels, Path):
        return _uniform_times(levels, position)
    t = jnp.floor(position * levels).astype(jnp.int32)
    return jnp.minimum(t, levels - 1), jnp.ones(batch_size, jnp.float32)


def antithetic(key: Key[Array, ""], batch_size: int, levels: int) -> _Drawn:
    """Draws half of the batch uniformly and mirrors it, T - 1 - t, for the other half (DDIM's code)."""
    if isinstance(levels, Path):
        raise ValueError("antithetic draws steps of a schedule; on a path use stratified")
    half, _ = uniform(key, (batch_size + 1) // 2, levels)
    return jnp.concatenate([half, levels - 1 - half])[:batch_size], jnp.ones(batch_size, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnPath:
    """stratified: True draws as the function `stratified`; False draws each level independently."""

    stratified: bool = True

    def __call__(self, key: Key[Array, ""], batch_size: int, levels: Path) -> _Drawn:
        if not isinstance(levels, Path):
            raise ValueError(f"{type(self).__name__} draws levels of a path; for the steps of a schedule use uniform")
        log_snr, log_density = self._draw(levels, _positions(key, batch_size, self.stratified))
        first, last = (jnp.asarray(end, jnp.float32) for end in levels.interval)
        return jnp.clip(levels.time_at_log_snr(log_snr), first, last), log_density

    def _draw(self, path, probability):
        """Returns the log SNRs [B] at the quantiles `probability` (0 is the least noise), and their log densities."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class uniform_log_snr(_OnPath):
    """Draws log SNRs uniformly between the ends of the path's interval (Kingma & Gao 2023).

    Raises: ValueError, when called, for a path with an infinite log SNR at an end.
    """

    def _draw(self, path, probability):
        first, last = path.check_finite_ends("a uniform draw of the log SNR")
        return first - (first - last) * probability, jnp.full(probability.shape, -jnp.log(first - last))


@dataclasses.dataclass(frozen=True)
class log_normal(_OnPath):
    """Draws EDM's levels: log(sigma / alpha) is normal (Karras et al. 2022, table 1); the defaults are EDM's for images.

    mean, std: the mean and standard deviation of log(sigma / alpha). EDM's mean -1.2 is for data with standard deviation 0.5;
    data with standard deviation d need the mean -1.2 + log(d / 0.5), which is -0.51 for standardized data.
    Raises: ValueError for a standard deviation that is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        require_number("std", self.std, 0, above=True)

    def _draw(self, path, probability):
        # log(sigma / alpha) at the ends, in standard deviations from the mean; infinite where the log SNR is infinite.
        low, high = (
            (-0.5 * path.log_snr(jnp.asarray(end, jnp.float32)) - self.mean) / self.std for end in path.interval
        )
        inside = ndtr(high) - ndtr(low)
        z = ndtri(ndtr(low) + inside * probability)
        log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(2 * self.std * inside)
        return -2 * (self.mean + self.std * z), log_density


def logit_normal(mean: float = 0.0, std: float = 1.0, *, stratified: bool = True) -> log_normal:
    """SD3's levels: logit(tau) is normal, for flow matching's tau = sigma / (alpha + sigma) (Esser et al. 2024, eq. 19).

    Returns a `log_normal`, because logit(tau) = log(sigma / alpha).
    """
    return log_normal(mean, std, stratified=stratified)


class LossHistory(NamedTuple):
    """A ring buffer with the last H losses at every step, and the number of losses recorded at every step so far."""

    losses: Float[Array, "T H"]
    counts: Int32[Array, "T"]


def loss_history(num_timesteps: int, length: int = 10) -> LossHistory:
    """Returns an empty history; Improved DDPM (section 3.3) keeps 10 losses per step."""
    return LossHistory(jnp.zeros((num_timesteps, length), jnp.float32), jnp.zeros(num_timesteps, jnp.int32))


def record(
    history: LossHistory, t: Integer[Array | np.ndarray, "B"], losses: Float[Array | np.ndarray, "B"]
) -> LossHistory:
    """Adds the unweighted losses of a batch, in order, to the history; losses that are not finite are skipped."""
    t, length, losses = as_array("t", t), history.losses.shape[1], jnp.asarray(losses, jnp.float32)
    finite = jnp.isfinite(losses)
    same = (t[:, None] == t[None, :]) & finite
    earlier = jnp.tril(same, -1).sum(axis=1)  # number of earlier losses in the batch at the same step
    later = jnp.triu(same, 1).sum(axis=1)
    place = (history.counts[t] + earlier) % length
    # If a batch has more than H losses at one step, only the last H are kept.
    row = jnp.where((later < length) & finite, t, history.counts.shape[0])
    return LossHistory(
        history.losses.at[row, place].set(losses, mode="drop"), history.counts.at[t].add(finite.astype(jnp.int32))
    )


def step_probabilities(history: LossHistory, uniform_probability: float = 0.001) -> Float[Array, "T"]:
    """Returns p_t, proportional to sqrt(E[L_t^2]) over the recorded losses, mixed with a uniform share `uniform_probability`.

    p_t is uniform until every step has H recorded losses (Improved DDPM eq. 18 and the text below it), and if all losses are
    0 or their squares overflow.
    """
    total, length = history.losses.shape
    root_mean_square = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    normalizer = jnp.sum(root_mean_square)
    learned = (1 - uniform_probability) * root_mean_square / normalizer + uniform_probability / total
    is_usable = jnp.all(history.counts >= length) & (normalizer > 0) & jnp.isfinite(normalizer)
    return jnp.where(is_usable, learned, 1 / total)


def loss_second_moment(history: LossHistory, uniform_probability: float = 0.001) -> TimestepSampler:
    """Returns a timestep sampler that draws steps with large losses more often, from `step_probabilities`.

    After each batch, the caller passes `record(history, aux.t, unweighted_loss)` to the next `loss_second_moment`. Raises:
    ValueError, when called, if the history and the schedule differ in length.
    """

    def sampler(key: Key[Array, ""], batch_size: int, levels: int) -> _Drawn:
        if history.counts.shape[0] != levels:
            raise ValueError(f"the loss history has {history.counts.shape[0]} steps, the schedule {levels}")
        p = step_probabilities(history, uniform_probability)
        # `choice` would lose the smallest probabilities in the cumulative sums of float32; mode "high" draws exact tails.
        t = jax.random.categorical(key, jnp.log(p), shape=(batch_size,), mode="high").astype(jnp.int32)
        return t, 1 / (levels * p[t])

    return sampler


# name -> timestep sampler with the published constants, or a function: history -> timestep sampler
TIMESTEP_SAMPLERS: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
    "log_normal": log_normal(),
    "logit_normal": logit_normal(),
    "uniform_log_snr": uniform_log_snr(),
}


def needs_history(name: str) -> bool:
    """Whether the timestep sampler with a name in `TIMESTEP_SAMPLERS` draws from a `LossHistory`."""
    return "history" in inspect.signature(TIMESTEP_SAMPLERS[name]).parameters


def sampler_by_name(name: str, history: LossHistory | None = None) -> TimestepSampler:
    """Returns the timestep sampler with a name in `TIMESTEP_SAMPLERS`.

    Raises: ValueError for an unknown name or a missing history.
    """
    if name not in TIMESTEP_SAMPLERS:
        raise ValueError(
            f"unknown timestep_sampler {name!r}; known: {', '.join(TIMESTEP_SAMPLERS)}, or a function "
            "(key, batch_size, number of steps or path) -> (t, weight or log density)"
        )
    if not needs_history(name):
        return TIMESTEP_SAMPLERS[name]
    if history is None:
        raise ValueError(
            f"timestep_sampler={name!r} needs a history of the losses; use timesteps.{name}(history), with a history from "
            "timesteps.loss_history"
        )
    return TIMESTEP_SAMPLERS[name](history)

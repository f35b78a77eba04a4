"""Timestep samplers: which timesteps a batch trains on.

A timestep sampler is a function `(key, batch_size, num_timesteps) -> (t, weight)`: t int32 [B], the indices, and weight float
[B], which multiplies the losses so that their mean estimates the mean over all T steps. `TIMESTEP_SAMPLERS` maps config names
to timestep samplers. `uniform`, `antithetic` and `stratified` draw each t uniformly, so their weights are 1; they differ in
the variance of the batch mean. `loss_second_moment` draws steps with large losses more often, using a `LossHistory` that the
caller updates.

t is int32 and the weights are float32, with x64 on or off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer, Key

from diffusion_jax.types import TimestepSampler

__all__ = [
    "TIMESTEP_SAMPLERS",
    "LossHistory",
    "antithetic",
    "loss_history",
    "loss_second_moment",
    "needs_history",
    "record",
    "sampler_by_name",
    "step_probabilities",
    "stratified",
    "uniform",
]


def _uniform(key, count, num_timesteps):
    return jax.random.randint(key, (count,), 0, num_timesteps, jnp.int32)


def _ones(batch_size):
    return jnp.ones(batch_size, jnp.float32)


def uniform(key: Key[Array, ""], batch_size: int, num_timesteps: int) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """Independent uniform timesteps (DDPM Algorithm 1). Returns (t, weights of 1)."""
    return _uniform(key, batch_size, num_timesteps), _ones(batch_size)


def antithetic(key: Key[Array, ""], batch_size: int, num_timesteps: int) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """Draws half of the batch uniformly and mirrors it, T - 1 - t, for the other half (DDIM's code). Returns as `uniform`."""
    half = _uniform(key, (batch_size + 1) // 2, num_timesteps)
    return jnp.concatenate([half, num_timesteps - 1 - half])[:batch_size], _ones(batch_size)


def stratified(key: Key[Array, ""], batch_size: int, num_timesteps: int) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """One shared uniform offset and B equal strides, modulo T (Kingma et al. 2021, appendix I.1).

    Each t is uniform, and together they cover all steps evenly. Returns as `uniform`.
    """
    strides = jnp.arange(batch_size, dtype=jnp.float32) / batch_size
    position = (jax.random.uniform(key, dtype=jnp.float32) + strides) % 1.0
    t = jnp.floor(position * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps - 1), _ones(batch_size)


class LossHistory(NamedTuple):
    """A ring buffer with the last H losses at every step, and the number of losses recorded so far."""

    losses: Float[Array, "T H"]
    counts: Int32[Array, "T"]


def loss_history(num_timesteps: int, length: int = 10) -> LossHistory:
    """Returns an empty history; Improved DDPM (section 3.3) keeps 10 losses per step."""
    return LossHistory(jnp.zeros((num_timesteps, length), jnp.float32), jnp.zeros(num_timesteps, jnp.int32))


def record(
    history: LossHistory, t: Integer[Array | np.ndarray, "B"], losses: Float[Array | np.ndarray, "B"]
) -> LossHistory:
    """Adds the unweighted losses of a batch, in order, to the history; losses that are not finite are skipped."""
    length, losses = history.losses.shape[1], jnp.asarray(losses, jnp.float32)
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
    """p_t proportional to sqrt(E[L_t^2]) over the recorded losses; uniform with probability `uniform_probability`.

    Uniform until every step has H recorded losses (Improved DDPM eq. 18 and the text below it), and if all losses are 0 or
    their squares overflow.
    """
    total, length = history.losses.shape
    root_mean_square = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    normalizer = jnp.sum(root_mean_square)
    learned = (1 - uniform_probability) * root_mean_square / normalizer + uniform_probability / total
    is_usable = jnp.all(history.counts >= length) & (normalizer > 0) & jnp.isfinite(normalizer)
    return jnp.where(is_usable, learned, 1 / total)


def loss_second_moment(history: LossHistory, uniform_probability: float = 0.001) -> TimestepSampler:
    """Returns a timestep sampler that draws from `step_probabilities` with weights 1 / (T p_t), so that means are unbiased.

    After each batch, the caller passes `record(history, aux.t, unweighted_loss)` to the next `loss_second_moment`. Raises:
    ValueError, when called, if the history and the schedule differ in length.
    """

    def sampler(
        key: Key[Array, ""], batch_size: int, num_timesteps: int
    ) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
        if history.counts.shape[0] != num_timesteps:
            raise ValueError(f"the loss history has {history.counts.shape[0]} steps, the schedule {num_timesteps}")
        p = step_probabilities(history, uniform_probability)
        # `choice` would lose the smallest probabilities in the cumulative sums of float32; mode "high" draws exact tails.
        t = jax.random.categorical(key, jnp.log(p), shape=(batch_size,), mode="high").astype(jnp.int32)
        return t, 1 / (num_timesteps * p[t])

    return sampler


# An entry is a timestep sampler, or a function: history -> timestep sampler.
TIMESTEP_SAMPLERS: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
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
            "(key, batch_size, num_timesteps) -> (t, weight)"
        )
    if not needs_history(name):
        return TIMESTEP_SAMPLERS[name]
    if history is None:
        raise ValueError(
            f"timestep_sampler={name!r} needs a history of the losses; use timesteps.{name}(history), with a history from "
            "timesteps.loss_history"
        )
    return TIMESTEP_SAMPLERS[name](history)

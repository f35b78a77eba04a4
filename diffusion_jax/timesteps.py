"""Which noise levels a training batch looks at.

A timestep sampler is a function `(key, batch_size, num_timesteps) -> (t, weight)`: t int32 [B], the indices, and weight
float [B], which multiplies the losses so that their mean estimates the mean over all T steps. Those of `SAMPLERS` draw
each t uniformly, so their weights are 1; they differ in how much the batch's mean varies. `loss_second_moment` prefers the
steps whose losses are large, and learns which those are from a `LossHistory` that the caller carries along.

t is int32 and the weights are float32, with x64 on or off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def _uniform(key, count, num_timesteps):
    return jax.random.randint(key, (count,), 0, num_timesteps, jnp.int32)


def _ones(batch_size):
    return jnp.ones(batch_size, jnp.float32)


def uniform(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """Independent and uniform (DDPM Algorithm 1). Returns (t int32 [B], ones [B])."""
    return _uniform(key, batch_size, num_timesteps), _ones(batch_size)


def antithetic(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """Half of the batch uniform, the other half its mirror T - 1 - t (DDIM's code). Returns as `uniform`."""
    half = _uniform(key, (batch_size + 1) // 2, num_timesteps)
    return jnp.concatenate([half, num_timesteps - 1 - half])[:batch_size], _ones(batch_size)


def stratified(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """One shared uniform offset and B equal strides around the chain (Kingma et al. 2021, appendix I.1).

    Each t alone is uniform; together they cover the chain evenly. Returns as `uniform`.
    """
    strides = jnp.arange(batch_size, dtype=jnp.float32) / batch_size
    position = (jax.random.uniform(key, dtype=jnp.float32) + strides) % 1.0
    t = jnp.floor(position * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps - 1), _ones(batch_size)


SAMPLERS = {"uniform": uniform, "antithetic": antithetic, "stratified": stratified}


class LossHistory(NamedTuple):
    """The last losses seen at every step. losses: float32 [T, H], a ring for each step; counts: int32 [T], ever recorded."""

    losses: jax.Array
    counts: jax.Array


def loss_history(num_timesteps: int, length: int = 10) -> LossHistory:
    """An empty history; Improved DDPM (section 3.3) keeps 10 losses of each step."""
    return LossHistory(jnp.zeros((num_timesteps, length), jnp.float32), jnp.zeros(num_timesteps, jnp.int32))


def record(history: LossHistory, t, losses) -> LossHistory:
    """The history with a batch's unweighted losses; t int32 [B], losses [B], as if one came after the other."""
    length = history.losses.shape[1]
    same = t[:, None] == t[None, :]
    earlier = jnp.tril(same, -1).sum(axis=1)  # how many of the batch's losses at this step come before this one
    later = jnp.triu(same, 1).sum(axis=1)
    place = (history.counts[t] + earlier) % length
    row = jnp.where(later < length, t, history.counts.shape[0])  # of more than a ring holds, only the last stay
    return LossHistory(
        history.losses.at[row, place].set(losses.astype(jnp.float32), mode="drop"), history.counts.at[t].add(1)
    )


def step_probabilities(history: LossHistory, uniform_probability: float = 0.001) -> jax.Array:
    """p_t proportional to sqrt(E[L_t^2]) over the kept losses, mixed with a little of the uniform; float [T], sums to 1.

    Uniform until every step's ring is full (Improved DDPM eq. 18 and the text below it).
    """
    total, length = history.losses.shape
    root_mean_square = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    learned = (1 - uniform_probability) * root_mean_square / jnp.sum(root_mean_square) + uniform_probability / total
    return jnp.where(jnp.all(history.counts >= length), learned, 1 / total)


def loss_second_moment(history: LossHistory, uniform_probability: float = 0.001) -> Callable:
    """A timestep sampler that draws from `step_probabilities` and weighs by 1 / (T p_t), so that means stay unbiased.

    After each batch the caller keeps `record(history, parts.t, unweighted_loss)` for the next one.
    """

    def sampler(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
        if history.counts.shape[0] != num_timesteps:
            raise ValueError(f"the loss history has {history.counts.shape[0]} steps, the schedule {num_timesteps}")
        p = step_probabilities(history, uniform_probability)
        # Not `choice`, whose cumulative sums lose the smallest probabilities in float32; "high" keeps the tails.
        t = jax.random.categorical(key, jnp.log(p), shape=(batch_size,), mode="high").astype(jnp.int32)
        return t, 1 / (num_timesteps * p[t])

    return sampler

"""Which noise levels a training batch looks at.

A timestep sampler is a function `(key, batch_size, num_timesteps) -> (t, weight)`: t int32 [B], the indices, and weight
float [B], which multiplies the losses so that their mean estimates the mean over all T steps. Every sampler here draws
each t uniformly, so its weights are 1; they differ in how much the batch's mean varies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def uniform(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """Independent and uniform (DDPM Algorithm 1). Returns (t int32 [B], ones [B])."""
    return jax.random.randint(key, (batch_size,), 0, num_timesteps), jnp.ones(batch_size)


def antithetic(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """Half of the batch uniform, the other half its mirror T - 1 - t (DDIM's code). Returns as `uniform`."""
    half = jax.random.randint(key, ((batch_size + 1) // 2,), 0, num_timesteps)
    return jnp.concatenate([half, num_timesteps - 1 - half])[:batch_size], jnp.ones(batch_size)


def stratified(key, batch_size: int, num_timesteps: int) -> tuple[jax.Array, jax.Array]:
    """One shared uniform offset and B equal strides around the chain (Kingma et al. 2021, appendix I.1).

    Each t alone is uniform; together they cover the chain evenly. Returns as `uniform`.
    """
    position = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    t = jnp.floor(position * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps - 1), jnp.ones(batch_size)


SAMPLERS = {"uniform": uniform, "antithetic": antithetic, "stratified": stratified}

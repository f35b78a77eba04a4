"""The way back: from an image to the noise that a deterministic sampler would make it from."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax import process
from diffusion_jax.sampling.noise_levels import call, level, level_before
from diffusion_jax.schedules import Schedule


def encode(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    *,
    order: int = 1,
    start: int | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool | Callable = False,
) -> jax.Array:
    """DDIM inversion: x_0 to x_T along the probability-flow ODE (DDIM section 4.3), whose inverse is a deterministic sampler.

    Args:
      schedule, denoise_fn: as `sample`.
      x_0: float [B, ...].
      order: 1 takes DDIM's step with the network asked at (x_{t-1}, t), one call a step; 2 is Heun's, two calls, and what
        `heun()` then makes of it is much closer to x_0.
      start: the index to stop at, where `sample(..., start=start)` starts; T - 1 unless given.
      prediction, variance: as `ddim`, without x_prev. clip: of order 1, x_0 on the way (eps is kept, as diffusers does).
    Returns: x float32 [B, ...] (float64 for a float64 x_0), at the level of index `start`.
    Raises: ValueError for an x_0 that is not float, another order, prediction x_prev, a start outside 0 ... T - 1, or clip
      with order 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if prediction == "x_prev":
        raise ValueError("prediction 'x_prev' cannot be inverted: it has no eps at a noise level of its own")
    if order == 2 and clip:
        raise ValueError("clip is for order 1; a clipped x_0 has no second-order inverse")
    top = schedule.num_timesteps - 1 if start is None else start
    if not 0 <= top < schedule.num_timesteps:
        raise ValueError(f"start={start} must be an index of the schedule, 0 ... {schedule.num_timesteps - 1}")
    x_0 = process.as_float("x_0", x_0)

    def eps_of(x, t, read):
        """The network's eps at x and index t, its output read at the level `read`."""
        output, _ = process.split_variance(call(schedule, denoise_fn, x, t), x, variance)
        return process.eps_at(read.alpha, read.sigma, output, x, prediction)

    def up(x, eps, below, here):
        x_0 = process.clip_x_0((x - below.sigma * eps) / below.alpha, clip)
        return (here.alpha * x_0 + here.sigma * eps).astype(x.dtype)

    def first_order(x, t):
        below, here = level_before(schedule, t, x), level(schedule, t, x)
        # x has the level below, where v is read; x_0 and the score say nothing of eps at level 0.
        return up(x, eps_of(x, t, below if prediction == "v" else here), below, here), None

    def second_order(x, t):
        below, here = level_before(schedule, t, x), level(schedule, t, x)
        eps = eps_of(x, t - 1, below)
        ahead = eps_of(up(x, eps, below, here), t, here)
        return up(x, (eps + ahead) / 2, below, here), None

    if order == 1:
        x, _ = jax.lax.scan(first_order, x_0, jnp.arange(top + 1, dtype=jnp.int32))
        return x
    # x_0 itself has no eps: the first step takes the one that its own end has.
    guess, _ = first_order(x_0, jnp.int32(0))
    below, here = level_before(schedule, 0, x_0), level(schedule, 0, x_0)
    x = up(x_0, eps_of(guess, jnp.int32(0), here), below, here)
    x, _ = jax.lax.scan(second_order, x, jnp.arange(1, top + 1, dtype=jnp.int32))
    return x

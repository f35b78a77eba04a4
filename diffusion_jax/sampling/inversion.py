"""Inversion: from an image to the noise from which a deterministic sampler generates it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax import process
from diffusion_jax.sampling.driver import call_network, first_index
from diffusion_jax.schedules import NoiseLevel, Schedule
from diffusion_jax.types import Clip, DenoiseFn

__all__ = ["encode"]


def encode(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Float[ArrayLike, "B *shape"],
    *,
    order: int = 1,
    start: int | np.integer | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: Clip = False,
) -> Float[Array, "B *shape"]:
    """DDIM inversion: x_0 to x_T along the probability-flow ODE (DDIM section 4.3), whose inverse is a deterministic sampler.

    Args:
      schedule, denoise_fn: as `sample`.
      order: 1 is DDIM's step with the network evaluated at (x_{t-1}, t), one call for each step; 2 is Heun's step, two calls,
        and `heun()` then reconstructs x_0 much more closely.
      start: the index to stop at, where `sample(..., start=start)` starts; the default is T - 1.
      prediction, variance: as `ddim`, without x_prev. clip: for order 1, clips the predicted x_0 of each step (and keeps eps,
        as diffusers does).
    Returns: x_t at the noise level of index `start`; float32, or float64 for a float64 x_0.
    Raises: ValueError for an x_0 that is not float or has no batch axis, another order, prediction x_prev, a start outside
      0 ... T - 1, or clip with order 2.
    """
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if prediction == "x_prev":
        raise ValueError("prediction 'x_prev' cannot be inverted, because it has no eps outside of a schedule's step")
    if order == 2 and clip:
        raise ValueError("clip is for order 1; a clipped x_0 has no second-order inverse")
    top = first_index(schedule, start)
    x_0 = process.as_float("x_0", x_0)
    if not x_0.ndim:
        raise ValueError("x_0 must have a batch axis: [B, ...]; got a single number")

    def predict_eps(x, t, level: NoiseLevel):
        """eps from the network's output at x and index t, converted with the coefficients of `level`."""
        output, _ = process.split_variance(call_network(schedule, denoise_fn, x, t), x, variance)
        return process.eps_at(level.alpha, level.sigma, output, x, prediction)

    def add_noise(x, eps, lower: NoiseLevel, upper: NoiseLevel):
        x_0 = process.clip_x_0((x - lower.sigma * eps) / lower.alpha, clip)
        return (upper.alpha * x_0 + upper.sigma * eps).astype(x.dtype)

    def first_order(x, t):
        lower, upper = schedule.at(t, x).previous, schedule.at(t, x).level
        # x is at the lower level, so v is converted there; x_0 and the score do not determine eps without noise (t = 0).
        return add_noise(x, predict_eps(x, t, lower if prediction == "v" else upper), lower, upper), None

    def second_order(x, t):
        lower, upper = schedule.at(t, x).previous, schedule.at(t, x).level
        eps = predict_eps(x, t - 1, lower)
        next_eps = predict_eps(add_noise(x, eps, lower, upper), t, upper)
        return add_noise(x, (eps + next_eps) / 2, lower, upper), None

    if order == 1:
        x, _ = jax.lax.scan(first_order, x_0, jnp.arange(top + 1, dtype=jnp.int32))
        return x
    # x_0 has no eps, so the first step uses the eps at its end, which a first-order step approximates.
    guess, _ = first_order(x_0, jnp.int32(0))
    lower, upper = schedule.at(0, x_0).previous, schedule.at(0, x_0).level
    x = add_noise(x_0, predict_eps(guess, jnp.int32(0), upper), lower, upper)
    x, _ = jax.lax.scan(second_order, x, jnp.arange(1, top + 1, dtype=jnp.int32))
    return x

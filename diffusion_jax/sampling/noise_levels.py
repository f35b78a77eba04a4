"""Noise levels of a schedule and between its steps, and the network's predictions at one.

At a noise level, x = alpha x_0 + sigma eps. The exponential integrators use lambda = log(alpha / sigma), half the log SNR.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax import process
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Clip, DenoiseFn

__all__ = [
    "Denoised",
    "NoiseLevel",
    "call_network",
    "ddim_step",
    "denoise",
    "denoise_between_steps",
    "noise_level",
    "noise_level_at_log_snr",
    "previous_noise_level",
]


class NoiseLevel(NamedTuple):
    """alpha, sigma and lambda = log(alpha / sigma); lambda is finite also where alpha or sigma is 0."""

    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    lam: Float[Array, ""]


class Denoised(NamedTuple):
    """The network's prediction: x_0 after the clip, and the eps computed from it."""

    x_0: Float[Array, "B *shape"]
    eps: Float[Array, "B *shape"]


def _noise_level(alpha, sigma) -> NoiseLevel:
    # log(1e-22) is about -50, and 1 + exp(-50) == 1 even in float64: a finite value for "no noise" and for "pure noise".
    return NoiseLevel(alpha, sigma, jnp.log(jnp.maximum(alpha, 1e-22)) - jnp.log(jnp.maximum(sigma, 1e-22)))


def noise_level(schedule: Schedule, t: Int[Array, ""] | int, x: Float[Array, "..."]) -> NoiseLevel:
    """The noise level of index t, in the dtype of x.

    An index above T - 1 gives that of T - 1: multistep methods compute it before they have a history and mask the result.
    """
    t, like = jnp.minimum(t, schedule.num_timesteps - 1), jnp.zeros((), x.dtype)
    return _noise_level(
        process.lookup(schedule.sqrt_alpha_bar, t, like),
        process.lookup(schedule.sqrt_one_minus_alpha_bar, t, like),
    )


def previous_noise_level(schedule: Schedule, t: Int[Array, ""] | int, x: Float[Array, "..."]) -> NoiseLevel:
    """The noise level that the step from index t ends at, in the dtype of x: no noise for t = 0."""
    like = jnp.zeros((), x.dtype)
    alpha = jnp.sqrt(process.lookup(schedule.alpha_bar_prev, t, like))
    return _noise_level(alpha, process.lookup(schedule.sqrt_one_minus_alpha_bar_prev, t, like))


def noise_level_at_log_snr(log_snr: Float[Array, ""]) -> NoiseLevel:
    """The noise level of any log SNR, also between a schedule's steps."""
    return NoiseLevel(jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr)), log_snr / 2)


def call_network(
    schedule: Schedule, denoise_fn: DenoiseFn, x_t: Float[Array, "B *shape"], t: Int[Array, ""]
) -> Float[Array, "B *output_shape"]:
    """The network's output at index t, in the dtype of x_t."""
    time = process.lookup(schedule.timesteps, t, jnp.zeros((), x_t.dtype))
    output = denoise_fn(x_t, jnp.full(x_t.shape[:1], time))
    return process.as_float("the output of denoise_fn", output).astype(x_t.dtype)


def denoise(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_t: Float[Array, "B *shape"],
    t: Int[Array, ""],
    prediction: str,
    variance: str,
    clip: Clip,
) -> Denoised:
    """One network call at index t; prediction, variance, clip: as `process.p_mean_variance`."""
    output, _ = process.split_variance(call_network(schedule, denoise_fn, x_t, t), x_t, variance)
    x_0 = process.clip_x_0(process.to_x_0(schedule, output, x_t, t, prediction), clip)
    return Denoised(x_0, process.to_eps(schedule, x_0, x_t, t, "x_0"))


def denoise_between_steps(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x: Float[Array, "B *shape"],
    level: NoiseLevel,
    prediction: str,
    variance: str,
    clip: Clip,
) -> Denoised:
    """As `denoise`, at any noise level of the training grid. Raises: ValueError for x_prev."""
    time = jnp.full(x.shape[:1], schedule.time_at_log_snr(2 * level.lam).astype(x.dtype))
    output = process.as_float("the output of denoise_fn", denoise_fn(x, time)).astype(x.dtype)
    output, _ = process.split_variance(output, x, variance)
    if prediction == "x_0":
        x_0 = output
    elif prediction == "v":  # like x_0, without a division by alpha, which may be 0
        x_0 = level.alpha * x - level.sigma * output
    else:
        x_0 = (x - level.sigma * process.eps_at(level.alpha, level.sigma, output, x, prediction)) / level.alpha
    x_0 = process.clip_x_0(x_0, clip)
    return Denoised(x_0, (x - level.alpha * x_0) / level.sigma)


def ddim_step(
    denoised: Denoised, eps: Float[Array, "B *shape"], current: NoiseLevel, target: NoiseLevel
) -> Float[Array, "B *shape"]:
    """The step from one noise level to another along a direction eps: DDIM's eq. 12 for the network's own eps.

    (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps, written in terms of the network's own x_0 and eps, so that it is
    defined for pure noise (alpha = 0), where the step is DDIM's for any eps.
    """
    slope = jnp.where(
        current.alpha > 1e-10, target.sigma - target.alpha * current.sigma / jnp.maximum(current.alpha, 1e-10), 0.0
    )
    return target.alpha * denoised.x_0 + target.sigma * denoised.eps + slope * (eps - denoised.eps)

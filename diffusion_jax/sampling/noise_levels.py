"""Noise levels as the solvers read them, and what the network says at one.

A level is x = alpha x_0 + sigma eps. The exponential solvers integrate over lambda = log(alpha / sigma), half the log SNR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import process
from diffusion_jax.schedules import Schedule


class Level(NamedTuple):
    """alpha, sigma and lambda = log(alpha / sigma), scalars; lambda is finite also where alpha or sigma is 0."""

    alpha: jax.Array
    sigma: jax.Array
    lam: jax.Array


class Denoised(NamedTuple):
    """What a network's output says: x_0 (after the clip) and the eps that goes with it; shapes of x_t."""

    x_0: jax.Array
    eps: jax.Array


def _level(alpha, sigma) -> Level:
    # exp(-50) is nothing beside 1, even in float64: far enough for "no noise" and for "noise alone".
    return Level(alpha, sigma, jnp.log(jnp.maximum(alpha, 1e-22)) - jnp.log(jnp.maximum(sigma, 1e-22)))


def level(schedule: Schedule, t, x) -> Level:
    """The level of index t, int [], in the dtype of x. An index above T - 1 reads T - 1: a multistep method masks what it
    reads before it has history.
    """
    t, like = jnp.minimum(t, schedule.num_timesteps - 1), jnp.zeros((), x.dtype)
    return _level(
        process.lookup(schedule.sqrt_alpha_bar, t, like),
        process.lookup(schedule.sqrt_one_minus_alpha_bar, t, like),
    )


def level_before(schedule: Schedule, t, x) -> Level:
    """The level one step earlier than index t, where t leads to: x_0 itself for t = 0. In the dtype of x."""
    like = jnp.zeros((), x.dtype)
    alpha = jnp.sqrt(process.lookup(schedule.alpha_bar_prev, t, like))
    return _level(alpha, process.lookup(schedule.sqrt_one_minus_alpha_bar_prev, t, like))


def level_at(log_snr) -> Level:
    """The level of any log SNR, between a schedule's steps too."""
    return Level(jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr)), log_snr / 2)


def call(schedule: Schedule, denoise_fn: Callable, x_t, t):
    """The network's output at index t, int [], in the dtype of x_t, whatever it computes in."""
    time = process.lookup(schedule.timesteps, t, jnp.zeros((), x_t.dtype))
    output = denoise_fn(x_t, jnp.full(x_t.shape[:1], time))
    return process.as_float("the output of denoise_fn", output).astype(x_t.dtype)


def denoise(
    schedule: Schedule, denoise_fn: Callable, x_t, t, prediction: str, variance: str, clip: bool | Callable
) -> Denoised:
    """One network call at index t, int []: x_0, clipped, and eps derived again from it. Arguments: `process`."""
    output, _ = process.split_variance(call(schedule, denoise_fn, x_t, t), x_t, variance)
    x_0 = process.clip_x_0(process.to_x_0(schedule, output, x_t, t, prediction), clip)
    return Denoised(x_0, process.to_eps(schedule, x_0, x_t, t, "x_0"))


def denoise_at(
    schedule: Schedule, denoise_fn: Callable, x, where: Level, prediction: str, variance: str, clip: bool | Callable
) -> Denoised:
    """As `denoise`, at a level of the training grid between the schedule's steps. Raises: ValueError for x_prev."""
    time = jnp.full(x.shape[:1], schedule.time_at_log_snr(2 * where.lam).astype(x.dtype))
    output = process.as_float("the output of denoise_fn", denoise_fn(x, time)).astype(x.dtype)
    output, _ = process.split_variance(output, x, variance)
    if prediction == "x_0":
        x_0 = output
    elif prediction == "v":  # neither divides by an alpha that may be 0
        x_0 = where.alpha * x - where.sigma * output
    else:
        x_0 = (x - where.sigma * process.eps_at(where.alpha, where.sigma, output, x, prediction)) / where.alpha
    x_0 = process.clip_x_0(x_0, clip)
    return Denoised(x_0, (x - where.alpha * x_0) / where.sigma)


def move(denoised: Denoised, eps, here: Level, there: Level) -> jax.Array:
    """The step of `there` from `here` along a direction eps: DDIM's eq. 12 for the network's own eps.

    (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps, written around the network's own x_0 and eps, so that a step from
    pure noise (alpha = 0), where any other direction is beyond reach, is DDIM's.
    """
    slope = jnp.where(here.alpha > 1e-10, there.sigma - there.alpha * here.sigma / jnp.maximum(here.alpha, 1e-10), 0.0)
    return there.alpha * denoised.x_0 + there.sigma * denoised.eps + slope * (eps - denoised.eps)

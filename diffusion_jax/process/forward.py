"""The forward process: q(x_t | x_0), one step q(x_t | x_{t-1}), and the posterior q(x_{t-1} | x_t, x_0)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.process.arrays import as_float, check_same_shape, lookup, promote
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Index

__all__ = ["Gaussian", "q_mean_variance", "q_posterior", "q_sample", "q_step", "q_step_mean_variance"]


class Gaussian(NamedTuple):
    """A diagonal Gaussian; every field has the shape of x_t."""

    mean: Float[Array, "B *shape"]
    variance: Float[Array, "B *shape"]
    log_variance: Float[Array, "B *shape"]


def q_mean_variance(
    schedule: Schedule, x_0: Float[ArrayLike, "B *shape"], t: Index
) -> tuple[Float[Array, "B *shape"], Float[Array, "B *shape"]]:
    """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), DDPM eq. 4."""
    x_0 = as_float("x_0", x_0)
    mean = lookup(schedule.sqrt_alpha_bar, t, x_0) * x_0
    return mean, jnp.broadcast_to(lookup(schedule.sqrt_one_minus_alpha_bar, t, x_0) ** 2, mean.shape)


def q_sample(
    schedule: Schedule, x_0: Float[ArrayLike, "B *shape"], t: Index, eps: Float[ArrayLike, "B *shape"]
) -> Float[Array, "B *shape"]:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, a draw of q(x_t | x_0) for eps ~ N(0, I) (DDPM eq. 4).

    Raises: ValueError if x_0 and eps differ in shape.
    """
    check_same_shape("eps", eps, "x_0", x_0)
    x_0, eps = promote(x_0=x_0, eps=eps)
    return lookup(schedule.sqrt_alpha_bar, t, x_0) * x_0 + lookup(schedule.sqrt_one_minus_alpha_bar, t, x_0) * eps


def q_step_mean_variance(
    schedule: Schedule, x_prev: Float[ArrayLike, "B *shape"], t: Index
) -> tuple[Float[Array, "B *shape"], Float[Array, "B *shape"]]:
    """Mean and variance of one forward step, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2).

    x_prev: x_{t-1}, which is x_0 at index 0.
    """
    x_prev = as_float("x_prev", x_prev)
    beta = lookup(schedule.betas, t, x_prev)
    mean = jnp.sqrt(1 - beta) * x_prev
    return mean, jnp.broadcast_to(beta, mean.shape)


def q_step(
    schedule: Schedule, x_prev: Float[ArrayLike, "B *shape"], t: Index, eps: Float[ArrayLike, "B *shape"]
) -> Float[Array, "B *shape"]:
    """One forward step, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM eq. 2); x_prev as `q_step_mean_variance`."""
    check_same_shape("eps", eps, "x_prev", x_prev)
    x_prev, eps = promote(x_prev=x_prev, eps=eps)
    mean, variance = q_step_mean_variance(schedule, x_prev, t)
    return mean + jnp.sqrt(variance) * eps


def q_posterior(
    schedule: Schedule, x_0: Float[ArrayLike, "B *shape"], x_t: Float[ArrayLike, "B *shape"], t: Index
) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7.

    At index 0 the mean is x_0 and the variance 0; the log variance there is the finite one of
    `Schedule.posterior_log_variance`. Raises: ValueError if x_0 and x_t differ in shape.
    """
    check_same_shape("x_0", x_0, "x_t", x_t)
    x_0, x_t = promote(x_0=x_0, x_t=x_t)
    mean = (
        lookup(schedule.posterior_mean_coef_x_0, t, x_t) * x_0 + lookup(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    return Gaussian(
        mean,
        jnp.broadcast_to(lookup(schedule.posterior_variance, t, x_t), mean.shape),
        jnp.broadcast_to(lookup(schedule.posterior_log_variance, t, x_t), mean.shape),
    )

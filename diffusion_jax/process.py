"""The Gaussian diffusion process: q(x_t | x_0), q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t).

All functions are pure functions of arrays and a `Schedule`. Shapes: x_0, x_t and eps are float [B, ...] (images are
[B, H, W, C] in [-1, 1]); t is int32 [B], the 0-based index for the papers' t = 1 ... T. A scalar t applies to every row, and
to an unbatched x under `vmap`. An index outside 0 ... T - 1 gives NaN, never a value at another index.

`q_mean_variance` and `q_sample` also take a `Path` with t float [B], the network time. Steps (x_{t-1} and its variance) are
defined for a schedule only.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic. All
functions raise ValueError for images that are not float, and for a t whose shape is not the start of x's shape.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax.arrays import as_batch, as_float, check_same_shape, promote
from diffusion_jax.denoiser import Denoiser, as_denoiser
from diffusion_jax.schedules import Path, Schedule, Transition
from diffusion_jax.types import Batch, BatchLike, DenoiseFn, Index, Time

__all__ = [
    "Gaussian",
    "Reverse",
    "as_batch",
    "as_float",
    "check_terminal_snr",
    "p_mean_variance",
    "promote",
    "q_mean_variance",
    "q_posterior",
    "q_sample",
    "q_step",
    "q_step_mean_variance",
    "reverse",
]


class Gaussian(NamedTuple):
    """A diagonal Gaussian; every field has the shape of x_t."""

    mean: Batch
    variance: Batch
    log_variance: Batch


def q_mean_variance(schedule: Schedule | Path, x_0: BatchLike, t: Index | Time) -> tuple[Batch, Batch]:
    """Returns the mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), DDPM eq. 4."""
    x_0 = as_float("x_0", x_0)
    at = schedule.at(t, x_0)
    mean = at.alpha * x_0
    return mean, jnp.broadcast_to(at.sigma**2, mean.shape)


def q_sample(schedule: Schedule | Path, x_0: BatchLike, t: Index | Time, eps: BatchLike) -> Batch:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, a draw of q(x_t | x_0) for eps ~ N(0, I) (DDPM eq. 4).

    Raises: ValueError if x_0 and eps differ in shape.
    """
    check_same_shape("eps", eps, "x_0", x_0)
    x_0, eps = promote(x_0=x_0, eps=eps)
    at = schedule.at(t, x_0)
    return at.alpha * x_0 + at.sigma * eps


def q_step_mean_variance(schedule: Schedule, x_prev: BatchLike, t: Index) -> tuple[Batch, Batch]:
    """Returns mean and variance of a forward step, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2).

    x_prev: x_{t-1}, which is x_0 at index 0.
    """
    x_prev = as_float("x_prev", x_prev)
    beta = schedule.transition(t, x_prev).beta
    mean = jnp.sqrt(1 - beta) * x_prev
    return mean, jnp.broadcast_to(beta, mean.shape)


def q_step(schedule: Schedule, x_prev: BatchLike, t: Index, eps: BatchLike) -> Batch:
    """One forward step, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM eq. 2); x_prev as `q_step_mean_variance`."""
    check_same_shape("eps", eps, "x_prev", x_prev)
    x_prev, eps = promote(x_prev=x_prev, eps=eps)
    mean, variance = q_step_mean_variance(schedule, x_prev, t)
    return mean + jnp.sqrt(variance) * eps


def q_posterior(schedule: Schedule, x_0: BatchLike, x_t: BatchLike, t: Index) -> Gaussian:
    """Returns q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

    At index 0 the mean is x_0 and the variance 0; the log variance is the decoder's finite log variance (`Schedule`).
    Raises: ValueError if x_0 and x_t differ in shape.
    """
    check_same_shape("x_0", x_0, "x_t", x_t)
    x_0, x_t = promote(x_0=x_0, x_t=x_t)
    step = schedule.transition(t, x_t)
    mean = step.posterior_mean_coef_x_0 * x_0 + step.posterior_mean_coef_x_t * x_t
    variances = (
        jnp.broadcast_to(value, mean.shape) for value in (step.posterior_variance, step.posterior_log_variance)
    )
    return Gaussian(mean, *variances)


def check_terminal_snr(schedule: Schedule | Path, prediction: str, first: int | None = None) -> None:
    """Raises ValueError if a visited step has alpha = 0 in float32, and the prediction (eps or score) does not give x_0.

    The check does not depend on the dtype of x. For a traced schedule, only the last step is checked.

    first: the highest index that is visited; the default is T - 1.
    """
    if not schedule.zero_terminal_snr or prediction not in ("eps", "score"):
        return
    if isinstance(schedule, Path):
        raise ValueError(
            f"the path ends in pure noise, where {prediction} does not determine x_0; predict v, x_0 or flow, or give the "
            "path an interval that ends before"
        )
    last = schedule.num_timesteps - 1
    first = last if first is None else first
    lowest = last  # the first index without signal
    if not isinstance(schedule.alpha_bar, Tracer):
        lowest = int(np.argmax(np.sqrt(schedule.alpha_bar) < np.finfo(np.float32).tiny))
    if lowest <= first <= last:
        raise ValueError(
            f"alpha_bar is 0 at index {first} (or its square root in float32): {prediction} does not determine x_0 there; "
            f"predict v, x_0 or flow, use smaller betas, or keep only the steps below index {lowest}: "
            f"schedules.respace(schedule, range({lowest}))"
        )


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) and the predicted x_0; every field has the shape of x_t."""

    mean: Batch
    variance: Batch
    log_variance: Batch
    x_0: Batch


def p_mean_variance(
    schedule: Schedule, denoiser: Denoiser | DenoiseFn, x_t: BatchLike, t: Index, variance: str | None = None
) -> Reverse:
    """Computes the model's reverse step p(x_{t-1} | x_t).

    The network's output is converted to x_0, x_0 is clipped, and q(x_{t-1} | x_t, x_0) gives the mean (DDPM eq. 7; eq. 11 for
    eps without a clip). DDPM's code clips, although the paper's Algorithm 2 does not. For `x_prev` the output itself is the
    mean, as in OpenAI's code, and only the returned x_0 is clipped.

    Args:
      denoiser: its `variance` selects sigma_t^2:
        fixed_large    beta_t (optimal for x_0 ~ N(0, I), DDPM section 3.2)
        fixed_small    the posterior variance beta-tilde_t (optimal for a single x_0)
        learned        the second half of the output is the log variance
        learned_range  exp(f log beta + (1 - f) log beta-tilde), f = (output + 1) / 2 (Improved DDPM eq. 15)
      x_t: [B, ..., C].
      variance: fixed_large or fixed_small, in place of the denoiser's fixed variance.
    Returns: Reverse(mean, variance, log_variance, x_0). At index 0 both fixed variances are the decoder's variance
      (`Schedule`); samplers add no noise there.
    Raises: ValueError as a call of `Denoiser`, for another `variance`, for a `variance` in place of a learned variance, and
      for x_prev with corrections or limits.
    """
    if variance not in (None, "fixed_small", "fixed_large"):
        raise ValueError(f"variance={variance!r} must be fixed_small or fixed_large, or None for the denoiser's")
    return reverse(as_denoiser(denoiser), x_t, schedule.transition(t, x_t), variance)


def reverse(denoiser: Denoiser, x_t: BatchLike, transition: Transition, variance: str | None = None) -> Reverse:
    """Computes `p_mean_variance` for any step from one noise level to another."""
    x_t = as_float("x_t", x_t)
    predicted = dataclasses.replace(denoiser, mean_shift=None)(x_t, transition)
    if variance is not None and predicted.learned is not None:
        raise ValueError(f"variance={variance!r} is for a network with a fixed variance, and this one learned its own")
    mean = transition.posterior_mean_coef_x_0 * predicted.x_0 + transition.posterior_mean_coef_x_t * x_t
    if denoiser.prediction == "x_prev":
        if denoiser.limits or denoiser.corrections:
            raise ValueError(
                "a projection cannot act on the mean that a network with prediction 'x_prev' predicts itself: use the "
                "sampler ddim"
            )
        mean = predicted.output[..., : x_t.shape[-1]]
    variance, learned = variance or denoiser.variance, predicted.learned
    if learned is None:
        small, large = transition.posterior_log_variance, jnp.log(transition.fixed_large_variance)
        log_variance = small if variance == "fixed_small" else large
    elif variance == "learned":
        log_variance = learned
    else:
        fraction = (learned + 1) / 2
        log_variance = fraction * jnp.log(transition.beta) + (1 - fraction) * transition.posterior_log_variance
    log_variance = jnp.broadcast_to(log_variance, mean.shape)
    if denoiser.mean_shift is not None:
        mean = mean + jnp.exp(log_variance) * denoiser.mean_shift(x_t, transition.level.times(x_t))
    return Reverse(mean, jnp.exp(log_variance), log_variance, predicted.x_0)

"""Conversions between the five quantities that a network may predict."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.process.arrays import check_same_shape, lookup, promote
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Index

__all__ = ["PREDICTIONS", "check_terminal_snr", "eps_at", "to_eps", "to_score", "to_v", "to_x_0"]

PREDICTIONS = ("eps", "x_0", "v", "x_prev", "score")


def to_x_0(
    schedule: Schedule,
    output: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    prediction: str = "eps",
) -> Float[Array, "B *shape"]:
    """x_0 from a network's output.

    eps: (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (DDPM eq. 15); v: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v;
    x_prev: the posterior mean (DDPM eq. 7) solved for x_0; score: as eps.

    prediction: the quantity that `output` is: eps, x_0, v, x_prev or score.
    Raises: ValueError for an unknown prediction, differing shapes, or eps or score at a step whose alpha is 0 in float32,
      where they contain no information about x_0. The value of a traced t is unknown, so the result at that step is NaN
      instead.
    """
    _check_output(schedule, output, x_t, t, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    a = lookup(schedule.sqrt_alpha_bar, t, x_t)
    s = lookup(schedule.sqrt_one_minus_alpha_bar, t, x_t)
    if prediction == "x_0":
        return output
    if prediction == "v":
        return a * x_t - s * output
    if prediction == "x_prev":
        c_0, c_t = (
            lookup(schedule.posterior_mean_coef_x_0, t, x_t),
            lookup(schedule.posterior_mean_coef_x_t, t, x_t),
        )
        return (output - c_t * x_t) / c_0
    eps = output if prediction == "eps" else -s * output
    return (x_t - s * eps) / (jnp.where(a > 0, a, jnp.nan) if schedule.zero_terminal_snr else a)


def eps_at(
    alpha: Float[ArrayLike, "..."],
    sigma: Float[ArrayLike, "..."],
    output: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    prediction: str,
) -> Float[Array, "B *shape"]:
    """eps from a network's output at any noise level, x_t = alpha x_0 + sigma eps, also between a schedule's steps.

    x_0: (x_t - alpha x_0) / sigma; v: alpha v + sigma x_t; score: -sigma score. alpha, sigma: broadcast with x_t.
    Raises: ValueError for x_prev, which is defined for a step only, or an unknown prediction.
    """
    output, x_t = promote(output=output, x_t=x_t)
    alpha, sigma = jnp.asarray(alpha, x_t.dtype), jnp.asarray(sigma, x_t.dtype)
    if prediction == "eps":
        return output
    if prediction == "x_0":
        return (x_t - alpha * output) / sigma
    if prediction == "v":
        return alpha * output + sigma * x_t
    if prediction == "score":
        return -sigma * output
    raise ValueError(f"prediction {prediction!r} has no eps outside of a schedule's step; known: eps, x_0, v, score")


def to_eps(
    schedule: Schedule,
    output: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    prediction: str = "eps",
) -> Float[Array, "B *shape"]:
    """eps from a network's output, as `eps_at`; arguments and errors as `to_x_0`."""
    # Where alpha_bar is 0 only x_0 is undefined, so t is checked only on the way through `to_x_0`.
    _check_output(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    if prediction == "x_prev":
        output, prediction = to_x_0(schedule, output, x_t, t, prediction), "x_0"
    a = lookup(schedule.sqrt_alpha_bar, t, x_t)
    return eps_at(a, lookup(schedule.sqrt_one_minus_alpha_bar, t, x_t), output, x_t, prediction)


def to_v(
    schedule: Schedule,
    output: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    prediction: str = "eps",
) -> Float[Array, "B *shape"]:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022); arguments and errors as `to_x_0`."""
    _check_output(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    a = lookup(schedule.sqrt_alpha_bar, t, x_t)
    if prediction == "v":
        return output
    x_0 = to_x_0(schedule, output, x_t, t, prediction)
    eps = to_eps(schedule, output, x_t, t, prediction)
    return a * eps - lookup(schedule.sqrt_one_minus_alpha_bar, t, x_t) * x_0


def to_score(
    schedule: Schedule,
    output: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    prediction: str = "eps",
) -> Float[Array, "B *shape"]:
    """grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021); arguments and errors as `to_x_0`."""
    eps = to_eps(schedule, output, x_t, t, prediction)
    return -eps / lookup(schedule.sqrt_one_minus_alpha_bar, t, eps)


def check_terminal_snr(schedule: Schedule, prediction: str, first: int | None = None) -> None:
    """Raises ValueError if a visited step has alpha = 0 in float32 and the prediction does not determine x_0 there.

    The check does not depend on the dtype of x. Of a traced schedule only the last step is known to have alpha = 0.

    first: the highest index that is visited; the default is T - 1.
    """
    last = schedule.num_timesteps - 1
    first = last if first is None else first
    if not schedule.zero_terminal_snr or prediction not in ("eps", "score"):
        return
    lowest, exact = last, True  # the first index without signal, and whether its alpha_bar is 0 also in float64
    if not isinstance(schedule.sqrt_alpha_bar, Tracer):
        lowest = int(np.argmax(np.asarray(schedule.sqrt_alpha_bar) < np.finfo(np.float32).tiny))
        exact = schedule.alpha_bar[lowest] == 0
    if lowest <= first <= last:
        problem = "alpha_bar is 0" if exact else "alpha = sqrt(alpha_bar) underflows in float32"
        betas = "" if exact else "use fewer or smaller betas (linear: beta_start=0.1 / T, beta_end=20 / T), "
        raise ValueError(
            f"{problem} at index {first}: {prediction} does not determine x_0 there; predict v or x_0, {betas}"
            f"or keep only the steps below index {lowest}: schedules.respace(schedule, range({lowest}))"
        )


def _check_output(schedule, output, x_t, t, prediction):
    """Raises ValueError for a wrong prediction, shape or index; the values of a traced t are unknown."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    check_same_shape("output", output, "x_t", x_t)
    known = t is not None and not isinstance(t, Tracer)
    if known and schedule.zero_terminal_snr:
        inside = np.asarray(t)[np.asarray(t) < schedule.num_timesteps]
        if inside.size:
            check_terminal_snr(schedule, prediction, int(inside.max()))

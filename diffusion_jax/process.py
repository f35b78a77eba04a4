"""The Gaussian diffusion process: q(x_t | x_0), q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t), and what a network may predict.

Everything here is a pure function of arrays and a `Schedule`. Shapes: x_0, x_t, eps and network outputs are float
[B, ...] (images are [B, H, W, C] in [-1, 1]); t is int32 [B], the 0-based index of the papers' t = 1 ... T. A scalar t
with an unbatched x works too, so `vmap` does. An index outside 0 ... T - 1 gives NaN, never a neighbor's value.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic. All
functions raise ValueError for images that are not float, and for a t whose shape is neither [] nor [B].

A network's output stands for one of five things, all the same information about x_0 given x_t, where
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM eq. 4):

    eps      the noise itself (DDPM section 3.2)
    x_0      the clean image
    v        sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)
    x_prev   the mean of x_{t-1} (DDPM section 3.2, mu-tilde)
    score    grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.schedules import Schedule, cast_table

PREDICTIONS = ("eps", "x_0", "v", "x_prev", "score")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


class Gaussian(NamedTuple):
    """A diagonal Gaussian; every field has the shape of x_t."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) and the x_0 it was made from; every field has the shape of x_t."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    x_0: jax.Array


def as_float(name: str, x) -> jax.Array:
    """x as a jax array of float32, or of float64 where it is float64 and x64 is on: lower precisions are promoted.

    name: what the error message calls x. Raises: ValueError for a dtype that is not float, such as uint8 images.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        advice = "; images are float in [-1, 1]: convert with x / 127.5 - 1" if x.dtype == jnp.uint8 else ""
        raise ValueError(f"{name} must be float; got {x.dtype}{advice}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def promote(**arrays) -> tuple[jax.Array, ...]:
    """The arrays in their common dtype, float32 at least. Raises: ValueError as `as_float`."""
    arrays = [as_float(name, x) for name, x in arrays.items()]
    dtype = jnp.result_type(*arrays)
    return tuple(x.astype(dtype) for x in arrays)


def lookup(table, t, like) -> jax.Array:
    """A schedule's table at index t, shaped to multiply `like`: [B, 1, ..., 1] for t [B] and like [B, ...].

    The dtype is that of a float `like`, float32 at least; with an int `like` it is float32, or float64 under x64. NaN where t
    lies outside the table. Raises: ValueError for a t that is not int, or whose shape is not [] or how that of `like` begins.
    """
    t = jnp.asarray(t)
    shape, dtype = jnp.shape(like), jnp.result_type(like)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"t must be int, an index of the schedule; got {t.dtype}")
    if t.shape != shape[: t.ndim]:
        raise ValueError(
            f"t has shape {t.shape} but x has {shape}; t must be one index, or one for each row of x: {shape[:1]}"
        )
    dtype = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    values = (
        jnp.asarray(cast_table(table, dtype)).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    return values.reshape(t.shape + (1,) * (len(shape) - t.ndim))


def network_time(schedule: Schedule, t, x_t) -> jax.Array:
    """The network time of index t, in the shape of t and the dtype of x_t, float32 at least: what a `denoise_fn` takes."""
    return lookup(schedule.timesteps, t, as_float("x_t", x_t)).reshape(jnp.shape(t))


def q_mean_variance(schedule: Schedule, x_0, t) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), DDPM eq. 4; shapes of x_0."""
    x_0 = as_float("x_0", x_0)
    mean = lookup(schedule.sqrt_alpha_bar, t, x_0) * x_0
    return mean, jnp.broadcast_to(lookup(schedule.sqrt_one_minus_alpha_bar, t, x_0) ** 2, mean.shape)


def q_sample(schedule: Schedule, x_0, t, eps) -> jax.Array:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, a draw of q(x_t | x_0) for eps ~ N(0, I) (DDPM eq. 4).

    x_0, eps: [B, ...]; t: [B]. Raises: ValueError where x_0 and eps differ in shape.
    """
    _same_shape("eps", eps, "x_0", x_0)
    x_0, eps = promote(x_0=x_0, eps=eps)
    return lookup(schedule.sqrt_alpha_bar, t, x_0) * x_0 + lookup(schedule.sqrt_one_minus_alpha_bar, t, x_0) * eps


def q_step_mean_variance(schedule: Schedule, x_prev, t) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of one forward step, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2).

    x_prev: [B, ...], x_{t-1}, which is x_0 at index 0; t: [B]. Both results have the shape of x_prev.
    """
    x_prev = as_float("x_prev", x_prev)
    beta = lookup(schedule.betas, t, x_prev)
    mean = jnp.sqrt(1 - beta) * x_prev
    return mean, jnp.broadcast_to(beta, mean.shape)


def q_step(schedule: Schedule, x_prev, t, eps) -> jax.Array:
    """One forward step, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM eq. 2). Shapes: q_step_mean_variance."""
    _same_shape("eps", eps, "x_prev", x_prev)
    x_prev, eps = promote(x_prev=x_prev, eps=eps)
    mean, variance = q_step_mean_variance(schedule, x_prev, t)
    return mean + jnp.sqrt(variance) * eps


def q_posterior(schedule: Schedule, x_0, x_t, t) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7.

    x_0, x_t: [B, ...]; t: [B]. At index 0 the mean is x_0 and the variance 0; the log variance there is the finite one
    of `Schedule.posterior_log_variance`. Raises: ValueError where x_0 and x_t differ in shape.
    """
    _same_shape("x_0", x_0, "x_t", x_t)
    x_0, x_t = promote(x_0=x_0, x_t=x_t)
    mean = (
        lookup(schedule.posterior_mean_coef_x_0, t, x_t) * x_0 + lookup(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    return Gaussian(
        mean,
        jnp.broadcast_to(lookup(schedule.posterior_variance, t, x_t), mean.shape),
        jnp.broadcast_to(lookup(schedule.posterior_log_variance, t, x_t), mean.shape),
    )


def to_x_0(schedule: Schedule, output, x_t, t, prediction: str = "eps") -> jax.Array:
    """The x_0 that a network's output stands for.

    eps: (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (DDPM eq. 15); v: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v;
    x_prev: the posterior mean (DDPM eq. 7) solved for x_0; score: as eps.

    Args:
      output, x_t: [B, ...], of one shape.
      t: int [B].
      prediction: what `output` is: eps, x_0, v, x_prev or score.
    Raises: ValueError for an unknown prediction, differing shapes, or eps or score at a step whose alpha_bar is 0, where
      they say nothing about x_0. A traced t cannot be looked at: there the result at that step is NaN.
    """
    _check(schedule, output, x_t, t, prediction)
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


def eps_at(alpha, sigma, output, x_t, prediction: str) -> jax.Array:
    """The noise that an output stands for at any noise level, x_t = alpha x_0 + sigma eps, between a schedule's steps too.

    x_0: (x_t - alpha x_0) / sigma; v: alpha v + sigma x_t; score: -sigma score. alpha, sigma: broadcast with x_t. Raises:
    ValueError for x_prev, which belongs to a step, or an unknown prediction.
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
    raise ValueError(f"prediction {prediction!r} has no eps at a noise level of its own; known: eps, x_0, v, score")


def to_eps(schedule: Schedule, output, x_t, t, prediction: str = "eps") -> jax.Array:
    """The noise that a network's output stands for, as `eps_at`; arguments and errors as `to_x_0`."""
    # Only the way to x_0 is closed where alpha_bar is 0, so nothing else is refused here.
    _check(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    if prediction == "x_prev":
        output, prediction = to_x_0(schedule, output, x_t, t, prediction), "x_0"
    a = lookup(schedule.sqrt_alpha_bar, t, x_t)
    return eps_at(a, lookup(schedule.sqrt_one_minus_alpha_bar, t, x_t), output, x_t, prediction)


def to_v(schedule: Schedule, output, x_t, t, prediction: str = "eps") -> jax.Array:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022); arguments and errors as `to_x_0`."""
    _check(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    a = lookup(schedule.sqrt_alpha_bar, t, x_t)
    if prediction == "v":
        return output
    x_0 = to_x_0(schedule, output, x_t, t, prediction)
    eps = to_eps(schedule, output, x_t, t, prediction)
    return a * eps - lookup(schedule.sqrt_one_minus_alpha_bar, t, x_t) * x_0


def to_score(schedule: Schedule, output, x_t, t, prediction: str = "eps") -> jax.Array:
    """grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021); arguments and errors as `to_x_0`."""
    eps = to_eps(schedule, output, x_t, t, prediction)
    return -eps / lookup(schedule.sqrt_one_minus_alpha_bar, t, eps)


def split_variance(output, x_t, variance: str):
    """A network's output as (prediction, variance values): learned variances stand in a second half of the channels.

    output: [B, ..., C] for a fixed variance, whose second part is None; [B, ..., 2 C] for a learned one (Improved DDPM
    section 3.1). Raises: ValueError for another shape or an unknown variance.
    """
    output = as_float("output", output)
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    learned = variance.startswith("learned")
    channels = jnp.shape(x_t)[-1]
    expected = jnp.shape(x_t)[:-1] + (channels * (2 if learned else 1),)
    if jnp.shape(output) != expected:
        raise ValueError(
            f"with variance={variance!r} and x_t {jnp.shape(x_t)} the network must give {expected}, it gave "
            f"{jnp.shape(output)}; a learned variance needs twice the channels of x_t, a fixed one the same number"
        )
    return (output[..., :channels], output[..., channels:]) if learned else (output, None)


def clip_x_0(x_0, clip: bool | Callable):
    """x_0 clipped to [-1, 1] (True), unchanged (False), or changed by a function of the caller's.

    Raises: ValueError for any other `clip`.
    """
    x_0 = as_float("x_0", x_0)
    if callable(clip):
        return as_float("the result of clip", clip(x_0)).astype(x_0.dtype)
    if not isinstance(clip, bool | np.bool_):
        raise ValueError(f"clip must be True, False or a function of x_0, got {clip!r}")
    return jnp.clip(x_0, -1.0, 1.0) if clip else x_0


@dataclasses.dataclass(frozen=True)
class dynamic_threshold:
    """Imagen's dynamic threshold (Saharia et al. 2022, section 2.3) as a `clip`: x_0 [B, ...] -> clip(x_0, -s, s) / s.

    s, of each example, is the quantile of |x_0|, at least 1. Raises: ValueError for a quantile outside (0, 1].
    """

    quantile: float = 0.995

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}")

    def __call__(self, x_0) -> jax.Array:
        x_0 = as_float("x_0", x_0)
        s = jnp.quantile(jnp.abs(x_0), float(self.quantile), axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x_0, -s, s) / s


def p_mean_variance(
    schedule: Schedule,
    output,
    x_t,
    t,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool | Callable = True,
) -> Reverse:
    """The model's reverse step p(x_{t-1} | x_t), from a network's output.

    The output is turned into x_0, x_0 is clipped, and the mean is that of q(x_{t-1} | x_t, x_0) (DDPM eq. 7; with eps
    and no clip this is eq. 11). DDPM's code clips though its Algorithm 2 does not. For `x_prev` the output itself is the
    mean, as in OpenAI's code, and only the reported x_0 is clipped.

    Args:
      output: [B, ..., C], or [B, ..., 2 C] for a learned variance, which stands in the second half.
      x_t: [B, ..., C]; t: int [B].
      prediction: eps, x_0, v, x_prev or score.
      variance: sigma_t^2, one of
        fixed_large    beta_t (optimal for x_0 ~ N(0, I), DDPM section 3.2)
        fixed_small    the posterior variance beta-tilde_t (optimal for a single x_0)
        learned        the output is the log variance
        learned_range  exp(f log beta + (1 - f) log beta-tilde), f = (output + 1) / 2 (Improved DDPM eq. 15)
      clip: True clips x_0 to [-1, 1]; False leaves it; a function x_0 -> x_0 does as it likes (a dynamic threshold).
    Returns: Reverse(mean, variance, log_variance, x_0). At index 0 both fixed variances are the posterior variance of
      index 1, as in OpenAI's code; samplers add no noise there.
    Raises: ValueError as `to_x_0`, for a number of channels that does not fit `variance`, and for another `clip`.
    """
    output, x_t = promote(output=output, x_t=x_t)
    output, values = split_variance(output, x_t, variance)
    x_0 = clip_x_0(to_x_0(schedule, output, x_t, t, prediction), clip)
    mean = output if prediction == "x_prev" else q_posterior(schedule, x_0, x_t, t).mean
    small = lookup(schedule.posterior_log_variance, t, x_t)
    if variance == "fixed_small":
        log_variance = small
    elif variance == "fixed_large":
        log_variance = jnp.log(lookup(schedule.fixed_large_variance, t, x_t))
    elif variance == "learned":
        log_variance = values
    else:
        fraction = (values + 1) / 2
        log_variance = fraction * jnp.log(lookup(schedule.betas, t, x_t)) + (1 - fraction) * small
    log_variance = jnp.broadcast_to(log_variance, mean.shape)
    return Reverse(mean, jnp.exp(log_variance), log_variance, x_0)


def _same_shape(name, value, other_name, other):
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} has shape {jnp.shape(value)} but {other_name} has {jnp.shape(other)}; they must agree"
        )


def check_terminal_snr(schedule: Schedule, prediction: str, first: int | None = None) -> None:
    """Raises: ValueError where alpha_bar ends at 0, that step is visited, and the prediction says nothing about x_0 there.

    first: the highest index that is visited, a Python int; T - 1 unless given.
    """
    visited = first is None or first == schedule.num_timesteps - 1
    if visited and schedule.zero_terminal_snr and prediction in ("eps", "score"):
        raise ValueError(
            f"alpha_bar is 0 at index {schedule.num_timesteps - 1}: {prediction} says nothing about x_0 there; "
            "predict v or x_0, or leave that step out with schedules.respace"
        )


def _check(schedule, output, x_t, t, prediction):
    """Refuses what can be seen to be wrong before tracing hides it."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    _same_shape("output", output, "x_t", x_t)
    known = t is not None and not isinstance(t, jax.core.Tracer)
    if known and np.any(np.asarray(t) == schedule.num_timesteps - 1):
        check_terminal_snr(schedule, prediction)

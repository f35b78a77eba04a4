"""The Gaussian diffusion process: q(x_t | x_0), q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t), and conversions of predictions.

All functions are pure functions of arrays and a `Schedule`. Shapes: x_0, x_t, eps and network outputs are float [B, ...]
(images are [B, H, W, C] in [-1, 1]); t is int32 [B], the 0-based index for the papers' t = 1 ... T. A scalar t applies to
every row, and to an unbatched x under `vmap`. An index outside 0 ... T - 1 gives NaN, never a value at another index.

`q_mean_variance`, `q_sample` and the conversions also take a `Path` with t float [B], the network time. What concerns a step
(x_{t-1} and its variance) is defined for a schedule only.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic. All
functions raise ValueError for images that are not float, and for a t whose shape is neither [] nor [B].

A network predicts one of six quantities. Given x_t, each quantity determines the other five, because
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM eq. 4):

    eps      the noise itself (DDPM section 3.2)
    x_0      the clean image
    v        sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)
    x_prev   the mean of x_{t-1} (DDPM section 3.2, mu-tilde)
    score    grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021)
    flow     eps - x_0, the velocity of flow matching (Lipman et al. 2023)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Shaped

from diffusion_jax.schedules import NoiseLevel, Path, Schedule, check_chain
from diffusion_jax.types import Batch, BatchLike, Clip, Index, Time

__all__ = [
    "PREDICTIONS",
    "QUANTITIES",
    "VARIANCES",
    "Gaussian",
    "Quantity",
    "Reverse",
    "as_batch",
    "as_float",
    "check_terminal_snr",
    "clip_x_0",
    "dynamic_threshold",
    "eps_at",
    "p_mean_variance",
    "promote",
    "q_mean_variance",
    "q_posterior",
    "q_sample",
    "q_step",
    "q_step_mean_variance",
    "split_variance",
    "to_eps",
    "to_flow",
    "to_score",
    "to_v",
    "to_x_0",
    "x_0_at",
]


class Quantity(NamedTuple):
    """A quantity that networks predict, at a level with alpha and sigma (for x_prev, a step of a schedule).

    x_0, eps: (output, x_t, level) -> x_0 or eps. value: (x_0, eps, x_t, level) -> the quantity, which is the training target.
    slope: level -> d eps / d output for a fixed x_t, which converts errors and shifts of one quantity to another.
    """

    x_0: Callable[[Any, Any, Any], Any]
    eps: Callable[[Any, Any, Any], Any]
    value: Callable[[Any, Any, Any, Any], Any]
    slope: Callable[[Any], Any]


# eps and score do not determine x_0 where alpha is 0, nor x_0 and x_prev eps where sigma is 0: these divide by 0 there.
QUANTITIES = {
    "eps": Quantity(
        x_0=lambda output, x_t, at: (x_t - at.sigma * output) / at.alpha,
        eps=lambda output, x_t, at: output,
        value=lambda x_0, eps, x_t, at: eps,
        slope=lambda at: jnp.ones_like(at.alpha),
    ),
    "x_0": Quantity(
        x_0=lambda output, x_t, at: output,
        eps=lambda output, x_t, at: (x_t - at.alpha * output) / at.sigma,
        value=lambda x_0, eps, x_t, at: x_0,
        slope=lambda at: -at.alpha / at.sigma,
    ),
    "v": Quantity(
        x_0=lambda output, x_t, at: at.alpha * x_t - at.sigma * output,
        eps=lambda output, x_t, at: at.alpha * output + at.sigma * x_t,
        value=lambda x_0, eps, x_t, at: at.alpha * eps - at.sigma * x_0,
        slope=lambda at: at.alpha,
    ),
    "x_prev": Quantity(
        x_0=lambda output, x_t, at: (output - at.posterior_mean_coef_x_t * x_t) / at.posterior_mean_coef_x_0,
        eps=lambda output, x_t, at: (x_t - at.alpha * QUANTITIES["x_prev"].x_0(output, x_t, at)) / at.sigma,
        value=lambda x_0, eps, x_t, at: at.posterior_mean_coef_x_0 * x_0 + at.posterior_mean_coef_x_t * x_t,
        slope=lambda at: -at.alpha / at.sigma / at.posterior_mean_coef_x_0,
    ),
    "score": Quantity(
        x_0=lambda output, x_t, at: (x_t - at.sigma * (-at.sigma * output)) / at.alpha,
        eps=lambda output, x_t, at: -at.sigma * output,
        value=lambda x_0, eps, x_t, at: -eps / at.sigma,
        slope=lambda at: -at.sigma,
    ),
    "flow": Quantity(
        x_0=lambda output, x_t, at: (x_t - at.sigma * output) / (at.alpha + at.sigma),
        eps=lambda output, x_t, at: (x_t + at.alpha * output) / (at.alpha + at.sigma),
        value=lambda x_0, eps, x_t, at: eps - x_0,
        slope=lambda at: at.alpha / (at.alpha + at.sigma),
    ),
}
PREDICTIONS = tuple(QUANTITIES)
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def as_float(name: str, x: Shaped[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Converts x to a float32 jax array, or float64 if x is float64 and x64 is on; lower precisions are promoted.

    name: the name of x in the error message. Raises: ValueError for a dtype that is not float, such as uint8 images, and for
    a tuple, a dict or None, which a network may return by mistake.
    """
    if x is None or isinstance(x, tuple | dict | str):  # jnp.asarray stacks a tuple
        raise ValueError(f"{name} must be one float array; got {type(x).__name__}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        advice = "; images are float in [-1, 1]: convert with x / 127.5 - 1" if x.dtype == jnp.uint8 else ""
        raise ValueError(f"{name} must be float; got {x.dtype}{advice}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_batch(name: str, x: Shaped[ArrayLike, "..."]) -> Batch:
    """`as_float`, for an x with a batch axis. Raises: ValueError as `as_float`, and for a number or one vector."""
    x = as_float(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have a batch axis, vectors [B, C] or arrays [B, ..., C]; got shape {x.shape}; give one example as "
            f"{name}[None]"
        )
    return x


def promote(**arrays: Shaped[ArrayLike, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Converts the arrays to their common dtype, at least float32. Raises: ValueError as `as_float`."""
    floats = [as_float(name, x) for name, x in arrays.items()]
    dtype = jnp.result_type(*floats)
    return tuple(x.astype(dtype) for x in floats)


def check_same_shape(
    name: str, value: Shaped[ArrayLike, "..."], other_name: str, other: Shaped[ArrayLike, "..."]
) -> None:
    """Raises ValueError, with both names, if the two arrays differ in shape."""
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} has shape {jnp.shape(value)} but {other_name} has {jnp.shape(other)}; they must be equal"
        )


class Gaussian(NamedTuple):
    """A diagonal Gaussian; every field has the shape of x_t."""

    mean: Batch
    variance: Batch
    log_variance: Batch


def q_mean_variance(schedule: Schedule | Path, x_0: BatchLike, t: Index | Time) -> tuple[Batch, Batch]:
    """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), DDPM eq. 4."""
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
    """Mean and variance of one forward step, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2).

    x_prev: x_{t-1}, which is x_0 at index 0.
    """
    check_chain(schedule, "q_step")
    x_prev = as_float("x_prev", x_prev)
    beta = schedule.at(t, x_prev).beta
    mean = jnp.sqrt(1 - beta) * x_prev
    return mean, jnp.broadcast_to(beta, mean.shape)


def q_step(schedule: Schedule, x_prev: BatchLike, t: Index, eps: BatchLike) -> Batch:
    """One forward step, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM eq. 2); x_prev as `q_step_mean_variance`."""
    check_same_shape("eps", eps, "x_prev", x_prev)
    x_prev, eps = promote(x_prev=x_prev, eps=eps)
    mean, variance = q_step_mean_variance(schedule, x_prev, t)
    return mean + jnp.sqrt(variance) * eps


def q_posterior(schedule: Schedule, x_0: BatchLike, x_t: BatchLike, t: Index) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7.

    At index 0 the mean is x_0 and the variance 0; the log variance is finite there (`Schedule.posterior_log_variance`).
    Raises: ValueError if x_0 and x_t differ in shape.
    """
    check_chain(schedule, "q_posterior")
    check_same_shape("x_0", x_0, "x_t", x_t)
    x_0, x_t = promote(x_0=x_0, x_t=x_t)
    at = schedule.at(t, x_t)
    mean = at.posterior_mean_coef_x_0 * x_0 + at.posterior_mean_coef_x_t * x_t
    variances = (jnp.broadcast_to(value, mean.shape) for value in (at.posterior_variance, at.posterior_log_variance))
    return Gaussian(mean, *variances)


def to_x_0(
    schedule: Schedule | Path, output: BatchLike, x_t: BatchLike, t: Index | Time, prediction: str = "eps"
) -> Batch:
    """Converts a network's output to x_0.

    eps: (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (DDPM eq. 15); v: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v;
    x_prev: the posterior mean (DDPM eq. 7) solved for x_0; score: as eps; flow: (x_t - sigma flow) / (alpha + sigma).

    prediction: the quantity that `output` is: eps, x_0, v, x_prev, score or flow.
    Raises: ValueError for an unknown prediction, differing shapes, x_prev on a path, or eps or score at a level with
      alpha = 0 in float32, where they contain no information about x_0; a traced t gives NaN at such a level.
    """
    _check_output(schedule, output, x_t, t, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    at: Any = schedule.at(t, x_t)
    if (isinstance(schedule, Path) or schedule.zero_terminal_snr) and prediction in ("eps", "score"):
        at = _without_log_snr(jnp.where(at.alpha > 0, at.alpha, jnp.nan), at.sigma)
    return QUANTITIES[prediction].x_0(output, x_t, at)


def _without_log_snr(alpha: jax.Array, sigma: jax.Array) -> NoiseLevel:
    """Returns a noise level for the functions of `Quantity`, which do not read the log SNR."""
    return NoiseLevel(alpha, sigma, jnp.full_like(alpha, jnp.nan))


def x_0_at(
    alpha: Float[ArrayLike, "..."], sigma: Float[ArrayLike, "..."], output: BatchLike, x_t: BatchLike, prediction: str
) -> Batch:
    """Converts a network's output to x_0 at any noise level; arguments and errors as `eps_at`."""
    output, x_t, level = _at_level(alpha, sigma, output, x_t, prediction)
    return QUANTITIES[prediction].x_0(output, x_t, level)


def eps_at(
    alpha: Float[ArrayLike, "..."], sigma: Float[ArrayLike, "..."], output: BatchLike, x_t: BatchLike, prediction: str
) -> Batch:
    """Converts a network's output to eps at any noise level x_t = alpha x_0 + sigma eps, also between a schedule's steps.

    x_0: (x_t - alpha x_0) / sigma; v: alpha v + sigma x_t; score: -sigma score; flow: (x_t + alpha flow) / (alpha + sigma).
    alpha, sigma: broadcast with x_t.
    Raises: ValueError for x_prev, which is defined for a step only, or an unknown prediction.
    """
    output, x_t, level = _at_level(alpha, sigma, output, x_t, prediction)
    return QUANTITIES[prediction].eps(output, x_t, level)


def _at_level(alpha, sigma, output, x_t, prediction) -> tuple[Batch, Batch, NoiseLevel]:
    if prediction not in PREDICTIONS or prediction == "x_prev":
        known = ", ".join(name for name in PREDICTIONS if name != "x_prev")
        raise ValueError(f"prediction {prediction!r} has no eps outside of a schedule's step; known: {known}")
    output, x_t = promote(output=output, x_t=x_t)
    alpha, sigma = jnp.asarray(alpha, x_t.dtype), jnp.asarray(sigma, x_t.dtype)
    return output, x_t, _without_log_snr(alpha, sigma)


def to_eps(
    schedule: Schedule | Path, output: BatchLike, x_t: BatchLike, t: Index | Time, prediction: str = "eps"
) -> Batch:
    """Converts a network's output to eps, as `eps_at`; arguments and errors as `to_x_0`."""
    # Where alpha_bar is 0 only x_0 is undefined, so only `to_x_0` checks t.
    _check_output(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    return QUANTITIES[prediction].eps(output, x_t, schedule.at(t, x_t))


def to_v(
    schedule: Schedule | Path, output: BatchLike, x_t: BatchLike, t: Index | Time, prediction: str = "eps"
) -> Batch:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022); arguments and errors as `to_x_0`."""
    return _convert("v", schedule, output, x_t, t, prediction)


def to_score(
    schedule: Schedule | Path, output: BatchLike, x_t: BatchLike, t: Index | Time, prediction: str = "eps"
) -> Batch:
    """grad log q(x_t) = -eps / sqrt(1 - alpha_bar) (Song et al. 2021); arguments and errors as `to_x_0`."""
    eps = to_eps(schedule, output, x_t, t, prediction)
    return -eps / schedule.at(t, eps).sigma


def to_flow(
    schedule: Schedule | Path, output: BatchLike, x_t: BatchLike, t: Index | Time, prediction: str = "eps"
) -> Batch:
    """eps - x_0, the velocity of flow matching (Lipman et al. 2023); arguments and errors as `to_x_0`."""
    return _convert("flow", schedule, output, x_t, t, prediction)


def _convert(name: str, schedule, output, x_t, t, prediction) -> Batch:
    """Converts a network's output to the quantity `name` by x_0 and eps."""
    _check_output(schedule, output, x_t, None, prediction)
    output, x_t = promote(output=output, x_t=x_t)
    if prediction == name:
        return output
    x_0, eps = (convert(schedule, output, x_t, t, prediction) for convert in (to_x_0, to_eps))
    return QUANTITIES[name].value(x_0, eps, x_t, schedule.at(t, x_t))


def check_terminal_snr(schedule: Schedule | Path, prediction: str, first: int | None = None) -> None:
    """Raises ValueError if a visited step has alpha = 0 in float32 and the prediction does not determine x_0 there.

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
    if not isinstance(schedule.sqrt_alpha_bar, Tracer):
        lowest = int(np.argmax(np.asarray(schedule.sqrt_alpha_bar) < np.finfo(np.float32).tiny))
    if lowest <= first <= last:
        raise ValueError(
            f"alpha_bar is 0 at index {first} (or its square root in float32): {prediction} does not determine x_0 there; "
            f"predict v, x_0 or flow, use smaller betas, or keep only the steps below index {lowest}: "
            f"schedules.respace(schedule, range({lowest}))"
        )


def _check_output(schedule, output, x_t, t, prediction):
    """Raises ValueError for an invalid prediction, shape or index; a traced t is not checked."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    check_same_shape("output", output, "x_t", x_t)
    if isinstance(schedule, Path):
        if prediction == "x_prev":
            check_chain(schedule, "prediction 'x_prev'")
        if t is not None and prediction in ("eps", "score"):
            alpha = schedule.at(t, x_t).alpha
            if not isinstance(alpha, Tracer) and not np.asarray(alpha > 0).all():
                raise ValueError(
                    f"alpha is 0 at a time in {t}: there {prediction} does not determine x_0; predict v, x_0 or flow"
                )
        return
    known = t is not None and not isinstance(t, Tracer)
    if known and schedule.zero_terminal_snr:
        inside = np.asarray(t)[np.asarray(t) < schedule.num_timesteps]
        if inside.size:
            check_terminal_snr(schedule, prediction, int(inside.max()))


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) and the predicted x_0; every field has the shape of x_t."""

    mean: Batch
    variance: Batch
    log_variance: Batch
    x_0: Batch


def split_variance(
    output: Float[ArrayLike, "*shape output_channels"], x_t: Float[ArrayLike, "*shape channels"], variance: str
) -> tuple[Float[Array, "*shape channels"], Float[Array, "*shape channels"] | None]:
    """Splits a network's output into the prediction and the learned variance, the second half of the channels.

    output: [B, ..., C] for a fixed variance, where the second result is None; [B, ..., 2 C] for a learned variance (Improved
    DDPM section 3.1). Raises: ValueError for another shape or an unknown variance.
    """
    output = as_float("output", output)
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    learned = variance.startswith("learned")
    channels = jnp.shape(x_t)[-1]
    expected = jnp.shape(x_t)[:-1] + (channels * (2 if learned else 1),)
    if jnp.shape(output) != expected:
        raise ValueError(
            f"with variance={variance!r} and x_t {jnp.shape(x_t)} the network must return {expected}, but it "
            f"returned {jnp.shape(output)}; a learned variance needs twice the channels of x_t, a fixed one the same number"
        )
    return (output[..., :channels], output[..., channels:]) if learned else (output, None)


def clip_x_0(x_0: Float[ArrayLike, "*shape"], clip: Clip) -> Float[Array, "*shape"]:
    """Clips x_0 to [-1, 1] (True), returns it unchanged (False), or applies the caller's function.

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

    s is a quantile of |x_0| for each example, at least 1. Raises: ValueError for a quantile outside (0, 1].
    """

    quantile: float | np.floating = 0.995

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}")

    def __call__(self, x_0: BatchLike) -> Batch:
        x_0 = as_float("x_0", x_0)
        s = jnp.quantile(jnp.abs(x_0), float(self.quantile), axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x_0, -s, s) / s


def p_mean_variance(
    schedule: Schedule,
    output: Float[ArrayLike, "B *output_shape"],
    x_t: BatchLike,
    t: Index,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: Clip = True,
) -> Reverse:
    """Computes the model's reverse step p(x_{t-1} | x_t) from a network's output.

    The output is converted to x_0, x_0 is clipped, and q(x_{t-1} | x_t, x_0) gives the mean (DDPM eq. 7; eq. 11 for eps
    without a clip). DDPM's code clips although its Algorithm 2 does not. For `x_prev` the output itself is the mean, as in
    OpenAI's code, and only the returned x_0 is clipped.

    Args:
      output: [B, ..., C], or [B, ..., 2 C] with a learned variance in the second half of the channels.
      x_t: [B, ..., C].
      prediction: eps, x_0, v, x_prev, score or flow.
      variance: sigma_t^2, one of
        fixed_large    beta_t (optimal for x_0 ~ N(0, I), DDPM section 3.2)
        fixed_small    the posterior variance beta-tilde_t (optimal for a single x_0)
        learned        the output is the log variance
        learned_range  exp(f log beta + (1 - f) log beta-tilde), f = (output + 1) / 2 (Improved DDPM eq. 15)
      clip: True clips x_0 to [-1, 1], the range of images; False, for data outside this range, does nothing; a function
        x_0 -> x_0 is applied (`dynamic_threshold`).
    Returns: Reverse(mean, variance, log_variance, x_0). At index 0 both fixed variances are the decoder's variance
      (`Schedule`); samplers add no noise there.
    Raises: ValueError as `to_x_0`, for a number of channels that does not match `variance`, and for an invalid `clip`.
    """
    check_chain(schedule, "p_mean_variance")
    output, x_t = promote(output=output, x_t=x_t)
    output, learned = split_variance(output, x_t, variance)
    x_0 = clip_x_0(to_x_0(schedule, output, x_t, t, prediction), clip)
    mean = output if prediction == "x_prev" else q_posterior(schedule, x_0, x_t, t).mean
    at = schedule.at(t, x_t)
    if learned is None:
        log_variance = at.posterior_log_variance if variance == "fixed_small" else jnp.log(at.fixed_large_variance)
    elif variance == "learned":
        log_variance = learned
    else:
        fraction = (learned + 1) / 2
        log_variance = fraction * jnp.log(at.beta) + (1 - fraction) * at.posterior_log_variance
    log_variance = jnp.broadcast_to(log_variance, mean.shape)
    return Reverse(mean, jnp.exp(log_variance), log_variance, x_0)

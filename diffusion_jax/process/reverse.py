"""The reverse step p(x_{t-1} | x_t): the model's mean and variance from a network's output."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.process.arrays import as_float, lookup, promote
from diffusion_jax.process.forward import q_posterior
from diffusion_jax.process.predictions import to_x_0
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Clip, Index

__all__ = ["VARIANCES", "Reverse", "clip_x_0", "dynamic_threshold", "p_mean_variance", "split_variance"]

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) and the x_0 it was computed from; every field has the shape of x_t."""

    mean: Float[Array, "B *shape"]
    variance: Float[Array, "B *shape"]
    log_variance: Float[Array, "B *shape"]
    x_0: Float[Array, "B *shape"]


def split_variance(
    output: Float[ArrayLike, "*shape output_channels"], x_t: Float[ArrayLike, "*shape channels"], variance: str
) -> tuple[Float[Array, "*shape channels"], Float[Array, "*shape channels"] | None]:
    """Splits a network's output into the prediction and the values of a learned variance, its second half of the channels.

    output: [B, ..., C] for a fixed variance, where the second result is None; [B, ..., 2 C] for a learned one (Improved DDPM
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
            f"with variance={variance!r} and x_t {jnp.shape(x_t)} the network must return {expected}, but it "
            f"returned {jnp.shape(output)}; a learned variance needs twice the channels of x_t, a fixed one the same number"
        )
    return (output[..., :channels], output[..., channels:]) if learned else (output, None)


def clip_x_0(x_0: Float[ArrayLike, "*shape"], clip: Clip) -> Float[Array, "*shape"]:
    """x_0 clipped to [-1, 1] (True), unchanged (False), or the result of the caller's function.

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

    quantile: float | np.floating = 0.995

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}")

    def __call__(self, x_0: Float[ArrayLike, "B *shape"]) -> Float[Array, "B *shape"]:
        x_0 = as_float("x_0", x_0)
        s = jnp.quantile(jnp.abs(x_0), float(self.quantile), axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x_0, -s, s) / s


def p_mean_variance(
    schedule: Schedule,
    output: Float[ArrayLike, "B *output_shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: Clip = True,
) -> Reverse:
    """The model's reverse step p(x_{t-1} | x_t), from a network's output.

    The output is converted to x_0, x_0 is clipped, and the mean is that of q(x_{t-1} | x_t, x_0) (DDPM eq. 7; with eps
    and no clip this is eq. 11). DDPM's code clips although its Algorithm 2 does not. For `x_prev` the output itself is the
    mean, as in OpenAI's code, and only the returned x_0 is clipped.

    Args:
      output: [B, ..., C], or [B, ..., 2 C] with a learned variance in the second half of the channels.
      x_t: [B, ..., C].
      prediction: eps, x_0, v, x_prev or score.
      variance: sigma_t^2, one of
        fixed_large    beta_t (optimal for x_0 ~ N(0, I), DDPM section 3.2)
        fixed_small    the posterior variance beta-tilde_t (optimal for a single x_0)
        learned        the output is the log variance
        learned_range  exp(f log beta + (1 - f) log beta-tilde), f = (output + 1) / 2 (Improved DDPM eq. 15)
      clip: True clips x_0 to [-1, 1], the range of images; False, for data that leave this range, does nothing; a function
        x_0 -> x_0 is applied (`dynamic_threshold`).
    Returns: Reverse(mean, variance, log_variance, x_0). At index 0 both fixed variances are the posterior variance of
      index 1, as in OpenAI's code; samplers add no noise there.
    Raises: ValueError as `to_x_0`, for a number of channels that does not match `variance`, and for another `clip`.
    """
    output, x_t = promote(output=output, x_t=x_t)
    output, learned = split_variance(output, x_t, variance)
    x_0 = clip_x_0(to_x_0(schedule, output, x_t, t, prediction), clip)
    mean = output if prediction == "x_prev" else q_posterior(schedule, x_0, x_t, t).mean
    small = lookup(schedule.posterior_log_variance, t, x_t)
    if variance == "fixed_small":
        log_variance = small
    elif variance == "fixed_large":
        log_variance = jnp.log(lookup(schedule.fixed_large_variance, t, x_t))
    else:
        assert learned is not None
        log_variance = learned
    if variance == "learned_range":
        fraction = (log_variance + 1) / 2
        log_variance = fraction * jnp.log(lookup(schedule.betas, t, x_t)) + (1 - fraction) * small
    log_variance = jnp.broadcast_to(log_variance, mean.shape)
    return Reverse(mean, jnp.exp(log_variance), log_variance, x_0)

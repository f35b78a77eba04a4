"""Guidance: functions from a denoise_fn to a denoise_fn, which every sampler takes.

Classifier-free guidance mixes a conditional and an unconditional output of one network (Ho & Salimans 2022); classifier
guidance adds the gradient of a noise-aware classifier (Dhariwal & Nichol 2021, ADM). Both guide the mean alone: of an output
with a learned variance, the second half of the channels is left as it is.

Outputs are mixed and shifted in float32, or in float64 where x_t is float64 under x64, whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax import labels, process
from diffusion_jax.schedules import Schedule


def _rows(values, like):
    """[B] or [] as [B, 1, ..., 1] or [], in the dtype of `like`."""
    values = jnp.asarray(values, like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def classifier_free(
    denoise_fn: Callable,
    y,
    null_y,
    scale,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Callable:
    """(1 - s) unconditional + s conditional (Ho & Salimans 2022 eq. 6 with s = 1 + w), in one call of twice the batch.

    s = 1 is the conditional half of that call and s = 0 the unconditional one, to the bit. Mixing eps, x_0, v, x_prev or the
    score is the same thing, for they are linear in one another.

    Args:
      denoise_fn: (x_t [2 B, ...], network time [2 B], y [2 B, ...]) -> output; `UNet.apply` with its parameters, say.
      y: [B, ...], the conditions. null_y: what stands for none, of y's shape or broadcast to it (`UNet.null_label`).
      scale: s, a number or [B].
      interval: (low, high), network times inside which s applies; outside it is 1 (Kynkaanniemi et al. 2024).
      rescale: phi of Lin et al. 2024 section 3.4: 0 leaves the result, 1 gives it the conditional output's standard deviation
        over each example, against the glare of a large s; between, a mixture.
    Returns: a denoise_fn(x_t [B, ...], time [B]). The learned variance, where there is one, is the conditional output's.
    Raises: ValueError, when called, where y has other rows than x_t.
    """
    y = jnp.asarray(y)
    both = jnp.concatenate([y, jnp.broadcast_to(jnp.asarray(null_y, y.dtype), y.shape)])

    def guided(x_t, time):
        if x_t.shape[0] != y.shape[0]:
            raise ValueError(f"y has {y.shape[0]} rows but x_t has {x_t.shape[0]}; each image needs its own condition")
        x_t = process.as_float("x_t", x_t)
        output = denoise_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([time, time]), both)
        output = process.as_float("the output of denoise_fn", output).astype(x_t.dtype)
        conditional, unconditional = jnp.split(output, 2)
        channels = x_t.shape[-1]
        c, u = conditional[..., :channels], unconditional[..., :channels]
        s = jnp.asarray(scale, x_t.dtype)
        if interval is not None:
            s = jnp.where((interval[0] <= time) & (time <= interval[1]), s, 1.0)
        s = _rows(s, x_t)
        mixed = (1 - s) * u + s * c
        if rescale:
            axes = tuple(range(1, x_t.ndim))
            own, its = jnp.std(mixed, axes, keepdims=True), jnp.std(c, axes, keepdims=True)
            ratio = jnp.where(own > 0, its / jnp.where(own > 0, own, 1.0), 1.0)
            phi = jnp.asarray(rescale, x_t.dtype)
            mixed = mixed * (1 - phi + phi * ratio)
        return jnp.concatenate([mixed, conditional[..., channels:]], axis=-1)

    return guided


def class_log_prob(logits_fn: Callable, y) -> Callable:
    """log p(y | x_t), (x_t [B, ...], network time [B]) -> [B], from a classifier's logits [B, classes].

    y: int [B] in 0 ... classes - 1; the result of a traced label outside is NaN. Raises: ValueError, when called, for labels
    that are not int or not in the range, or of other rows than the logits.
    """

    def log_prob(x_t, time):
        x_t = process.as_float("x_t", x_t)
        logits = process.as_float("the output of logits_fn", logits_fn(x_t, time)).astype(x_t.dtype)
        return labels.log_prob(logits, y)

    return log_prob


def log_prob_gradient(log_prob: Callable, scale=1.0) -> Callable:
    """s grad_x log p(y | x_t), (x_t [B, ...], network time [B]) -> [B, ...]: what `sampling.ddpm(mean_shift=)` takes.

    log_prob: (x_t, time) -> [B], differentiable. scale: s, a number or [B].
    """
    gradient = jax.grad(lambda x_t, time: jnp.sum(log_prob(x_t, time)))

    def scaled(x_t, time):
        x_t = process.as_float("x_t", x_t)
        return _rows(scale, x_t) * gradient(x_t, time)

    return scaled


def classifier(
    denoise_fn: Callable, log_prob: Callable, schedule: Schedule, scale=1.0, *, prediction: str = "eps"
) -> Callable:
    """eps - s sqrt(1 - alpha_bar) grad_x log p(y | x_t) (ADM eq. 14), whatever the network predicts.

    At s = 1 and with the exact gradient this is the eps of the conditional data. It acts before a sampler's clip; ADM's other
    form, which shifts the mean after it, is `sampling.ddpm(mean_shift=log_prob_gradient(...))`.

    Args:
      denoise_fn: (x_t [B, ...], network time [B]) -> output.
      log_prob: (x_t, time) -> log p(y | x_t) [B]; `class_log_prob` makes one of a classifier.
      schedule: for the noise level at a network time.
      scale: s, a number or [B]. prediction: of the output: eps, x_0, v or score.
    Returns: a denoise_fn of the same output.
    Raises: ValueError for x_prev, whose shift is `sampling.ddpm(mean_shift=)`, or an unknown prediction.
    """
    if prediction not in process.PREDICTIONS or prediction == "x_prev":
        raise ValueError(
            f"classifier guidance cannot shift prediction {prediction!r}; known: eps, x_0, v, score (x_prev: "
            "sampling.ddpm(mean_shift=...))"
        )
    gradient = log_prob_gradient(log_prob, scale)

    def guided(x_t, time):
        x_t = process.as_float("x_t", x_t)
        output, g = denoise_fn(x_t, time), gradient(x_t, time)
        output = process.as_float("the output of denoise_fn", output).astype(x_t.dtype)
        log_snr = schedule.log_snr(time)
        alpha, sigma = (_rows(jnp.sqrt(jax.nn.sigmoid(sign * log_snr)), x_t) for sign in (1, -1))
        some = alpha > 1e-15  # a schedule that ends at alpha_bar = 0 has less there, under x64
        # d eps = -s sigma g, and what that is for the others at this x_t. Where alpha is 0, x_t says nothing of y: g is 0.
        shift = {
            "eps": lambda: -sigma * g,
            "score": lambda: g,
            "x_0": lambda: jnp.where(some, sigma**2 / jnp.where(some, alpha, 1.0) * g, 0.0),
            "v": lambda: jnp.where(some, -sigma / jnp.where(some, alpha, 1.0) * g, 0.0),
        }[prediction]()
        channels = x_t.shape[-1]
        return jnp.concatenate([output[..., :channels] + shift, output[..., channels:]], axis=-1)

    return guided

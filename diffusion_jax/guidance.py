"""Guidance: functions from a denoise_fn to a denoise_fn, for any sampler.

Classifier-free guidance mixes a conditional and an unconditional output of one network (Ho & Salimans 2022); classifier
guidance adds the gradient of a noise-aware classifier (Dhariwal & Nichol 2021, ADM). Both change only the mean: the second
half of the channels, a learned variance, is unchanged.

Outputs are mixed and shifted in float32, or in float64 if x_t is float64 under x64, whatever dtype the network computes in.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Integer, PyTree, Real, Shaped

from diffusion_jax import labels, process
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Batch, DenoiseFn, LogitsFn, LogProbFn

__all__ = ["ConditionalDenoiseFn", "class_log_prob", "classifier", "classifier_free", "log_prob_gradient"]


@runtime_checkable
class ConditionalDenoiseFn(Protocol):
    """A conditional network: (x_t [B, ...], network time [B], y) -> output, such as `UNet.apply`.

    y: [B, ...], or a tree of such arrays, for instance {"y": labels, "condition": vectors}.
    """

    def __call__(self, x_t: Batch, time: Float[Array, "B"], y: PyTree[Shaped[Array, "B ..."]], /) -> ArrayLike: ...


def _expand_rows(values, like):
    """Reshapes [B] to [B, 1, ..., 1] in the dtype of `like`; a scalar stays []. Raises: ValueError for another shape."""
    values = jnp.asarray(values, like.dtype)
    if values.ndim and (values.shape[0] not in (1, like.shape[0]) or any(size != 1 for size in values.shape[1:])):
        raise ValueError(
            f"scale has shape {values.shape}; it must be one number, or one for each of {like.shape[0]} rows"
        )
    return values.reshape(values.shape[:1] + (1,) * (like.ndim - 1)) if values.ndim else values


def _append_null(y, null):
    """Concatenates y [B, ...] and B null conditions to [2 B, ...]. Raises: ValueError for a float null where y is int."""
    dtype = y.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        if not jnp.issubdtype(jnp.result_type(null), jnp.integer):
            raise ValueError(f"null_y must be int, as y is; got {jnp.result_type(null)}")
        dtype = dtype if dtype.itemsize >= 4 else jnp.int32  # 8 bits cannot hold the null label of 256 classes
    return jnp.concatenate([y.astype(dtype), jnp.broadcast_to(jnp.asarray(null, dtype), y.shape)])


def classifier_free(
    denoise_fn: ConditionalDenoiseFn,
    y: PyTree[Shaped[ArrayLike, "B ..."]],
    null_y: PyTree[Shaped[ArrayLike, "..."]],
    scale: Real[ArrayLike, ""] | Real[ArrayLike, "B ..."],
    *,
    interval: tuple[Real[ArrayLike, ""], Real[ArrayLike, ""]] | None = None,
    rescale: float = 0.0,
) -> DenoiseFn:
    """(1 - s) unconditional + s conditional (Ho & Salimans 2022 eq. 6 with s = 1 + w), in one call of twice the batch.

    s = 1 is bit-identical to the conditional half of that call and s = 0 to the unconditional half. The same mixture applies
    to eps, x_0, v, x_prev, the score and flow, which are linear functions of each other.

    Args:
      denoise_fn: called with x_t [2 B, ...], network time [2 B] and y [2 B, ...].
      y: the conditions, an array or a tree of arrays. null_y: the condition that means "none" (`UNet.null_label`,
        `UNet.null_condition`), in a shape that broadcasts to y's shape, or a tree of null conditions. An array of y that
        null_y repeats is not guided.
      scale: s, one number or one per row: [B] or [B, 1, ..., 1].
      interval: (low, high), the network times at which s applies; at other times s is 1 (Kynkaanniemi et al. 2024).
      rescale: phi from Lin et al. 2024 section 3.4, in 0 ... 1, against the overexposure that a large s causes: 1 rescales
        each example to the standard deviation of the conditional output; 0 does nothing.
    Returns: a denoise_fn(x_t [B, ...], time [B]), with the learned variance of the conditional output.
    Raises: ValueError for a null_y that is float where y is int, an interval in the wrong order, or a rescale outside
      0 ... 1; when called, if y or scale and x_t differ in the number of rows.
    """
    if interval is not None and not any(isinstance(end, Tracer) for end in interval):
        low, high = map(np.asarray, interval)
        if not low <= high:
            raise ValueError(f"interval must be (low, high), network times with low <= high, got {interval}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in 0 ... 1, got {rescale}")
    both = jax.tree.map(lambda y, null: _append_null(jnp.asarray(y), null), y, null_y)

    def guided(x_t, time):
        for part in jax.tree.leaves(both):
            if 2 * x_t.shape[0] != part.shape[0]:
                raise ValueError(
                    f"y has {part.shape[0] // 2} rows but x_t has {x_t.shape[0]}; give each row of x_t a condition"
                )
        x_t = process.as_float("x_t", x_t)
        output = denoise_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([time, time]), both)
        output = process.as_float("the output of denoise_fn", output).astype(x_t.dtype)
        conditional, unconditional = jnp.split(output, 2)
        channels = x_t.shape[-1]
        c, u = conditional[..., :channels], unconditional[..., :channels]
        s = _expand_rows(scale, x_t)
        if interval is not None:
            applies = (interval[0] <= time) & (time <= interval[1])
            s = jnp.where(applies.reshape(-1, *(1,) * (x_t.ndim - 1)), s, 1.0)
        mixed = (1 - s) * u + s * c
        if rescale:
            axes = tuple(range(1, x_t.ndim))
            std_mixed, std_c = jnp.std(mixed, axes, keepdims=True), jnp.std(c, axes, keepdims=True)
            ratio = jnp.where(std_mixed > 0, std_c / jnp.where(std_mixed > 0, std_mixed, 1.0), 1.0)
            phi = jnp.asarray(rescale, x_t.dtype)
            mixed = mixed * (1 - phi + phi * ratio)
        return jnp.concatenate([mixed, conditional[..., channels:]], axis=-1)

    return guided


def class_log_prob(logits_fn: LogitsFn, y: Integer[ArrayLike, "B"]) -> LogProbFn:
    """log p(y | x_t) from a classifier's logits [B, K].

    y: labels in 0 ... K - 1; a traced label out of range gives NaN. Raises: ValueError, when called, for labels that are not
    int or out of range, or if there are not as many labels as rows.
    """

    def log_prob(x_t, time):
        x_t = process.as_float("x_t", x_t)
        logits = process.as_float("the output of logits_fn", logits_fn(x_t, time)).astype(x_t.dtype)
        return labels.log_prob(logits, y)

    return log_prob


def log_prob_gradient(log_prob: LogProbFn, scale: Real[ArrayLike, ""] | Real[ArrayLike, "B"] = 1.0) -> DenoiseFn:
    """s grad_x log p(y | x_t), (x_t [B, ...], network time [B]) -> [B, ...], as `sampling.ddpm(mean_shift=)` expects.

    scale: s.
    """
    gradient = jax.grad(lambda x_t, time: jnp.sum(log_prob(x_t, time)))

    def scaled(x_t, time):
        x_t = process.as_float("x_t", x_t)
        return _expand_rows(scale, x_t) * gradient(x_t, time)

    return scaled


def classifier(
    denoise_fn: DenoiseFn,
    log_prob: LogProbFn,
    schedule: Schedule,
    scale: Real[ArrayLike, ""] | Real[ArrayLike, "B"] = 1.0,
    *,
    prediction: str = "eps",
) -> DenoiseFn:
    """eps - s sqrt(1 - alpha_bar) grad_x log p(y | x_t) (ADM eq. 14), for any prediction of the network.

    At s = 1 and with the exact gradient, the result is the eps of the conditional data. This form shifts eps before a
    sampler's clip; ADM's other form, `sampling.ddpm(mean_shift=log_prob_gradient(...))`, shifts the mean after the clip.

    Args:
      log_prob: for a classifier, the result of `class_log_prob`.
      schedule: gives the noise level at a network time.
      scale: s. prediction: the quantity that the network predicts: eps, x_0, v, score or flow.
    Returns: a denoise_fn that predicts the same quantity.
    Raises: ValueError for x_prev, whose shift is `sampling.ddpm(mean_shift=)`, or an unknown prediction.
    """
    if prediction not in process.PREDICTIONS or prediction == "x_prev":
        raise ValueError(
            f"classifier guidance cannot shift prediction {prediction!r}; known: eps, x_0, v, score, flow (x_prev: "
            "sampling.ddpm(mean_shift=...))"
        )
    gradient = log_prob_gradient(log_prob, scale)

    def guided(x_t, time):
        x_t = process.as_float("x_t", x_t)
        output, g = denoise_fn(x_t, time), gradient(x_t, time)
        output = process.as_float("the output of denoise_fn", output).astype(x_t.dtype)
        level = schedule.path.at(time, x_t)
        slope = process.QUANTITIES[prediction].slope(level)
        # d eps = -s sigma g, converted to the prediction. Where x_t is pure noise it is independent of y, so g is 0.
        has_signal = jnp.abs(slope) > 1e-15
        shift = jnp.where(has_signal, -level.sigma / jnp.where(has_signal, slope, 1.0) * g, 0.0)
        channels = x_t.shape[-1]
        return jnp.concatenate([output[..., :channels] + shift, output[..., channels:]], axis=-1)

    return guided

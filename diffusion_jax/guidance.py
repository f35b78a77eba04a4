"""Guidance: functions from a denoiser to a denoiser, for any sampler.

Classifier-free guidance mixes a conditional and an unconditional output of one network (Ho & Salimans 2022); classifier
guidance adds the gradient of a noise-aware classifier (Dhariwal & Nichol 2021, ADM). Both change only the mean: a learned
variance, the second half of the channels, is unchanged.

Outputs are mixed and shifted in float32, or in float64 if x_t is float64 under x64, whatever dtype the network computes in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Integer, PyTree, Real, Shaped

from diffusion_jax import labels
from diffusion_jax.arrays import as_array, as_float
from diffusion_jax.denoiser import QUANTITIES, Denoiser, as_denoiser, as_node
from diffusion_jax.errors import require_known, require_number
from diffusion_jax.types import DenoiseFn, LogitsFn, LogProbFn


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
    if not y.ndim:
        raise ValueError("y must hold a condition for each row of x_t, [B, ...]; got a single number")
    if jnp.issubdtype(dtype, jnp.integer):
        if not jnp.issubdtype(jnp.result_type(null), jnp.integer):
            raise ValueError(f"null_y must be int, as y is; got {jnp.result_type(null)}")
        dtype = dtype if dtype.itemsize >= 4 else jnp.int32  # 8 bits cannot hold the null label of 256 classes
    return jnp.concatenate([y.astype(dtype), jnp.broadcast_to(as_array("null_y", null).astype(dtype), y.shape)])


def classifier_free(
    denoiser: Denoiser | DenoiseFn,
    y: PyTree[Shaped[ArrayLike, "B ..."]],
    null_y: PyTree[Shaped[ArrayLike, "..."]],
    scale: Real[ArrayLike, ""] | Real[ArrayLike, "B ..."],
    *,
    interval: tuple[Real[ArrayLike, ""], Real[ArrayLike, ""]] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """Guides a denoiser: (1 - s) unconditional + s conditional output (Ho & Salimans 2022 eq. 6, s = 1 + w).

    Both outputs come from one network call with twice the batch. The result is bit-identical to the conditional output for
    s = 1, and to the unconditional output for s = 0. The formula holds for every prediction, because all are linear in eps.

    Args:
      denoiser: its network is called as network(x_t [2 B, ...], network time [2 B], y=y [2 B, ...]).
      y: the conditions, or a dict of the network's inputs, such as {"y": labels, "condition": vectors}. null_y: the condition
        that means "none" (`UNet.null_label`, `UNet.null_condition`), in a shape that broadcasts to y's shape, or a dict of
        null conditions. To leave an input unguided, pass the same array in y and null_y.
      scale: s, one number or one per row: [B] or [B, 1, ..., 1].
      interval: (low, high), the network times from low to high at which s applies; at other times s is 1 (Kynkaanniemi et
        al. 2024). To convert levels sigma / alpha to times: `schedule.path.time_at_log_snr(-2 * jnp.log(levels))`.
      rescale: phi from Lin et al. 2024 section 3.4, in 0 ... 1, against the overexposure that a large s causes: 1 rescales
        each example to the standard deviation of the conditional output; 0 does nothing.
    Returns: the denoiser, with the learned variance of the conditional output.
    Raises: ValueError for a null_y that is float where y is int, an interval in the wrong order, or a rescale outside
      0 ... 1. The returned denoiser raises ValueError if y or scale has another number of rows than x_t.
    """
    if interval is not None and not any(isinstance(end, Tracer) for end in interval):
        low, high = map(np.asarray, interval)
        if not low <= high:
            raise ValueError(f"interval must be (low, high), network times with low <= high, got {interval}")
    require_number("rescale", rescale, 0, 1)
    y, null_y = (value if isinstance(value, dict) else {"y": value} for value in (y, null_y))
    both = jax.tree.map(lambda y, null: _append_null(as_array("y", y), null), y, null_y)
    denoiser = as_denoiser(denoiser)
    stage = _ClassifierFree(both, scale, interval, rescale)
    # Innermost, because this stage doubles the rows, and a classifier's labels are for B rows.
    return dataclasses.replace(denoiser, stages=(stage, *denoiser.stages))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _ClassifierFree:
    """The stage of `classifier_free`. both: {input: conditions and null conditions [2 B, ...]}."""

    both: Any
    scale: Any
    interval: Any
    rescale: float = dataclasses.field(metadata={"static": True})

    def __call__(self, evaluate, x_t, level, inputs):
        for part in jax.tree.leaves(self.both):
            if 2 * x_t.shape[0] != part.shape[0]:
                raise ValueError(
                    f"y has {part.shape[0] // 2} rows but x_t has {x_t.shape[0]}; give one condition for each row of x_t"
                )
        x_twice, level_twice, inputs = jax.tree.map(
            lambda value: jnp.concatenate([value, value]) if jnp.ndim(value) else value, (x_t, level, dict(inputs))
        )
        output = evaluate(x_twice, level_twice, {**inputs, **self.both})
        conditional, unconditional = jnp.split(output, 2)
        channels = x_t.shape[-1]
        c, u = conditional[..., :channels], unconditional[..., :channels]
        s = _expand_rows(self.scale, x_t)
        if self.interval is not None:
            applies = (self.interval[0] <= level.time) & (level.time <= self.interval[1])
            s = jnp.where(applies.reshape(jnp.shape(level.alpha)), s, 1.0)
        mixed = (1 - s) * u + s * c
        if self.rescale:
            axes = tuple(range(1, x_t.ndim))
            std_mixed, std_c = jnp.std(mixed, axes, keepdims=True), jnp.std(c, axes, keepdims=True)
            ratio = jnp.where(std_mixed > 0, std_c / jnp.where(std_mixed > 0, std_mixed, 1.0), 1.0)
            phi = jnp.asarray(self.rescale, x_t.dtype)
            mixed = mixed * (1 - phi + phi * ratio)
        return jnp.concatenate([mixed, conditional[..., channels:]], axis=-1)


def class_log_prob(logits_fn: LogitsFn, y: Integer[ArrayLike, "B"] | None) -> LogProbFn:
    """Returns the function log p(y | x_t) from a classifier's logits [B, K]: a pytree with the arrays of y and `logits_fn`.

    y: labels in 0 ... K - 1; a traced label out of range gives NaN. Raises: ValueError, when called, for labels that are not
    int or out of range, or if the numbers of labels and rows differ.
    """
    return jax.tree_util.Partial(_class_log_prob, as_node(logits_fn), y)


def _class_log_prob(logits_fn, y, x_t, time):
    x_t = as_float("x_t", x_t)
    return labels.log_prob(as_float("the output of logits_fn", logits_fn(x_t, time)).astype(x_t.dtype), y)


def classifier(
    denoiser: Denoiser | DenoiseFn,
    log_prob: LogProbFn,
    scale: Real[ArrayLike, ""] | Real[ArrayLike, "B"] = 1.0,
    *,
    form: str = "eps",
) -> Denoiser:
    """Guides a denoiser with a classifier: eps - s sigma grad_x log p(y | x_t) (ADM eq. 14), for any prediction.

    With s = 1 and the exact gradient, the result is the eps of the data given y.

    Args:
      log_prob: (x_t, network time) -> log p(y | x_t) [B], differentiable in x_t; for a classifier, `class_log_prob`.
      scale: s, one number or one per row.
      form: "eps" shifts the output, before a clip. "mean" shifts the mean of p(x_{t-1} | x_t) by the variance times s grad,
        after the clip (ADM Algorithm 1), in `sampling.ddpm` only. The shifts of several classifiers add up.
    Raises: ValueError for form "eps" with prediction x_prev, or an unknown form.
    """
    require_known("form", form, ("eps", "mean"))
    denoiser = as_denoiser(denoiser)
    if form == "mean":
        total = jax.tree_util.Partial(_total_gradient, denoiser.mean_shift, as_node(log_prob), scale)
        return dataclasses.replace(denoiser, mean_shift=total)
    if denoiser.prediction == "x_prev":
        raise ValueError("classifier guidance cannot shift prediction 'x_prev'; use form='mean' and the sampler ddpm")
    stage = _Classifier(as_node(log_prob), scale, denoiser.prediction)
    return dataclasses.replace(denoiser, stages=(*denoiser.stages, stage))


def _gradient(log_prob, scale, x_t, time):
    """Returns s grad_x log p(y | x_t)."""
    gradient = jax.grad(lambda x_t: jnp.sum(log_prob(x_t, time)))(x_t)
    return _expand_rows(scale, x_t) * gradient


def _total_gradient(earlier, log_prob, scale, x_t, time):
    gradient = _gradient(log_prob, scale, x_t, time)
    return gradient if earlier is None else earlier(x_t, time) + gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Classifier:
    """The stage of `classifier` with form "eps"."""

    log_prob: Any
    scale: Any
    prediction: str = dataclasses.field(metadata={"static": True})

    def __call__(self, evaluate, x_t, level, inputs):
        output = evaluate(x_t, level, inputs)
        slope = QUANTITIES[self.prediction].slope(level)
        # The shift of eps, -scale sigma grad log p(y | x_t), converted to the network's quantity; 0 in pure noise.
        factor = jnp.where(level.has_signal, -level.sigma / jnp.where(level.has_signal, slope, 1.0), 0.0)
        shift = factor * _gradient(self.log_prob, self.scale, x_t, level.times(x_t))
        channels = x_t.shape[-1]
        return jnp.concatenate([output[..., :channels] + shift, output[..., channels:]], axis=-1)

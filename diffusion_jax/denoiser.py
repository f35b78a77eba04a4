"""`Denoiser`: a network and the meaning of its output in one value, for losses, samplers, guidance and likelihoods.

    denoiser = Denoiser(network, prediction="v", clip=False)
    d = denoiser(x_t, schedule.at(t, x_t))         # d.x_0, d.eps

A network predicts one of six quantities. Given x_t, each quantity determines the other five, because
x_t = alpha x_0 + sigma eps (DDPM eq. 4):

    eps      the noise itself (DDPM section 3.2)
    x_0      the clean image
    v        alpha eps - sigma x_0 (Salimans & Ho 2022, section 4)
    x_prev   the mean of x_{t-1} (DDPM section 3.2, mu-tilde), which is defined for a step only
    score    grad log q(x_t) = -eps / sigma (Song et al. 2021)
    flow     eps - x_0, the velocity of flow matching (Lipman et al. 2023)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.arrays import as_float, check_same_shape, promote
from diffusion_jax.errors import require_known, require_number
from diffusion_jax.schedules import NoiseLevel, Transition
from diffusion_jax.types import Batch, BatchLike, Clip, DenoiseFn


class Quantity(NamedTuple):
    """Conversions of a quantity that networks predict; `level` has alpha and sigma (for x_prev, it is a `Transition`).

    x_0, eps: (output, x_t, level) -> x_0 or eps. value: (x_0, eps, x_t, level) -> the quantity, which is the training target.
    slope: level -> d eps / d output for a fixed x_t, which converts errors and shifts of one quantity to another.
    """

    x_0: Callable[[Any, Any, Any], Any]
    eps: Callable[[Any, Any, Any], Any]
    value: Callable[[Any, Any, Any, Any], Any]
    slope: Callable[[Any], Any]


def _x_0_of_eps(eps, x_t, at):
    # Where alpha is 0, eps does not determine x_0. The result is NaN there, not a number made of rounding errors.
    return (x_t - at.sigma * eps) / jnp.where(at.alpha > 0, at.alpha, jnp.nan)


# Where sigma is 0, x_0 and x_prev do not determine eps, and their functions divide by 0.
QUANTITIES = {
    "eps": Quantity(
        x_0=_x_0_of_eps,
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
        x_0=lambda output, x_t, at: _x_0_of_eps(-at.sigma * output, x_t, at),
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


def quantity(prediction: str, at: NoiseLevel | Transition | None = None) -> Quantity:
    """Returns a prediction's row of `QUANTITIES`. Raises: ValueError for an unknown prediction, or x_prev at one level."""
    require_known("prediction", prediction, PREDICTIONS)
    if prediction == "x_prev" and isinstance(at, NoiseLevel):
        raise ValueError(
            "prediction 'x_prev' is defined for a step from one noise level to another (schedule.transition(t, x_t)), not at "
            "a single level; the samplers heun and pndm also call the network at single levels: use another sampler"
        )
    return QUANTITIES[prediction]


def convert(
    output: BatchLike, x_t: BatchLike, at: NoiseLevel | Transition, prediction: str = "eps", wanted: str = "x_0"
) -> Batch:
    """Converts a network's output from the quantity `prediction` to the quantity `wanted`.

    at: the noise level of x_t; a `Transition` for x_prev. Results are float32, or float64 for float64 arrays under x64.
    Raises: ValueError for an unknown quantity, differing shapes, x_prev at a single level, or a conversion from eps or
      score to a quantity other than these two at alpha = 0, where they do not determine x_0 (NaN if the level is traced).
    """
    source, target = quantity(prediction, at), quantity(wanted, at)
    check_same_shape("output", output, "x_t", x_t)
    output, x_t = promote(output=output, x_t=x_t)
    if wanted == prediction:
        return output
    determines_all = prediction not in ("eps", "score") or wanted in ("eps", "score")
    if not determines_all and not isinstance(at.alpha, Tracer) and not np.asarray(at.alpha > 0).all():
        raise ValueError(f"alpha is 0: there {prediction} does not determine x_0; predict v, x_0 or flow")
    if wanted in ("x_0", "eps"):
        return getattr(source, wanted)(output, x_t, at)
    return target.value(source.x_0(output, x_t, at), source.eps(output, x_t, at), x_t, at)


class Denoised(NamedTuple):
    """A denoiser's prediction at x_t.

    x_0: the predicted x_0 after the limits (clip, projection). eps: computed from this x_0, so that
    x_t = alpha x_0 + sigma eps. own_x_0, own_eps: x_0 and eps before the limits. output: the network's output after guidance,
    [B, ..., C or 2 C]. learned: for a learned variance, the second half of the output's channels; else None.
    """

    x_0: Batch
    eps: Batch
    own_x_0: Batch
    own_eps: Batch
    output: Float[Array, "B *output_shape"]
    learned: Batch | None

    def corrected(self, x_0: Batch, x_t: Batch, level: NoiseLevel) -> Denoised:
        """Returns the prediction with another x_0, to which no limits are applied, and the eps computed from this x_0."""
        eps = QUANTITIES["x_0"].eps(x_0, x_t, level)
        return self._replace(x_0=x_0, eps=eps, own_x_0=x_0, own_eps=eps)


# (x_t, level, inputs) -> output, and (evaluate, x_t, level, inputs) -> output
Evaluate: TypeAlias = Callable[[Batch, NoiseLevel, Mapping[str, Any]], Float[Array, "B *output_shape"]]
Stage: TypeAlias = Callable[[Evaluate, Batch, NoiseLevel, Mapping[str, Any]], Float[Array, "B *output_shape"]]
# (predict, x_t, level) -> Denoised, where predict(x_t) -> Denoised is the prediction before this correction
Correction: TypeAlias = Callable[[Callable[[Batch], Denoised], Batch, NoiseLevel], Denoised]


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network and the meaning of its output, a pytree; new parameters, inputs, scales and measurements need no compilation.

    A call runs one pipeline: the network, guidance on its output, the conversion to x_0 and eps, corrections of x_0, the
    clip, and limits. `guidance` and `editing` add a function to a part of the pipeline; functions for different parts may be
    added in any order. `dataclasses.replace` changes any field.

    network: called as network(x_t [B, ...], network time [B], **inputs); its output has the shape of x_t, or twice
      the channels for a learned variance. It is a function, or a pytree that can be called, such as an Equinox module or
      `jax.tree_util.Partial(function, params)`, whose arrays may change without a compilation.
    prediction: the quantity that the network predicts: eps, x_0, v, x_prev, score or flow.
    variance: the variance of p(x_{t-1} | x_t), by a name that `process.p_mean_variance` lists.
    clip: the clip of the predicted x_0. True clips to [-1, 1], the range of images; False, for data outside this range, does
      nothing; a function x_0 -> x_0 is applied (`dynamic_threshold`).
    sigma_data: the standard deviation of x_0, for a network in EDM's scaling (`coordinates.precondition`), whose prediction
      is x_0; None for no preconditioning.
    sigma_min: above 0 for a consistency network (Song et al. 2023), which maps x_t to the end of the probability-flow ODE's
      path, at sigma / alpha = sigma_min, not to the mean of x_0. Only `sampling.consistency` takes such a denoiser; calling
      it raises ValueError.
    inputs: further arguments of the network by name, with a row for each row of x_t, such as {"y": labels}.
    stages: guidance, as functions (evaluate, x_t, level, inputs) -> output around the network, where evaluate(x_t, level,
      inputs) calls the inner stages and the network.
    corrections: functions (predict, x_t, level) -> `Denoised`, where predict(x_t) is the prediction so far, such as
      lambda predict, x_t, level: (d := predict(x_t)).corrected(d.x_0 + shift, x_t, level).
    limits: functions x_0 -> x_0 to apply after the clip, such as projections.
    mean_shift: (x_t, network time) -> g, or None; `process.p_mean_variance` shifts the mean by the variance times g. Among
      the samplers, only `ddpm` uses this mean; calling a denoiser with a mean_shift raises ValueError.
    Raises: ValueError for an unknown prediction or variance; a sigma_data that is not above 0, or comes with another
      prediction than x_0; a sigma_min that is below 0, or comes without sigma_data.
    """

    network: Any
    prediction: str = dataclasses.field(default="eps", metadata=_STATIC)
    variance: str = dataclasses.field(default="fixed_large", metadata=_STATIC)
    clip: Clip = dataclasses.field(default=True, metadata=_STATIC)
    sigma_data: float | None = dataclasses.field(default=None, metadata=_STATIC)
    sigma_min: float = dataclasses.field(default=0.0, metadata=_STATIC)
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    corrections: tuple[Correction, ...] = ()
    limits: tuple[Callable[[Batch], ArrayLike], ...] = ()
    mean_shift: DenoiseFn | None = None

    def __post_init__(self):
        if isinstance(self.network, Denoiser):
            raise ValueError("the network is a Denoiser already; dataclasses.replace(denoiser, ...) changes its fields")
        quantity(self.prediction)
        require_known("variance", self.variance, VARIANCES)
        _check_clip(self.clip)
        object.__setattr__(self, "clip", self.clip if callable(self.clip) else bool(self.clip))
        if self.sigma_data is not None:
            require_number("sigma_data", self.sigma_data, 0, above=True)
            if self.prediction != "x_0":
                raise ValueError(f"with sigma_data the network predicts x_0, not {self.prediction!r}")
            object.__setattr__(self, "sigma_data", float(self.sigma_data))  # a float64 scalar would promote under x64
        if not (self.sigma_min == 0 or (self.sigma_min > 0 and self.sigma_data)):
            raise ValueError(
                f"sigma_min={self.sigma_min} must be 0, or above 0 with sigma_data, for a consistency network"
            )
        object.__setattr__(self, "network", as_node(self.network))
        object.__setattr__(self, "mean_shift", as_node(self.mean_shift))
        for name in ("stages", "corrections", "limits"):
            object.__setattr__(self, name, tuple(map(as_node, getattr(self, name))))

    def __call__(self, x_t: BatchLike, at: NoiseLevel | Transition) -> Denoised:
        """Predicts x_0 and eps from x_t [B, ...] at a noise level, one for each row or one for all rows.

        at: `schedule.at(t, x_t)`, `path.at(time, x_t)`, or for x_prev `schedule.transition(t, x_t)`. Its alpha and sigma
        convert the output; its `time`, which may belong to another level, as in `sampling.encode`, is the network's time.
        Raises: ValueError for x_prev at a single level, an x_t that is not float, an output whose shape does not match
          `variance`, an `at` of another type, and a denoiser with `mean_shift` or `sigma_min`.
        """
        if not isinstance(at, NoiseLevel | Transition):
            raise ValueError(
                f"a denoiser takes a noise level, schedule.at(t, x_t) or path.at(time, x_t), or a step, "
                f"schedule.transition(t, x_t); got {type(at).__name__}"
            )
        if self.mean_shift is not None:
            raise ValueError(
                "classifier guidance with form='mean' shifts the mean in the sampler ddpm, and no other prediction; use "
                "form='eps'"
            )
        if self.sigma_min:
            raise ValueError(
                "a consistency network predicts the end of the ODE's path, not the mean of x_0; use the sampler consistency"
            )
        x_t, row = as_float("x_t", x_t), quantity(self.prediction, at)

        def predict(x_t: Batch) -> Denoised:
            output = self.output(x_t, at)
            own, learned = split_variance(output, x_t, self.variance)
            x_0, eps = row.x_0(own, x_t, at), row.eps(own, x_t, at)
            return Denoised(x_0, eps, x_0, eps, output, learned)

        for correction in self.corrections:
            predict = _apply(correction, predict, at.level)
        denoised = predict(x_t)
        if self.clip is False and not self.limits:
            return denoised
        x_0 = clip_x_0(denoised.own_x_0, self.clip)
        for limit in self.limits:
            x_0 = as_float("the result of a limit", limit(x_0)).astype(x_0.dtype)
        return denoised._replace(x_0=x_0, eps=QUANTITIES["x_0"].eps(x_0, x_t, at))

    def output(self, x_t: BatchLike, at: NoiseLevel | Transition) -> Float[Array, "B *output_shape"]:
        """Returns the network's output with guidance, in x_t's dtype; its first C channels are the quantity `prediction`."""
        x_t, evaluate = as_float("x_t", x_t), self._evaluate
        for stage in self.stages:
            evaluate = functools.partial(stage, evaluate)
        return evaluate(x_t, at.level, self.inputs)

    def _evaluate(self, x_t: Batch, level: NoiseLevel, inputs: Mapping[str, Any]) -> Float[Array, "B *output_shape"]:
        """Calls the network, in EDM's scaling if `sigma_data` is set (Karras et al. 2022, table 1).

        With `sigma_min`, the result at the level sigma / alpha = sigma_min is x_t / alpha (Song et al. 2023, appendix C).
        """
        time = level.times(x_t)

        def call(x):
            return as_float("the output of the network", self.network(x, time, **inputs)).astype(x_t.dtype)

        if (d := self.sigma_data) is None:
            return call(x_t)
        r = jnp.sqrt(level.sigma**2 + (d * level.alpha) ** 2)
        output, sigma, r_skip = call(x_t / r), level.sigma, r
        if self.sigma_min:
            sigma = level.sigma - self.sigma_min * level.alpha
            r_skip = jnp.sqrt(sigma**2 + (d * level.alpha) ** 2)
        channels, skip = x_t.shape[-1], d**2 * level.alpha / r_skip**2 * x_t
        return jnp.concatenate([skip + d * sigma / r * output[..., :channels], output[..., channels:]], axis=-1)

    def with_output(self, output: Float[Array, "B *output_shape"]) -> Denoiser:
        """Returns the denoiser with a known output in place of network and guidance, to compute values from this output."""
        return dataclasses.replace(
            self,
            network=jax.tree_util.Partial(_known_output, output),
            inputs={},
            stages=(),
            sigma_data=None,
            sigma_min=0.0,
        )


def _apply(correction: Correction, predict: Callable[[Batch], Denoised], level: NoiseLevel):
    return lambda x_t: correction(predict, x_t, level)


def _known_output(output, x_t, time):
    return output


def as_denoiser(network: Denoiser | DenoiseFn, **fields: Any) -> Denoiser:
    """Returns a denoiser unchanged; makes a `Denoiser` with these fields from a function (x_t, network time) -> output."""
    return network if isinstance(network, Denoiser) else Denoiser(network, **fields)


def as_node(function: Any) -> Any:
    """Wraps a plain function as a pytree without arrays, so that a pytree can contain it; returns other values unchanged."""
    is_leaf = callable(function) and jax.tree_util.all_leaves([function])
    return jax.tree_util.Partial(function) if is_leaf else function


def split_variance(
    output: Float[ArrayLike, "*shape output_channels"], x_t: Float[ArrayLike, "*shape channels"], variance: str
) -> tuple[Float[Array, "*shape channels"], Float[Array, "*shape channels"] | None]:
    """Splits a network's output into the prediction and the learned variance, the second half of the channels.

    output: [B, ..., C] for a fixed variance, where the second result is None; [B, ..., 2 C] for a learned variance (Improved
    DDPM section 3.1). Raises: ValueError for another shape or an unknown variance.
    """
    output = as_float("output", output)
    require_known("variance", variance, VARIANCES)
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
    _check_clip(clip)
    if callable(clip):
        return as_float("the result of clip", clip(x_0)).astype(x_0.dtype)
    return jnp.clip(x_0, -1.0, 1.0) if clip else x_0


def _check_clip(clip: Clip) -> None:
    if not callable(clip) and not isinstance(clip, bool | np.bool_):
        raise ValueError(f"clip must be True, False or a function of x_0, got {clip!r}")


@dataclasses.dataclass(frozen=True)
class dynamic_threshold:
    """Imagen's dynamic threshold (Saharia et al. 2022, section 2.3) as a `clip`: x_0 [B, ...] -> clip(x_0, -s, s) / s.

    s is a quantile of |x_0| for each example, at least 1. Raises: ValueError for a quantile outside (0, 1].
    """

    quantile: float | np.floating = 0.995

    def __post_init__(self):
        require_number("quantile", self.quantile, 0, 1, above=True)

    def __call__(self, x_0: BatchLike) -> Batch:
        x_0 = as_float("x_0", x_0)
        s = jnp.quantile(jnp.abs(x_0), float(self.quantile), axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x_0, -s, s) / s

"""Training losses, as pure functions of a key, a schedule or path, and a `Denoiser` or any callable (x_t, time) -> output.

Each loss draws one noise level per example. It returns one loss per example, so that the caller chooses the mean, and a
`LossAux` with intermediate values. The losses are `simple` (DDPM's L_simple), `vlb` (the variational bound), `hybrid`
(Improved DDPM's sum of both, which trains a learned variance) and, for paths, `continuous_vlb` (VDM's bound). `classify`
trains a classifier of noisy images, and returns a `ClassifyAux` instead. `simple` and `classify` also take a path.

`timestep_sampler`, a name in `timesteps.TIMESTEP_SAMPLERS` or a `TimestepSampler`, draws the levels: by default "uniform" for
the steps of a schedule and "stratified" on a path ("uniform_log_snr" in `continuous_vlb`). In version 0.3, this
argument was named `draw` for paths, and "stratified" was named "uniform".

`LOSSES` maps config names to losses.

Data are batches [B, ..., C]. Continuous data, and data outside [-1, 1], need gray_levels=None in `vlb` and `hybrid`.

Noise, network time and losses are float32, or float64 for a float64 x_0 under x64. Lower precisions, including the network's
output, are promoted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Integer, Key

from diffusion_jax import labels, likelihood, process, timesteps
from diffusion_jax.arrays import as_array, as_batch, as_float
from diffusion_jax.denoiser import Denoiser, as_denoiser, quantity, split_variance
from diffusion_jax.errors import require_known
from diffusion_jax.schedules import NoiseLevel, Path, Schedule
from diffusion_jax.types import Batch, BatchLike, DenoiseFn, LogitsFn, TimestepSampler


class LossAux(NamedTuple):
    """The intermediate values of a loss.

    t: the drawn levels, indices of a schedule or times on a path. importance: the weight from the timestep sampler, which
    the loss already contains; 1 on a path. mse: the unweighted error of the predicted quantity. vlb: T times the bound's term
    at t, in bits per dimension (an estimate of the bound without L_T), or the loss `continuous_vlb`; None for `simple`.
    output: the network's output, with twice the channels for a learned variance. log_density: on a path, the log density of
    the drawn log SNR. scalars: {name: values} for a loss of your own; training logs their means, weighted by the importance.
    """

    t: Int[Array, "B"] | Float[Array, "B"]
    importance: Float[Array, "B"]
    mse: Float[Array, "B"]
    vlb: Float[Array, "B"] | None
    eps: Batch
    x_t: Batch
    output: Float[Array, "B *output_shape"]
    log_density: Float[Array, "B"] | None = None
    scalars: Mapping[str, Float[Array, "B"]] | None = None


class ClassifyAux(NamedTuple):
    """The intermediate values of `classify`.

    t, importance: as in `LossAux`. accuracy: 1 if the label has the largest logit, else 0.
    """

    t: Int[Array, "B"] | Float[Array, "B"]
    importance: Float[Array, "B"]
    accuracy: Float[Array, "B"]
    x_t: Batch
    logits: Float[Array, "B K"]


# An elementwise function of the SNR that returns the weight on the eps error.
WeightFn: TypeAlias = Callable[[Float[Array, "*shape"]], Float[ArrayLike, "*shape"]]


def snr_weight(snr: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Weight 1 on the eps error, equal to weight SNR on the x_0 error (Salimans & Ho 2022, "SNR")."""
    return jnp.ones_like(as_float("snr", snr))


def min_snr_weight(snr: Float[ArrayLike, "*shape"], gamma: float = 5.0) -> Float[Array, "*shape"]:
    """Weight min(1, gamma / SNR) on the eps error, equal to min(SNR, gamma) on the x_0 error (Hang et al. 2023)."""
    return jnp.minimum(1.0, gamma / as_float("snr", snr))


def truncated_snr_weight(snr: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Weight max(1, 1 / SNR) on the eps error, equal to max(SNR, 1) on the x_0 error (Salimans & Ho 2022)."""
    return jnp.maximum(1.0, 1.0 / as_float("snr", snr))


def p2_weight(snr: Float[ArrayLike, "*shape"], k: float = 1.0, gamma: float = 1.0) -> Float[Array, "*shape"]:
    """Weight 1 / (k + SNR)^gamma on the eps error (Choi et al. 2022, P2)."""
    return (k + as_float("snr", snr)) ** -gamma


def edm_weight(snr: Float[ArrayLike, "*shape"], sigma_data: float = 0.5) -> Float[Array, "*shape"]:
    """Weight 1 + 1 / (SNR d^2) on the eps error, equal to EDM's (s^2 + d^2) / (s d)^2 on the x_0 error.

    d = sigma_data, s^2 = 1 / SNR. Karras et al. 2022, table 1.
    """
    snr = as_float("snr", snr)
    return 1.0 + 1.0 / (snr * jnp.asarray(sigma_data, snr.dtype) ** 2)


def sigmoid_weight(snr: Float[ArrayLike, "*shape"], bias: float = -1.0) -> Float[Array, "*shape"]:
    """Weight sigmoid(bias - log SNR) on the eps error, for levels drawn uniformly in log SNR (Kingma & Gao 2023; SiD2)."""
    snr = as_float("snr", snr)
    return 1.0 / (1.0 + snr * jnp.exp(jnp.asarray(-bias, snr.dtype)))


WEIGHTINGS: dict[str, WeightFn] = {
    "snr": snr_weight,
    "min_snr": min_snr_weight,
    "truncated_snr": truncated_snr_weight,
    "p2": p2_weight,
    "edm": edm_weight,
    "sigmoid": sigmoid_weight,
}


def simple(
    key: Key[Array, ""],
    schedule: Schedule | Path,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str | None = None,
    weighting: str | WeightFn | None = None,
    timestep_sampler: str | TimestepSampler | None = None,
    draw: str | TimestepSampler | None = None,
) -> tuple[Float[Array, "B"], LossAux]:
    """L_simple (DDPM eq. 14): E || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2.

    The square is averaged over pixels and channels, as in DDPM's and OpenAI's code (DDIM's code sums).

    Args:
      key: draws t and eps.
      schedule: a schedule, or a path for continuous time.
      denoiser: a `Denoiser`, whose output with guidance enters this loss, or a plain function (x_t, network time) ->
        output. The second half of the channels (a learned variance) does not enter this loss.
      x_0: images in [-1, 1], or other data [B, ..., C]. Pass one example [..., C] as x_0[None].
      prediction: the quantity that a plain function predicts: eps (the default), x_0, v, x_prev (not on a path), score or
        flow; a `Denoiser` has its own prediction.
      weighting: None or "none" for the plain squared error of the predicted quantity, as in OpenAI's code; for eps this is
        L_simple. Otherwise a weight on the **eps error** for any prediction: a name in `WEIGHTINGS` (the functions above,
        with their published constants) or a function SNR [B] -> weight [B]. The eps error is SNR times the x_0 error,
        SNR / (1 + SNR) times the v error and SNR / (1 + sqrt(SNR))^2 times the flow error.
      timestep_sampler, draw: as in the module's docstring. On a path, the sampler is part of the objective.
    Returns: (loss [B], LossAux).
    Raises: ValueError for an unknown prediction, weighting or timestep sampler; a timestep sampler for paths on a schedule,
      or for schedules on a path; an output of the wrong shape; weights that are not [B]; an x_0 that is not float
      [B, ..., C]; a `Denoiser` with corrections, limits or sigma_min, or with another prediction than `prediction`; or a
      "truncated_snr" or "edm" weight for eps or score if alpha_bar ends at 0, where the weight is infinite.
    """
    denoiser = _denoiser(denoiser, prediction)
    if weighting in ("truncated_snr", "edm"):
        process.check_terminal_snr(schedule, denoiser.prediction)
    aux = _predict(key, schedule, denoiser, x_0, timestep_sampler, draw)
    return aux.importance * _weight_of_target(schedule, aux, denoiser.prediction, weighting) * aux.mse, aux


def vlb(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str | None = None,
    gray_levels: int | None = 256,
    timestep_sampler: str | TimestepSampler | None = None,
) -> tuple[Float[Array, "B"], LossAux]:
    """The variational bound (DDPM eq. 5) without its constant L_T, in bits per dimension: T times the term at one drawn step.

    The mean loss is an unbiased estimate of `likelihood.bits_per_dim(...).total - .prior`. `timesteps.loss_second_moment`
    reduces the variance of this estimate (Improved DDPM section 3.3).

    Args:
      key, x_0, prediction, timestep_sampler: as `simple`.
      denoiser: a plain function has the variance learned_range and no clip; as in OpenAI's code, training does not clip (Ho's
        code clips).
      gray_levels: as `likelihood.decoder_log_prob`: 256 for images in [-1, 1], None for continuous data, which need a
        denoiser without a clip.
    Returns: (loss [B], LossAux). With gray levels or a clip to [-1, 1], an example with traced values outside this range has
      the loss NaN.
    Raises: ValueError as `simple`, for an output whose channels do not match the variance, for eps or score if alpha_bar ends
      at 0, and for an x_0 outside [-1, 1] with gray levels or a clip to this range.
    """
    denoiser = _denoiser(denoiser, prediction, variance="learned_range", clip=False)
    aux = _predict(key, schedule, denoiser, x_0, timestep_sampler)
    bound = _bound(schedule, denoiser.with_output(aux.output), aux, x_0, gray_levels)
    return aux.importance * bound, aux._replace(vlb=bound)


def hybrid(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    *,
    gray_levels: int | None = 256,
    weighting: str | WeightFn | None = None,
    vlb_weight: float = 0.001,
    timestep_sampler: str | TimestepSampler | None = None,
) -> tuple[Float[Array, "B"], LossAux]:
    """L_hybrid = L_simple + vlb_weight L_vlb (Improved DDPM eq. 16), where the bound trains only the variance.

    In the bound, the first half of the output, which determines the mean, is constant (`stop_gradient`), so only L_simple
    trains the mean. The bound is in bits per dimension, summed over all T steps, and `vlb_weight` multiplies this sum.
    The published weight is 0.001: OpenAI's code multiplies one sampled term by T / 1000. With --rescale_learned_sigmas False
    it multiplies the term by 1, which is a weight of 1 / T.

    Args: as `simple` and `vlb`; a plain function predicts eps.
    Returns: (loss [B], LossAux).
    Raises: ValueError as `vlb`, and for a fixed variance, which the bound cannot train.
    """
    denoiser = _denoiser(denoiser, None, variance="learned_range", clip=False)
    if not denoiser.variance.startswith("learned"):
        raise ValueError(
            f"variance={denoiser.variance!r}: the hybrid loss trains a learned variance; use losses.simple, or learned_range"
        )
    aux = _predict(key, schedule, denoiser, x_0, timestep_sampler)
    mean, values = split_variance(aux.output, aux.x_t, denoiser.variance)
    assert values is not None  # the variance is learned
    detached = jnp.concatenate([jax.lax.stop_gradient(mean), values], axis=-1)
    bound = _bound(schedule, denoiser.with_output(detached), aux, x_0, gray_levels)
    weight = _weight_of_target(schedule, aux, denoiser.prediction, weighting)
    return aux.importance * (weight * aux.mse + jnp.asarray(vlb_weight, bound.dtype) * bound), aux._replace(vlb=bound)


def continuous_vlb(
    key: Key[Array, ""],
    path: Path,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str | None = None,
    timestep_sampler: str | TimestepSampler | None = None,
    draw: str | TimestepSampler | None = None,
) -> tuple[Float[Array, "B"], LossAux]:
    """The transitions of the variational bound in continuous time, in bits per dimension (Kingma et al. 2021, eq. 17).

    The loss is 1/2 E || eps - eps_theta ||^2 / p(log SNR), with the density p of the drawn log SNR. For every timestep
    sampler, the mean loss is the integral over the log SNR between the ends of the path's interval, so the mean loss depends
    on the path only through these ends. As T grows, `vlb` without the decoder, for a fixed variance, converges to this loss.

    Args:
      key, denoiser, x_0, prediction: as `simple`.
      timestep_sampler, draw: as `simple`, by default "uniform_log_snr"; they change only the variance of the estimate.
    Returns: (loss [B], LossAux).
    Raises: ValueError as `simple`, for a schedule, and for a path whose log SNR is infinite at an end of the interval.
    """
    if not isinstance(path, Path):
        raise ValueError("continuous_vlb needs a path; for the steps of a schedule use losses.vlb, or schedule.path")
    path.check_finite_ends("the variational bound")
    denoiser = _denoiser(denoiser, prediction)
    if timestep_sampler is None and draw is None:
        timestep_sampler = "uniform_log_snr"
    aux = _predict(key, path, denoiser, x_0, timestep_sampler, draw)
    eps_error = _weight_of_target(path, aux, denoiser.prediction, snr_weight) * aux.mse
    assert aux.log_density is not None  # drawn on a path
    bound = 0.5 * eps_error * jnp.exp(-aux.log_density) / math.log(2)
    return bound, aux._replace(vlb=bound)


def classify(
    key: Key[Array, ""],
    schedule: Schedule | Path,
    logits_fn: LogitsFn,
    x_0: BatchLike,
    y: Integer[ArrayLike, "B"],
    *,
    timestep_sampler: str | TimestepSampler | None = None,
    draw: str | TimestepSampler | None = None,
) -> tuple[Float[Array, "B"], ClassifyAux]:
    """-log p(y | x_t, t), in nats, at a drawn timestep: the loss that trains a classifier for guidance (ADM section 4).

    Args:
      key: draws t and eps.
      x_0: images in [-1, 1], or other data [B, ..., C].
      y: labels in 0 ... K - 1. A traced label outside this range has a loss of NaN.
      timestep_sampler, draw: as `simple`.
    Returns: (loss [B], ClassifyAux).
    Raises: ValueError for logits of another shape, an x_0 that is not float [B, ..., C], weights that are not [B], or labels
      that are not int or out of range.
    """
    _, level, drawn = _draw_noise(key, schedule, x_0, timestep_sampler, draw)
    t, importance, x_t = (drawn[name] for name in ("t", "importance", "x_t"))
    logits = as_float("the output of logits_fn", logits_fn(x_t, level.time)).astype(x_t.dtype)
    if logits.ndim != 2 or logits.shape[0] != x_t.shape[0]:
        raise ValueError(
            f"logits_fn returned {logits.shape} for x_t {x_t.shape}; it must return [B, K], a logit for each class"
        )
    loss = -labels.log_prob(logits, y)
    accuracy = (logits.argmax(axis=1) == y).astype(loss.dtype)
    return importance * loss, ClassifyAux(t, importance, accuracy, x_t, logits)


# The losses by config name. A setting, such as `weighting`, sets the argument with the same name.
LOSSES: dict[str, Callable[..., tuple[Float[Array, "B"], NamedTuple]]] = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "continuous_vlb": continuous_vlb,
    "classify": classify,
}


def _per_example(name, x, batch_size):
    """Broadcasts x to [B]. Raises: ValueError for another shape, which would broadcast a loss [B] to [B, B]."""
    x = as_array(name, x)
    if x.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} must have shape [{batch_size}], one for each example; got {list(jnp.shape(x))}")
    return jnp.broadcast_to(x, batch_size)


def _draw_noise(key, schedule, x_0, timestep_sampler, draw=None) -> tuple[Batch, NoiseLevel, dict[str, Any]]:
    """Draws eps and the noise levels. Returns (x_0, level, the fields of `LossAux` that do not need the network)."""
    x_0, is_path = as_batch("x_0", x_0), isinstance(schedule, Path)
    batch_size, dtype = x_0.shape[0], x_0.dtype
    key_t, key_eps = jax.random.split(key)
    if draw is not None and timestep_sampler is not None and timestep_sampler is not draw:
        raise ValueError("draw is the earlier name of timestep_sampler on a path; give timestep_sampler alone")
    if draw is not None and not is_path:
        raise ValueError(f"draw={draw} needs a path, but got a schedule; use timestep_sampler")
    sampler = timestep_sampler if draw is None else draw
    if sampler is None or draw == "uniform":
        sampler = "stratified" if is_path else "uniform"
    sampler = timesteps.sampler_by_name(sampler) if isinstance(sampler, str) else sampler
    t, density = sampler(key_t, batch_size, schedule if is_path else schedule.num_timesteps)
    t = _per_example("the times of timestep_sampler", t, batch_size)
    if is_path and not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(
            "on a path, timestep_sampler returns network times and log densities; it returned indices of steps"
        )
    density = jnp.asarray(_per_example("the weights of timestep_sampler", density, batch_size), dtype)
    importance, log_density = (jnp.ones_like(density), density) if is_path else (density, None)
    t = t.astype(dtype) if is_path else t
    level = schedule.at(t, x_0)
    eps = jax.random.normal(key_eps, x_0.shape, dtype)
    x_t = level.alpha * x_0 + level.sigma * eps
    return x_0, level, {"t": t, "importance": importance, "eps": eps, "x_t": x_t, "log_density": log_density}


def _denoiser(network: Denoiser | DenoiseFn, prediction: str | None, **defaults: Any) -> Denoiser:
    """Returns a loss's denoiser. defaults: fields for a plain function. Raises: ValueError for two different predictions."""
    if not isinstance(network, Denoiser):
        return as_denoiser(network, prediction="eps" if prediction is None else prediction, **defaults)
    if prediction not in (None, network.prediction):
        raise ValueError(
            f"prediction={prediction!r} is for a plain function; this denoiser predicts {network.prediction!r}"
        )
    return network


def _at(schedule, prediction, t, like):
    """Returns the noise level at t; for prediction x_prev, the transition from x_t to x_{t-1}."""
    return schedule.transition(t, like) if prediction == "x_prev" else schedule.at(t, like)


def _predict(key, schedule, denoiser, x_0, timestep_sampler, draw=None) -> LossAux:
    """Draws t and eps, calls the network and computes the prediction's error."""
    x_0, level, drawn = _draw_noise(key, schedule, x_0, timestep_sampler, draw)
    if denoiser.corrections or denoiser.limits or denoiser.sigma_min:
        raise ValueError(
            "a loss trains the network without corrections and limits, to predict a mean and not the end of the ODE's path "
            "(sigma_min); leave them out of the denoiser"
        )
    at, x_t = _at(schedule, denoiser.prediction, drawn["t"], x_0), drawn["x_t"]
    target = quantity(denoiser.prediction, at).value(x_0, drawn["eps"], x_t, at)
    output = denoiser.output(x_t, level)
    predicted = output[..., : x_t.shape[-1]]
    if output.shape[-1] not in (x_0.shape[-1], 2 * x_0.shape[-1]) or predicted.shape != target.shape:
        raise ValueError(
            f"the network returned {output.shape} for x_t {x_t.shape}; it must return the shape of x_t, or twice its "
            "channels for a learned variance"
        )
    mse = jnp.mean(jnp.square(target - predicted), axis=range(1, x_0.ndim))
    return LossAux(**drawn, mse=mse, vlb=None, output=output)


def _bound(schedule, denoiser, aux, x_0, gray_levels):
    """Returns T times the bound's term at the drawn steps, [B]."""
    total = schedule.num_timesteps  # raises for a path
    process.check_terminal_snr(schedule, denoiser.prediction)
    term, _ = likelihood.bound_term(schedule, denoiser, x_0, aux.x_t, aux.t, gray_levels=gray_levels)
    return total * term


def _weight_of_target(schedule, aux, prediction, weighting):
    """Converts a weight on the eps error to a weight on the error of the predicted quantity, [B]."""
    if weighting is None or weighting == "none":
        return 1.0
    if not callable(weighting):
        require_known("weighting", weighting, ["none", *WEIGHTINGS])
    weight_fn = weighting if callable(weighting) else WEIGHTINGS[weighting]
    at: Any = _at(schedule, prediction, aux.t, aux.mse)
    level = at.level
    # Pure noise gets a tiny signal, so that 1 / SNR is finite, and 1 / SNR times the squared slope of v is near its limit.
    level = NoiseLevel.at_log_snr(jnp.full_like(level.alpha, 2 * math.log(1e-10)), level.time).where(
        ~level.has_signal, level
    )
    weight = _per_example("the result of weighting", weight_fn(level.snr), len(level.snr)).astype(level.snr.dtype)
    return weight * quantity(prediction).slope(at if prediction == "x_prev" else level) ** 2

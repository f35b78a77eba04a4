"""Training losses, as pure functions of a key, a schedule and any callable `denoise_fn(x_t, time) -> output`.

Each loss draws one timestep per example and returns one loss per example, so that the caller chooses the mean, and a
`LossAux` with intermediate values: `simple` (DDPM's L_simple), `vlb` (the variational bound) and `hybrid` (Improved DDPM's
sum of both, which trains a learned variance). `classify` trains a classifier of noisy images from labels.

`LOSSES` maps config names to losses.

Data are batches [B, ..., C]. Continuous data, and data outside [-1, 1], need gray_levels=None in the bound.

Noise, network time and losses are float32, or float64 for a float64 x_0 under x64. Lower precisions, including the network's
output, are promoted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Integer, Key

from diffusion_jax import labels, likelihood, process, timesteps
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Batch, BatchLike, Clip, DenoiseFn, LogitsFn, TimestepSampler

__all__ = [
    "LOSSES",
    "WEIGHTINGS",
    "ClassifyAux",
    "LossAux",
    "classify",
    "hybrid",
    "min_snr_weight",
    "p2_weight",
    "simple",
    "snr_weight",
    "truncated_snr_weight",
    "vlb",
]


class LossAux(NamedTuple):
    """The intermediate values of a loss.

    t: the drawn indices. importance: the weight from the timestep sampler, already in the loss. mse: the unweighted error of
    the predicted quantity. vlb: T times the bound's term at t, in bits per dimension (an estimate of the bound without L_T);
    None for `simple`. output: the network's output, with twice the channels for a learned variance.
    """

    t: Int[Array, "B"]
    importance: Float[Array, "B"]
    mse: Float[Array, "B"]
    vlb: Float[Array, "B"] | None
    eps: Batch
    x_t: Batch
    output: Float[Array, "B *output_shape"]


class ClassifyAux(NamedTuple):
    """The intermediate values of `classify`.

    t, importance: as in `LossAux`. accuracy: 1 where the largest logit is at the label, else 0.
    """

    t: Int[Array, "B"]
    importance: Float[Array, "B"]
    accuracy: Float[Array, "B"]
    x_t: Batch
    logits: Float[Array, "B K"]


# An elementwise function of the SNR: the weight of the eps error.
WeightFn: TypeAlias = Callable[[Float[Array, "*shape"]], Float[ArrayLike, "*shape"]]


def snr_weight(snr: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Weight 1 on the eps error, equal to weight SNR on the x_0 error (Salimans & Ho 2022, "SNR")."""
    return jnp.ones_like(process.as_float("snr", snr))


def min_snr_weight(snr: Float[ArrayLike, "*shape"], gamma: float = 5.0) -> Float[Array, "*shape"]:
    """Weight min(1, gamma / SNR) on the eps error, equal to min(SNR, gamma) on the x_0 error (Hang et al. 2023)."""
    return jnp.minimum(1.0, gamma / process.as_float("snr", snr))


def truncated_snr_weight(snr: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Weight max(1, 1 / SNR) on the eps error, equal to max(SNR, 1) on the x_0 error (Salimans & Ho 2022)."""
    return jnp.maximum(1.0, 1.0 / process.as_float("snr", snr))


def p2_weight(snr: Float[ArrayLike, "*shape"], k: float = 1.0, gamma: float = 1.0) -> Float[Array, "*shape"]:
    """Weight 1 / (k + SNR)^gamma on the eps error (Choi et al. 2022, P2)."""
    return (k + process.as_float("snr", snr)) ** -gamma


WEIGHTINGS: dict[str, WeightFn] = {
    "snr": snr_weight,
    "min_snr": min_snr_weight,
    "truncated_snr": truncated_snr_weight,
    "p2": p2_weight,
}


def simple(
    key: Key[Array, ""],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str = "eps",
    weighting: str | WeightFn | None = None,
    timestep_sampler: str | TimestepSampler = timesteps.uniform,
) -> tuple[Float[Array, "B"], LossAux]:
    """L_simple (DDPM eq. 14): E || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2.

    The square is averaged over pixels and channels, as in DDPM's and OpenAI's code (DDIM's code sums).

    Args:
      key: draws t and eps.
      denoise_fn: its output has the shape of x_t. The second half of the channels (a learned variance) does not enter this
        loss.
      x_0: images in [-1, 1], or other data [B, ..., C]. One example [..., C] is x_0[None].
      prediction: the quantity that the network predicts: eps, x_0, v, x_prev or score.
      weighting: None or "none" for the plain squared error of the predicted quantity, as in OpenAI's code; for eps this is
        L_simple. Otherwise a weight on the **eps error** for any prediction (the eps error is SNR times the x_0 error and
        SNR/(1 + SNR) times the v error): "snr", "min_snr", "truncated_snr", "p2" (the functions above, with their published
        constants) or a function SNR [B] -> weight [B].
      timestep_sampler: a name in `timesteps.SAMPLERS`, or a `TimestepSampler`.
    Returns: (loss [B], LossAux).
    Raises: ValueError for an unknown prediction, weighting or timestep sampler, an output of another shape, weights that are
      not [B], an x_0 that is not float [B, ..., C], or a "truncated_snr" weight, which is infinite, for eps or score if
      alpha_bar ends at 0.
    """
    if weighting == "truncated_snr":
        process.check_terminal_snr(schedule, prediction)
    aux = _apply_denoise_fn(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    return aux.importance * _weight_of_target(schedule, aux, prediction, weighting) * aux.mse, aux


def vlb(
    key: Key[Array, ""],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: Clip = False,
    gray_levels: int | None = 256,
    timestep_sampler: str | TimestepSampler = timesteps.uniform,
) -> tuple[Float[Array, "B"], LossAux]:
    """The variational bound (DDPM eq. 5) without its constant L_T, in bits per dimension: T times the term at one drawn step.

    The mean loss is an unbiased estimate of `likelihood.bits_per_dim(...).total - .prior`. `timesteps.loss_second_moment`
    reduces the variance of this estimate (Improved DDPM section 3.3).

    Args:
      key, denoise_fn, x_0, prediction, timestep_sampler: as `simple`.
      variance, clip: as `process.p_mean_variance`; by default training does not clip, as in OpenAI's code (Ho's code clips).
      gray_levels: as `likelihood.decoder_log_prob`: 256 for images in [-1, 1], None for continuous data, with clip=False.
    Returns: (loss [B], LossAux). With gray levels or clip=True, an example with traced values outside [-1, 1] has a loss of
      NaN.
    Raises: ValueError as `simple`, for an output whose channels do not match `variance`, for eps or score if alpha_bar ends
      at 0, and for an x_0 outside [-1, 1] with gray levels or clip=True.
    """
    process.check_terminal_snr(schedule, prediction)
    aux = _apply_denoise_fn(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    bound = _bound(schedule, aux, aux.output, x_0, prediction, variance, clip, gray_levels)
    return aux.importance * bound, aux._replace(vlb=bound)


def hybrid(
    key: Key[Array, ""],
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: BatchLike,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: Clip = False,
    gray_levels: int | None = 256,
    weighting: str | WeightFn | None = None,
    vlb_weight: float = 0.001,
    timestep_sampler: str | TimestepSampler = timesteps.uniform,
) -> tuple[Float[Array, "B"], LossAux]:
    """L_hybrid = L_simple + vlb_weight L_vlb (Improved DDPM eq. 16), where the bound trains only the variance.

    In the bound, the first half of the output, which determines the mean, is constant (`stop_gradient`), so only L_simple
    trains the mean. The bound is in bits per dimension, summed over all T steps, and `vlb_weight` multiplies this sum.
    Published: 0.001 (OpenAI's code multiplies one sampled term by T / 1000; with --rescale_learned_sigmas False it multiplies
    by 1, a weight of 1 / T).

    Args: as `simple` and `vlb`.
    Returns: (loss [B], LossAux).
    Raises: ValueError as `vlb`, and for a fixed variance, which the bound cannot train.
    """
    if not variance.startswith("learned"):
        raise ValueError(
            f"variance={variance!r}: the hybrid loss trains a learned variance; use losses.simple, or learned_range"
        )
    process.check_terminal_snr(schedule, prediction)
    aux = _apply_denoise_fn(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    mean, values = process.split_variance(aux.output, aux.x_t, variance)
    assert values is not None  # the variance is learned
    detached = jnp.concatenate([jax.lax.stop_gradient(mean), values], axis=-1)
    bound = _bound(schedule, aux, detached, x_0, prediction, variance, clip, gray_levels)
    weight = _weight_of_target(schedule, aux, prediction, weighting)
    return aux.importance * (weight * aux.mse + jnp.asarray(vlb_weight, bound.dtype) * bound), aux._replace(vlb=bound)


def classify(
    key: Key[Array, ""],
    schedule: Schedule,
    logits_fn: LogitsFn,
    x_0: BatchLike,
    y: Integer[ArrayLike, "B"],
    *,
    timestep_sampler: str | TimestepSampler = timesteps.uniform,
) -> tuple[Float[Array, "B"], ClassifyAux]:
    """-log p(y | x_t, t), in nats, at a drawn timestep: trains the classifier of classifier guidance (ADM section 4).

    Args:
      key: draws t and eps.
      x_0: images in [-1, 1], or other data [B, ..., C].
      y: labels in 0 ... K - 1. A traced label outside this range has a loss of NaN.
      timestep_sampler: as `simple`.
    Returns: (loss [B], ClassifyAux).
    Raises: ValueError for logits of another shape, an x_0 that is not float [B, ..., C], weights that are not [B], or labels
      that are not int or out of range.
    """
    x_0, t, importance, _, x_t, time = _draw_noise(key, schedule, x_0, timestep_sampler)
    logits = process.as_float("the output of logits_fn", logits_fn(x_t, time)).astype(x_t.dtype)
    if logits.ndim != 2 or logits.shape[0] != x_0.shape[0]:
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
    "classify": classify,
}


def _per_example(name, x, batch_size):
    """Broadcasts x to [B]. Raises: ValueError for another shape, which would broadcast a loss [B] to [B, B]."""
    if jnp.shape(x) not in ((), (batch_size,)):
        raise ValueError(f"{name} must have shape [{batch_size}], one for each example; got {list(jnp.shape(x))}")
    return jnp.broadcast_to(x, batch_size)


def _draw_noise(key, schedule, x_0, timestep_sampler):
    """Draws t and eps. Returns (x_0 promoted, t, importance, eps, x_t, network time)."""
    x_0 = process.as_batch("x_0", x_0)
    key_t, key_eps = jax.random.split(key)
    if isinstance(timestep_sampler, str):
        timestep_sampler = timesteps.sampler_by_name(timestep_sampler)
    t, importance = timestep_sampler(key_t, x_0.shape[0], schedule.num_timesteps)
    t, importance = (
        _per_example(f"the {name} of timestep_sampler", x, x_0.shape[0])
        for name, x in (("timesteps", t), ("weights", importance))
    )
    eps = jax.random.normal(key_eps, x_0.shape, x_0.dtype)
    time = schedule.at(t, x_0).time
    return x_0, t, jnp.asarray(importance, x_0.dtype), eps, process.q_sample(schedule, x_0, t, eps), time


def _apply_denoise_fn(key, schedule, denoise_fn, x_0, prediction, timestep_sampler) -> LossAux:
    """Draws t and eps, calls the network and computes the error of its prediction."""
    x_0, t, importance, eps, x_t, time = _draw_noise(key, schedule, x_0, timestep_sampler)
    target = _target(schedule, x_0, x_t, t, eps, prediction)
    output = process.as_float("the output of denoise_fn", denoise_fn(x_t, time)).astype(x_t.dtype)
    predicted = output[..., : x_t.shape[-1]]
    if output.shape[-1] not in (x_0.shape[-1], 2 * x_0.shape[-1]) or predicted.shape != target.shape:
        raise ValueError(
            f"denoise_fn returned {output.shape} for x_t {x_t.shape}; it must return the shape of x_t, or twice its "
            "channels for a learned variance"
        )
    mse = jnp.mean(jnp.square(target - predicted), axis=range(1, x_0.ndim))
    return LossAux(t, importance, mse, None, eps, x_t, output)


def _bound(schedule, aux, output, x_0, prediction, variance, clip, gray_levels):
    """Returns T times the bound's term at the drawn steps, [B]."""
    term, _ = likelihood.bound_term(
        schedule,
        output,
        x_0,
        aux.x_t,
        aux.t,
        prediction=prediction,
        variance=variance,
        clip=clip,
        gray_levels=gray_levels,
    )
    return schedule.num_timesteps * term


def _target(schedule, x_0, x_t, t, eps, prediction):
    """Returns the training target."""
    at = schedule.at(t, x_0)
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    if prediction == "v":
        return at.alpha * eps - at.sigma * x_0
    if prediction == "x_prev":
        return process.q_posterior(schedule, x_0, x_t, t).mean
    if prediction == "score":
        return -eps / at.sigma
    raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(process.PREDICTIONS)}")


def _weight_of_target(schedule, aux, prediction, weighting):
    """Converts a weight on the eps error to a weight on the error of the predicted quantity, [B]."""
    if weighting is None or weighting == "none":
        return 1.0
    if not callable(weighting) and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; known: none, {', '.join(WEIGHTINGS)}")
    weight_fn = weighting if callable(weighting) else WEIGHTINGS[weighting]

    at = schedule.at(aux.t, aux.mse)
    # A lower bound keeps 1 / SNR finite where alpha_bar is 0, so that its product with the factor of v has its limit.
    snr = jnp.maximum(at.snr, 1e-20)
    eps_error_per_error = {
        "eps": lambda: 1.0,
        "x_0": lambda: snr,
        "v": lambda: snr / (1 + snr),
        "x_prev": lambda: snr / at.posterior_mean_coef_x_0**2,
        "score": lambda: at.sigma**2,
    }
    weight = _per_example("the result of weighting", weight_fn(snr), len(snr))
    return weight.astype(snr.dtype) * eps_error_per_error[prediction]()

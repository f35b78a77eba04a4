"""Training losses, as pure functions of a key, a schedule and any callable `denoise_fn(x_t, time) -> output`.

Each draws one timestep for each example and returns one loss for each, so that the caller chooses the mean, and the parts
that went into it: `simple` (DDPM's L_simple), `vlb` (the variational bound) and `hybrid` (Improved DDPM's sum of both, which
trains a learned variance). `classify` trains a classifier of noisy images instead, from labels.

Noise, network time and losses are float32, or float64 for a float64 x_0 under x64; lower precisions are promoted, also the
network's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import labels, likelihood, process, timesteps
from diffusion_jax.schedules import Schedule

LOSSES = ("simple", "vlb", "hybrid", "classify")


class Parts(NamedTuple):
    """What a loss saw.

    t: int32 [B]. importance: [B], the weight of the timestep sampler, already in the loss. mse: [B], the unweighted error of
    what is predicted. vlb: [B], T times the bound's term at t, in bits per dimension (an estimate of the whole bound but its
    constant L_T); None for `simple`. eps, x_t, output: as the images.
    """

    t: jax.Array
    importance: jax.Array
    mse: jax.Array
    vlb: jax.Array | None
    eps: jax.Array
    x_t: jax.Array
    output: jax.Array


class ClassifyParts(NamedTuple):
    """What `classify` saw.

    t, importance: as in `Parts`. accuracy: [B], 1 where the largest logit is the label's, else 0. x_t: as the images.
    logits: [B, K].
    """

    t: jax.Array
    importance: jax.Array
    accuracy: jax.Array
    x_t: jax.Array
    logits: jax.Array


def snr_weight(snr):
    """Weight 1 on the eps error, which is SNR on the x_0 error (Salimans & Ho 2022, "SNR")."""
    return jnp.ones_like(process.as_float("snr", snr))


def min_snr_weight(snr, gamma: float = 5.0):
    """Weight min(1, gamma / SNR) on the eps error, which is min(SNR, gamma) on the x_0 error (Hang et al. 2023)."""
    return jnp.minimum(1.0, gamma / process.as_float("snr", snr))


def truncated_snr_weight(snr):
    """Weight max(1, 1 / SNR) on the eps error, which is max(SNR, 1) on the x_0 error (Salimans & Ho 2022)."""
    return jnp.maximum(1.0, 1.0 / process.as_float("snr", snr))


def p2_weight(snr, k: float = 1.0, gamma: float = 1.0):
    """Weight 1 / (k + SNR)^gamma on the eps error (Choi et al. 2022, P2)."""
    return (k + process.as_float("snr", snr)) ** -gamma


WEIGHTINGS = {"snr": snr_weight, "min_snr": min_snr_weight, "truncated_snr": truncated_snr_weight, "p2": p2_weight}


def simple(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    *,
    prediction: str = "eps",
    weighting: str | Callable | None = None,
    timestep_sampler: str | Callable = timesteps.uniform,
) -> tuple[jax.Array, Parts]:
    """L_simple (DDPM eq. 14): E || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2.

    The square is a mean over pixels and channels, as in DDPM's and OpenAI's code (DDIM's sums).

    Args:
      key: draws t and eps.
      denoise_fn: (x_t [B, ...], network time float [B]) -> output with the shape of x_t. A second half of the channels (a
        learned variance) is left out of this loss.
      x_0: float [B, ...], images in [-1, 1].
      prediction: what the output stands for: eps, x_0, v, x_prev or score.
      weighting: None or "none": the plain squared error of whatever is predicted, as OpenAI's code does; for eps this is
        L_simple. Otherwise a weight of the **eps error**, whatever is predicted (the eps error is SNR times the x_0 error
        and SNR/(1 + SNR) times the v error): "snr", "min_snr", "truncated_snr", "p2" (the functions above, with their
        published constants) or a function SNR [B] -> weight [B].
      timestep_sampler: a name in `timesteps.SAMPLERS`, or any function of that form.
    Returns: (loss float [B], Parts).
    Raises: ValueError for an unknown prediction, weighting or timestep sampler, an output of another shape, an x_0 that is
      not float, or a "truncated_snr" weight, which is infinite, for eps or score where alpha_bar ends at 0.
    """
    if weighting == "truncated_snr":
        process.check_terminal_snr(schedule, prediction)
    parts = _draw(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    return parts.importance * _weight_of_target(schedule, parts, prediction, weighting) * parts.mse, parts


def vlb(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: bool | Callable = False,
    gray_levels: int | None = 256,
    timestep_sampler: str | Callable = timesteps.uniform,
) -> tuple[jax.Array, Parts]:
    """The variational bound (DDPM eq. 5) but its constant L_T, in bits per dimension: T times the term of one drawn step.

    Its mean estimates `likelihood.bits_per_dim(...).total - .prior` without bias. The noise of that estimate is what
    `timesteps.loss_second_moment` is for (Improved DDPM section 3.3).

    Args:
      key, denoise_fn, x_0, prediction, timestep_sampler: as `simple`.
      variance, clip: as `process.p_mean_variance`; training does not clip, as in OpenAI's code (Ho's does).
      gray_levels: as `likelihood.decoder_log_prob`.
    Returns: (loss float [B], Parts).
    Raises: ValueError as `simple`, for an output whose channels do not fit `variance`, and for eps or score where alpha_bar
      ends at 0.
    """
    process.check_terminal_snr(schedule, prediction)
    parts = _draw(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    bound = _bound(schedule, parts, parts.output, x_0, prediction, variance, clip, gray_levels)
    return parts.importance * bound, parts._replace(vlb=bound)


def hybrid(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: bool | Callable = False,
    gray_levels: int | None = 256,
    weighting: str | Callable | None = None,
    vlb_weight: float = 0.001,
    timestep_sampler: str | Callable = timesteps.uniform,
) -> tuple[jax.Array, Parts]:
    """L_hybrid = L_simple + vlb_weight L_vlb (Improved DDPM eq. 16), where the bound trains the variance alone.

    In the bound the first half of the output, which makes the mean, is a constant (`stop_gradient`): its gradient is that of
    L_simple. The bound is in bits per dimension and its weight is on the whole of it, whatever T; published: 0.001 (OpenAI's
    code multiplies one sampled term by T / 1000; with --rescale_learned_sigmas False by 1, which is a weight of 1 / T).

    Args: as `simple` and `vlb`.
    Returns: (loss float [B], Parts).
    Raises: as `vlb`, and ValueError for a fixed variance, which leaves the bound nothing to train.
    """
    if not variance.startswith("learned"):
        raise ValueError(
            f"variance={variance!r}: the hybrid loss trains a learned variance; use simple, or learned_range"
        )
    process.check_terminal_snr(schedule, prediction)
    parts = _draw(key, schedule, denoise_fn, x_0, prediction, timestep_sampler)
    mean, values = process.split_variance(parts.output, parts.x_t, variance)
    detached = jnp.concatenate([jax.lax.stop_gradient(mean), values], axis=-1)
    bound = _bound(schedule, parts, detached, x_0, prediction, variance, clip, gray_levels)
    weight = _weight_of_target(schedule, parts, prediction, weighting)
    return parts.importance * (weight * parts.mse + jnp.asarray(vlb_weight, bound.dtype) * bound), parts._replace(
        vlb=bound
    )


def classify(
    key, schedule: Schedule, logits_fn: Callable, x_0, y, *, timestep_sampler: str | Callable = timesteps.uniform
) -> tuple[jax.Array, ClassifyParts]:
    """-log p(y | x_t, t), in nats, at a drawn timestep: trains the classifier of classifier guidance (ADM section 4).

    Args:
      key: draws t and eps.
      logits_fn: (x_t [B, ...], network time float [B]) -> logits [B, K].
      x_0: float [B, ...], images in [-1, 1].
      y: int [B] in 0 ... K - 1. The loss of a traced label outside is NaN.
      timestep_sampler: as `simple`.
    Returns: (loss float [B], ClassifyParts).
    Raises: ValueError for logits of another shape, an x_0 that is not float, or labels that are not int or not in the range.
    """
    x_0, t, importance, _, x_t, time = _noise(key, schedule, x_0, timestep_sampler)
    logits = process.as_float("the output of logits_fn", logits_fn(x_t, time)).astype(x_t.dtype)
    if logits.ndim != 2 or logits.shape[0] != x_0.shape[0]:
        raise ValueError(
            f"logits_fn gave {logits.shape} for x_t {x_t.shape}; it must give [B, K], a logit for each class"
        )
    loss = -labels.log_prob(logits, y)
    accuracy = (logits.argmax(axis=1) == y).astype(loss.dtype)
    return importance * loss, ClassifyParts(t, importance, accuracy, x_t, logits)


def _timestep_sampler(sampler: str | Callable) -> Callable:
    if callable(sampler):
        return sampler
    if sampler == "loss_second_moment":
        raise ValueError(
            "timestep_sampler='loss_second_moment' needs the losses seen so far; give "
            "timesteps.loss_second_moment(history), with a history from timesteps.loss_history"
        )
    if sampler not in timesteps.SAMPLERS:
        raise ValueError(
            f"unknown timestep_sampler {sampler!r}; known: {', '.join(timesteps.SAMPLERS)}, or a function "
            "(key, batch_size, num_timesteps) -> (t, weight)"
        )
    return timesteps.SAMPLERS[sampler]


def _noise(key, schedule, x_0, timestep_sampler):
    """Draws t and eps: (x_0 promoted, t, importance, eps, x_t, network time)."""
    x_0 = process.as_float("x_0", x_0)
    if x_0.ndim == 0:
        raise ValueError("x_0 must have a batch axis [B, ...], got a single number")
    key_t, key_eps = jax.random.split(key)
    t, importance = _timestep_sampler(timestep_sampler)(key_t, x_0.shape[0], schedule.num_timesteps)
    eps = jax.random.normal(key_eps, x_0.shape, x_0.dtype)
    time = process.network_time(schedule, t, x_0)
    return x_0, t, jnp.asarray(importance, x_0.dtype), eps, process.q_sample(schedule, x_0, t, eps), time


def _draw(key, schedule, denoise_fn, x_0, prediction, timestep_sampler) -> Parts:
    """Draws t and eps, calls the network and compares its prediction with the target."""
    x_0, t, importance, eps, x_t, time = _noise(key, schedule, x_0, timestep_sampler)
    target = _target(schedule, x_0, x_t, t, eps, prediction)
    output = process.as_float("the output of denoise_fn", denoise_fn(x_t, time)).astype(x_t.dtype)
    predicted = output[..., : x_t.shape[-1]]
    if output.shape[-1] not in (x_0.shape[-1], 2 * x_0.shape[-1]) or predicted.shape != target.shape:
        raise ValueError(
            f"denoise_fn gave {output.shape} for x_t {x_t.shape}; it must keep the shape of x_t, or double its last axis "
            "for a learned variance"
        )
    mse = jnp.mean(jnp.square(target - predicted), axis=range(1, x_0.ndim))
    return Parts(t, importance, mse, None, eps, x_t, output)


def _bound(schedule, parts, output, x_0, prediction, variance, clip, gray_levels):
    """T times the bound's term at the drawn step, [B]."""
    term, _ = likelihood.bound_term(
        schedule,
        output,
        x_0,
        parts.x_t,
        parts.t,
        prediction=prediction,
        variance=variance,
        clip=clip,
        gray_levels=gray_levels,
    )
    return schedule.num_timesteps * term


def _target(schedule, x_0, x_t, t, eps, prediction):
    a, s = (
        process.lookup(schedule.sqrt_alpha_bar, t, x_0),
        process.lookup(schedule.sqrt_one_minus_alpha_bar, t, x_0),
    )
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    if prediction == "v":
        return a * eps - s * x_0
    if prediction == "x_prev":
        return process.q_posterior(schedule, x_0, x_t, t).mean
    if prediction == "score":
        return -eps / s
    raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(process.PREDICTIONS)}")


def _weight_of_target(schedule, parts, prediction, weighting):
    """A weight of the eps error, [B], turned into the weight of the predicted quantity's error."""
    if weighting is None or weighting == "none":
        return 1.0
    if not callable(weighting) and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; known: none, {', '.join(WEIGHTINGS)}")
    weighting = weighting if callable(weighting) else WEIGHTINGS[weighting]

    def table(values):
        return process.lookup(values, parts.t, parts.mse)

    # A floor keeps 1 / SNR finite where alpha_bar is 0, so that its product with a v error stays what it tends to.
    snr = jnp.maximum(table(schedule.snr), 1e-20)
    eps_error_per_error = {
        "eps": 1.0,
        "x_0": snr,
        "v": snr / (1 + snr),
        "x_prev": snr / table(schedule.posterior_mean_coef_x_0) ** 2,
        "score": table(schedule.sqrt_one_minus_alpha_bar) ** 2,
    }
    return jnp.asarray(weighting(snr), snr.dtype) * eps_error_per_error[prediction]

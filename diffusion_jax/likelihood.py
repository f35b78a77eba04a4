"""The variational bound on -log p(x_0), term by term, and the decoder of discretized data.

    E_q[ KL(q(x_T | x_0) || p(x_T))  +  sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))  -  log p(x_0 | x_1) ]
         L_T, the prior                 L_{t-1}, the transitions                              L_0, the decoder

(DDPM eq. 5), for any callable `denoise_fn(x_t, time) -> output`. Everything public is in bits per dimension, nats / (D ln 2)
for D numbers in an example, but `gaussian_kl` and `decoder_log_prob`, which are in nats. Index t of the tables holds
L_t for the 0-based t: L_0 is the decoder, index t >= 1 the transition from x_{t+1} to x_t of the papers.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffusion_jax import process
from diffusion_jax.schedules import Schedule

_LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
_LEAST_LOG_VARIANCE = -60.0
CDFS = ("exact", "tanh")


class BitsPerDim(NamedTuple):
    """The bound of each example, in bits per dimension, and its parts; [B], tables [B, K], K = T unless strata are drawn.

    total: prior + decoder + the transitions (their estimate, where strata are drawn).
    prior: L_T. decoder: L_0.
    standard_error: of `total` by the choice of steps; None where every step was visited.
    t: int32 [B, K], the index of each column of the tables. vlb: L_t there. mse, x_0_mse: mean squared errors of eps and of
      x_0, of the x_0 that the bound used (clipped, where it clips). All None where tables were not asked for.
    """

    total: jax.Array
    prior: jax.Array
    decoder: jax.Array
    standard_error: jax.Array | None
    t: jax.Array | None
    vlb: jax.Array | None
    mse: jax.Array | None
    x_0_mse: jax.Array | None


def gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2) -> jax.Array:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of every element, in nats; shapes broadcast."""
    arrays = (mean_1, log_variance_1, mean_2, log_variance_2)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    mean_1, log_variance_1, mean_2, log_variance_2 = (jnp.asarray(array, dtype) for array in arrays)
    d = log_variance_1 - log_variance_2
    return 0.5 * (jnp.expm1(d) - d + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2))


@jax.custom_jvp
def _log_cdf(z):
    """log of the standard normal CDF."""
    return log_ndtr(z)


@_log_cdf.defjvp
def _log_cdf_jvp(primals, tangents):
    # The derivative phi(z) / Phi(z) is a difference of logarithms of size z^2 / 2, which leaves no digits in float32 far
    # below 0; there its expansion takes over.
    (z,), (tangent,) = primals, tangents
    value = _log_cdf(z)
    far = jnp.minimum(z, -30.0)
    near = jnp.maximum(z, -30.0)
    ratio = jnp.where(z < -30.0, -far - 1 / far + 2 / far**3, jnp.exp(-0.5 * near**2 - _LOG_SQRT_2_PI - log_ndtr(near)))
    return value, ratio * tangent


def _tanh_cdf(z):
    """OpenAI's approximation of the standard normal CDF; at most 1.8e-4 off."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def decoder_log_prob(x_0, mean, log_variance, gray_levels: int | None = 256, cdf: str = "exact") -> jax.Array:
    """log p(x_0 | x_1) of every element, in nats: the Gaussian's mass in the bin of each gray level (DDPM eq. 13).

    Level k of `gray_levels` is x_0 = 2 k / (gray_levels - 1) - 1, and its bin reaches half way to its neighbors, the outermost ones
    to infinity, so the probabilities of all gray_levels sum to 1.

    Args:
      x_0, mean, log_variance: float, of one shape; a variance below exp(-60) counts as that.
      gray_levels: how many values the data has (256; scikit-learn's digits 17); x_0 is rounded to the nearest. None for
        continuous data: the log density of N(mean, variance) at x_0.
      cdf: "exact", or "tanh" for OpenAI's approximation with its floor of log 1e-12, to reproduce their figures.
    Raises: ValueError for fewer than 2 gray_levels, an unknown cdf, or arrays that are not float.
    """
    x_0, mean, log_variance = process.promote(x_0=x_0, mean=mean, log_variance=log_variance)
    if gray_levels is None:
        return -0.5 * jnp.square(x_0 - mean) * jnp.exp(-log_variance) - 0.5 * log_variance - _LOG_SQRT_2_PI
    if gray_levels < 2:
        raise ValueError(f"gray_levels={gray_levels} must be at least 2, or None for continuous data")
    if cdf not in CDFS:
        raise ValueError(f"unknown cdf {cdf!r}; known: {', '.join(CDFS)}")
    log_variance = jnp.maximum(log_variance, _LEAST_LOG_VARIANCE)
    inverse_sd = jnp.exp(-0.5 * log_variance)
    half = 1.0 / (gray_levels - 1)
    level = jnp.clip(jnp.round((x_0 + 1) / (2 * half)), 0, gray_levels - 1)
    # Edges come from the whole number of the level, so that neighbors share theirs to the bit: edges made from x_0 leave
    # gaps, which at a standard deviation of 1e-3 let the sum of probabilities miss 1 by 5e-5 in float32.
    lower = ((2 * level - 1) * half - 1 - mean) * inverse_sd
    upper = ((2 * level + 1) * half - 1 - mean) * inverse_sd
    first, last = level == 0, level == gray_levels - 1
    if cdf == "tanh":
        mass = jnp.where(last, 1.0, _tanh_cdf(upper)) - jnp.where(first, 0.0, _tanh_cdf(lower))
        return jnp.log(jnp.maximum(mass, 1e-12))

    # Mirrored to the side where the CDF is small and keeps its digits.
    mirrored = jnp.where(first, False, jnp.where(last, True, lower + upper > 0))
    a, b = jnp.where(mirrored, -upper, lower), jnp.where(mirrored, -lower, upper)
    edge = first | last
    # Each branch sees arguments that keep it finite where another one is taken, or its gradient would be NaN.
    log_b = _log_cdf(b)
    middle, width = 0.5 * (a + b), 2 * half * inverse_sd
    narrow = width * (1 + jnp.abs(middle)) < 0.05  # a difference of CDFs would cancel: the midpoint rule, to width^4
    z = jnp.where(narrow, middle, 0.0)
    w = jnp.where(narrow, width, 0.05)
    by_midpoint = -0.5 * z**2 - _LOG_SQRT_2_PI + math.log(2 * half) - 0.5 * log_variance
    by_midpoint += jnp.log1p(w**2 * (z**2 - 1) / 24)
    drop = jnp.where(edge | narrow, -1.0, _log_cdf(jnp.where(edge, b - 1, a)) - log_b)
    by_difference = log_b + jnp.where(edge, 0.0, jnp.log(-jnp.expm1(jnp.minimum(drop, -1e-30))))
    return jnp.where(narrow & ~edge, by_midpoint, by_difference)


def _bits(nats):
    """Mean over everything but the batch, in bits."""
    return jnp.mean(nats, axis=range(1, jnp.ndim(nats))) / math.log(2)


def prior_term(schedule: Schedule, x_0) -> jax.Array:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension; x_0 [B, ...] -> [B]. Nothing in it is learned."""
    x_0 = process.as_float("x_0", x_0)
    alpha_bar = jnp.asarray(schedule.alpha_bar[-1], x_0.dtype)
    return _bits(0.5 * (alpha_bar * jnp.square(x_0) - alpha_bar - jnp.log1p(-alpha_bar)))


def bound_term(
    schedule: Schedule,
    output,
    x_0,
    x_t,
    t,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool | Callable = True,
    gray_levels: int | None = 256,
    cdf: str = "exact",
) -> tuple[jax.Array, process.Reverse]:
    """One term of the bound, from a network's output at (x_t, t): L_0 where t is 0, else the KL of DDPM eq. 5.

    output: [B, ..., C], twice the channels for a learned variance; x_0, x_t: [B, ..., C]; t: int32 [B]; prediction, variance,
    clip: as `process.p_mean_variance`; gray_levels, cdf: as `decoder_log_prob`.
    Returns: (bits per dimension [B], the reverse step p(x_{t-1} | x_t) it was made with).
    """
    output, x_0, x_t = process.promote(output=output, x_0=x_0, x_t=x_t)
    reverse = process.p_mean_variance(schedule, output, x_t, t, prediction, variance, clip)
    posterior = process.q_posterior(schedule, x_0, x_t, t)
    # A network's own log variance may fall to where float32 has no exponential, here or in the branch not taken.
    log_variance = jnp.maximum(reverse.log_variance, _LEAST_LOG_VARIANCE)
    kl = gaussian_kl(posterior.mean, posterior.log_variance, reverse.mean, log_variance)
    decoder = -decoder_log_prob(x_0, reverse.mean, log_variance, gray_levels, cdf)
    return jnp.where(t == 0, _bits(decoder), _bits(kl)), reverse


def bits_per_dim(
    key,
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool | Callable = True,
    gray_levels: int | None = 256,
    cdf: str = "exact",
    strata: int | None = None,
    tables: bool = True,
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0) / D of every example (DDPM eq. 5; OpenAI's calc_bpd_loop), one draw of noise a
    step, in one scan.

    Args:
      key: the noise of every step, and the steps where strata are drawn.
      denoise_fn: (x_t [B, ...], network time float [B]) -> output.
      x_0: float [B, ...], images in [-1, 1].
      prediction, variance, clip: as `process.p_mean_variance`. Ho's and OpenAI's figures clip.
      gray_levels, cdf: as `decoder_log_prob`; None gray_levels for continuous data, whose "bits" are of a density and may be negative.
      strata: None visits all T steps. A number S visits 1 + 2 S of them: L_0, and two in each of S parts of the others (short
        ones where t is small and terms are large), drawn for each example on its own. The estimate is unbiased, and
        `standard_error` comes from the differences of those pairs.
      tables: False leaves the tables out, for memory that does not grow with T.
    Returns: BitsPerDim.
    Raises: ValueError as `process.p_mean_variance` and `decoder_log_prob`; where eps or the score is predicted and alpha_bar
      ends at 0; for strata outside 1 ... T - 1; for an x_0 that is not float.
    """
    process.check_terminal_snr(schedule, prediction)
    x_0 = process.as_float("x_0", x_0)
    batch, total_steps = x_0.shape[0], schedule.num_timesteps
    key_t, key_eps = jax.random.split(key)
    if strata is None:
        steps = jnp.broadcast_to(jnp.arange(total_steps, dtype=jnp.int32)[:, None], (total_steps, batch))
        sizes = jnp.ones(total_steps)
    else:
        steps, sizes = _drawn_steps(key_t, total_steps, strata, batch)

    def step(carry, row):
        total, squared_error, decoder, previous = carry
        i, t, size = row
        eps = jax.random.normal(jax.random.fold_in(key_eps, i), x_0.shape, x_0.dtype)
        x_t = process.q_sample(schedule, x_0, t, eps)
        time = process.network_time(schedule, t, x_t)
        output = process.as_float("the output of denoise_fn", denoise_fn(x_t, time)).astype(x_t.dtype)
        term, reverse = bound_term(
            schedule,
            output,
            x_0,
            x_t,
            t,
            prediction=prediction,
            variance=variance,
            clip=clip,
            gray_levels=gray_levels,
            cdf=cdf,
        )
        eps_hat = process.to_eps(schedule, reverse.x_0, x_t, t, "x_0")
        # Rows 1 and 2, 3 and 4, ... are the pairs of one stratum, whose sum is estimated by size (first + second) / 2.
        second = (i > 0) & (i % 2 == 0)
        squared_error += jnp.where(second, jnp.square(size * (term - previous)), 0.0)
        carry = (total + size * term, squared_error, jnp.where(i == 0, term, decoder), term)
        errors = [jnp.mean(jnp.square(e), axis=range(1, x_0.ndim)) for e in (eps_hat - eps, reverse.x_0 - x_0)]
        return carry, (term, *errors) if tables else None

    zeros = jnp.zeros(batch, x_0.dtype)
    rows = (jnp.arange(len(sizes)), steps, sizes.astype(x_0.dtype))
    (total, squared_error, decoder, _), columns = jax.lax.scan(step, (zeros,) * 4, rows)
    prior = prior_term(schedule, x_0)
    return BitsPerDim(
        prior + total,
        prior,
        decoder,
        None if strata is None else jnp.sqrt(squared_error),
        *([steps.T, *(column.T for column in columns)] if tables else [None] * 4),
    )


def rate_distortion(prior, vlb, x_0_mse) -> tuple[jax.Array, jax.Array]:
    """Progressive coding (DDPM section 4.3): what is paid until x_t is known, and how well it tells x_0.

    Rate at index t: L_T + sum_{s > t} L_s, bits per dimension. Distortion: the root mean squared error of the x_0 predicted
    from x_t, on the 0-255 scale. The rest, L_t and below, makes the code lossless.

    Args: prior [...]; vlb, x_0_mse [..., T], every step's, of examples or averaged over them.
    Returns: (rate, distortion) [..., T].
    """
    prior, vlb, x_0_mse = process.promote(prior=prior, vlb=vlb, x_0_mse=x_0_mse)
    after = jnp.flip(jnp.cumsum(jnp.flip(vlb, -1), -1), -1) - vlb
    return prior[..., None] + after, 127.5 * jnp.sqrt(x_0_mse)


def _drawn_steps(key, total_steps: int, strata: int, batch: int):
    """Index 0, then two draws of each stratum of 1 ... T - 1. Returns t int32 [1 + 2 S, B] and the weight of each row."""
    if not 1 <= strata <= total_steps - 1:
        raise ValueError(f"strata={strata} must lie in 1 ... {total_steps - 1}, or be None for all steps")
    # Terms fall off roughly as 1 / t, so parts of equal ratio, not of equal length, have sums of like size.
    edges = [1]
    for left in range(strata, 0, -1):
        ratio = (total_steps / edges[-1]) ** (1 / left)
        edges.append(max(edges[-1] + 1, round(edges[-1] * ratio)))
    low, size = np.repeat(edges[:-1], 2), np.repeat(np.diff(edges), 2)
    drawn = jax.random.randint(key, (2 * strata, batch), low[:, None], (low + size)[:, None], jnp.int32)
    return jnp.concatenate([jnp.zeros((1, batch), jnp.int32), drawn]), jnp.asarray(np.append(1.0, size / 2))

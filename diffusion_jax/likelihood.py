"""The variational bound on -log p(x_0), term by term, and the decoder of discretized data.

    E_q[ KL(q(x_T | x_0) || p(x_T))  +  sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))  -  log p(x_0 | x_1) ]
         L_T, the prior                 L_{t-1}, the transitions                              L_0, the decoder

(DDPM eq. 5), for a `Denoiser` or any callable (x_t, time) -> eps. Results are in bits per dimension, nats / (D ln 2) for
examples with D numbers; `gaussian_kl` and `decoder_log_prob` return nats. Index t of a table holds L_t for the 0-based t:
L_0 is the decoder, and index t >= 1 is the papers' transition from x_{t+1} to x_t.

Gray levels, and clipping x_0, assume data in [-1, 1], with a tolerance of 1/32 for rounding. Other data need
gray_levels=None and clip=False: otherwise values outside [-1, 1] raise ValueError, or give NaN if they are traced.

Results are float32, or float64 for float64 arrays under x64; lower precisions are promoted before any arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import log_ndtr
from jaxtyping import Array, ArrayLike, Float, Int, Key

from diffusion_jax import process
from diffusion_jax.arrays import as_batch, as_float, promote
from diffusion_jax.denoiser import Denoiser, as_denoiser, convert
from diffusion_jax.errors import require_known, require_number
from diffusion_jax.schedules import Schedule
from diffusion_jax.types import Clip, DenoiseFn, Index

_LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
_MIN_LOG_VARIANCE = -60.0
# Images that were scaled in bfloat16, which has a spacing of 1/128 at 1, may leave [-1, 1] by a few roundings.
_LARGEST = 1 + 4 / 128
CDFS = ("exact", "tanh")


class BitsPerDim(NamedTuple):
    """The bound of each example in bits per dimension, its terms, and tables with K columns: T, or 1 + 2 S for S strata.

    total: prior + decoder + transitions; with strata, the sum of the transitions is estimated.
    prior: L_T. decoder: L_0.
    standard_error: the error of `total` from the random choice of steps; None if every step was visited.
    t: the index of each table column. vlb: L_t at t. mse, x_0_mse: mean squared errors of eps and x_0, computed from the x_0
      in the bound (after the clip). t, vlb, mse and x_0_mse are None with tables=False.
    """

    total: Float[Array, "B"]
    prior: Float[Array, "B"]
    decoder: Float[Array, "B"]
    standard_error: Float[Array, "B"] | None
    t: Int[Array, "B K"] | None
    vlb: Float[Array, "B K"] | None
    mse: Float[Array, "B K"] | None
    x_0_mse: Float[Array, "B K"] | None


def gaussian_kl(
    mean_1: Float[ArrayLike, "*#shape"],
    log_variance_1: Float[ArrayLike, "*#shape"],
    mean_2: Float[ArrayLike, "*#shape"],
    log_variance_2: Float[ArrayLike, "*#shape"],
) -> Float[Array, "*shape"]:
    """Returns KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of every element, in nats; shapes broadcast."""
    arrays = (mean_1, log_variance_1, mean_2, log_variance_2)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    mean_1, log_variance_1, mean_2, log_variance_2 = (jnp.asarray(array, dtype) for array in arrays)
    d = log_variance_1 - log_variance_2
    return 0.5 * (jnp.expm1(d) - d + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2))


@jax.custom_jvp
def _log_cdf(z):
    """Returns the log of the standard normal CDF."""
    return log_ndtr(z)


@_log_cdf.defjvp
def _log_cdf_jvp(primals, tangents):
    # To compute the derivative phi(z) / Phi(z), logarithms of size z^2 / 2 are subtracted. Far below 0, the difference has no
    # correct digits in float32, so an asymptotic expansion replaces it.
    (z,), (tangent,) = primals, tangents
    value = _log_cdf(z)
    far = jnp.minimum(z, -30.0)
    near = jnp.maximum(z, -30.0)
    ratio = jnp.where(z < -30.0, -far - 1 / far + 2 / far**3, jnp.exp(-0.5 * near**2 - _LOG_SQRT_2_PI - log_ndtr(near)))
    return value, ratio * tangent


def _tanh_cdf(z):
    """Returns OpenAI's approximation of the standard normal CDF, with an error of at most 1.8e-4."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def in_model_range(x_0: Float[Array, "*shape"], gray_levels: int | None, clip: Clip = False) -> Float[Array, "*shape"]:
    """Returns x_0, with NaN for traced values outside [-1, 1] if gray levels or a clip assume this range.

    Raises: ValueError for values outside [-1, 1] if x_0 is not traced.
    """
    is_clipped = isinstance(clip, bool | np.bool_) and bool(clip)  # a function may have any range
    if gray_levels is None and not is_clipped:
        return x_0
    if isinstance(x_0, Tracer):
        return jnp.where(jnp.abs(x_0) > _LARGEST, jnp.nan, x_0)
    values = np.asarray(x_0)
    outside = np.abs(values) > _LARGEST
    if outside.any():
        assumed = [f"gray_levels={gray_levels}"] * (gray_levels is not None) + ["clip=True"] * is_clipped
        others = ["gray_levels=None"] * (gray_levels is not None) + ["clip=False"] * is_clipped
        raise ValueError(
            f"x_0 has the value {values[outside].flat[0]:g}, outside of [-1, 1], the range for {' and '.join(assumed)}; "
            f"scale images to it, and use {' and '.join(others)} for other data"
        )
    return x_0


def decoder_log_prob(
    x_0: Float[ArrayLike, "*#shape"],
    mean: Float[ArrayLike, "*#shape"],
    log_variance: Float[ArrayLike, "*#shape"],
    gray_levels: int | None = 256,
    cdf: str = "exact",
) -> Float[Array, "*shape"]:
    """Returns log p(x_0 | x_1) of every element, in nats: the Gaussian mass in each gray level's bin (DDPM eq. 13).

    With L gray levels, level k is x_0 = 2 k / (L - 1) - 1. Each bin reaches halfway to its neighbors, and the outermost bins
    reach to infinity, so the probabilities of all levels sum to 1.

    Args:
      log_variance: with gray levels, values below -60 count as -60.
      gray_levels: L, the data's number of gray levels in [-1, 1] (256; 17 for scikit-learn's digits); x_0 is rounded to the
        nearest level. None for continuous data: returns the log density of N(mean, variance) at x_0.
      cdf: "exact", or "tanh" for OpenAI's approximation with its lower bound log 1e-12, to reproduce OpenAI's numbers.
        Without gray levels, cdf is neither used nor checked.
    Raises: ValueError for fewer than 2 gray levels, an unknown cdf, arrays that are not float, or an x_0 outside [-1, 1] with
      gray levels (NaN if x_0 is traced).
    """
    x_0, mean, log_variance = promote(x_0=x_0, mean=mean, log_variance=log_variance)
    x_0 = in_model_range(x_0, gray_levels)
    if gray_levels is None:
        return -0.5 * jnp.square(x_0 - mean) * jnp.exp(-log_variance) - 0.5 * log_variance - _LOG_SQRT_2_PI
    require_number("gray_levels, if not None for continuous data,", gray_levels, 2)
    require_known("cdf", cdf, CDFS)
    log_variance = jnp.maximum(log_variance, _MIN_LOG_VARIANCE)
    inverse_sd = jnp.exp(-0.5 * log_variance)
    half = 1.0 / (gray_levels - 1)
    level = jnp.clip(jnp.round((x_0 + 1) / (2 * half)), 0, gray_levels - 1)
    # Edges are computed from the integer k, so that neighboring bins share bit-identical edges: with edges computed from
    # x_0, and a standard deviation of 1e-3, the probabilities sum to 1 only within 5e-5 in float32.
    lower = ((2 * level - 1) * half - 1 - mean) * inverse_sd
    upper = ((2 * level + 1) * half - 1 - mean) * inverse_sd
    first, last = level == 0, level == gray_levels - 1
    if cdf == "tanh":
        mass = jnp.where(last, 1.0, _tanh_cdf(upper)) - jnp.where(first, 0.0, _tanh_cdf(lower))
        return jnp.log(jnp.maximum(mass, 1e-12))

    # Bins are mirrored to the side where the CDF is small, because a CDF near 1 loses digits.
    mirrored = jnp.where(first, False, jnp.where(last, True, lower + upper > 0))
    a, b = jnp.where(mirrored, -upper, lower), jnp.where(mirrored, -lower, upper)
    edge = first | last
    # The branch that is not taken gets finite arguments, because otherwise its gradient would be NaN.
    log_b = _log_cdf(b)
    middle, width = 0.5 * (a + b), 2 * half * inverse_sd
    narrow = width * (1 + jnp.abs(middle)) < 0.05  # CDF differences would cancel; the midpoint rule errs by O(width^4)
    z = jnp.where(narrow, middle, 0.0)
    w = jnp.where(narrow, width, 0.05)
    by_midpoint = -0.5 * z**2 - _LOG_SQRT_2_PI + math.log(2 * half) - 0.5 * log_variance
    by_midpoint += jnp.log1p(w**2 * (z**2 - 1) / 24)
    drop = jnp.where(edge | narrow, -1.0, _log_cdf(jnp.where(edge, b - 1, a)) - log_b)
    by_difference = log_b + jnp.where(edge, 0.0, jnp.log(-jnp.expm1(jnp.minimum(drop, -1e-30))))
    return jnp.where(narrow & ~edge, by_midpoint, by_difference)


def _bits(nats):
    """Returns the mean over all axes except the batch axis, converted from nats to bits."""
    return jnp.mean(nats, axis=range(1, jnp.ndim(nats))) / math.log(2)


def prior_term(schedule: Schedule, x_0: Float[ArrayLike, "B *shape"]) -> Float[Array, "B"]:
    """Returns L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension; the network does not affect it."""
    x_0 = as_float("x_0", x_0)
    alpha_bar = jnp.asarray(schedule.alpha_bar[-1], x_0.dtype)
    return _bits(0.5 * (alpha_bar * jnp.square(x_0) - alpha_bar - jnp.log1p(-alpha_bar)))


def bound_term(
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: Float[ArrayLike, "B *shape"],
    x_t: Float[ArrayLike, "B *shape"],
    t: Index,
    *,
    gray_levels: int | None = 256,
    cdf: str = "exact",
) -> tuple[Float[Array, "B"], process.Reverse]:
    """Computes one term of the bound at (x_t, t): L_0 where t is 0, else the KL of DDPM eq. 5.

    denoiser: as `process.p_mean_variance`. gray_levels, cdf: as `decoder_log_prob`.
    Returns: (bits per dimension [B], the reverse step p(x_{t-1} | x_t) that this term uses).
    Raises: ValueError as `process.p_mean_variance` and `decoder_log_prob`, and for an x_0 outside [-1, 1] with gray levels
      or a clip to this range (NaN if x_0 is traced).
    """
    denoiser, (x_0, x_t) = as_denoiser(denoiser), promote(x_0=x_0, x_t=x_t)
    x_0 = in_model_range(x_0, gray_levels, denoiser.clip)
    reverse = process.p_mean_variance(schedule, denoiser, x_t, t)
    posterior = process.q_posterior(schedule, x_0, x_t, t)
    # The exponential of a small learned log variance can underflow to 0 in float32, even in the branch that is not taken.
    log_variance = jnp.maximum(reverse.log_variance, _MIN_LOG_VARIANCE)
    kl = gaussian_kl(posterior.mean, posterior.log_variance, reverse.mean, log_variance)
    decoder = -decoder_log_prob(x_0, reverse.mean, log_variance, gray_levels, cdf)
    return jnp.where(t == 0, _bits(decoder), _bits(kl)), reverse


def bits_per_dim(
    key: Key[Array, ""],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: Float[ArrayLike, "B *shape"],
    *,
    gray_levels: int | None = 256,
    cdf: str = "exact",
    strata: int | None = None,
    tables: bool = True,
) -> BitsPerDim:
    """Computes the variational bound on -log2 p(x_0) / D of every example (DDPM eq. 5; OpenAI's calc_bpd_loop).

    Noise is drawn once per step, in one scan.

    Args:
      key: draws the noise of every step and, with strata, the steps.
      denoiser: as `process.p_mean_variance`; a plain function predicts eps, with the variance fixed_large and a clip. Ho's
        and OpenAI's published numbers use a clip. On the levels of a path, the bound with fixed_large is near the bound with
        the exact variance; fixed_small needs many levels that are evenly spaced in log SNR.
      x_0: images in [-1, 1]; other data [B, ..., C] with gray_levels=None and clip=False.
      gray_levels, cdf: as `decoder_log_prob`. For continuous data (None) the bits measure the density of x_0 and may be
        negative; add `standardization_bits` for the density of the data before standardization.
      strata: None visits all T steps. A number S visits 1 + 2 S steps, drawn for each example: index 0, and two steps in each
        of S intervals (short intervals where t is small and terms are large). The estimate is unbiased; the differences
        within the pairs give `standard_error`.
      tables: False omits the tables, so that memory does not grow with T.
    Raises: ValueError as `process.p_mean_variance` and `decoder_log_prob`; for prediction eps or score if alpha_bar ends at
      0; for strata outside 1 ... T - 1; for an x_0 that is not float [B, ..., C]; for an x_0 outside [-1, 1] with gray levels
      or clip=True. Traced values outside make all fields of the example NaN, except t.
    """
    denoiser, total_steps = as_denoiser(denoiser), schedule.num_timesteps
    process.check_terminal_snr(schedule, denoiser.prediction)
    x_0 = in_model_range(as_batch("x_0", x_0), gray_levels, denoiser.clip)
    batch = x_0.shape[0]
    key_t, key_eps = jax.random.split(key)
    if strata is None:
        steps = jnp.broadcast_to(jnp.arange(total_steps, dtype=jnp.int32)[:, None], (total_steps, batch))
        sizes = jnp.ones(total_steps, x_0.dtype)
    else:
        pairs, pair_sizes = _draw_pairs(key_t, total_steps, strata, batch)
        steps = jnp.concatenate([jnp.zeros((1, batch), jnp.int32), pairs.reshape(-1, batch)])
        # The sum over a stratum is estimated as its size times the mean of its pair.
        sizes = jnp.asarray(np.append(1.0, np.repeat(pair_sizes / 2, 2)), x_0.dtype)

    def step(carry, row) -> tuple[Any, Any]:
        total, decoder = carry
        i, t, size = row
        eps = jax.random.normal(jax.random.fold_in(key_eps, i), x_0.shape, x_0.dtype)
        x_t = process.q_sample(schedule, x_0, t, eps)
        term, reverse = bound_term(schedule, denoiser, x_0, x_t, t, gray_levels=gray_levels, cdf=cdf)
        eps_hat = convert(reverse.x_0, x_t, schedule.at(t, x_t), "x_0", "eps")
        carry = total + size * term, jnp.where(i == 0, term, decoder)
        errors = [jnp.mean(jnp.square(e), axis=range(1, x_0.ndim)) for e in (eps_hat - eps, reverse.x_0 - x_0)]
        return carry, (term, *errors) if tables or strata else None

    zeros = jnp.zeros(batch, x_0.dtype)
    (total, decoder), columns = jax.lax.scan(step, (zeros, zeros), (jnp.arange(len(sizes)), steps, sizes))
    standard_error = None
    if strata is not None:
        first, second = jnp.moveaxis(columns[0][1:].reshape(strata, 2, batch), 1, 0)
        standard_error = jnp.linalg.norm(sizes[1::2, None] * (second - first), axis=0)
    prior = prior_term(schedule, x_0)
    in_rows = [steps.T, *(column.T for column in columns)] if tables else [None] * 4
    return BitsPerDim(prior + total, prior, decoder, standard_error, *in_rows)


def standardization_bits(scale: Float[ArrayLike, "*#shape"]) -> Float[Array, ""]:
    """Returns the bits per dimension to add for x = (data - offset) / scale, so that the density is in data units.

    By the change of variables -log p(data) = -log p(x) + sum log |scale|, so the result is the mean of log2 |scale|. Add it
    to `bits_per_dim(...).total` and `.decoder` for continuous data, and to the likelihood of the probability-flow ODE. For
    nats, multiply by ln 2.

    scale: not 0; one per channel [C], one number, or an array with the data's spatial shape.
    """
    return jnp.mean(jnp.log2(jnp.abs(as_float("scale", scale))))


def rate_distortion(
    prior: Float[ArrayLike, "*batch"], vlb: Float[ArrayLike, "*batch T"], x_0_mse: Float[ArrayLike, "*batch T"]
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Returns the rate and distortion of progressive coding (DDPM section 4.3).

    Rate at index t: the bits per dimension received when x_t is known, L_T + sum_{s > t} L_s; the remaining terms (L_t and
    below) make the code lossless. Distortion: the root mean squared error of the x_0 predicted from x_t, on the 0-255 scale.

    The tables must hold every step, for each example or averaged over examples.
    Returns: (rate, distortion).
    """
    prior, vlb, x_0_mse = promote(prior=prior, vlb=vlb, x_0_mse=x_0_mse)
    after = jnp.flip(jnp.cumsum(jnp.flip(vlb, -1), -1), -1) - vlb
    return prior[..., None] + after, 127.5 * jnp.sqrt(x_0_mse)


def _draw_pairs(key, total_steps: int, strata: int, batch: int):
    """Draws two steps in each stratum of 1 ... T - 1. Returns t int32 [S, 2, B] and the sizes of the strata [S]."""
    require_number("strata, if not None for all steps,", strata, 1, total_steps - 1)
    # Terms decrease roughly as 1 / t, so strata whose ends have equal ratios, not equal differences, have similar sums.
    edges = [1]
    for remaining in range(strata, 0, -1):
        ratio = (total_steps / edges[-1]) ** (1 / remaining)
        edges.append(max(edges[-1] + 1, round(edges[-1] * ratio)))
    low, high = (np.asarray(ends)[:, None, None] for ends in (edges[:-1], edges[1:]))
    return jax.random.randint(key, (strata, 2, batch), low, high, jnp.int32), np.diff(edges)

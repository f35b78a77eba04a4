"""Exact likelihood with the probability-flow ODE (Song et al. 2021, section 4.3), solved adaptively by diffrax.

The ODE maps x_0 to noise deterministically, and the density follows by the instantaneous change of variables. With
x = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1, and time l = log(sigma / alpha) = -log_snr / 2, the ODE is

    dx/dl = sigma (eps_theta(x) - sigma x),      d log p(x) / dl = -div = sigma^2 D - sigma tr(d eps_theta / dx),

in which no beta appears and every term has order 1. The ODE is solved from the first noise level of the training schedule to
the last level with a signal, where the density is N(0, I). The result is the density of **x_t at the first level** (sigma
0.01 for linear-1000); `bits_per_dim` computes the likelihood of images from this density.

The ODE does not use the steps of the schedule, so a respaced schedule has the likelihood of the original schedule. (Index 0
of a respaced schedule may have more noise: a "trailing" spacing leaves the cleanest steps out.) If the log SNR is infinite
at an end of the path, as for rectified_flow, the ODE begins or ends at the outermost step of `schedule` with a finite log
SNR, so the likelihood depends on the spacing.

The ODE and the ancestral chain are different models: neither likelihood bounds the other. This module needs the extra `ode`.

Matrix products use full float32 (`jax.default_matmul_precision("highest")`) unless the network sets another precision: by
default, GPUs and TPUs round the inputs of products, and the solver would integrate the rounding errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import likelihood, process
from diffusion_jax.arrays import as_float
from diffusion_jax.denoiser import Denoiser, as_denoiser
from diffusion_jax.errors import require_known, require_number
from diffusion_jax.schedules import Schedule

DEQUANTIZATIONS = ("uniform", "variational", "none")


class OdeDensity(NamedTuple):
    """log_density: nats [B], NaN if the solver failed. x_T: the final noise [B, ...]. num_steps: steps of the solver."""

    log_density: jax.Array
    x_T: jax.Array
    num_steps: jax.Array


def log_density(
    key,
    schedule: Schedule,
    denoiser: Denoiser | Callable,
    x,
    *,
    trace: str | int = "hutchinson",
    tolerance: float = 1e-5,
    max_steps: int = 4096,
    time: ArrayLike | None = None,
) -> OdeDensity:
    """Computes log p(x) under the probability-flow ODE, for x at the noise level of `time`.

    Args:
      key: the key for the random vectors of the trace.
      denoiser: a `Denoiser`, whose clip, limits and variance are ignored, or a function (x_t [B, ...], network time float
        [B], fractional) -> eps. The prediction must not be x_prev.
      x: float [B, *spatial, C]: vectors, series, images or volumes. All examples share the solver's steps.
      trace: "hutchinson", the unbiased estimate v^T (d eps / dx) v with a vector v of random signs (FFJORD); an int, the mean
        estimate over this number of vectors; "exact", computed with D derivatives.
      tolerance: relative and absolute tolerance of the solver. max_steps: the solver fails after this many steps.
      time: the network time of x, a number; None for the path's start, or if the log SNR is infinite there, for the
        schedule's first timestep.
    Returns: OdeDensity.
    Raises: ValueError for an unknown trace, prediction x_prev, a tolerance that is not above 0, an output with another shape,
      or prediction eps or score if alpha_bar ends at 0.
    """
    denoiser = dataclasses.replace(as_denoiser(denoiser), clip=False, limits=())
    process.check_terminal_snr(schedule, denoiser.prediction)
    num_vectors = trace if isinstance(trace, int) else 1
    if trace not in ("hutchinson", "exact", num_vectors) or num_vectors < 1:
        raise ValueError(f"unknown trace {trace!r}; known: hutchinson, exact, or a number of vectors")
    require_number("tolerance", tolerance, 0, above=True)
    x = as_float("x", x)
    dimensions = math.prod(x.shape[1:])
    if trace == "exact":
        vectors = jnp.arange(dimensions)  # indices of unit vectors; all D vectors at once would need D^2 numbers
    else:
        vectors = jax.random.rademacher(key, (num_vectors, *x.shape), x.dtype)
    scale = 1.0 if trace == "exact" else 1.0 / num_vectors

    def derivative(half_log_ratio, state, _):
        x, _ = state
        log_snr = -2 * half_log_ratio
        level = schedule.path.at_log_snr(log_snr, x)

        # v^T J v from J^T v: in loops on CPUs, the U-Net's gradients are faster than its forward derivatives.
        eps, transposed = jax.vjp(lambda x: denoiser(x, level).eps, x)

        def directional(vector):
            if trace == "exact":
                vector = jax.nn.one_hot(vector, dimensions, dtype=x.dtype).reshape(x.shape[1:])
            vector = jnp.broadcast_to(vector, x.shape)
            return jnp.sum(vector * transposed(vector)[0], axis=range(1, x.ndim))

        eps_trace = scale * jnp.sum(jax.lax.map(directional, vectors), axis=0)
        sigma = level.sigma
        return sigma * (eps - sigma * x), sigma * eps_trace - sigma**2 * dimensions

    start, end = _finite_ends(schedule, x.dtype)
    start = start if time is None else -0.5 * schedule.path.log_snr(jnp.asarray(time, x.dtype))
    with jax.default_matmul_precision("highest"):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(derivative),
            diffrax.Tsit5(),
            t0=start,
            t1=end,
            dt0=None,
            y0=(x, jnp.zeros(x.shape[0], x.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=max_steps,
            throw=False,
        )
    assert solution.ys is not None
    x_T, divergence = (leaf[0] for leaf in solution.ys)
    log_prior = -0.5 * jnp.sum(jnp.square(x_T), axis=range(1, x.ndim)) - 0.5 * dimensions * math.log(2 * math.pi)
    solved = solution.result == diffrax.RESULTS.successful
    return OdeDensity(jnp.where(solved, log_prior + divergence, jnp.nan), x_T, solution.stats["num_steps"])


def _finite_ends(schedule: Schedule, dtype) -> list[jax.Array]:
    """Returns log(sigma / alpha) at both ends of the path; if it is infinite, at the schedule's outermost finite step."""
    steps = schedule.timesteps[0], schedule.timesteps[-2:][0] if schedule.zero_terminal_snr else schedule.timesteps[-1]
    ends = []
    for end, step in zip(schedule.path.interval, steps, strict=True):
        log_snr = schedule.path.log_snr(jnp.asarray(end, dtype))
        ends.append(-0.5 * jnp.where(jnp.isinf(log_snr), schedule.path.log_snr(jnp.asarray(step, dtype)), log_snr))
    return ends


def bits_per_dim(
    key,
    schedule: Schedule,
    denoiser: Denoiser | Callable,
    x_0,
    *,
    dequantization: str = "uniform",
    gray_levels: int | None = 256,
    trace: str | int = "hutchinson",
    tolerance: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Computes -log2 P(x_0) / D of images under the ODE: an upper bound, estimated with one draw of the dequantization.

    Images have D numbers with `gray_levels` values each, spaced w = 2 / (gray_levels - 1) apart in [-1, 1]; x_0 is rounded to
    the nearest value. p is the density at the first noise level of the training schedule, also if `schedule` is respaced;
    if the log SNR is infinite at the path's start, p is the density at the first step of `schedule`.

    uniform: the model is "draw x ~ p and round", so P(x_0) is the integral of p over the cell around x_0, with volume w^D. By
      Jensen, -log2 P <= E_u[-log2 p(x_0 + w u)] - D log2 w with u uniform on [-1/2, 1/2]^D. The offset -log2 w is
      log2(127.5) = 6.994 bits for 256 levels. Score-based papers scale images to [0, 1) with 256 cells, so their offset
      is 8; in [-1, 1) it is 7, because w is 2/256 instead of 2/255.
    variational: the model draws x_1 ~ p, and then x_0 from P(x_0 | x_1), the decoder of L_0. With q(x_1 | x_0),
      one step of the forward process, as the variational distribution, -log2 P <= E_q[-log2 p(x_1) + log2 q(x_1 | x_0)
      - log2 P(x_0 | x_1)], without an offset, because the decoder includes it. x_1 is at index 0 of `schedule`, where a
      respaced schedule may have more noise.
    none: for continuous data. The result is -log2 p(x_0) / D, which may be negative; x_0 is used as if it had the first noise
      level. For standardized data, add `likelihood.standardization_bits`.

    Args: as `log_density`; the variational decoder uses the denoiser's variance, a clip to [-1, 1] and the exact CDF;
      gray_levels: may be None for continuous data with dequantization "none".
    Returns: (bits per dimension [B], num_steps of the solver).
    Raises: ValueError as `log_density`, for an unknown dequantization, and unless it is "none", for fewer than 2 gray levels
      and for an x_0 outside [-1, 1] (a traced x_0 gives NaN instead).
    """
    require_known("dequantization", dequantization, DEQUANTIZATIONS)
    x_0 = as_float("x_0", x_0)
    if dequantization != "none":
        if gray_levels is None or gray_levels < 2:
            raise ValueError(
                f"gray_levels={gray_levels}: dequantization={dequantization!r} is for data of at least 2 gray levels"
            )
        x_0 = likelihood.in_model_range(x_0, gray_levels)
        x_0 = jnp.round((x_0 + 1) * ((gray_levels - 1) / 2)) * (2 / (gray_levels - 1)) - 1
    axes, dimensions, time = range(1, x_0.ndim), math.prod(x_0.shape[1:]), None
    key_x, key_trace = jax.random.split(key)
    first = jnp.zeros(x_0.shape[0], jnp.int32)
    x, nats = x_0, jnp.zeros(x_0.shape[0], x_0.dtype)  # the density's argument, and the dequantization's cost
    if dequantization == "uniform":
        assert gray_levels is not None
        width = 2 / (gray_levels - 1)
        x = x_0 + width * jax.random.uniform(key_x, x_0.shape, x_0.dtype, minval=-0.5, maxval=0.5)
        nats = nats - dimensions * math.log(width)
    elif dequantization == "variational":
        eps = jax.random.normal(key_x, x_0.shape, x_0.dtype)
        x, time = process.q_sample(schedule, x_0, first, eps), schedule.timesteps[0]
        clipped = dataclasses.replace(as_denoiser(denoiser), clip=True)
        with jax.default_matmul_precision("highest"):
            decoder, _ = likelihood.bound_term(schedule, clipped, x_0, x, first, gray_levels=gray_levels)
        log_sigma = jnp.log(schedule.at(jnp.int32(0), x).sigma)
        log_q = -0.5 * jnp.sum(jnp.square(eps), axis=axes) - dimensions * (log_sigma + 0.5 * math.log(2 * math.pi))
        nats = log_q + dimensions * math.log(2) * decoder
    density = log_density(key_trace, schedule, denoiser, x, trace=trace, tolerance=tolerance, time=time)
    return (nats - density.log_density) / (dimensions * math.log(2)), density.num_steps

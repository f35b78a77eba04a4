"""Samples of x_0 given a noisy linear measurement y = A(x_0) + noise, with a denoiser of the prior.

    mmps     moment matching posterior sampling, the recommended method (Rozet et al. 2024)
    smc      twisted sequential Monte Carlo, exact as the number of particles grows (Wu et al. 2023)

`mmps` returns a `Denoiser` of E[x_0 | x_t, y], so that samplers draw from the posterior; only `consistency`, and `ddpm` for
prediction x_prev, raise ValueError. `smc` is a sampling loop of its own.

For p(x_0 | x_t) = N(D, V) with D = E[x_0 | x_t], E[x_0 | x_t, y] = D + V A^T (R + A V A^T)^-1 (y - A D). In `mmps`, V is a
covariance from data (`covariances`), or by Tweedie's formula (sigma^2 / alpha) J, where J is the Jacobian of D in x_t. For
Gaussian data with their covariance, or J of an exact denoiser and enough iterations, E is exact. D is the denoiser's x_0
before the clip. Rows of a batch do not affect each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from diffusion_jax import process
from diffusion_jax.arrays import as_float
from diffusion_jax.covariances import Covariance
from diffusion_jax.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.errors import require_number
from diffusion_jax.measurements import Measurement
from diffusion_jax.sampling import normal
from diffusion_jax.sampling.driver import fold_in, is_batch_of_keys, split
from diffusion_jax.schedules import NoiseLevel, Schedule
from diffusion_jax.types import Batch, BatchLike, DenoiseFn


def mmps(
    denoiser: Denoiser | DenoiseFn,
    measurement: Measurement,
    covariance: Covariance | None = None,
    *,
    given_y: Covariance | None = None,
    iterations: int | None = None,
    tolerance: float = 1e-3,
) -> Denoiser:
    """Returns a denoiser of E[x_0 | x_t, y], with a covariance V of x_0 given x_t.

    covariance: the covariance of x_0, from which V follows. None: V = (sigma^2 / alpha) J of the denoiser itself, which needs
    no data; J of a trained network may be far from a covariance.
    given_y: `covariance.given(measurement, shape)`. With it, a call solves no linear system and costs one forward pass.
    iterations, tolerance: otherwise (R + A V A^T) u = y - A D is solved by preconditioned conjugate gradients until the
    residual, in units of the noise, is `tolerance` times that of u = 0, in at most `iterations` steps: by default 3 with J,
    where each step multiplies by the transposed Jacobian, a backward pass, and 100 with a covariance.
    `relative_residual` measures what is left.

    Classifier-free guidance must have scale 1, because samples with another scale do not follow the posterior. In pure noise
    (alpha = 0), J has no correct digits, and D is unchanged. Near pure noise, the error of J grows as (sigma / alpha)^2 for
    networks that predict eps or score, but not for networks that predict v or x_0.
    Raises: ValueError for iterations below 1, a tolerance not above 0, a `given_y` without its covariance, and the errors of
      `Measurement.check`; when called, the errors of `LinearOperator.check`, and for a y whose shape is not A(x_0)'s.
    """
    if given_y is not None and covariance is None:
        raise ValueError("given_y needs the covariance that it was computed from")
    if iterations is None:
        iterations = 3 if covariance is None else 100
    require_number("iterations", iterations, 1, whole=True)
    require_number("tolerance", tolerance, 0, above=True)
    measurement.check()
    denoiser, correction = as_denoiser(denoiser), _Correction(measurement, covariance, given_y, iterations, tolerance)
    return dataclasses.replace(denoiser, corrections=(*denoiser.corrections, correction))


def relative_residual(
    denoiser: Denoiser | DenoiseFn,
    measurement: Measurement,
    x_t: BatchLike,
    level: NoiseLevel,
    covariance: Covariance | None = None,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-3,
) -> Float[Array, "B"]:
    """Returns the residual of the linear system in `mmps`, in units of the noise, relative to y - A D; 0 is exact.

    Raises: as `mmps`.
    """
    prior, x_t = as_denoiser(denoiser), as_float("x_t", x_t)
    correction: Any = mmps(prior, measurement, covariance, iterations=iterations, tolerance=tolerance).corrections[-1]
    return correction.solve(lambda x_t: prior(x_t, level), x_t, level).residual


def _white_variance(level: NoiseLevel, data_std: float) -> Float[Array, "..."]:
    """Returns the variance of x_0 given x_t for white data N(0, data_std^2 I)."""
    return data_std**2 * level.sigma**2 / (data_std**2 * level.alpha**2 + level.sigma**2)


class _Solved(NamedTuple):
    """prior: the denoiser's prediction. shift: what is added to D. residual: as `relative_residual`."""

    prior: Denoised
    shift: Batch
    residual: Float[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Correction:
    """The correction in `mmps`, whose arguments are the fields."""

    measurement: Measurement
    covariance: Covariance | None
    given_y: Covariance | None
    iterations: int = dataclasses.field(metadata={"static": True})
    tolerance: float = dataclasses.field(metadata={"static": True})

    def __call__(self, predict: Callable[[Batch], Denoised], x_t: Batch, level: NoiseLevel) -> Denoised:
        prior, shift, _ = self.solve(predict, x_t, level)
        return prior.corrected(prior.own_x_0 + shift, x_t, level)

    def solve(self, predict: Callable[[Batch], Denoised], x_t: Batch, level: NoiseLevel) -> _Solved:
        """Computes V A^T (R + A V A^T)^-1 (y - A D)."""
        if self.covariance is None:
            prior, times_v = _linearize(predict, x_t, level)
        else:
            prior, times_v = predict(x_t), functools.partial(self.covariance.times, level=level)
        x_0, measurement, operator = prior.own_x_0, self.measurement, self.measurement.operator
        operator.check(x_0.shape[1:])
        variances, adjoint, b = measurement.variances(x_0.dtype), operator.adjoint(x_0), measurement.residual(x_0)
        if self.given_y is not None:  # (V^-1 + A^T R^-1 A)^-1 A^T R^-1 is the same matrix
            return _Solved(prior, self.given_y.times(adjoint(b / variances), level), jnp.zeros(len(b), b.dtype))

        def times_matrix(u):
            return measurement.covariance(u) + operator.linear(times_v(adjoint(u)))

        prior_variance = _white_variance(level, 1.0) if self.covariance is None else self.covariance.variance(level)
        per_row = jnp.reshape(prior_variance, (-1, *[1] * (b.ndim - 1)) if jnp.ndim(prior_variance) else ())
        diagonal = variances + per_row * operator.squared_norms(x_0)
        u, left = _conjugate_gradients(
            times_matrix, measurement.covariance, b, variances, diagonal, self.tolerance, self.iterations
        )
        return _Solved(prior, times_v(adjoint(u)), left)


def _linearize(predict, x_t, level):
    """Returns the prediction with D, and the function x -> (sigma^2 / alpha) J^T x."""

    def x_0_of(x_t):
        denoised = predict(x_t)
        return denoised.own_x_0, denoised

    _, transposed, prior = jax.vjp(x_0_of, x_t, has_aux=True)
    # In pure noise, J and sigma^2 / alpha have no correct digits, so the shift is 0.
    scale = jnp.where(level.has_signal, level.sigma**2 / jnp.where(level.has_signal, level.alpha, 1.0), 0.0)
    return prior, lambda x: scale * transposed(x)[0]


def _conjugate_gradients(times_matrix, covariance, b, variances, diagonal, tolerance, iterations):
    """Solves M u = b, M = R + A V A^T, for each row with Jacobi's preconditioner; returns u and |M u - b| / |b|.

    The norms are in units of the noise; a row stops when the ratio is below `tolerance`. For an exact covariance V, the
    curvature p^T M p is at least p^T R p. A trained network's Jacobian may violate this bound, and a curvature near 0 makes a
    step of many standard deviations. So a row also stops if the curvature is at most p^T R p / 2, where 1/2 allows for
    rounding: the row's result is the current u, or b / diagonal at the first iteration.
    """
    axes = tuple(range(1, b.ndim))

    def dot(x, y):
        return jnp.sum(x * y, axis=axes, keepdims=True)

    def solve(times_matrix, b):
        z = b / diagonal
        enough = tolerance**2 * dot(b, b / variances)

        def step(carry):
            i, u, r, p, product, is_open = carry
            times_p = times_matrix(p)
            curvature = dot(p, times_p)
            is_convex = curvature > 0.5 * dot(p, covariance(p))
            length = jnp.where(is_convex, product / jnp.where(is_convex, curvature, 1.0), jnp.where(i == 0, 1.0, 0.0))
            length = jnp.where(is_open, length, 0.0)
            u, r = u + length * p, r - length * times_p
            z = r / diagonal
            next_product = dot(r, z)
            is_open = is_open & is_convex & (dot(r, r / variances) > enough)
            p = z + jnp.where(is_open, next_product / jnp.where(product > 0, product, 1.0), 0.0) * p
            return i + 1, u, r, p, next_product, is_open

        first = dot(b, z)
        carry = jnp.int32(0), jnp.zeros_like(b), b, z, first, first > 0
        _, u, r, *_ = jax.lax.while_loop(lambda carry: (carry[0] < iterations) & carry[-1].any(), step, carry)
        size = dot(b, b / variances)
        return u, jnp.sqrt(dot(r, r / variances) / jnp.where(size > 0, size, 1.0)).reshape(-1)

    # The derivative of the solution, which a loop of unknown length lacks.
    return jax.lax.custom_linear_solve(times_matrix, b, solve, symmetric=True, has_aux=True)


class Particles(NamedTuple):
    """The result of `smc`: P weighted samples of each posterior.

    x_0: [P, B, ...]. weights: [P, B], with sum 1 over the particles. effective: [T, B], the effective sample size
    1 / sum(weights^2) at each step, before any resampling, in sampling order. resampled: [T, B], whether the step resampled.
    """

    x_0: Float[Array, "P B *shape"]
    weights: Float[Array, "P B"]
    effective: Float[Array, "T B"]
    resampled: Bool[Array, "T B"]


def systematic_resample(key: Key[Array, ""], weights: Float[Array, "P"], count: int | None = None) -> Int[Array, "N"]:
    """Returns `count` particle indices, P by default; index i appears weights[i] * count times, rounded up or down."""
    count = len(weights) if count is None else count
    points = (jnp.arange(count) + jax.random.uniform(key, (), weights.dtype)) / count
    ends = jnp.cumsum(weights)
    return jnp.clip(jnp.searchsorted(ends / ends[-1], points, side="right"), 0, len(weights) - 1)


def smc(
    key: Key[Array, ""] | Key[Array, "B"],
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    measurement: Measurement,
    x_T: Float[ArrayLike, "P B *shape"],
    *,
    data_std: float = 1.0,
    resample_below: float = 0.5,
) -> Particles:
    """Twisted diffusion sampler (Wu et al. 2023): weighted particles from ancestral steps guided by y.

    Each step but the last shifts the mean of p(x_{t-1} | x_t) by its variance times grad log N(y; A D, R + v diag(A A^T)),
    with the variance v of x_0 given x_t for white data N(0, data_std^2 I). The weights correct for the shift and the
    approximation, so that as P grows, the weighted particles follow p(x_0 | y) exactly, with the ancestral sampler's samples
    as the prior.

    Args:
      key: one key, or one for each example [B], so that an example's particles depend on its own key only.
      x_T: N(0, I); the particles of an example share its row of y. data_std: the deviation of white data.
      resample_below: an example's particles are resampled if their effective sample size falls below this share of P.
    Raises: ValueError for an x_T without the axes P and B, a data_std that is not above 0, a noise that is a function, a
      prediction of eps or score if alpha_bar ends at 0, and as `Measurement.check`.
    """
    denoiser, x_T = as_denoiser(denoiser), as_float("x_T", x_T)
    if x_T.ndim < 2:
        raise ValueError(f"x_T must be [P, B, ...], P particles for each of B examples; got {x_T.shape}")
    require_number("data_std", data_std, 0, above=True)
    measurement.check()
    if callable(measurement.noise):
        raise ValueError("smc needs the noise as standard deviations, not as a function")
    process.check_terminal_snr(schedule, denoiser.prediction)
    (count, rows), shape = x_T.shape[:2], x_T.shape[2:]
    keys = key if is_batch_of_keys(key) else jax.random.split(key, rows)
    if len(keys) != rows:
        raise ValueError(f"key has {len(keys)} keys for {rows} examples of x_T; give one key, or one for each example")
    squared_norms = measurement.operator.squared_norms(x_T[0])
    variances = measurement.variances(x_T.dtype)

    def per_example(x):
        return x.reshape(count, rows, *x.shape[1:])

    def sums(x):
        return jnp.sum(x, axis=tuple(range(1, x.ndim)))

    def log_likelihood(x_0, variance):
        """Returns log N(y; A x_0, R + variance diag(A A^T)) [P B], without the constant that all particles share."""
        residual = jax.vmap(measurement.residual)(per_example(x_0))
        squares = jnp.square(residual) / (variances + variance * squared_norms)
        return -0.5 * sums(squares.reshape(-1, *squares.shape[2:]))

    def evaluate(x, t):
        """Returns approximations of log p(y | x_t) and its gradient, and the mean and the variance of p(x_{t-1} | x_t)."""
        transition = schedule.transition(t, x)
        variance = _white_variance(transition.level, data_std)

        def twist(x):
            denoised = denoiser(x, transition)
            values = log_likelihood(denoised.own_x_0, variance)
            return jnp.sum(values), (values, denoised.output)

        (_, (values, output)), gradient = jax.value_and_grad(twist, has_aux=True)(x)
        reverse = process.reverse(denoiser.with_output(output), x, transition)
        return values, gradient, reverse.mean, reverse.variance

    def weights_of(log_weights):
        return jax.nn.softmax(log_weights, axis=0)

    def effective_number(weights):
        return 1 / jnp.sum(jnp.square(weights), axis=0)

    def step(carry, t):
        log_weights, x, (values, gradient, mean, variance) = carry
        key_noise, key_resample = split(fold_in(keys, t))
        noise = normal(key_noise, jnp.swapaxes(per_example(x), 0, 1)).swapaxes(0, 1).reshape(x.shape)
        moved = variance * gradient + jnp.sqrt(variance) * noise
        x = mean + moved
        # log p(x' | x_t) - log q(x' | x_t), for two Gaussians with the same variance.
        ratio = sums(-moved * gradient + 0.5 * variance * jnp.square(gradient))
        new = evaluate(x, t - 1)
        log_weights = log_weights + per_example(ratio + new[0] - values)
        weights = weights_of(log_weights)
        effective = effective_number(weights)
        is_low = effective < resample_below * count
        drawn = jax.vmap(systematic_resample, (0, 1), 1)(key_resample, weights)
        chosen = jnp.where(is_low, drawn, jnp.arange(count)[:, None])
        flat = (chosen * rows + jnp.arange(rows)).reshape(-1)
        x, new = jax.tree.map(lambda each: each[flat], (x, new))
        return (jnp.where(is_low, 0.0, log_weights), x, new), (effective, is_low)

    x, last = x_T.reshape(-1, *shape), schedule.num_timesteps - 1
    first = evaluate(x, jnp.int32(last))
    carry, (effective, resampled) = jax.lax.scan(
        step, (per_example(first[0]), x, first), jnp.arange(last, 0, -1, dtype=jnp.int32)
    )
    log_weights, _, (values, _, x_0, _) = carry  # the last step has no noise
    weights = weights_of(log_weights + per_example(log_likelihood(x_0, 0.0) - values))
    return Particles(
        x_0.reshape(count, rows, *shape),
        weights,
        jnp.concatenate([effective, effective_number(weights)[None]]),
        jnp.concatenate([resampled, jnp.zeros_like(resampled[:1])]),
    )

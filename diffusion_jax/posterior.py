"""Samples of x_0 given a noisy linear measurement y = A(x_0) + noise, with a denoiser of the prior.

`mmps`, moment matching posterior sampling (Rozet et al. 2024), returns a `Denoiser` of E[x_0 | x_t, y], so that samplers draw
from the posterior; only `consistency`, and `ddpm` for prediction x_prev, raise ValueError.

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
from jaxtyping import Array, Float

from diffusion_jax.arrays import as_float
from diffusion_jax.covariances import Covariance, white
from diffusion_jax.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.errors import require_number
from diffusion_jax.measurements import Measurement
from diffusion_jax.schedules import NoiseLevel
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

        prior_variance = (white() if self.covariance is None else self.covariance).variance(level)
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

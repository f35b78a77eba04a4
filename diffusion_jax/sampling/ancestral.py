"""Ancestral sampling and DDIM, which use only p(x_{t-1} | x_t), and `encode`, the inverse of DDIM."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import process
from diffusion_jax.arrays import as_float
from diffusion_jax.denoiser import Denoiser, as_denoiser, clip_x_0
from diffusion_jax.errors import require_number
from diffusion_jax.sampling.driver import Sampler, Stability, Step, first_index, normal
from diffusion_jax.sampling.solvers import heun
from diffusion_jax.schedules import Schedule, Transition
from diffusion_jax.types import Batch, BatchLike, DenoiseFn


@dataclasses.dataclass(frozen=True)
class ddpm(Sampler):
    """Draws x_{t-1} ~ p(x_{t-1} | x_t), without noise at the last step (DDPM Algorithm 2, with the clip in DDPM's code).

    variance: fixed_large or fixed_small, in place of the denoiser's fixed variance; None keeps the denoiser's.
    Raises: ValueError for another variance; when called, if `variance` is not None and the denoiser learned its variance.
    """

    variance: str | None = None

    def __post_init__(self):
        if self.variance not in (None, "fixed_small", "fixed_large"):
            raise ValueError(
                f"variance={self.variance!r}: a sampler may replace a fixed variance by fixed_small or fixed_large; a "
                "learned variance belongs to the network: Denoiser(network, variance='learned_range')"
            )

    @property
    def stability(self) -> Stability:
        return Stability(eta=1.0)

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        reverse = process.reverse(denoiser, x_t, transition, self.variance)
        noise = jnp.exp(0.5 * reverse.log_variance) * normal(key, x_t)
        return Step(reverse.mean + jnp.where(transition.target.sigma > 0, noise, 0.0), reverse.x_0)


@dataclasses.dataclass(frozen=True)
class ddim(Sampler):
    """DDIM eq. 12: x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with sigma from eq. 16.

    sigma = eta sqrt((1 - abar')/(1 - abar)) sqrt(1 - abar/abar'), where abar' is abar at index t - 1: eta = 0 is
    deterministic, eta = 1 is the ancestral sampler with the fixed small variance.

    clipped_eps: True computes eps from the clipped x_0, as OpenAI's code does; False keeps the network's own eps, as
      diffusers does by default (DDIM's own code never clips, which is clip=False).
    Raises: ValueError for an eta outside [0, 1].
    """

    eta: float | np.floating = 0.0
    _: dataclasses.KW_ONLY
    clipped_eps: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_number("eta", self.eta, 0, 1)

    @property
    def stability(self) -> Stability:
        return Stability(eta=float(self.eta))

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        denoised, target = denoiser(x_t, transition), transition.target
        eps = denoised.eps if self.clipped_eps else denoised.own_eps
        # sigma in eq. 16 is eta times the standard deviation of q(x_{t-1} | x_t, x_0), hence
        # 1 - abar' - sigma^2 = (1 - abar') (1 - eta^2 beta / (1 - abar)); both sides are 0 at index 0.
        ratio = transition.beta / transition.level.sigma**2
        direction = target.sigma * jnp.sqrt(jnp.maximum(1 - self.eta**2 * ratio, 0.0)) if self.eta else target.sigma
        x_prev = target.alpha * denoised.x_0 + direction * eps
        if self.eta:
            x_prev = x_prev + self.eta * jnp.sqrt(transition.posterior_variance) * normal(key, x_t)
        return Step(x_prev, denoised.x_0)


@dataclasses.dataclass(frozen=True)
class consistency(Sampler):
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): each step predicts x_0, and adds fresh noise to it.

    The denoiser must be a consistency network, a `Denoiser` with `sigma_min`; any other raises ValueError. In x / alpha, the
    noise for the next level s = sigma / alpha has the variance s^2 - sigma_min^2. One step needs only the noisiest level.
    """

    @property
    def is_stochastic(self) -> bool:
        return True

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        if not denoiser.sigma_min or denoiser.corrections or denoiser.mean_shift is not None:
            raise ValueError(
                "the sampler consistency takes a consistency network, a Denoiser with sigma_min, without corrections such "
                "as mmps, and without a mean shift"
            )
        x_0, target = clip_x_0(denoiser.output(x_t, transition), denoiser.clip), transition.target
        for limit in denoiser.limits:
            x_0 = as_float("the result of a limit", limit(x_0))
        variance = target.sigma**2 - (denoiser.sigma_min * target.alpha) ** 2
        return Step(target.alpha * x_0 + jnp.sqrt(jnp.maximum(variance, 0.0)) * normal(key, x_t), x_0)


def euler(**options: Any) -> Sampler:
    """Euler's method on dx/dsigma = eps, in x / alpha and sigma / alpha (Karras et al. 2022); equal to DDIM with eta = 0."""
    return ddim(0.0, **options)


def euler_ancestral(**options: Any) -> Sampler:
    """Euler's step to sigma_down, and noise up to the next sigma (k-diffusion's "Euler a"); equal to DDIM with eta = 1."""
    return ddim(1.0, **options)


def encode(
    schedule: Schedule,
    denoiser: Denoiser | DenoiseFn,
    x_0: BatchLike,
    *,
    order: int = 1,
    start: int | np.integer | None = None,
) -> Batch:
    """Maps x_0 to x_T along the probability-flow ODE (DDIM inversion, section 4.3), the inverse of deterministic samplers.

    Args:
      schedule: as `sample`. denoiser: as `sample`, but a plain function has no clip; not for x_prev. A clip, for order 1
        only, applies to the predicted x_0 at each step; eps is not recomputed, as in diffusers.
      order: 1 is DDIM's step, with one network call per step, at (x_{t-1}, t). 2 is Heun's step, with two calls; `heun()`
        reconstructs x_0 much more closely from this encoding.
      start: the index to stop at, where `sample(..., start=start)` starts; the default is T - 1.
    Returns: x_t at the noise level of index `start`; float32, or float64 for a float64 x_0.
    Raises: ValueError for an x_0 that is not float or has no batch axis, another order, prediction x_prev, a start outside
      0 ... T - 1, a projection, or a clip with order 2.
    """
    require_number("order", order, 1, 2, whole=True)
    denoiser = as_denoiser(denoiser, clip=False)
    if denoiser.limits:
        raise ValueError("a projection of x_0 has no inverse; encode without it")
    if order == 2 and denoiser.clip is not False:
        raise ValueError(
            "a clip is for order 1; a clipped x_0 has no second-order inverse: use Denoiser(..., clip=False)"
        )
    top = first_index(schedule, start)
    x_0 = as_float("x_0", x_0)
    if not x_0.ndim:
        raise ValueError("x_0 must have a batch axis: [B, ...]; got a single number")
    unclipped = dataclasses.replace(denoiser, clip=False)

    def second_order_step(x: Batch, t) -> tuple[Batch, None]:
        """Heun's step from the lower to the upper level of index t."""
        transition = schedule.transition(t, x)
        backward = Transition.between(transition.target, transition.level)
        return heun().step(jax.random.key(0), unclipped, x, backward, ()).x_prev.astype(x.dtype), None

    def first_order_step(x: Batch, t, at_end: Batch | None = None) -> Batch:
        """DDIM's step with the network time of the upper level. at_end: x at the upper level, to call the network with."""
        transition = schedule.transition(t, x)
        lower, upper = transition.target._replace(time=transition.level.time), transition.level
        # Without noise, x_0 and the score do not determine eps, so they are converted with the upper level.
        is_lower = at_end is None and denoiser.prediction not in ("x_0", "score")
        eps = unclipped(x if at_end is None else at_end, lower if is_lower else upper).own_eps
        predicted = clip_x_0((x - lower.sigma * eps) / lower.alpha, denoiser.clip)
        return (upper.alpha * predicted + upper.sigma * eps).astype(x.dtype)

    if order == 1:
        x, _ = jax.lax.scan(lambda x, t: (first_order_step(x, t), None), x_0, jnp.arange(top + 1, dtype=jnp.int32))
        return x
    # Without noise there is no eps, so the first step uses the eps at its end, approximated by a first-order step.
    first = jnp.int32(0)
    x = first_order_step(x_0, first, first_order_step(x_0, first))
    x, _ = jax.lax.scan(second_order_step, x, jnp.arange(1, top + 1, dtype=jnp.int32))
    return x

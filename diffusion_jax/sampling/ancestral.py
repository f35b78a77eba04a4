"""Ancestral sampling and DDIM: the samplers that use only p(x_{t-1} | x_t)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import process
from diffusion_jax.sampling.driver import Sampler, Stability, Step, call_network
from diffusion_jax.types import Clip, DenoiseFn

__all__ = ["ddim", "ddpm", "euler", "euler_ancestral"]


@dataclasses.dataclass(frozen=True)
class ddpm(Sampler):
    """x_{t-1} ~ p(x_{t-1} | x_t), without noise at the last step (DDPM Algorithm 2, and the clip of its code).

    prediction, variance, clip: as `Sampler`.
    mean_shift: (x_t [B, ...], network time [B]) -> g [B, ...], a gradient of log p(y | x_t) as from
      `guidance.log_prob_gradient`; the mean is shifted by the variance times g, after the clip (ADM Algorithm 1).
    """

    variance: str = "fixed_large"
    _: dataclasses.KW_ONLY
    mean_shift: DenoiseFn | None = None

    @property
    def stability(self) -> Stability:
        return Stability(eta=1.0)

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        output = call_network(schedule, denoise_fn, x_t, t)
        reverse = process.p_mean_variance(schedule, output, x_t, t, self.prediction, self.variance, self.clip)
        mean = reverse.mean
        if self.mean_shift is not None:
            mean = mean + reverse.variance * call_network(schedule, self.mean_shift, x_t, t)
        noise = jax.random.normal(key, x_t.shape, x_t.dtype)
        return Step(mean + jnp.where(t > 0, jnp.exp(0.5 * reverse.log_variance) * noise, 0.0), reverse.x_0)


@dataclasses.dataclass(frozen=True)
class ddim(Sampler):
    """DDIM eq. 12: x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with sigma from eq. 16.

    sigma = eta sqrt((1 - abar')/(1 - abar)) sqrt(1 - abar/abar'), abar' one step earlier: eta = 0 is deterministic, eta = 1
    the ancestral sampler with the fixed small variance.

    prediction, variance, clip: as `Sampler`.
    clipped_eps: True computes eps from the clipped x_0, as OpenAI's code does; False keeps the network's own, which is the
      default of diffusers (DDIM's own code never clips: clip=False).
    Raises: ValueError for an eta outside [0, 1].
    """

    eta: float | np.floating = 0.0
    _: dataclasses.KW_ONLY
    clipped_eps: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {self.eta}")

    @property
    def stability(self) -> Stability:
        return Stability(eta=float(self.eta))

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        output, _ = process.split_variance(call_network(schedule, denoise_fn, x_t, t), x_t, self.variance)
        x_0 = process.clip_x_0(process.to_x_0(schedule, output, x_t, t, self.prediction), self.clip)
        if self.clipped_eps:
            eps = process.to_eps(schedule, x_0, x_t, t, "x_0")
        else:
            eps = process.to_eps(schedule, output, x_t, t, self.prediction)
        # sigma of eq. 16 is eta times the standard deviation of q(x_{t-1} | x_t, x_0), hence
        # 1 - abar' - sigma^2 = (1 - abar') (1 - eta^2 beta / (1 - abar)); both are 0 at index 0.
        at = schedule.at(t, x_t)
        direction = at.sigma_prev * jnp.sqrt(jnp.maximum(1 - self.eta**2 * (at.beta / at.sigma**2), 0.0))
        x_prev = at.alpha_prev * x_0 + direction * eps
        if self.eta > 0:
            sigma = self.eta * jnp.sqrt(at.posterior_variance)
            x_prev = x_prev + sigma * jax.random.normal(key, x_t.shape, x_t.dtype)
        return Step(x_prev, x_0)


def euler(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """Euler's method on dx/dsigma = eps, in x / alpha and sigma / alpha (Karras et al. 2022): it is DDIM with eta = 0."""
    return ddim(0.0, prediction=prediction, variance=variance, clip=clip)


def euler_ancestral(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """Euler's step to sigma_down and noise back up to sigma (k-diffusion's "Euler a"): it is DDIM with eta = 1."""
    return ddim(1.0, prediction=prediction, variance=variance, clip=clip)

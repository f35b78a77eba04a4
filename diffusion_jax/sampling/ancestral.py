"""Ancestral sampling and DDIM, which use only p(x_{t-1} | x_t), and `encode`, the inverse of DDIM."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import process
from diffusion_jax.sampling.driver import Sampler, Stability, Step, call_network, first_index, normal
from diffusion_jax.schedules import NoiseLevel, Schedule
from diffusion_jax.types import Batch, BatchLike, Clip, DenoiseFn

__all__ = ["ddim", "ddpm", "encode", "euler", "euler_ancestral"]


@dataclasses.dataclass(frozen=True)
class ddpm(Sampler):
    """x_{t-1} ~ p(x_{t-1} | x_t), without noise at the last step (DDPM Algorithm 2, with the clip in DDPM's code).

    prediction, variance, clip: as `Sampler`.
    mean_shift: (x_t [B, ...], network time [B]) -> g [B, ...], a gradient of log p(y | x_t), as `guidance.log_prob_gradient`
      returns it; the mean is shifted by the variance times g, after the clip (ADM Algorithm 1).
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
        noise = normal(key, x_t)
        return Step(mean + jnp.where(t > 0, jnp.exp(0.5 * reverse.log_variance) * noise, 0.0), reverse.x_0)


@dataclasses.dataclass(frozen=True)
class ddim(Sampler):
    """DDIM eq. 12: x_{t-1} = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with sigma from eq. 16.

    sigma = eta sqrt((1 - abar')/(1 - abar)) sqrt(1 - abar/abar'), where abar' is abar one step earlier: eta = 0 is
    deterministic, eta = 1 is the ancestral sampler with the fixed small variance.

    prediction, variance, clip: as `Sampler`.
    clipped_eps: True computes eps from the clipped x_0, as OpenAI's code does; False keeps the network's own eps, the default
      of diffusers (DDIM's own code never clips: clip=False).
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
        x_0, eps = self.denoise(schedule, denoise_fn, x_t, t, self.clipped_eps)
        # sigma in eq. 16 is eta times the standard deviation of q(x_{t-1} | x_t, x_0), hence
        # 1 - abar' - sigma^2 = (1 - abar') (1 - eta^2 beta / (1 - abar)); both sides are 0 at index 0.
        at = schedule.at(t, x_t)
        direction = at.sigma_prev * jnp.sqrt(jnp.maximum(1 - self.eta**2 * (at.beta / at.sigma**2), 0.0))
        x_prev = at.alpha_prev * x_0 + direction * eps
        if self.eta > 0:
            sigma = self.eta * jnp.sqrt(at.posterior_variance)
            x_prev = x_prev + sigma * normal(key, x_t)
        return Step(x_prev, x_0)


def euler(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """Euler's method on dx/dsigma = eps, in x / alpha and sigma / alpha (Karras et al. 2022); equal to DDIM with eta = 0."""
    return ddim(0.0, prediction=prediction, variance=variance, clip=clip)


def euler_ancestral(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """Euler's step to sigma_down and noise back up to sigma (k-diffusion's "Euler a"); equal to DDIM with eta = 1."""
    return ddim(1.0, prediction=prediction, variance=variance, clip=clip)


def encode(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: BatchLike,
    *,
    order: int = 1,
    start: int | np.integer | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: Clip = False,
) -> Batch:
    """DDIM inversion: x_0 to x_T along the probability-flow ODE (DDIM section 4.3), the inverse of deterministic samplers.

    Args:
      schedule, denoise_fn: as `sample`.
      order: 1 is DDIM's step with the network evaluated at (x_{t-1}, t), with one call per step; 2 is Heun's step, with two
        calls; `heun()` then reconstructs x_0 much more closely.
      start: the index to stop at, where `sample(..., start=start)` starts; the default is T - 1.
      prediction, variance: as `ddim`, without x_prev. clip: for order 1, clips the predicted x_0 at each step (and keeps eps,
        as diffusers does).
    Returns: x_t at the noise level of index `start`; float32, or float64 for a float64 x_0.
    Raises: ValueError for an x_0 that is not float or has no batch axis, another order, prediction x_prev, a start outside
      0 ... T - 1, or clip with order 2.
    """
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if prediction == "x_prev":
        raise ValueError("prediction 'x_prev' cannot be inverted, because it has no eps outside of a schedule's step")
    if order == 2 and clip:
        raise ValueError("clip is for order 1; a clipped x_0 has no second-order inverse")
    top = first_index(schedule, start)
    x_0 = process.as_float("x_0", x_0)
    if not x_0.ndim:
        raise ValueError("x_0 must have a batch axis: [B, ...]; got a single number")

    def predict_eps(x, t, level: NoiseLevel):
        """Returns eps from the network's output at x and index t, converted with the coefficients of `level`."""
        output, _ = process.split_variance(call_network(schedule, denoise_fn, x, t), x, variance)
        return process.eps_at(level.alpha, level.sigma, output, x, prediction)

    def add_noise(x, eps, lower: NoiseLevel, upper: NoiseLevel):
        x_0 = process.clip_x_0((x - lower.sigma * eps) / lower.alpha, clip)
        return (upper.alpha * x_0 + upper.sigma * eps).astype(x.dtype)

    def first_order(x, t):
        lower, upper = schedule.at(t, x).previous, schedule.at(t, x).level
        # x is at the lower level, so v and flow are converted with this level; x_0 and the score do not determine eps without
        # noise (t = 0).
        return add_noise(x, predict_eps(x, t, lower if prediction in ("v", "flow") else upper), lower, upper), None

    def second_order(x, t):
        lower, upper = schedule.at(t, x).previous, schedule.at(t, x).level
        eps = predict_eps(x, t - 1, lower)
        next_eps = predict_eps(add_noise(x, eps, lower, upper), t, upper)
        return add_noise(x, (eps + next_eps) / 2, lower, upper), None

    if order == 1:
        x, _ = jax.lax.scan(first_order, x_0, jnp.arange(top + 1, dtype=jnp.int32))
        return x
    # x_0 has no eps, so the first step uses the eps at its end, approximated by a first-order step.
    guess, _ = first_order(x_0, jnp.int32(0))
    lower, upper = schedule.at(0, x_0).previous, schedule.at(0, x_0).level
    x = add_noise(x_0, predict_eps(guess, jnp.int32(0), upper), lower, upper)
    x, _ = jax.lax.scan(second_order, x, jnp.arange(1, top + 1, dtype=jnp.int32))
    return x

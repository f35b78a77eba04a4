"""Solvers that call the network more than once in a step: Heun's, with EDM's churn, and PNDM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.sampling.driver import Sampler, Step
from diffusion_jax.sampling.exponential import History, empty_history, push
from diffusion_jax.sampling.noise_levels import (
    Level,
    denoise,
    denoise_at,
    level,
    level_at,
    level_before,
    move,
)
from diffusion_jax.schedules import cast_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class heun(Sampler):
    """Heun's method on dx/dsigma = eps, in x / alpha and sigma / alpha: EDM's Algorithm 2 (Karras et al. 2022).

    Two network calls a step, one in the last; from pure noise (alpha_bar = 0) the step is Euler's. A step over many octaves
    of sigma is beyond it, and the first ones of a cosine schedule are that: respace by "karras" or "log_snr".

    churn: S_churn; above 0 each step first raises sigma, the standard deviation of the noise in x / alpha, by the factor
      1 + min(churn / T, sqrt(2) - 1), never above the training grid's largest, with fresh noise of S_noise = `churn_noise`,
      where sigma lies in `churn_range` (S_tmin, S_tmax).
    prediction, variance, clip: as `ddim`.
    Raises: ValueError for a negative churn or churn_noise; with churn, for prediction "x_prev", which is no function of a
      noise level.
    """

    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, float("inf"))
    churn_noise: float = 1.0
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: bool | Callable = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.churn < float("inf"):
            raise ValueError(f"churn must be a number of at least 0, got {self.churn}")
        if not 0 <= self.churn_noise < float("inf"):
            raise ValueError(f"churn_noise must be a number of at least 0, got {self.churn_noise}")
        self._floats("churn", "churn_noise")
        object.__setattr__(self, "churn_range", tuple(map(float, self.churn_range)))

    def step(self, key, schedule, denoise_fn, x_t, t, memory) -> Step:
        here, there = level(schedule, t, x_t), level_before(schedule, t, x_t)
        options = self.prediction, self.variance, self.clip
        if self.churn:
            x_t, here = self._stir(key, schedule, x_t, here)
            denoised = denoise_at(schedule, denoise_fn, x_t, here, *options)
        else:
            denoised = denoise(schedule, denoise_fn, x_t, t, *options)
        euler = move(denoised, denoised.eps, here, there)

        def corrected():
            ahead = denoise(schedule, denoise_fn, euler, t - 1, *options)
            return move(denoised, (denoised.eps + ahead.eps) / 2, here, there)

        return Step(jax.lax.cond(t > 0, corrected, lambda: euler), denoised.x_0)

    def _stir(self, key, schedule, x_t, here: Level):
        alpha = jnp.maximum(here.alpha, 1e-10)  # beyond, nothing but noise is left to raise
        sigma = here.sigma / alpha
        raised = sigma * (1 + min(self.churn / schedule.num_timesteps, 2**0.5 - 1))
        highest = jnp.exp(-schedule.log_snr(cast_table(schedule.grid_timesteps, x_t.dtype)[-1]) / 2)
        inside = (self.churn_range[0] <= sigma) & (sigma <= self.churn_range[1])
        raised = jnp.where(inside, jnp.maximum(jnp.minimum(raised, highest), sigma), sigma)
        added = self.churn_noise * jnp.sqrt((raised - sigma) * (raised + sigma))
        noise = added * jax.random.normal(key, x_t.shape, x_t.dtype)
        there = level_at(-2 * jnp.log(raised))
        return there.alpha * (x_t / alpha + noise), there


@dataclasses.dataclass(frozen=True, kw_only=True)
class pndm(Sampler):
    """PNDM (Liu et al. 2022): DDIM's step along a mean of the last four eps, 55/24, -59/24, 37/24, -9/24 (F-PNDM).

    For steps even in network time ("leading", "linspace"), of second order there; as `heun`, not for steps over many octaves
    of sigma.

    runge_kutta: the first three steps make four network calls each, two of them half-way; False starts with the lower orders
      instead, one call a step, two in the first (PLMS).
    prediction, variance, clip: as `ddim`; not "x_prev" with `runge_kutta`.
    """

    runge_kutta: bool = True
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: bool | Callable = True

    def step(self, key, schedule, denoise_fn, x_t, t, history) -> Step:
        here, there = level(schedule, t, x_t), level_before(schedule, t, x_t)
        options = self.prediction, self.variance, self.clip
        denoised = denoise(schedule, denoise_fn, x_t, t, *options)
        e_1, values = denoised.eps, history.values

        def ahead(eps):
            """eps at the step's end, reached along `eps`."""
            x = move(denoised, eps, here, there)
            return denoise(schedule, denoise_fn, x, t - 1, *options).eps

        def four_calls():
            middle = level_at(schedule.log_snr(_middle(schedule, t, x_t.dtype)))

            def half_way(eps):
                x = move(denoised, eps, here, middle)
                return denoise_at(schedule, denoise_fn, x, middle, *options).eps

            e_2 = half_way(e_1)
            e_3 = half_way(e_2)
            return (e_1 + 2 * e_2 + 2 * e_3 + ahead(e_3)) / 6

        mean = {
            1: lambda: e_1,
            2: lambda: (3 * e_1 - values[0]) / 2,
            3: lambda: (23 * e_1 - 16 * values[0] + 5 * values[1]) / 12,
            4: lambda: (55 * e_1 - 59 * values[0] + 37 * values[1] - 9 * values[2]) / 24,
        }
        if self.runge_kutta:
            first = [four_calls] * 3
        else:
            first = [lambda: (e_1 + ahead(e_1)) / 2, mean[2], mean[3]]
        branches = [mean[1], *first, mean[4]]
        # The last step, to x_0, is DDIM's.
        eps = jax.lax.switch(jnp.where(t > 0, jnp.minimum(history.taken, 3) + 1, 0), branches)
        return Step(move(denoised, eps, here, there), denoised.x_0, push(history, e_1))

    def start(self, schedule, x_T, num_steps: int) -> History:
        return empty_history(x_T, num_steps, 3)


def _middle(schedule, t, dtype):
    """The network time half-way between index t and the one before, float []."""
    times = jnp.asarray(cast_table(schedule.timesteps, dtype))
    return (times[t] + times[t - 1]) / 2

"""Solvers with several network calls in a step: Heun's method with EDM's churn, and PNDM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.sampling.driver import Sampler, Stability, Step, StepFn, ddim_step
from diffusion_jax.sampling.exponential import History, choose, empty_history, push
from diffusion_jax.schedules import NoiseLevel, Schedule, cast_table
from diffusion_jax.types import Clip

__all__ = ["heun", "plms", "pndm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class heun(Sampler):
    """Heun's method on dx/dsigma = eps, in x / alpha and sigma / alpha: EDM's Algorithm 2 (Karras et al. 2022).

    Two network calls for each step, one in the last; from pure noise (alpha_bar = 0) the step is Euler's. It fails on steps
    over many octaves of sigma, such as the first ones of a cosine schedule: respace with "karras" or "log_snr".

    churn: S_churn; above 0 each step first multiplies sigma, the standard deviation of the noise in x / alpha, by
      1 + min(churn / T, sqrt(2) - 1), up to the largest sigma of the training grid, with fresh noise of
      S_noise = `churn_noise`, if sigma is in `churn_range` (S_tmin, S_tmax).
    prediction, variance, clip: as `Sampler`; with churn not "x_prev".
    Raises: ValueError for a negative churn or churn_noise, or a churn_range in the wrong order.
    """

    churn: float | np.floating = 0.0
    churn_range: tuple[float, float] = (0.0, float("inf"))
    churn_noise: float | np.floating = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.churn < float("inf"):
            raise ValueError(f"churn must be a number of at least 0, got {self.churn}")
        if not 0 <= self.churn_noise < float("inf"):
            raise ValueError(f"churn_noise must be a number of at least 0, got {self.churn_noise}")
        try:
            low, high = map(float, self.churn_range)
        except (TypeError, ValueError):  # not two, or not numbers
            low, high = float("nan"), float("nan")
        if not low <= high:
            raise ValueError(f"churn_range must be (low, high) with low <= high, got {self.churn_range!r}")
        object.__setattr__(self, "churn_range", (low, high))

    @property
    def is_stochastic(self) -> bool:
        return bool(self.churn > 0)

    @property
    def calls_between_steps(self) -> bool:
        return bool(self.churn > 0)

    @property
    def stability(self) -> Stability:
        return Stability(order=2, along_eps=True, limit=0.5)

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        return self._step(t > 0, key, schedule, denoise_fn, x_t, t, state)

    def phases(self, num_steps: int, final_step: bool) -> Sequence[tuple[StepFn, int]]:
        last = int(final_step)
        return [(functools.partial(self._step, True), num_steps - last), (functools.partial(self._step, False), last)]

    def _step(self, corrected: bool | jax.Array, key, schedule, denoise_fn, x_t, t, state) -> Step:
        """A step with its second network call, or Euler's."""
        at = schedule.at(t, x_t)
        current, target = at.level, at.previous
        if self.churn:
            x_t, current = self._add_churn(key, schedule, x_t, current)
            denoised = self.denoise_between_steps(schedule, denoise_fn, x_t, current)
        else:
            denoised = self.denoise(schedule, denoise_fn, x_t, t)
        euler = ddim_step(denoised, denoised.eps, current, target)

        def heun():
            endpoint = self.denoise(schedule, denoise_fn, euler, t - 1)
            return ddim_step(denoised, (denoised.eps + endpoint.eps) / 2, current, target)

        return Step(_cond(corrected, heun, lambda: euler), denoised.x_0)

    def _add_churn(self, key, schedule, x_t, current: NoiseLevel):
        """x_t with fresh noise, and its noise level."""
        alpha = jnp.maximum(current.alpha, 1e-10)  # x_t is pure noise below
        sigma = current.sigma / alpha
        raised = sigma * (1 + min(self.churn / schedule.num_timesteps, 2**0.5 - 1))
        highest = jnp.exp(-schedule.log_snr(cast_table(schedule.grid_timesteps, x_t.dtype)[-1]) / 2)
        inside = (self.churn_range[0] <= sigma) & (sigma <= self.churn_range[1])
        raised = jnp.where(inside, jnp.maximum(jnp.minimum(raised, highest), sigma), sigma)
        added = self.churn_noise * jnp.sqrt((raised - sigma) * (raised + sigma))
        noise = added * jax.random.normal(key, x_t.shape, x_t.dtype)
        target = NoiseLevel.at_log_snr(-2 * jnp.log(raised))
        return target.alpha * (x_t / alpha + noise), target


@dataclasses.dataclass(frozen=True, kw_only=True)
class pndm(Sampler):
    """PNDM (Liu et al. 2022): DDIM's step along a mean of the last four eps, 55/24, -59/24, 37/24, -9/24 (F-PNDM).

    Of second order for steps that are uniform in network time ("leading", "linspace"); like `heun` it fails on steps over
    many octaves of sigma.

    runge_kutta: the first three steps have four network calls each, two of them at the midpoint; False starts with the lower
      orders instead, with one call for each step and two in the first (PLMS).
    prediction, variance, clip: as `Sampler`; not "x_prev" with `runge_kutta`.
    """

    runge_kutta: bool = True

    @property
    def calls_between_steps(self) -> bool:
        return self.runge_kutta

    @property
    def stability(self) -> Stability:
        return Stability(order=4, along_eps=True, limit=0.5)

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        starting = (t > 0) & (state.steps_taken < self._num_starting)
        return self._step(starting, key, schedule, denoise_fn, x_t, t, state)

    def phases(self, num_steps: int, final_step: bool) -> Sequence[tuple[StepFn, int]]:
        starting = min(self._num_starting, num_steps - final_step)
        return [
            (functools.partial(self._step, True), starting),
            (functools.partial(self._step, False), num_steps - starting),
        ]

    @property
    def _num_starting(self) -> int:
        """The number of first steps with further network calls."""
        return 3 if self.runge_kutta else 1

    def _step(self, starting: bool | jax.Array, key, schedule, denoise_fn, x_t, t, state) -> Step:
        """A step with further network calls, or along a mean of the last eps."""
        at = schedule.at(t, x_t)
        current, target = at.level, at.previous
        denoised = self.denoise(schedule, denoise_fn, x_t, t)
        e_1, values = denoised.eps, state.values

        def eps_at_end(eps):
            """eps at the end of the step along `eps`."""
            x = ddim_step(denoised, eps, current, target)
            return self.denoise(schedule, denoise_fn, x, t - 1).eps

        def two_calls():
            return (e_1 + eps_at_end(e_1)) / 2

        def four_calls():
            midpoint = NoiseLevel.at_log_snr(schedule.log_snr(_midpoint(schedule, t, x_t.dtype)))

            def eps_at_midpoint(eps):
                x = ddim_step(denoised, eps, current, midpoint)
                return self.denoise_between_steps(schedule, denoise_fn, x, midpoint).eps

            e_2 = eps_at_midpoint(e_1)
            e_3 = eps_at_midpoint(e_2)
            return (e_1 + 2 * e_2 + 2 * e_3 + eps_at_end(e_3)) / 6

        def mean():
            means = [
                e_1,  # also in the last step, to x_0, which is DDIM's
                (3 * e_1 - values[0]) / 2,
                (23 * e_1 - 16 * values[0] + 5 * values[1]) / 12,
                (55 * e_1 - 59 * values[0] + 37 * values[1] - 9 * values[2]) / 24,
            ]
            return choose(jnp.where(t > 0, jnp.minimum(state.steps_taken, 3), 0), means)

        eps = _cond(starting, four_calls if self.runge_kutta else two_calls, mean)
        return Step(ddim_step(denoised, eps, current, target), denoised.x_0, push(state, e_1))

    def init_state(self, schedule: Schedule, x_T: Float[Array, "B *shape"], num_steps: int) -> History:
        return empty_history(x_T, num_steps, 3)


def plms(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """PLMS (Liu et al. 2022; Stable Diffusion's code): it is `pndm` without the Runge-Kutta steps."""
    return pndm(runge_kutta=False, prediction=prediction, variance=variance, clip=clip)


def _cond(
    predicate: bool | jax.Array, if_true: Callable[[], jax.Array], if_false: Callable[[], jax.Array]
) -> jax.Array:
    """`lax.cond`, decided while the program is traced if the predicate is a Python bool."""
    if isinstance(predicate, bool):
        return if_true() if predicate else if_false()
    return jax.lax.cond(predicate, if_true, if_false)


def _midpoint(schedule: Schedule, t, dtype) -> jax.Array:
    """The network time halfway between index t and t - 1, float []."""
    times = jnp.asarray(cast_table(schedule.timesteps, dtype))
    return (times[t] + times[t - 1]) / 2

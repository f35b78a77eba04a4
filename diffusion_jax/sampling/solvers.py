"""Solvers for the probability-flow ODE and the reverse SDE: DPM-Solver++, UniPC, DEIS, Heun's method and PNDM.

DPM-Solver++, UniPC and DEIS are exponential integrators in lambda = log(alpha / sigma): they solve the linear part exactly
and interpolate the network's prediction, a smooth function of lambda, through its last values. From lambda to
lambda' = lambda + h, with the x_0 prediction D,

    x' = (sigma'/sigma) x + alpha' int_0^h e^{-(h - u)} D(lambda + u) du            (DPM-Solver++ eq. 9; UniPC)
    x' = (alpha'/alpha) x - sigma' int_0^h e^{h - u} eps(lambda + u) du             (DPM-Solver eq. 3.4; DEIS)

These methods differ in the choice of polynomial, whose order is at most the number of values so far. The step to x_0 has
order 1: it returns the predicted x_0. Their common options: `order`, 1 to 3; `lower_order_final`, True for at most order n in
the n-th step from the end, which is necessary with few steps; `prediction`, `variance` and `clip` as `Sampler`. All raise
ValueError for an order outside 1 to 3.

Heun's method and PNDM make several network calls in some steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PyTree

from diffusion_jax.sampling.driver import Sampler, Stability, Step, StepFn, ddim_step, normal
from diffusion_jax.schedules import NoiseLevel, Schedule, cast_table
from diffusion_jax.types import Batch, Clip

__all__ = ["deis", "dpm_solver_pp", "heun", "plms", "pndm", "unipc"]


class History(NamedTuple):
    """The state of a multistep method: the network's last predictions, newest first, and method-specific values."""

    steps_taken: Int32[Array, ""]
    steps_left: Int32[Array, ""]
    values: tuple[Batch, ...]
    extra: PyTree = ()


def empty_history(x_T: Batch, num_steps: int, num_values: int, extra: PyTree = ()) -> History:
    """Returns the history before the first of `num_steps` steps."""
    return History(jnp.int32(0), jnp.int32(num_steps), (jnp.zeros_like(x_T),) * num_values, extra)


def push(history: History, value: Batch, extra: PyTree = ()) -> History:
    """Returns the history after a step with this prediction."""
    values = (value, *history.values)[: len(history.values)]
    return History(history.steps_taken + 1, history.steps_left - 1, values, extra)


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """The common options of the multistep samplers."""

    order: int = 2
    _: dataclasses.KW_ONLY
    lower_order_final: bool = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.order, bool) or not isinstance(self.order, int | np.integer) or self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order!r}")

    @property
    def stability(self) -> Stability:
        return Stability(self.order)

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        return empty_history(x_T, num_steps, self.order - 1)

    def _step_order(self, history: History, t: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the order of this step: the least of `order`, the values so far, and the steps left."""
        order = jnp.minimum(self.order, history.steps_taken + 1)
        return jnp.minimum(order, history.steps_left) if self.lower_order_final else jnp.where(t > 0, order, 1)


def _levels(schedule: Schedule, t, x: jax.Array, count: int) -> list[NoiseLevel]:
    """Returns the noise levels at the indices t, t + 1, ..., noisiest last.

    Indices above T - 1 get the level at T - 1: they belong to steps before the first, whose values are unused.
    """
    return [schedule.at(jnp.minimum(t + i, schedule.num_timesteps - 1), x).level for i in range(count)]


def _slopes(values, gaps):
    """First and second derivative in lambda, at values[0], of the line or parabola through two or three values.

    gaps[i]: lambda at values[i] minus lambda at values[i + 1].
    """
    first = (values[0] - values[1]) / gaps[0]
    if len(values) == 2:
        return first, 0.0
    second = (first - (values[1] - values[2]) / gaps[1]) / (gaps[0] + gaps[1])
    return first + second * gaps[0], 2 * second


def _gaps(nodes):
    """Differences of lambda; 1 for equal nodes, which belong to steps before the first, whose values are unused."""
    gaps = [a.lam - b.lam for a, b in itertools.pairwise(nodes)]
    return [jnp.where(gap == 0, 1.0, gap) for gap in gaps]


def choose(index: Int[Array, ""], candidates: list[Batch]) -> Batch:
    """Returns candidates[index]. All are computed, because a branch makes an accelerator wait for the host."""
    return jax.lax.select_n(index, *candidates)


def _vandermonde_solve(points: list, right: list) -> list:
    """Returns w with sum_j points[j]^i w[j] = right[i], for distinct points, by Lagrange's polynomials.

    On GPUs `jnp.linalg.solve` would call a library in every step.
    """
    weights = []
    for j, point in enumerate(points):
        # Coefficients, lowest first: the polynomial is 1 at this point and 0 at the other points.
        coefficients = [1.0]
        for other in points[:j] + points[j + 1 :]:
            shifted, scaled = [0.0, *coefficients], [other * c for c in coefficients] + [0.0]
            coefficients = [(a - b) / (point - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * r for c, r in zip(coefficients, right, strict=True)))
    return weights


@dataclasses.dataclass(frozen=True)
class dpm_solver_pp(_Multistep):
    """DPM-Solver++ (Lu et al. 2022): polynomials through x_0 predictions; one network call per step.

    order: 1 is DDIM (with sde, eta = 1). 2 multistep is "2M", with the authors' h/2 (1 - e^-h) for the second term. 3
      integrates the parabola exactly; the authors' code has half of the last term, which reduces the order.
    sde: solves the reverse SDE instead of the ODE: the integrand's rate doubles, and noise with variance sigma'^2 (1 -
      e^{-2h}) is added ("SDE-DPM-Solver++").
    singlestep: takes steps in groups of `order`; each step in a group starts from the group's first x and uses all values
      since. Order 3 needs steps of similar length in lambda, as in any smooth spacing. The steps in a group share one noise
      path.
    """

    _: dataclasses.KW_ONLY
    sde: bool = False
    singlestep: bool = False

    @property
    def stability(self) -> Stability:
        limits = (None, None, 0.1) if self.singlestep else (None, 0.3, 0.1 if self.sde else 0.3)
        return Stability(self.order, eta=float(self.sde), limit=limits[self.order - 1])

    @property
    def _rate(self) -> float:
        return 2.0 if self.sde else 1.0

    def _integral(self, current, target, values, nodes):
        """alpha' rate int_0^h e^{-rate (h - u)} D(u) du, D the polynomial through `values` at `nodes`; nodes[0] = current."""
        rate, h = self._rate, target.lam - current.lam
        zeroth = -jnp.expm1(-rate * h)
        total = zeroth * values[0]
        if len(values) > 1:
            slope, curve = _slopes(values, _gaps(nodes))
            first = zeroth * h / 2 if len(values) == 2 else h - zeroth / rate
            total += first * slope
            if len(values) > 2:
                total += (h**2 / 2 - first / rate) * curve
        return target.alpha * total

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        order, at = self.order, schedule.at(t, x_t)
        current, target = at.level, at.previous
        h = target.lam - current.lam
        x_0 = self.denoise(schedule, denoise_fn, x_t, t).x_0
        values = (x_0, *state.values)
        x_scale, noise = target.sigma / current.sigma, 0.0
        if self.sde:
            x_scale = x_scale * jnp.exp(-h)
            noise = target.sigma * jnp.sqrt(-jnp.expm1(-2 * h)) * normal(key, x_t)

        if not self.singlestep:
            nodes = _levels(schedule, t, x_t, order)
            drifts = [self._integral(current, target, values[:n], nodes[:n]) for n in range(1, order + 1)]
            drift = choose(self._step_order(state, t) - 1, drifts)
            return Step(x_scale * x_t + drift + noise, x_0, push(state, x_0))

        x_first, path = state.extra
        is_last = (state.steps_left == 1) if self.lower_order_final else (t == 0)  # the last step is its own group
        position = jnp.where(is_last, 0, state.steps_taken % order)
        x_first, path = jnp.where(position == 0, x_t, x_first), x_scale * jnp.where(position == 0, 0.0, path) + noise

        def from_first(n):
            nodes = _levels(schedule, t, x_t, n)[::-1]
            h = target.lam - nodes[0].lam
            x_scale = target.sigma / nodes[0].sigma * jnp.exp(-(self._rate - 1) * h)
            return x_scale * x_first + self._integral(nodes[0], target, values[:n][::-1], nodes)

        x_prev = choose(position, [from_first(n) for n in range(1, order + 1)]) + path
        return Step(x_prev, x_0, push(state, x_0, (x_first, path)))

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        extra = (x_T, jnp.zeros_like(x_T)) if self.singlestep else ()
        return empty_history(x_T, num_steps, self.order - 1, extra)


@dataclasses.dataclass(frozen=True)
class deis(_Multistep):
    """DEIS (Zhang & Chen 2023, "log-rho"): polynomials in lambda through eps, integrated exactly.

    One network call per step. Order 1 is DDIM.
    """

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        at = schedule.at(t, x_t)
        current, target = at.level, at.previous
        h = target.lam - current.lam
        denoised = self.denoise(schedule, denoise_fn, x_t, t)
        values = (denoised.eps, *state.values)
        first = jnp.expm1(h) - h  # int_0^h e^{h - u} u du; with u^2 / 2 for u: first - h^2 / 2

        def higher_order_terms(n):
            slope, curve = _slopes(values[:n], _gaps(_levels(schedule, t, x_t, n)))
            return target.sigma * (first * slope + (first - h**2 / 2) * curve)

        changes = [jnp.zeros_like(x_t), *(higher_order_terms(n) for n in range(2, self.order + 1))]
        change = choose(self._step_order(state, t) - 1, changes)
        x_prev = target.alpha * denoised.x_0 + target.sigma * denoised.eps - change
        return Step(x_prev, denoised.x_0, push(state, denoised.eps))


@dataclasses.dataclass(frozen=True)
class unipc(_Multistep):
    """UniPC (Zhao et al. 2023), predictor and corrector in x_0 predictions; one network call per step.

    Each call is used twice: it corrects its own input x (to order + 1), and predicts the next x. Order 3 with "bh2" is for
    few steps without guidance; the authors use order 2 with guidance. The last x_0 is predicted, not corrected.

    variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1). Raises: ValueError for another variant.
    """

    _: dataclasses.KW_ONLY
    variant: str = "bh2"

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    @property
    def stability(self) -> Stability:
        return Stability(self.order, limit=0.3 if self.order > 1 else None)

    def _update(self, p, corrector, current, target, nodes, x, values, new):
        """x at `target` from p values, and the value at `target` for the corrector (UniPC eq. 3, with h -> -h for x_0)."""
        h = current.lam - target.lam
        h = jnp.where(h == 0, -1.0, h)  # before the first step, whose corrected x is unused
        zeroth = jnp.expm1(h)
        scale = h if self.variant == "bh1" else zeroth
        positions = [gap / h for gap in itertools.accumulate(_gaps(nodes[:p]))]
        differences = [(value - values[0]) / position for value, position in zip(values[1:p], positions, strict=True)]
        if corrector:
            differences, positions = [*differences, new - values[0]], [*positions, 1.0]
        unknowns = len(positions)
        change = 0.0
        if unknowns == 1:
            change = 0.5 * differences[0]  # the limit of the system below, as in the authors' code
        elif unknowns:
            right, phi, factorial = [], zeroth / h - 1, 1
            for i in range(1, unknowns + 1):
                right.append(phi * factorial / scale)
                factorial *= i + 1
                phi = phi / h - 1 / factorial
            weights = _vandermonde_solve(positions, right)
            change = sum(weight * difference for weight, difference in zip(weights, differences, strict=True))
        return target.sigma / current.sigma * x - target.alpha * (zeroth * values[0] + scale * change)

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        order, (last_x, last_order) = self.order, state.extra
        nodes, target = _levels(schedule, t, x_t, order + 1), schedule.at(t, x_t).previous
        current = nodes[0]
        x_0 = self.denoise(schedule, denoise_fn, x_t, t).x_0

        def correct(p):
            return self._update(p, True, nodes[1], current, nodes[1:], last_x, state.values, x_0)

        corrected = choose(last_order, [x_t, *map(correct, range(1, order + 1))])
        step_order = self._step_order(state, t)
        values = (x_0, *state.values)

        def predict(p):
            return self._update(p, False, current, target, nodes, corrected, values, None)

        x_prev = choose(step_order - 1, [*map(predict, range(1, order + 1))])
        # A step from pure noise is infinitely long in lambda, so it has no corrector.
        corrector_order = jnp.where(current.alpha > 0, step_order, 0)
        return Step(x_prev, x_0, push(state, x_0, (corrected, corrector_order)))

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        # One value more than a predictor needs, because the corrector starts from the previous step.
        return empty_history(x_T, num_steps, self.order, (x_T, jnp.int32(0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class heun(Sampler):
    """Heun's method on dx/dsigma = eps, in x / alpha and sigma / alpha: EDM's Algorithm 2 (Karras et al. 2022).

    Two network calls per step, and one in the last step; from pure noise (alpha_bar = 0) the step is Euler's. Heun's method
    fails if sigma falls by many octaves in one step, as in the first steps of a cosine schedule: respace with "karras" or
    "log_snr".

    churn: S_churn; above 0, each step first multiplies sigma, the standard deviation of the noise in x / alpha, by
      1 + min(churn / T, sqrt(2) - 1), up to the largest sigma of the path, with fresh noise scaled by
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
        low, high = map(float, self.churn_range)
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

    def loops(self, num_steps: int, final_step: bool) -> Sequence[tuple[StepFn, int]]:
        last = int(final_step)
        return [(functools.partial(self._step, True), num_steps - last), (functools.partial(self._step, False), last)]

    def _step(self, corrected: bool | jax.Array, key, schedule, denoise_fn, x_t, t, state) -> Step:
        """Takes a step with a second network call, or Euler's step."""
        at = schedule.at(t, x_t)
        current, target = at.level, at.previous
        if self.churn:
            x_t, current, time = self._add_churn(key, schedule, x_t, current, at.time)
            denoised = self.denoise_between_steps(schedule, denoise_fn, x_t, current, time)
        else:
            denoised = self.denoise(schedule, denoise_fn, x_t, t)
        euler = ddim_step(denoised, denoised.eps, current, target)

        def heun():
            endpoint = self.denoise(schedule, denoise_fn, euler, t - 1)
            return ddim_step(denoised, (denoised.eps + endpoint.eps) / 2, current, target)

        return Step(_cond(corrected, heun, lambda: euler), denoised.x_0)

    def _add_churn(self, key, schedule, x_t, current: NoiseLevel, time):
        """Returns x_t with fresh noise, its noise level and its network time; all unchanged where no noise is added."""
        factor = 1 + min(self.churn / schedule.num_timesteps, 2**0.5 - 1)
        lowest = schedule.log_snr(jnp.asarray(schedule.path.interval[1], x_t.dtype))
        raised = NoiseLevel.at_log_snr(jnp.maximum(current.log_snr - 2 * math.log(factor), lowest))
        sigma = jnp.exp(-current.log_snr / 2)
        inside = (self.churn_range[0] <= sigma) & (sigma <= self.churn_range[1])
        is_raised = inside & (current.alpha > 0) & (raised.log_snr < current.log_snr)
        kept = raised.alpha / jnp.where(is_raised, current.alpha, 1.0)
        # alpha' sqrt((sigma'/alpha')^2 - (sigma/alpha)^2)
        added = raised.sigma * jnp.sqrt(-jnp.expm1(jnp.minimum(raised.log_snr - current.log_snr, 0.0)))
        noisier = kept * x_t + self.churn_noise * added * normal(key, x_t)
        pairs = ((noisier, x_t), *zip(raised, current, strict=True), (schedule.time_at_log_snr(raised.log_snr), time))
        x_t, *level, time = (jnp.where(is_raised, new, old) for new, old in pairs)
        return x_t, NoiseLevel(*level), time


@dataclasses.dataclass(frozen=True, kw_only=True)
class pndm(Sampler):
    """PNDM (Liu et al. 2022): DDIM's step along a mean of the last four eps, weighted 55/24, -59/24, 37/24, -9/24 (F-PNDM).

    Second order for steps that are uniform in network time ("leading", "linspace"); like `heun`, PNDM fails on steps over
    many octaves of sigma.

    runge_kutta: the first three steps have four network calls each, two calls at the midpoint; False starts with the lower
      orders instead, with one call per step and two calls in the first step (PLMS).
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

    def loops(self, num_steps: int, final_step: bool) -> Sequence[tuple[StepFn, int]]:
        starting = min(self._num_starting, num_steps - final_step)
        return [
            (functools.partial(self._step, True), starting),
            (functools.partial(self._step, False), num_steps - starting),
        ]

    @property
    def _num_starting(self) -> int:
        """The number of first steps with extra network calls."""
        return 3 if self.runge_kutta else 1

    def _step(self, starting: bool | jax.Array, key, schedule, denoise_fn, x_t, t, state) -> Step:
        """Takes a step with extra network calls, or along a mean of the last eps."""
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
            times = jnp.asarray(cast_table(schedule.timesteps, x_t.dtype))
            midpoint = NoiseLevel.at_log_snr(schedule.log_snr((times[t] + times[t - 1]) / 2))

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

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        return empty_history(x_T, num_steps, 3)


def plms(*, prediction: str = "eps", variance: str = "fixed_large", clip: Clip = True) -> Sampler:
    """PLMS (Liu et al. 2022; Stable Diffusion's code): `pndm` without the Runge-Kutta steps."""
    return pndm(runge_kutta=False, prediction=prediction, variance=variance, clip=clip)


def _cond(
    predicate: bool | jax.Array, if_true: Callable[[], jax.Array], if_false: Callable[[], jax.Array]
) -> jax.Array:
    """`lax.cond`; a Python bool chooses the branch while the program is traced."""
    if isinstance(predicate, bool):
        return if_true() if predicate else if_false()
    return jax.lax.cond(predicate, if_true, if_false)

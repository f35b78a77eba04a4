"""Solvers for the probability-flow ODE and the reverse SDE: DPM-Solver++, UniPC, DEIS, Heun's method and PNDM.

DPM-Solver++, UniPC and DEIS are exponential integrators in lambda = log(alpha / sigma): they solve the linear part exactly
and interpolate the network's prediction, a smooth function of lambda, through its last values. From lambda to
lambda' = lambda + h, with the x_0 prediction D,

    x' = (sigma'/sigma) x + alpha' int_0^h e^{-(h - u)} D(lambda + u) du            (DPM-Solver++ eq. 9; UniPC)
    x' = (alpha'/alpha) x - sigma' int_0^h e^{h - u} eps(lambda + u) du             (DPM-Solver eq. 3.4; DEIS)

The three methods differ in the polynomial. A step's order is at most the number of values so far. The step to x_0 has
order 1: it returns the predicted x_0. The methods share two options: `order`, 1 to 3, and `lower_order_final`, True to lower
the order in the last steps (at most n in the n-th step from the end), for stability with few steps. All raise ValueError for
an order outside 1 to 3.

Heun's method and PNDM make several network calls in some steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PyTree

from diffusion_jax.errors import require_known, require_number
from diffusion_jax.sampling.driver import Sampler, Stability, Step, ddim_step, normal
from diffusion_jax.schedules import NoiseLevel, Schedule, Transition
from diffusion_jax.types import Batch

__all__ = ["deis", "dpm_solver_pp", "heun", "plms", "pndm", "unipc"]


class History(NamedTuple):
    """The state of a multistep method: predictions and their noise levels, newest first, and method-specific values."""

    steps_taken: Int32[Array, ""]
    steps_left: Int32[Array, ""]
    values: tuple[Batch, ...]
    levels: tuple[NoiseLevel, ...]
    extra: PyTree = ()

    def push(self, value: Batch, level: NoiseLevel, extra: PyTree = ()) -> History:
        """Returns the history after a step with this prediction."""
        count = len(self.values)
        values, levels = (value, *self.values)[:count], (level, *self.levels)[:count]
        return History(self.steps_taken + 1, self.steps_left - 1, values, levels, extra)


def empty_history(x_T: Batch, num_steps: int, num_values: int, extra: PyTree = ()) -> History:
    """Returns the history before the first of `num_steps` steps; its values and levels are unused."""
    zero, one = jnp.zeros((), x_T.dtype), jnp.ones((), x_T.dtype)
    none = NoiseLevel(one, one, zero, zero)  # finite, so that no gradient becomes NaN
    values = (jnp.zeros_like(x_T),) * num_values
    return History(jnp.int32(0), jnp.int32(num_steps), values, (none,) * num_values, extra)


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """The common options of the multistep samplers."""

    order: int = 2
    _: dataclasses.KW_ONLY
    lower_order_final: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_number("order", self.order, 1, 3, whole=True)

    @property
    def stability(self) -> Stability:
        return Stability(self.order)

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        return empty_history(x_T, num_steps, self.order - 1)

    def _step_order(self, history: History, transition: Transition) -> Int[Array, ""]:
        """Returns the least of `order`, the values so far and, if `lower_order_final`, the steps left; 1 for the last one."""
        order = jnp.minimum(self.order, history.steps_taken + 1)
        return (
            jnp.minimum(order, history.steps_left) if self.lower_order_final else jnp.where(_ends(transition), 1, order)
        )


def _ends(transition: Transition) -> Array:
    """Whether the step is the last step, to x_0."""
    return jnp.all(transition.target.sigma == 0)


def _slopes(values, gaps):
    """Returns the first and second derivative in lambda, at values[0], of the line or parabola through the values.

    gaps[i]: lambda at values[i] minus lambda at values[i + 1].
    """
    first = (values[0] - values[1]) / gaps[0]
    if len(values) == 2:
        return first, 0.0
    second = (first - (values[1] - values[2]) / gaps[1]) / (gaps[0] + gaps[1])
    return first + second * gaps[0], 2 * second


def _gaps(nodes):
    """Returns the differences of lambda between adjacent nodes; 1 for the equal, unused nodes before the first step."""
    gaps = [a.lam - b.lam for a, b in itertools.pairwise(nodes)]
    return [jnp.where(gap == 0, 1.0, gap) for gap in gaps]


def choose(index: Int[Array, ""], candidates: list[Batch]) -> Batch:
    """Returns candidates[index]. All candidates are computed, because a branch makes an accelerator wait for the host."""
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

    order: order 1 is DDIM (with sde, eta = 1). Order 2 is "2M" without singlestep; its second term has the authors' factor
      h/2 (1 - e^-h). Order 3 integrates the parabola exactly; the authors' code halves the last term, which lowers the order.
    sde: solves the reverse SDE instead of the ODE: the integrand's rate doubles, and noise with variance sigma'^2 (1 -
      e^{-2h}) is added ("SDE-DPM-Solver++").
    singlestep: takes steps in groups of `order`; each step in a group starts from the group's first x and uses all values
      in the group so far. Order 3 needs steps of similar length in lambda, as in any smooth spacing. The steps in a group
      share one noise path. `lower_order_final` lowers the order of the last step only, which becomes a group of its own.
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

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        order, (current, target) = self.order, transition[:2]
        h = target.lam - current.lam
        x_0 = denoiser(x_t, transition).x_0
        values, nodes = (x_0, *state.values), (current, *state.levels)
        x_scale, noise = target.sigma / current.sigma, 0.0
        if self.sde:
            x_scale = x_scale * jnp.exp(-h)
            noise = target.sigma * jnp.sqrt(-jnp.expm1(-2 * h)) * normal(key, x_t)

        if not self.singlestep:
            drifts = [self._integral(current, target, values[:n], nodes[:n]) for n in range(1, order + 1)]
            drift = choose(self._step_order(state, transition) - 1, drifts)
            return Step(x_scale * x_t + drift + noise, x_0, state.push(x_0, current))

        x_first, path = state.extra
        # The last step is its own group.
        is_last = (state.steps_left == 1) if self.lower_order_final else _ends(transition)
        position = jnp.where(is_last, 0, state.steps_taken % order)
        x_first, path = jnp.where(position == 0, x_t, x_first), x_scale * jnp.where(position == 0, 0.0, path) + noise

        def from_first(n):
            *_, first = in_order = nodes[:n]
            h = target.lam - first.lam
            x_scale = target.sigma / first.sigma * jnp.exp(-(self._rate - 1) * h)
            return x_scale * x_first + self._integral(first, target, values[:n][::-1], in_order[::-1])

        x_prev = choose(position, [from_first(n) for n in range(1, order + 1)]) + path
        return Step(x_prev, x_0, state.push(x_0, current, (x_first, path)))

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        extra = (x_T, jnp.zeros_like(x_T)) if self.singlestep else ()
        return empty_history(x_T, num_steps, self.order - 1, extra)


@dataclasses.dataclass(frozen=True)
class deis(_Multistep):
    """DEIS (Zhang & Chen 2023, "log-rho"): polynomials in lambda through eps, integrated exactly.

    One network call per step. Order 1 is DDIM.
    """

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        current, target = transition[:2]
        h = target.lam - current.lam
        x_0, eps, *_ = denoiser(x_t, transition)
        values, nodes = (eps, *state.values), (current, *state.levels)
        first = jnp.expm1(h) - h  # int_0^h e^{h - u} u du; with u^2 / 2 for u: first - h^2 / 2

        def higher_order_terms(n):
            slope, curve = _slopes(values[:n], _gaps(nodes[:n]))
            return target.sigma * (first * slope + (first - h**2 / 2) * curve)

        changes = [jnp.zeros_like(x_t), *(higher_order_terms(n) for n in range(2, self.order + 1))]
        change = choose(self._step_order(state, transition) - 1, changes)
        return Step(target.alpha * x_0 + target.sigma * eps - change, x_0, state.push(eps, current))


@dataclasses.dataclass(frozen=True)
class unipc(_Multistep):
    """UniPC (Zhao et al. 2023), a predictor and a corrector with x_0 predictions; one network call per step.

    Each predicted x_0 is used twice: it corrects its own input x (to order + 1), and predicts the next x. Order 3 with "bh2"
    is for few steps without guidance; the authors use order 2 with guidance. The last x_0 is predicted, not corrected.

    variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1). Raises: ValueError for another variant.
    """

    _: dataclasses.KW_ONLY
    variant: str = "bh2"

    def __post_init__(self):
        super().__post_init__()
        require_known("variant", self.variant, ("bh1", "bh2"))

    @property
    def stability(self) -> Stability:
        return Stability(self.order, limit=0.3 if self.order > 1 else None)

    def _move(self, x, nodes, target, values, value_at_target=None):
        """Moves x from nodes[0] to `target` with the values at `nodes` (UniPC eq. 3, with h -> -h for x_0).

        value_at_target: the value at `target`, for the corrector.
        """
        current = nodes[0]
        h = current.lam - target.lam
        h = jnp.where(h == 0, -1.0, h)  # h is 0 before the first step, whose corrected x is unused
        zeroth = jnp.expm1(h)
        scale = h if self.variant == "bh1" else zeroth
        positions = [gap / h for gap in itertools.accumulate(_gaps(nodes))]
        differences = [(value - values[0]) / position for value, position in zip(values[1:], positions, strict=True)]
        if value_at_target is not None:
            differences, positions = [*differences, value_at_target - values[0]], [*positions, 1.0]
        unknowns = len(positions)
        change: Any = 0.0
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

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        current, target = transition[:2]
        orders, (last_x, last_order) = range(1, self.order + 1), state.extra
        x_0 = denoiser(x_t, transition).x_0
        corrections = [self._move(last_x, state.levels[:p], current, state.values[:p], x_0) for p in orders]
        corrected = choose(last_order, [x_t, *corrections])
        values, nodes = (x_0, *state.values), (current, *state.levels)
        step_order = self._step_order(state, transition)
        x_prev = choose(step_order - 1, [self._move(corrected, nodes[:p], target, values[:p]) for p in orders])
        # A step from pure noise is infinitely long in lambda, so it has no corrector.
        corrector_order = jnp.where(jnp.all(current.alpha > 0), step_order, 0)
        return Step(x_prev, x_0, state.push(x_0, current, (corrected, corrector_order)))

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        # One value more than a predictor needs, because the corrector starts from the previous step.
        return empty_history(x_T, num_steps, self.order, (x_T, jnp.int32(0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class heun(Sampler):
    """Heun's method on dx/dsigma = eps, in x / alpha and sigma / alpha: EDM's Algorithm 2 (Karras et al. 2022).

    Each step calls the network twice, the last step once; from pure noise (alpha_bar = 0) the step is Euler's. Heun's method
    fails if sigma falls by many octaves in one step, as in the first steps of a cosine schedule: respace with "karras" or
    "log_snr". Not for the prediction x_prev.

    churn: S_churn. Above 0, each step whose sigma (the noise's standard deviation in x / alpha) lies in `churn_range`
      (S_tmin, S_tmax) first adds fresh noise: sigma is multiplied by 1 + min(churn / T, sqrt(2) - 1), up to the largest sigma
      of the path. `churn_noise` (S_noise) scales the fresh noise.
    Raises: ValueError for a negative churn or churn_noise, or a churn_range in the wrong order.
    """

    churn: float | np.floating = 0.0
    churn_range: tuple[float, float] = (0.0, float("inf"))
    churn_noise: float | np.floating = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_number("churn", self.churn, 0)
        require_number("churn_noise", self.churn_noise, 0)
        low, high = map(float, self.churn_range)
        if not low <= high:
            raise ValueError(f"churn_range must be (low, high) with low <= high, got {self.churn_range}")
        object.__setattr__(self, "churn_range", (low, high))

    @property
    def is_stochastic(self) -> bool:
        return bool(self.churn > 0)

    @property
    def stability(self) -> Stability:
        return Stability(order=2, along_eps=True, limit=0.5)

    def num_calls(self, num_steps: int) -> int:
        return 2 * num_steps - 1

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> Float[Array, ""]:
        """Returns the factor by which churn multiplies sigma."""
        return jnp.asarray(1 + min(self.churn / schedule.num_timesteps, 2**0.5 - 1), x_T.dtype)

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        x_t, level = self._add_churn(key, x_t, transition, state) if self.churn else (x_t, transition.level)
        target, denoised = transition.target, denoiser(x_t, level)
        euler = ddim_step(denoised, denoised.eps, level, target)

        def corrected():
            eps = (denoised.eps + denoiser(euler, target).eps) / 2
            return jnp.where(target.sigma > 0, ddim_step(denoised, eps, level, target), euler)

        # The branch saves the last step's second call. Taking the last step outside the loop would compile the network again.
        x_prev = jax.lax.cond(_ends(transition), lambda: euler, corrected)
        return Step(x_prev, denoised.x_0, state)

    def _add_churn(self, key, x_t, transition, factor) -> tuple[Batch, NoiseLevel]:
        """Returns x_t with fresh noise, and its noise level; both unchanged where no noise is added."""
        current, path = transition.level, transition.path
        lowest = path.log_snr(jnp.asarray(path.interval[1], x_t.dtype))
        log_snr = jnp.maximum(current.log_snr - 2 * jnp.log(factor), lowest)
        raised = path.at_log_snr(log_snr.reshape(current.time.shape), x_t)
        sigma = jnp.exp(-current.log_snr / 2)
        inside = (self.churn_range[0] <= sigma) & (sigma <= self.churn_range[1])
        is_raised = inside & (current.alpha > 0) & (raised.log_snr < current.log_snr)
        kept = raised.alpha / jnp.where(is_raised, current.alpha, 1.0)
        # alpha' sqrt((sigma'/alpha')^2 - (sigma/alpha)^2)
        added = raised.sigma * jnp.sqrt(-jnp.expm1(jnp.minimum(raised.log_snr - current.log_snr, 0.0)))
        noisier = kept * x_t + self.churn_noise * added * normal(key, x_t)
        return jnp.where(is_raised, noisier, x_t), raised.where(is_raised, current)


@dataclasses.dataclass(frozen=True, kw_only=True)
class pndm(Sampler):
    """PNDM (Liu et al. 2022): DDIM's step along a mean of the last four eps, weighted 55/24, -59/24, 37/24, -9/24 (F-PNDM).

    It has second order for steps that are uniform in network time ("leading", "linspace"); like `heun`, PNDM fails on steps
    over many octaves of sigma. Not for the prediction x_prev.

    runge_kutta: True makes four network calls in each of the first three steps, two of them at the midpoint. False starts
      with lower orders, with two calls in the first step and one call in each later step (PLMS).
    """

    runge_kutta: bool = True

    @property
    def stability(self) -> Stability:
        return Stability(order=4, along_eps=True, limit=0.5)

    def num_calls(self, num_steps: int) -> int:
        return num_steps + (3 * min(num_steps - 1, 3) if self.runge_kutta else min(num_steps - 1, 1))

    def init_state(self, schedule: Schedule, x_T: Batch, num_steps: int) -> History:
        return empty_history(x_T, num_steps, 3)

    def step(self, key, denoiser, x_t, transition, state) -> Step:
        current, target = transition[:2]
        denoised = denoiser(x_t, current)
        e_1, values = denoised.eps, state.values

        def eps_at(level, eps):
            """Returns eps at another noise level, after DDIM's step along `eps`."""
            return denoiser(ddim_step(denoised, eps, current, level), level).eps

        def start():
            if not self.runge_kutta:
                return (e_1 + eps_at(target, e_1)) / 2
            midpoint = transition.path.at((current.time + target.time) / 2, x_t)
            e_2 = eps_at(midpoint, e_1)
            e_3 = eps_at(midpoint, e_2)
            return (e_1 + 2 * e_2 + 2 * e_3 + eps_at(target, e_3)) / 6

        means = [
            e_1,  # also used in the last step, to x_0, which is DDIM's step
            (3 * e_1 - values[0]) / 2,
            (23 * e_1 - 16 * values[0] + 5 * values[1]) / 12,
            (55 * e_1 - 59 * values[0] + 37 * values[1] - 9 * values[2]) / 24,
        ]
        is_last = _ends(transition)
        mean = choose(jnp.where(is_last, 0, jnp.minimum(state.steps_taken, 3)), means)
        is_starting = ~is_last & (state.steps_taken < (3 if self.runge_kutta else 1))
        # The branch, as in `heun`, saves the extra calls in all later steps.
        eps = jax.lax.cond(is_starting, start, lambda: mean)
        return Step(ddim_step(denoised, eps, current, target), denoised.x_0, state.push(e_1, current))


def plms(**options: Any) -> Sampler:
    """PLMS (Liu et al. 2022; Stable Diffusion's code): `pndm` without the Runge-Kutta steps."""
    return pndm(runge_kutta=False, **options)

"""Exponential integrators in lambda = log(alpha / sigma): DPM-Solver++, UniPC and DEIS.

They solve the linear part of the probability-flow ODE exactly and interpolate the network's prediction, a smooth function of
lambda, through its last values. From lambda to lambda' = lambda + h, with D the x_0 prediction,

    x' = (sigma'/sigma) x + alpha' int_0^h e^{-(h - u)} D(lambda + u) du            (DPM-Solver++ eq. 9; UniPC)
    x' = (alpha'/alpha) x - sigma' int_0^h e^{h - u} eps(lambda + u) du             (DPM-Solver eq. 3.4; DEIS)

Each method here is one choice of polynomial, whose order is at most the number of values so far. The step to x_0 is of
order 1: it returns the predicted x_0.

Common options: `order`, 1 to 3; `lower_order_final`, True for at most order n in the n-th step from the end, which is
necessary with few steps; `prediction`, `variance` and `clip` as `Sampler`. All raise ValueError for another order.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PyTree

from diffusion_jax.sampling.driver import Sampler, Stability, Step
from diffusion_jax.schedules import NoiseLevel, Schedule
from diffusion_jax.types import Clip  # noqa: F401  # an annotation of the inherited __init__

__all__ = ["History", "choose", "deis", "dpm_solver_pp", "empty_history", "push", "unipc"]


class History(NamedTuple):
    """The state of a multistep method: the network's last predictions, newest first, and values of the method's own."""

    steps_taken: Int32[Array, ""]
    steps_left: Int32[Array, ""]
    values: tuple[Float[Array, "B *shape"], ...]
    extra: PyTree = ()


def empty_history(x_T: Float[Array, "B *shape"], num_steps: int, num_values: int, extra: PyTree = ()) -> History:
    """The history before the first of `num_steps` steps."""
    return History(jnp.int32(0), jnp.int32(num_steps), (jnp.zeros_like(x_T),) * num_values, extra)


def push(history: History, value: Float[Array, "B *shape"], extra: PyTree = ()) -> History:
    """The history after a step with this prediction."""
    values = (value, *history.values)[: len(history.values)]
    return History(history.steps_taken + 1, history.steps_left - 1, values, extra)


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """The options of all samplers in this module."""

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

    def init_state(self, schedule: Schedule, x_T: Float[Array, "B *shape"], num_steps: int) -> History:
        return empty_history(x_T, num_steps, self.order - 1)


def _levels(schedule: Schedule, t, x: jax.Array, count: int) -> list[NoiseLevel]:
    """The noise levels of the indices t, t + 1, ..., noisiest last.

    Those above T - 1 are the level of T - 1: they belong to steps before the first, whose values are unused.
    """
    return [schedule.at(jnp.minimum(t + i, schedule.num_timesteps - 1), x).level for i in range(count)]


def _step_order(max_order: int, history: History, t, lower_order_final: bool) -> jax.Array:
    """The order of this step, int []: limited by `max_order`, the values so far and the steps left."""
    order = jnp.minimum(max_order, history.steps_taken + 1)
    return jnp.minimum(order, history.steps_left) if lower_order_final else jnp.where(t > 0, order, 1)


def _slopes(values, gaps):
    """First and second derivative in lambda, at values[0], of the line or parabola through two or three values.

    gaps[i]: lambda of values[i] minus that of values[i + 1].
    """
    first = (values[0] - values[1]) / gaps[0]
    if len(values) == 2:
        return first, 0.0
    second = (first - (values[1] - values[2]) / gaps[1]) / (gaps[0] + gaps[1])
    return first + second * gaps[0], 2 * second


def _gaps(nodes):
    """Differences of lambda; 1 between equal ones, which belong to steps before the first, whose values are unused."""
    gaps = [a.lam - b.lam for a, b in itertools.pairwise(nodes)]
    return [jnp.where(gap == 0, 1.0, gap) for gap in gaps]


def choose(index: Int[Array, ""], candidates: list[Float[Array, "B *shape"]]) -> Float[Array, "B *shape"]:
    """candidates[index], with all of them computed, because a branch makes an accelerator wait for the host."""
    return jax.lax.select_n(index, *candidates)


def _vandermonde_solve(points: list, right: list) -> list:
    """w with sum_j points[j]^i w[j] = right[i], for distinct points: Lagrange's polynomials, without a linear solver.

    `jnp.linalg.solve` is a call of a library on GPUs, in every step.
    """
    weights = []
    for j, point in enumerate(points):
        # The coefficients, lowest first, of the polynomial that is 1 at this point and 0 at the others.
        coefficients = [1.0]
        for other in points[:j] + points[j + 1 :]:
            shifted, scaled = [0.0, *coefficients], [other * c for c in coefficients] + [0.0]
            coefficients = [(a - b) / (point - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * r for c, r in zip(coefficients, right, strict=True)))
    return weights


@dataclasses.dataclass(frozen=True)
class dpm_solver_pp(_Multistep):
    """DPM-Solver++ (Lu et al. 2022): polynomials through x_0 predictions; one network call for each step.

    order: 1 is DDIM (with sde, eta = 1). 2 multistep is "2M", with the authors' h/2 (1 - e^-h) for its second term. 3 is the
      exact integral of the parabola; the authors' code has half of the last term, which reduces the order.
    sde: the reverse SDE instead of the ODE: the integrand's rate doubles, and noise of variance sigma'^2 (1 - e^{-2h}) is
      added ("SDE-DPM-Solver++").
    singlestep: steps in groups of `order`; each step of a group starts from the group's first x and uses all values since.
      Order 3 needs steps of similar length in lambda, as any smooth spacing has. The steps of a group share one noise path.
    """

    _: dataclasses.KW_ONLY
    sde: bool = False
    singlestep: bool = False

    @property
    def stability(self) -> Stability:
        if self.singlestep or (self.sde and self.order == 3):
            limit = 0.1 if self.order == 3 else None
        else:
            limit = 0.3 if self.order > 1 else None
        return Stability(self.order, eta=float(self.sde), limit=limit)

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
            noise = target.sigma * jnp.sqrt(-jnp.expm1(-2 * h)) * jax.random.normal(key, x_t.shape, x_t.dtype)

        if not self.singlestep:
            nodes = _levels(schedule, t, x_t, order)
            drifts = [self._integral(current, target, values[:n], nodes[:n]) for n in range(1, order + 1)]
            drift = choose(_step_order(order, state, t, self.lower_order_final) - 1, drifts)
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

    def init_state(self, schedule: Schedule, x_T: Float[Array, "B *shape"], num_steps: int) -> History:
        extra = (x_T, jnp.zeros_like(x_T)) if self.singlestep else ()
        return empty_history(x_T, num_steps, self.order - 1, extra)


@dataclasses.dataclass(frozen=True)
class deis(_Multistep):
    """DEIS (Zhang & Chen 2023, "log-rho"): polynomials in lambda through eps, integrated exactly.

    One network call for each step. Order 1 is DDIM.
    """

    def step(self, key, schedule, denoise_fn, x_t, t, state) -> Step:
        at = schedule.at(t, x_t)
        current, target = at.level, at.previous
        h = target.lam - current.lam
        denoised = self.denoise(schedule, denoise_fn, x_t, t)
        values = (denoised.eps, *state.values)
        first = jnp.expm1(h) - h  # int_0^h e^{h - u} u du; the next with u^2 / 2

        def higher_order_terms(n):
            slope, curve = _slopes(values[:n], _gaps(_levels(schedule, t, x_t, n)))
            return target.sigma * (first * slope + (first - h**2 / 2) * curve)

        changes = [jnp.zeros_like(x_t), *(higher_order_terms(n) for n in range(2, self.order + 1))]
        change = choose(_step_order(self.order, state, t, self.lower_order_final) - 1, changes)
        x_prev = target.alpha * denoised.x_0 + target.sigma * denoised.eps - change
        return Step(x_prev, denoised.x_0, push(state, denoised.eps))


@dataclasses.dataclass(frozen=True)
class unipc(_Multistep):
    """UniPC (Zhao et al. 2023), predictor and corrector in x_0 predictions; one network call for each step.

    Each call is used twice: it corrects the x that it was called with (to order + 1), and predicts the next x. Order 3 with
    "bh2" is for few steps without guidance; its authors use order 2 with guidance. The last x_0 is predicted, not corrected.

    variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1). Raises: ValueError for another.
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
        """x at `target` with p values, and with the one at `target` for the corrector (UniPC eq. 3, with h -> -h for x_0)."""
        h = current.lam - target.lam
        h = jnp.where(h == 0, -1.0, h)  # of a corrector before the first step, whose result is unused
        zeroth = jnp.expm1(h)
        scale = h if self.variant == "bh1" else zeroth
        positions = [gap / h for gap in itertools.accumulate(_gaps(nodes[:p]))]
        differences = [(value - values[0]) / position for value, position in zip(values[1:p], positions, strict=True)]
        if corrector:
            differences, positions = [*differences, new - values[0]], [*positions, 1.0]
        unknowns = len(positions)
        change = 0.0
        if unknowns == 1:
            change = 0.5 * differences[0]  # the limit of the system below, which the authors use
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
        step_order = _step_order(order, state, t, self.lower_order_final)
        values = (x_0, *state.values)

        def predict(p):
            return self._update(p, False, current, target, nodes, corrected, values, None)

        x_prev = choose(step_order - 1, [*map(predict, range(1, order + 1))])
        return Step(x_prev, x_0, push(state, x_0, (corrected, step_order)))

    def init_state(self, schedule: Schedule, x_T: Float[Array, "B *shape"], num_steps: int) -> History:
        # One value more than a predictor needs, because the corrector starts from the previous step.
        return empty_history(x_T, num_steps, self.order, (x_T, jnp.int32(0)))

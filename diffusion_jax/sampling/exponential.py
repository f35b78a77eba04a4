"""Exponential integrators in lambda = log(alpha / sigma): DPM-Solver++, UniPC and DEIS.

Along the probability-flow ODE a linear part is solved exactly, and what the network predicts is a smooth function of lambda
that is interpolated through its last values. From lambda to lambda' = lambda + h, with D the x_0 prediction,

    x' = (sigma'/sigma) x + alpha' int_0^h e^{-(h - u)} D(lambda + u) du            (DPM-Solver++ eq. 9; UniPC)
    x' = (alpha'/alpha) x - sigma' int_0^h e^{h - u} eps(lambda + u) du             (DPM-Solver eq. 3.4; DEIS)

so that every method here is one choice of polynomial, and of order at most the number of values it has seen. A step to x_0
itself is of order 1: it returns the x_0 predicted.

What they all take: `order`, 1 to 3; `lower_order_final`, True for at most order n in the n-th step from the end, which few
steps need; `prediction`, `variance` and `clip` as `ddim`. All raise ValueError for another order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.sampling.driver import Sampler, Step
from diffusion_jax.sampling.noise_levels import denoise, level, level_before


class History(NamedTuple):
    """taken, left: steps so far and to go, int32 []; values: the network's last ones, newest first; more: a method's own."""

    taken: jax.Array
    left: jax.Array
    values: tuple[jax.Array, ...]
    more: Any = ()


def empty_history(x_T, num_steps: int, num_values: int, more: Any = ()) -> History:
    """What is known before the first of `num_steps` steps."""
    return History(jnp.int32(0), jnp.int32(num_steps), (jnp.zeros_like(x_T),) * num_values, more)


def push(history: History, value, more: Any = ()) -> History:
    """The history after a step."""
    values = (value, *history.values)[: len(history.values)]
    return History(history.taken + 1, history.left - 1, values, more)


@dataclasses.dataclass(frozen=True)
class _Multistep(Sampler):
    """The options that all of this file take."""

    order: int = 2
    _: dataclasses.KW_ONLY
    lower_order_final: bool = True
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: bool | Callable = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")

    def start(self, schedule, x_T, num_steps: int) -> History:
        return empty_history(x_T, num_steps, self.order - 1)


def _order(order: int, history: History, t, lower_order_final: bool):
    """The order of this step, int []: what was asked for, what the values seen allow, and what is left to go."""
    order = jnp.minimum(order, history.taken + 1)
    return jnp.minimum(order, history.left) if lower_order_final else jnp.where(t > 0, order, 1)


def _slopes(values, gaps):
    """First and second derivative in lambda at values[0] of the line or parabola through two or three values.

    gaps[i]: lambda of values[i] minus that of values[i + 1].
    """
    first = (values[0] - values[1]) / gaps[0]
    if len(values) == 2:
        return first, 0.0
    second = (first - (values[1] - values[2]) / gaps[1]) / (gaps[0] + gaps[1])
    return first + second * gaps[0], 2 * second


def _gaps(nodes):
    """Between neighbors; 1 between equal ones, which stand for steps that were never taken: their values are left out."""
    gaps = [a.lam - b.lam for a, b in itertools.pairwise(nodes)]
    return [jnp.where(gap == 0, 1.0, gap) for gap in gaps]


def _choose(index, candidates: list):
    """candidates[index], all of them computed: an accelerator's program waits for the host where it branches."""
    return jax.lax.select_n(index, *candidates)


@dataclasses.dataclass(frozen=True)
class dpm_solver_pp(_Multistep):
    """DPM-Solver++ (Lu et al. 2022): polynomials through x_0 predictions; one network call a step.

    order: 1 is DDIM (with sde, eta = 1). 2 multistep is "2M", with the authors' h/2 (1 - e^-h) for its second term. 3 has the
      exact integral of the parabola; the authors' code has half of the last term, which costs it the order.
    sde: the reverse SDE instead of the ODE: the integrand's rate doubles, and noise of variance sigma'^2 (1 - e^{-2h}) is
      added ("SDE-DPM-Solver++").
    singlestep: steps in groups of `order`; inside a group each starts from the group's first x with all values seen since.
      Order 3 needs steps of about one length in lambda, which any smooth spacing has. The noise of a group is one path.
    """

    _: dataclasses.KW_ONLY
    sde: bool = False
    singlestep: bool = False

    @property
    def _rate(self) -> float:
        return 2.0 if self.sde else 1.0

    def _integral(self, here, there, values, nodes):
        """alpha' rate int_0^h e^{-rate (h - u)} D(u) du, D the polynomial through `values` at `nodes`; nodes[0] = here."""
        rate, h = self._rate, there.lam - here.lam
        zeroth = -jnp.expm1(-rate * h)
        total = zeroth * values[0]
        if len(values) > 1:
            slope, curve = _slopes(values, _gaps(nodes))
            first = zeroth * h / 2 if len(values) == 2 else h - zeroth / rate
            total += first * slope
        if len(values) > 2:
            total += (h**2 / 2 - first / rate) * curve
        return there.alpha * total

    def step(self, key, schedule, denoise_fn, x_t, t, history) -> Step:
        order, here, there = self.order, level(schedule, t, x_t), level_before(schedule, t, x_t)
        h = there.lam - here.lam
        x_0 = denoise(schedule, denoise_fn, x_t, t, self.prediction, self.variance, self.clip).x_0
        values = (x_0, *history.values)
        kept, noise = there.sigma / here.sigma, 0.0
        if self.sde:
            kept = kept * jnp.exp(-h)
            noise = there.sigma * jnp.sqrt(-jnp.expm1(-2 * h)) * jax.random.normal(key, x_t.shape, x_t.dtype)

        if not self.singlestep:
            nodes = [level(schedule, t + i, x_t) for i in range(order)]
            drifts = [self._integral(here, there, values[:n], nodes[:n]) for n in range(1, order + 1)]
            drift = _choose(_order(order, history, t, self.lower_order_final) - 1, drifts)
            return Step(kept * x_t + drift + noise, x_0, push(history, x_0))

        x_first, path = history.more
        alone = (history.left == 1) if self.lower_order_final else (t == 0)  # the last step, as a group of its own
        place = jnp.where(alone, 0, history.taken % order)
        x_first, path = jnp.where(place == 0, x_t, x_first), kept * jnp.where(place == 0, 0.0, path) + noise

        def from_first(n):
            nodes = [level(schedule, t + n - 1 - i, x_t) for i in range(n)]  # as the group saw them
            h = there.lam - nodes[0].lam
            kept = there.sigma / nodes[0].sigma * jnp.exp(-(self._rate - 1) * h)
            return kept * x_first + self._integral(nodes[0], there, values[:n][::-1], nodes)

        x_prev = _choose(place, [from_first(n) for n in range(1, order + 1)]) + path
        return Step(x_prev, x_0, push(history, x_0, (x_first, path)))

    def start(self, schedule, x_T, num_steps: int) -> History:
        more = (x_T, jnp.zeros_like(x_T)) if self.singlestep else ()
        return empty_history(x_T, num_steps, self.order - 1, more)


@dataclasses.dataclass(frozen=True)
class deis(_Multistep):
    """DEIS (Zhang & Chen 2023, "log-rho"): polynomials in lambda through eps, integrated exactly; one network call a step.

    Order 1 is DDIM.
    """

    def step(self, key, schedule, denoise_fn, x_t, t, history) -> Step:
        here, there = level(schedule, t, x_t), level_before(schedule, t, x_t)
        h = there.lam - here.lam
        denoised = denoise(schedule, denoise_fn, x_t, t, self.prediction, self.variance, self.clip)
        values = (denoised.eps, *history.values)
        first = jnp.expm1(h) - h  # int_0^h e^{h - u} u du; the next with u^2 / 2

        def beyond_ddim(n):
            slope, curve = _slopes(values[:n], _gaps([level(schedule, t + i, x_t) for i in range(n)]))
            return there.sigma * (first * slope + (first - h**2 / 2) * curve)

        changes = [jnp.zeros_like(x_t), *(beyond_ddim(n) for n in range(2, self.order + 1))]
        change = _choose(_order(self.order, history, t, self.lower_order_final) - 1, changes)
        x_prev = there.alpha * denoised.x_0 + there.sigma * denoised.eps - change
        return Step(x_prev, denoised.x_0, push(history, denoised.eps))


@dataclasses.dataclass(frozen=True)
class unipc(_Multistep):
    """UniPC (Zhao et al. 2023), predictor and corrector in x_0 predictions; one network call a step.

    Each call serves twice: it corrects the x it was made at (order + 1 there), and predicts the next. Order 3 and "bh2" suit
    few steps without guidance; order 2 is what its authors use with guidance. The last x_0 is predicted, not corrected.

    variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1). Raises: ValueError for another.
    """

    _: dataclasses.KW_ONLY
    variant: str = "bh2"

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    def _update(self, p, corrector, here, there, nodes, x, values, new):
        """x at `there` with p values, and with the one at `there` for the corrector (UniPC eq. 3, with h -> -h for x_0)."""
        h = here.lam - there.lam
        zeroth = jnp.expm1(h)
        scale = h if self.variant == "bh1" else zeroth
        places = [(here.lam - nodes[i].lam) / h for i in range(1, p)]
        differences = [(values[i] - values[0]) / places[i - 1] for i in range(1, p)]
        if corrector:
            differences, places = [*differences, new - values[0]], [*places, 1.0]
        unknowns = len(places)
        change = 0.0
        if unknowns == 1:
            change = 0.5 * differences[0]  # what the system below tends to, and the authors take instead
        elif unknowns:
            system = jnp.stack([jnp.array(places) ** i for i in range(unknowns)])
            right, phi, factorial = [], zeroth / h - 1, 1
            for i in range(1, unknowns + 1):
                right.append(phi * factorial / scale)
                factorial *= i + 1
                phi = phi / h - 1 / factorial
            weights = jnp.linalg.solve(system, jnp.stack(right))
            change = sum(weights[i] * differences[i] for i in range(unknowns))
        return there.sigma / here.sigma * x - there.alpha * (zeroth * values[0] + scale * change)

    def step(self, key, schedule, denoise_fn, x_t, t, history) -> Step:
        order, (last_x, last_order) = self.order, history.more
        here, there = level(schedule, t, x_t), level_before(schedule, t, x_t)
        nodes = [level(schedule, t + i, x_t) for i in range(order + 1)]
        x_0 = denoise(schedule, denoise_fn, x_t, t, self.prediction, self.variance, self.clip).x_0

        def correct(p):
            return lambda: self._update(p, True, nodes[1], here, nodes[1:], last_x, history.values, x_0)

        corrected = jax.lax.switch(last_order, [lambda: x_t] + [correct(p) for p in range(1, order + 1)])
        now = _order(order, history, t, self.lower_order_final)
        values = (x_0, *history.values)

        def predict(p):
            return lambda: self._update(p, False, here, there, nodes, corrected, values, None)

        x_prev = jax.lax.switch(now - 1, [predict(p) for p in range(1, order + 1)])
        return Step(x_prev, x_0, push(history, x_0, (corrected, now)))

    def start(self, schedule, x_T, num_steps: int) -> History:
        # One value more than a predictor needs: the corrector looks back from the step before.
        return empty_history(x_T, num_steps, self.order, (x_T, jnp.int32(0)))

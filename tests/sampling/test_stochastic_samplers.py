"""The noise of the stochastic samplers, against their recursions in closed form."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from diffusion_jax import sampling, schedules
from helpers.gaussian_mixtures import FULL, S2, M, gaussian

KEY = jax.random.key(0)
FREE = {"clip": False}


def d_of(alpha):
    """E[x_0 | x_t] of N(M, S2) as slope and offset."""
    v = alpha**2 * S2 + 1 - alpha**2
    return alpha * S2 / v, M - alpha**2 * S2 / v * M


class Affine:
    """offset + sum of coefficients times independent standard normals: (1, x_T, z_1, z_2, ...)."""

    def __init__(self, values):
        self.values = np.asarray(values, np.float64)

    def __add__(self, other):
        return Affine(
            self.values + (other.values if isinstance(other, Affine) else np.eye(len(self.values))[0] * other)
        )

    def __mul__(self, factor):
        return Affine(self.values * factor)

    __rmul__ = __mul__

    def __sub__(self, other):
        return self + other * -1.0


class Levels(NamedTuple):
    """alpha and sigma of a step's start and end; no step here ends without noise."""

    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float

    @property
    def lam(self):
        return np.log(self.alpha / self.sigma)

    @property
    def h(self):
        return np.log(self.next_alpha / self.next_sigma) - self.lam


class HalfDdim:
    """DDIM with eta = 0.5."""

    def step(self, x, x_0, z, t, levels):
        a, s, b, _ = levels
        up = 0.5 * np.sqrt((1 - b**2) / (1 - a**2)) * np.sqrt(1 - a**2 / b**2)
        return b * x_0 + np.sqrt(1 - b**2 - up**2) / s * (x - a * x_0) + up * z


class MultistepSde:
    """SDE-DPM-Solver++ of orders 1 to 3."""

    def __init__(self, order):
        self.order, self.seen = order, []

    def step(self, x, x_0, z, t, levels):
        a, s, b, r = levels
        h, seen = levels.h, self.seen
        order = min(self.order, len(seen) + 1, t + 1)
        first = 1 - np.exp(-2 * h)
        mean = first * x_0
        if order >= 2:
            step = np.log(a / s) - seen[-1][0]
            d_1 = (x_0 - seen[-1][1]) * (1 / step)
        if order == 2:
            mean = mean + first * h / 2 * d_1
        if order == 3:
            step_2 = seen[-1][0] - seen[-2][0]
            d_2 = (d_1 - (seen[-1][1] - seen[-2][1]) * (1 / step_2)) * (1 / (step + step_2))
            # 2 int_0^h e^{-2 (h - u)} (u, u^2 / 2) du
            i_1 = h - 0.5 * (1 - np.exp(-2 * h))
            i_2 = h**2 / 2 - h / 2 + 0.25 * (1 - np.exp(-2 * h))
            mean = mean + i_1 * (d_1 + step * d_2) + i_2 * 2 * d_2
        seen.append((levels.lam, x_0))
        return r / s * np.exp(-h) * x + b * mean + r * np.sqrt(first) * z


class SinglestepSde:
    """SDE-DPM-Solver++ in groups of `order` steps, each from the group's first x."""

    def __init__(self, order):
        self.order, self.values = order, []

    def step(self, x, x_0, z, t, levels):
        _, s, b, r = levels
        h = levels.h
        if len(self.values) in (0, self.order):
            self.lam, self.s_0, self.x_s, self.path, self.values = levels.lam, s, x, 0 * z, []
        lam, values = self.lam, self.values
        values.append((levels.lam, x_0))
        self.path = (r / s * np.exp(-h)) * self.path + r * np.sqrt(1 - np.exp(-2 * h)) * z
        whole = np.log(b / r) - lam
        # 2 int_0^whole e^{-2 (whole - u)} (1, u, u^2 / 2) du, and Newton's polynomial from the group's first node
        i_0 = 1 - np.exp(-2 * whole)
        i_1 = whole - i_0 / 2
        i_2 = whole**2 / 2 - whole / 2 + i_0 / 4
        mean = i_0 * values[0][1]
        if len(values) > 1:
            d_01 = (values[1][1] - values[0][1]) * (1 / (values[1][0] - lam))
            mean = mean + i_1 * d_01
        if len(values) == 2:  # the authors' shorter form of the first-order term
            mean = i_0 * (values[0][1] + whole / 2 * d_01)
        if len(values) == 3:
            d_12 = (values[2][1] - values[1][1]) * (1 / (values[2][0] - values[1][0]))
            d_012 = (d_12 - d_01) * (1 / (values[2][0] - lam))
            mean = mean + (2 * i_2 - (values[1][0] - lam) * i_1) * d_012
        return r / self.s_0 * np.exp(-whole) * self.x_s + b * mean + self.path


class ChurnedHeun:
    """EDM's Algorithm 2 in x / alpha and sigma / alpha."""

    def __init__(self, total):
        self.total = total

    def step(self, x, x_0, z, t, levels):
        a, s, b, r = levels
        sigma, lower = s / a, r / b
        raised = min(sigma * (1 + min(20 / self.total, np.sqrt(2) - 1)), np.sqrt(1 / FULL.alpha_bar[-1] - 1))
        raised = raised if 0.3 <= sigma <= 20 else sigma
        hat = x * (1 / a) + 1.1 * np.sqrt(raised**2 - sigma**2) * z
        d = []
        for point, level in ((hat, raised), (None, lower)):
            if point is None:
                point = hat + (lower - raised) * d[0]
            alpha = 1 / np.sqrt(1 + level**2)
            slope, offset = d_of(alpha)
            d.append((point - (slope * alpha * point + offset)) * (1 / level))
        return b * (hat + (lower - raised) / 2 * (d[0] + d[1]))


def recursion(name, schedule):
    """Mean and variance of the samples of a stochastic sampler, from its published formulas (float64 NumPy)."""
    total = schedule.num_timesteps
    method = {
        "ddim 0.5": HalfDdim,
        "heun churn": lambda: ChurnedHeun(total),
        "sde 1": lambda: MultistepSde(1),
        "sde 2": lambda: MultistepSde(2),
        "sde 3": lambda: MultistepSde(3),
        "singlestep sde 2": lambda: SinglestepSde(2),
        "singlestep sde 3": lambda: SinglestepSde(3),
    }[name]()
    basis = np.eye(2 + 3 * total)
    x, draws = Affine(basis[1]), iter(basis[2:])
    alphas, sigmas = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    for t in range(total - 1, 0, -1):
        slope, offset = d_of(np.sqrt(schedule.alpha_bar[t]))
        levels = Levels(alphas[t], sigmas[t], alphas[t - 1], sigmas[t - 1])
        x = method.step(x, slope * x + offset, Affine(next(draws)), t, levels)
    slope, offset = d_of(np.sqrt(schedule.alpha_bar[0]))
    x = slope * x + offset
    return x.values[0], (x.values[1:] ** 2).sum()


STOCHASTIC = {
    "ddim 0.5": sampling.ddim(0.5, **FREE),
    "sde 1": sampling.dpm_solver_pp(1, sde=True, **FREE),
    "sde 2": sampling.dpm_solver_pp(2, sde=True, **FREE),
    "sde 3": sampling.dpm_solver_pp(3, sde=True, **FREE),
    "singlestep sde 2": sampling.dpm_solver_pp(2, sde=True, singlestep=True, **FREE),
    "singlestep sde 3": sampling.dpm_solver_pp(3, sde=True, singlestep=True, **FREE),
    "heun churn": sampling.heun(churn=20, churn_range=(0.3, 20), churn_noise=1.1, **FREE),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_have_the_mean_and_variance_of_their_recursion(name):
    schedule, n = schedules.respace(FULL, 15, "karras"), 200_000
    x_T = jax.random.normal(jax.random.key(1), (n, 1))
    x_0 = jax.jit(lambda x: sampling.sample(KEY, schedule, gaussian(), x, STOCHASTIC[name]))(x_T)
    mean, variance = recursion(name, schedule)
    assert 0.4 * S2 < variance < 4 * S2
    assert abs(float(x_0.mean()) - mean) < 4 * np.sqrt(variance / n) + 1e-5
    assert abs(float(x_0.var()) - variance) < 4 * variance * np.sqrt(2 / n) + 1e-5


def test_first_order_sde_is_ddim_with_eta_1(x64):
    schedule, x_T = schedules.respace(FULL, 12, "karras"), jax.random.normal(KEY, (4, 2))
    a = sampling.sample(KEY, schedule, gaussian(), x_T, sampling.dpm_solver_pp(1, sde=True))
    b = sampling.sample(KEY, schedule, gaussian(), x_T, sampling.euler_ancestral())
    np.testing.assert_allclose(a, b, rtol=1e-9)

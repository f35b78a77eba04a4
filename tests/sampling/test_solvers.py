"""The solvers' orders of convergence, their noise, and the numbers that diffusers publishes for its own."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import samplers as benchmark
from diffusion_jax import process, sampling, schedules
from diffusion_jax.sampling import noise_levels
from helpers.gaussian_mixtures import FULL, S2, M, gaussian, mixture

KEY = jax.random.key(0)
FREE = {"clip": False}
FULL_ORDER = FREE | {"lower_order_final": False}

# name: (sampler, least order measured).
DETERMINISTIC = {
    "ddim": (sampling.ddim(**FREE), 0.9),
    "euler": (sampling.euler(**FREE), 0.9),
    "dpm_solver_pp 1": (sampling.dpm_solver_pp(1, **FULL_ORDER), 0.9),
    "deis 1": (sampling.deis(1, **FULL_ORDER), 0.9),
    "dpm_solver_pp 2": (sampling.dpm_solver_pp(2, **FULL_ORDER), 1.8),
    "dpm_solver_pp 2, lower final": (sampling.dpm_solver_pp(2, **FREE), 1.8),
    "dpm_solver_pp 2 singlestep": (sampling.dpm_solver_pp(2, singlestep=True, **FULL_ORDER), 1.8),
    "deis 2": (sampling.deis(2, **FULL_ORDER), 1.8),
    "heun": (sampling.heun(**FREE), 1.8),
    "pndm": (sampling.pndm(**FREE), 1.8),
    "plms": (sampling.pndm(runge_kutta=False, **FREE), 1.8),
    "unipc 1": (sampling.unipc(1, **FULL_ORDER), 1.8),
    "dpm_solver_pp 3": (sampling.dpm_solver_pp(3, **FULL_ORDER), 2.5),
    "dpm_solver_pp 3 singlestep": (sampling.dpm_solver_pp(3, singlestep=True, **FULL_ORDER), 2.5),
    "deis 3": (sampling.deis(3, **FULL_ORDER), 2.5),
    "unipc 2": (sampling.unipc(2, **FULL_ORDER), 2.5),
    "unipc 2 bh1": (sampling.unipc(2, variant="bh1", **FULL_ORDER), 2.5),
    "unipc 3": (sampling.unipc(3, **FULL_ORDER), 2.5),
}
TOP, LOW = 800.0, 100.0  # two noise levels; x_0 itself would hide the order


def between(steps):
    """TOP to LOW in steps even in log SNR."""
    ends = np.asarray(FULL.log_snr(np.array([LOW, TOP])))
    return schedules.respace(FULL, np.asarray(FULL.time_at_log_snr(np.linspace(*ends, steps + 1))))


def walk(sampler, denoise_fn, x, steps):
    schedule = between(steps)
    return jax.jit(lambda x: sampling.sample(KEY, schedule, denoise_fn, x, sampler, final_step=False))(x)


POINTS = np.linspace(-1.5, 1.5, 7)[:, None]


@pytest.fixture(scope="module")
def truth_of_the_mixture():
    """The map in float64 by 2,400 steps of the third order; another method agrees."""
    with jax.enable_x64(True):
        fine = walk(sampling.dpm_solver_pp(3, singlestep=True, **FULL_ORDER), mixture(), POINTS, 2400)
        other = walk(sampling.deis(3, **FULL_ORDER), mixture(), POINTS, 2400)
        np.testing.assert_allclose(fine, other, atol=2e-9)
        return np.asarray(fine)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_orders_of_convergence_on_a_mixture(name, truth_of_the_mixture, x64):
    sampler, least = DETERMINISTIC[name]
    errors = [np.sqrt(np.mean((walk(sampler, mixture(), POINTS, n) - truth_of_the_mixture) ** 2)) for n in (36, 72)]
    assert errors[0] > 1e-7
    assert np.log2(errors[0] / errors[1]) > least


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_solvers_converge_to_the_flow_of_a_gaussian(name, x64):
    """x_s - a_s m = sqrt(v_s / v_t) (x_t - a_t m), which every solver tends to."""
    sampler, least = DETERMINISTIC[name]
    a = np.exp(np.interp([LOW, TOP], FULL.grid_timesteps, FULL.grid_log_alpha_bar))
    v = a * S2 + 1 - a
    truth = np.sqrt(a[0]) * M + np.sqrt(v[0] / v[1]) * (POINTS - np.sqrt(a[1]) * M)
    errors = [np.sqrt(np.mean((walk(sampler, gaussian(), POINTS, n) - truth) ** 2)) for n in (48, 96)]
    # These maps are linear, and where terms of two orders cancel at one number of steps the slope there says little.
    assert errors[1] < 0.01 / 20 ** (least > 1) and errors[0] / errors[1] > 1.7


def test_the_halved_last_term_reduces_the_third_order(truth_of_the_mixture, x64, monkeypatch):
    """Why dpm_solver_pp(3) differs from its authors' code."""
    from diffusion_jax.sampling import exponential

    slopes = exponential._slopes
    halved = lambda values, gaps: (slopes(values, gaps)[0], slopes(values, gaps)[1] / (1 + (len(values) == 3)))  # noqa: E731
    monkeypatch.setattr(exponential, "_slopes", halved)
    sampler = sampling.dpm_solver_pp(3, **FULL_ORDER)
    errors = [np.sqrt(np.mean((walk(sampler, mixture(), POINTS, n) - truth_of_the_mixture) ** 2)) for n in (72, 144)]
    assert np.log2(errors[0] / errors[1]) < 2.4


def test_euler_ancestral_is_karras_s_step(x64):
    """Euler to sigma_down and noise up to sigma (k-diffusion), written in sigma, against ddim(eta=1)."""
    schedule = schedules.respace(FULL, 12, "karras")
    x = jax.random.normal(KEY, (5, 2))
    _, got = sampling.sample(KEY, schedule, gaussian(), x, sampling.euler_ancestral(**FREE), trajectory=True)
    sigmas = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    for place, t in enumerate(range(11, 0, -1)):
        sigma, lower, alpha = sigmas[t], sigmas[t - 1], schedule.sqrt_alpha_bar
        up = np.sqrt(lower**2 * (sigma**2 - lower**2) / sigma**2)
        down = np.sqrt(lower**2 - up**2)
        x_t = got.x_t[place]
        eps = gaussian()(x_t, jnp.full(5, schedule.timesteps[t]))
        noise = jax.random.normal(jax.random.fold_in(KEY, t), x.shape)
        expected = alpha[t - 1] * (x_t / alpha[t] + (down - sigma) * eps + up * noise)
        np.testing.assert_allclose(got.x_t[place + 1], expected, rtol=1e-9)


# ------------------------------------------------------------------- noise: each sampler's own recursion, in closed form


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


# ------------------------------------------------------------------------------------------------ public yardsticks


SAMPLE = (np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2).astype(np.float32)
LINSPACE = np.round(np.linspace(0, 999, 11)).astype(int)


def dummy_model(x, time):
    return x * (time / (time + 1)).reshape(-1, 1, 1, 1)


def sum_and_mean(x):
    return float(np.abs(x).sum()), float(np.abs(x).mean())


YARDSTICKS = {  # diffusers' scheduler tests: (sampler, the levels walked, mean of |x|)
    "2M eps": (sampling.dpm_solver_pp(2, **FULL_ORDER), (LINSPACE,), 0.3301),
    "2M v": (sampling.dpm_solver_pp(2, prediction="v", **FULL_ORDER), (LINSPACE,), 0.2251),
    "2M v karras": (sampling.dpm_solver_pp(2, prediction="v", **FULL_ORDER), (10, "karras"), 0.2096),
    "2M v lu": (sampling.dpm_solver_pp(2, prediction="v", **FULL_ORDER), (10, "log_snr"), 0.1554),
    "singlestep": (sampling.dpm_solver_pp(2, singlestep=True, **FULL_ORDER), (LINSPACE,), 0.2791),
    "UniPC bh2": (sampling.unipc(2, **FREE), (LINSPACE,), 0.2464),
    "DEIS": (sampling.deis(2, **FREE), (LINSPACE,), 0.23916),
    "PNDM": (sampling.pndm(**FREE), (10, "leading"), 0.2580),
}


@pytest.mark.parametrize("name", YARDSTICKS)
def test_solvers_agree_with_published_numbers(name):
    """They end at the noise level of index 0; with Karras's and Lu's levels diffusers ends there twice."""
    sampler, steps, mean = YARDSTICKS[name]
    x = sampling.sample(KEY, schedules.respace(FULL, *steps), dummy_model, SAMPLE, sampler, final_step=False)
    assert abs(sum_and_mean(x)[1] - mean) < 1e-3


@pytest.mark.parametrize(
    ("prediction", "beta_start", "to_one", "total", "mean"),
    [
        ("eps", 1e-4, True, 172.0067, 0.223967),
        ("v", 1e-4, True, 52.5302, 0.0684),
        ("eps", 0.01, True, 149.8295, 0.1951),
        ("eps", 0.01, False, 149.0784, 0.1941),
    ],
)
def test_ddim_agrees_with_published_numbers(prediction, beta_start, to_one, total, mean):
    full = schedules.from_betas(schedules.betas("linear", 1000, beta_start=beta_start))
    schedule = schedules.respace(full, 10, "leading")
    if not to_one:  # the last step leads to the level of index 0 instead of to x_0
        schedule = dataclasses.replace(
            schedule,
            alpha_bar_prev=np.append(full.alpha_bar[0], schedule.alpha_bar_prev[1:]),
            sqrt_one_minus_alpha_bar_prev=np.append(
                full.sqrt_one_minus_alpha_bar[0], schedule.sqrt_one_minus_alpha_bar_prev[1:]
            ),
        )
    sampler = sampling.ddim(prediction=prediction, clipped_eps=False)
    found = sum_and_mean(sampling.sample(KEY, schedule, dummy_model, SAMPLE, sampler))
    assert abs(found[0] - total) < 1e-2 and abs(found[1] - mean) < 1e-3


@pytest.mark.parametrize(("prediction", "total"), [("eps", 671.6816), ("v", 1394.2185)])
def test_inverse_ddim_agrees_with_published_numbers(prediction, total):
    schedule = schedules.respace(FULL, 10, "leading")
    x_T = sampling.encode(schedule, dummy_model, SAMPLE, prediction=prediction, clip=True)
    assert abs(sum_and_mean(x_T)[0] - total) < 1e-2


def test_the_best_solver_is_much_more_accurate_than_ddim_on_a_sharp_mixture(x64):
    """Karras spacing, 40 calls, against the exact map: at least five times closer."""
    x_T = jax.random.normal(jax.random.key(1), (benchmark.POINTS, 2))
    truth = benchmark.exact_map(x_T)
    near = np.linalg.norm(truth[:, None] - benchmark.MODES, axis=-1).min(axis=1)
    assert np.median(near) < 2 * benchmark.SD  # the map does end at the modes
    errors = {
        name: benchmark.error(name, 40, x_T, truth) for name in ("DDIM (Euler)", "DPM-Solver++ 2M", "PLMS", "UniPC 3")
    }
    assert errors["DDIM (Euler)"] > 5 * min(errors.values())
    assert errors["DDIM (Euler)"] > 3 * max(v for name, v in errors.items() if name != "DDIM (Euler)")


# ------------------------------------------------------------------------------------------------------- inversion


def round_trip(order, steps, denoise_fn=None):
    denoise_fn = denoise_fn or mixture()
    schedule, x_0 = schedules.respace(FULL, steps, "log_snr"), np.linspace(-1.1, 1.1, 23)[:, None]
    x_T = sampling.encode(schedule, denoise_fn, x_0, order=order)
    back = sampling.heun(**FREE) if order == 2 else sampling.ddim(**FREE)
    return float(np.sqrt(np.mean((sampling.sample(KEY, schedule, denoise_fn, x_T, back) - x_0) ** 2)))


def test_inversion_reconstructs_and_the_second_order_does_so_better(x64):
    first, second = [round_trip(1, n) for n in (50, 100)], [round_trip(2, n) for n in (50, 100)]
    assert first[0] > 1.7 * first[1] and second[0] > 3 * second[1]
    assert second[0] < 0.3 * first[0]
    assert round_trip(2, 50) < 0.5 * round_trip(1, 100)  # at the same number of network calls


def test_inversion_ends_where_the_probability_flow_does(x64):
    a = FULL.alpha_bar[-1]
    x_0 = np.array([[-0.7], [0.2], [1.0]])
    truth = np.sqrt(a) * M + np.sqrt((a * S2 + 1 - a) / S2) * (x_0 - M)
    for order, tolerance in ((1, 0.1), (2, 4e-3)):
        schedule = schedules.respace(FULL, 100, "log_snr")
        np.testing.assert_allclose(sampling.encode(schedule, gaussian(), x_0, order=order), truth, atol=tolerance)


def test_every_prediction_inverts_to_the_same_noise(x64):
    schedule, x_0 = schedules.respace(FULL, 40, "log_snr"), np.array([[-0.7], [0.2], [1.0]])
    outs = [
        sampling.encode(schedule, gaussian(prediction), x_0, order=2, prediction=prediction)
        for prediction in ("eps", "x_0", "v", "score")
    ]
    np.testing.assert_allclose(outs[1:], [outs[0]] * 3, rtol=1e-6)
    part = sampling.encode(schedule, gaussian(), x_0, start=20)
    whole = sampling.encode(schedule, gaussian(), part * 0 + x_0)
    assert abs(part).max() < abs(whole).max()
    again = sampling.sample(KEY, schedule, gaussian(), part, sampling.ddim(**FREE), start=20)
    np.testing.assert_allclose(again, x_0, atol=0.1)


def test_encode_refuses_wrong_arguments(x64):
    schedule, x_0 = schedules.respace(FULL, 10), jnp.ones((1, 1))
    for words, options in {
        "order must be 1 or 2": {"order": 3},
        "x_prev": {"prediction": "x_prev"},
        "clip is for order 1": {"order": 2, "clip": True},
        "start=10": {"start": 10},
    }.items():
        with pytest.raises(ValueError, match=words):
            sampling.encode(schedule, gaussian(), x_0, **options)


# ---------------------------------------------------------------------------------- every solver, as a pure function

ALL = {
    "ddpm": sampling.ddpm,
    "ddim": sampling.ddim,
    "euler": sampling.euler,
    "euler_ancestral": sampling.euler_ancestral,
    "dpm_solver_pp 2": lambda **k: sampling.dpm_solver_pp(2, **k),
    "dpm_solver_pp 3 sde": lambda **k: sampling.dpm_solver_pp(3, sde=True, **k),
    "dpm_solver_pp 3 singlestep": lambda **k: sampling.dpm_solver_pp(3, singlestep=True, **k),
    "deis 3": lambda **k: sampling.deis(3, **k),
    "unipc 3": lambda **k: sampling.unipc(3, **k),
    "heun": sampling.heun,
    "heun churn": lambda **k: sampling.heun(churn=10, **k),
    "pndm": sampling.pndm,
    "plms": lambda **k: sampling.pndm(runge_kutta=False, **k),
}


@pytest.mark.parametrize("name", ALL)
def test_every_solver_under_jit_vmap_grad_and_bfloat16(name):
    schedule = schedules.respace(FULL, 6, "log_snr")
    sampler = ALL[name](clip=False)
    x_T = jax.random.normal(jax.random.key(1), (3, 2))
    traced = []

    def run(key, schedule, x):
        traced.append(name)
        return sampling.sample(key, schedule, mixture(), x, sampler)

    compiled = jax.jit(run)
    x_0 = compiled(KEY, schedule, x_T)
    assert x_0.shape == x_T.shape and np.isfinite(x_0).all()
    compiled(jax.random.key(5), schedules.respace(FULL, 6, "karras"), 2 * x_T)
    assert len(traced) == 1  # other arrays, the same program
    stacked = jax.vmap(lambda x: run(KEY, schedule, x[None])[0])(x_T)
    assert stacked.shape == x_T.shape
    if name not in ("ddpm", "euler_ancestral", "dpm_solver_pp 3 sde", "heun churn"):
        np.testing.assert_allclose(stacked, x_0, rtol=2e-4, atol=1e-5)
    x_T = x_T[:1]
    slope = jax.grad(lambda x: run(KEY, schedule, x).sum())(x_T)
    step = 1e-2
    for i in range(2):
        moved = [run(KEY, schedule, x_T.at[0, i].add(sign * step)).sum() for sign in (1, -1)]
        np.testing.assert_allclose(slope[0, i], (moved[0] - moved[1]) / (2 * step), rtol=0.05, atol=5e-3)

    def half(x, time):
        return mixture()(x.astype(jnp.bfloat16), time).astype(jnp.bfloat16)

    low = sampling.sample(KEY, schedule, half, x_T.astype(jnp.bfloat16), sampler)
    assert low.dtype == jnp.float32 and np.isfinite(low).all()


@pytest.mark.parametrize("name", ALL)
def test_every_prediction_gives_the_same_samples(name, x64):
    schedule, x_T = schedules.respace(FULL, 8, "log_snr"), jax.random.normal(KEY, (3, 2))
    outs = [
        sampling.sample(KEY, schedule, mixture(p), x_T, ALL[name](prediction=p, clip=False))
        for p in ("eps", "x_0", "v", "score")
    ]
    np.testing.assert_allclose(outs[1:], [outs[0]] * 3, rtol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_every_solver_from_pure_noise(name):
    """A schedule whose alpha_bar ends at 0, with a network that predicts v; Gaussian data, whose spread must come out."""
    zero = schedules.from_betas(np.append(FULL.betas[:-1], 1.0))
    schedule = schedules.respace(zero, 100, "trailing")
    assert schedule.zero_terminal_snr
    alpha_bar = np.append(FULL.alpha_bar[:-1], 0.0)

    def network(x, time):
        alpha_bar_t = process.lookup(alpha_bar, jnp.round(time).astype(int), x)
        # PNDM's half-way points and churn lie between the table's; at its end log alpha_bar falls too fast to interpolate.
        fraction = time % 1.0
        exact = jax.nn.sigmoid(zero.log_snr(time))[:, None]
        alpha_bar_t = jnp.where(fraction[:, None] > 0, exact, alpha_bar_t)
        a, s = jnp.sqrt(alpha_bar_t), jnp.sqrt(1 - alpha_bar_t)
        eps = s * (x - a * M) / (a**2 * S2 + s**2)
        x_0 = M + a * S2 / (a**2 * S2 + s**2) * (x - a * M)
        return a * eps - s * x_0

    x_T = jax.random.normal(jax.random.key(1), (20_000, 1))
    sampler = ALL[name](prediction="v", clip=False)
    x_0 = jax.jit(lambda x: sampling.sample(KEY, schedule, network, x, sampler))(x_T)
    assert abs(x_0.mean() - M) < 0.02 and abs(x_0.std() - np.sqrt(S2)) < 0.05
    with pytest.raises(ValueError, match="predict v or x_0"):
        sampling.sample(KEY, schedule, network, x_T, ALL[name]())


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_noise_levels_between_steps_include_pure_noise(prediction):
    """x_0 there needs no division by alpha, and neither does its gradient."""
    zero = schedules.from_betas(np.append(FULL.betas[:-1], 1.0))
    network = lambda x, time: 0.3 * x + 0.1  # noqa: E731
    x = jnp.array([[0.5, -1.0]])

    def x_0(x, alpha):
        level = noise_levels.NoiseLevel(alpha, jnp.sqrt(1 - alpha**2), jnp.float32(-40.0))
        return noise_levels.denoise_between_steps(zero, network, x, level, prediction, "fixed_large", False).x_0

    for alpha in (0.0, 1e-30, 0.6):
        alpha = jnp.float32(alpha)
        expected = network(x, 0)
        if prediction == "v":
            expected = alpha * x - jnp.sqrt(1 - alpha**2) * expected
        np.testing.assert_allclose(x_0(x, alpha), expected, rtol=1e-6)
        slope = jax.grad(lambda x, alpha=alpha: x_0(x, alpha).sum())(x)
        np.testing.assert_allclose(
            slope, 0.3 if prediction == "x_0" else alpha - 0.3 * jnp.sqrt(1 - alpha**2), rtol=1e-6
        )


@pytest.mark.parametrize("name", ["pndm", "heun churn"])
def test_full_schedules_from_pure_noise_are_finite(name):
    """With half-way points between alpha_bar = 0 and the next level."""
    zero = schedules.from_betas(np.append(FULL.betas[:-1], 1.0))
    sampler = sampling.pndm(prediction="v") if name == "pndm" else sampling.heun(churn=5.0, prediction="v")
    x_T = jax.random.normal(KEY, (4, 2))
    x_0 = jax.jit(lambda x: sampling.sample(KEY, zero, lambda x, time: -0.2 * x, x, sampler))(x_T)
    assert np.isfinite(x_0).all()


def test_samples_have_the_covariance_of_correlated_data():
    """A stochastic sampler acts on each axis of the data's covariance as the recursion says, and mixes none."""
    angle, spreads = 0.6, np.array([1.0, 3.0])  # of S2
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def network(x, time):
        log_snr = FULL.log_snr(time)[0]
        a, s2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        along = jnp.sqrt(s2) * (x @ axes - jnp.sqrt(a) * M) / (a * S2 * spreads + s2)
        return along @ axes.T

    schedule, n = schedules.respace(FULL, 15, "karras"), 100_000
    x_T = jax.random.normal(jax.random.key(1), (n, 2))
    for name in ("ddim 0.5", "sde 2"):
        x_0 = jax.jit(lambda x, s=STOCHASTIC[name]: sampling.sample(KEY, schedule, network, x, s))(x_T) @ axes
        mean, variance = recursion(name, schedule)
        covariance = np.cov(x_0.T)
        assert abs(float(x_0[:, 0].mean()) - mean) < 4 * np.sqrt(variance / n) + 1e-5
        assert abs(covariance[0, 0] - variance) < 4 * variance * np.sqrt(2 / n) + 1e-5
        assert abs(covariance[0, 1]) < 4 * np.sqrt(variance * covariance[1, 1] / n)
        assert 2 < covariance[1, 1] / variance < 3.5


def test_learned_variances_do_not_change_deterministic_solvers():
    schedule, x_T = schedules.respace(FULL, 5, "log_snr"), jax.random.normal(KEY, (3, 2))

    def doubled(x, time):
        return jnp.concatenate([mixture()(x, time), 7 * jnp.ones_like(x)], axis=-1)

    for name in ("ddim", "dpm_solver_pp 2", "heun churn"):
        make = ALL[name]
        plain = sampling.sample(KEY, schedule, mixture(), x_T, make())
        learned = sampling.sample(KEY, schedule, doubled, x_T, make(variance="learned_range"))
        np.testing.assert_allclose(learned, plain, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="twice the channels"):
            sampling.sample(KEY, schedule, mixture(), x_T, make(variance="learned_range"))


def test_the_clip_and_the_dynamic_threshold():
    threshold = process.dynamic_threshold(0.5)
    x_0 = jnp.array([[0.1, -0.2, 0.3], [-4.0, 2.0, 1.0]])
    np.testing.assert_allclose(threshold(x_0), [[0.1, -0.2, 0.3], [-1.0, 1.0, 0.5]])
    schedule, x_T = schedules.respace(FULL, 8, "log_snr"), jax.random.normal(KEY, (3, 4))
    wide = lambda x, time: 4 * mixture()(x, time)  # noqa: E731
    for name in ("ddim", "dpm_solver_pp 2", "heun churn"):
        for clip in (True, threshold):
            _, way = sampling.sample(KEY, schedule, wide, x_T, ALL[name](clip=clip), trajectory=True)
            assert abs(way.x_0).max() <= 1.0, name
    for quantile in (0.0, 1.1):
        with pytest.raises(ValueError, match="quantile"):
            process.dynamic_threshold(quantile)


def test_start_final_step_and_progress():
    schedule, x_T = schedules.respace(FULL, 20), jax.random.normal(KEY, (3, 2))
    sampler = sampling.ddim(clip=False)
    whole, way = sampling.sample(KEY, schedule, mixture(), x_T, sampler, trajectory=True)
    part = sampling.sample(KEY, schedule, mixture(), way.x_t[8], sampler, start=11)
    np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)
    stopped, short = sampling.sample(KEY, schedule, mixture(), x_T, sampler, final_step=False, trajectory=True)
    np.testing.assert_allclose(stopped, way.x_t[-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(short.t, np.arange(19, 0, -1))
    for start in (-1, 20):
        with pytest.raises(ValueError, match=f"start={start}"):
            sampling.sample(KEY, schedule, mixture(), x_T, sampler, start=start)
    with pytest.raises(ValueError, match="keeps indices in 1 ... 19"):
        sampling.sample(KEY, schedule, mixture(), x_T, sampler, final_step=False, trajectory=[0])
    seen = []
    run = jax.jit(
        lambda x: sampling.sample(KEY, schedule, mixture(), x, sampler, progress=lambda n: seen.append(int(n)))
    )
    run(x_T).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == list(range(1, 21))
    quiet = jax.make_jaxpr(lambda x: sampling.sample(KEY, schedule, mixture(), x, sampler))(x_T)
    assert "callback" not in str(quiet)


def test_memory_of_every_solver_is_flat_in_the_number_of_steps():
    def temporary_bytes(make, steps):
        schedule = schedules.respace(FULL, steps)
        run = jax.jit(lambda x: sampling.sample(KEY, schedule, mixture(), x, make()))
        analysis = run.lower(jnp.zeros((512, 512))).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    for name in ("heun", "unipc 3", "pndm", "dpm_solver_pp 3 singlestep"):
        assert temporary_bytes(ALL[name], 1000) < 1.05 * temporary_bytes(ALL[name], 10), name


def test_solvers_refuse_wrong_options():
    for order in (0, 4):
        for make in (sampling.dpm_solver_pp, sampling.deis, sampling.unipc):
            with pytest.raises(ValueError, match="order must be 1, 2 or 3"):
                make(order)
    with pytest.raises(ValueError, match="bh1"):
        sampling.unipc(variant="bh3")
    with pytest.raises(ValueError, match="churn"):
        sampling.heun(churn=-1)
    schedule, x_T = schedules.respace(FULL, 5, "log_snr"), jnp.ones((1, 1))
    with pytest.raises(ValueError, match="x_prev"):
        sampling.sample(KEY, schedule, mixture(), x_T, sampling.heun(churn=1, prediction="x_prev"))

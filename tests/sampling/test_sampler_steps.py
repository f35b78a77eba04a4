"""Solver steps against float64 NumPy, with the sampler's own noise, and against diffusers' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, sampling, schedules
from helpers.gaussian_mixtures import FULL, S2, M, gaussian
from helpers.samplers import MAKERS

KEY = jax.random.key(0)
SCHEDULE = schedules.respace(FULL, [40, 150, 300, 450, 620, 800])
ALPHAS, SIGMAS, _, TIMES = SCHEDULE.transitions.level
X = np.array([[0.4, -1.2], [1.7, 0.1]])


def eps_of(x, time, np=np):
    """Any smooth network."""
    return np.tanh(0.8 * x) * (0.6 + time / 3000)


def network(x, time):
    return eps_of(x, time[:, None], jnp)


def walk(sampler, start, **options):
    with jax.disable_jit():
        return sampling.sample(KEY, SCHEDULE, Denoiser(network, clip=False), X, sampler, start=start, **options)


def move(x, eps, t, to=None):
    """Moves along eps from index t to index t - 1, or to the level (alpha, sigma)."""
    b, r = to or ((ALPHAS[t - 1], SIGMAS[t - 1]) if t else (1.0, 0.0))
    return b / ALPHAS[t] * x + (r - b / ALPHAS[t] * SIGMAS[t]) * eps


@pytest.mark.parametrize(("start", "last"), [(5, 0), (2, 0), (3, 1), (1, 1)])
@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm_is_the_recursion_of_its_paper(runge_kutta, start, last, x64):
    """Liu et al. 2022, algorithm 2 and eq. 12 (first steps: Runge-Kutta, or PLMS's improved Euler) and eq. 10.

    Without the step to x_0 (last = 1) the last step may be among the first steps.
    """
    x, seen = X, []
    for t in range(start, last - 1, -1):
        e = eps_of(x, TIMES[t])
        if t == 0:
            mean = e  # to x_0 by DDIM
        elif runge_kutta and len(seen) < 3:
            time = (TIMES[t] + TIMES[t - 1]) / 2
            log_snr = float(SCHEDULE.path.log_snr(time))
            middle = (1 / (1 + np.exp(-log_snr))) ** 0.5, (1 / (1 + np.exp(log_snr))) ** 0.5
            e_2 = eps_of(move(x, e, t, middle), time)
            e_3 = eps_of(move(x, e_2, t, middle), time)
            e_4 = eps_of(move(x, e_3, t), TIMES[t - 1])
            mean = (e + 2 * e_2 + 2 * e_3 + e_4) / 6
        elif not seen:
            mean = (e + eps_of(move(x, e, t), TIMES[t - 1])) / 2
        elif len(seen) == 1:
            mean = (3 * e - seen[-1]) / 2
        elif len(seen) == 2:
            mean = (23 * e - 16 * seen[-1] + 5 * seen[-2]) / 12
        else:
            mean = (55 * e - 59 * seen[-1] + 37 * seen[-2] - 9 * seen[-3]) / 24
        seen.append(e)
        x = move(x, mean, t)
    sampler = sampling.pndm(runge_kutta=runge_kutta)
    np.testing.assert_allclose(walk(sampler, start, final_step=last == 0), x, rtol=1e-9)


def x_0_of(x, t):
    return (x - SIGMAS[t] * eps_of(x, TIMES[t])) / ALPHAS[t]


LAM = np.log(ALPHAS / SIGMAS)


def noise_of(t):
    return np.asarray(jax.random.normal(jax.random.fold_in(KEY, t), X.shape))


def integral(rate, h, lams, values):
    """rate int_0^h e^{-rate (h - u)} P(lams[0] + u) du by Gauss's quadrature; P is the polynomial through values at lams."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    u, powers = h / 2 * (nodes + 1), np.vander(np.subtract(lams, lams[0]), increasing=True)
    polynomial = np.vander(u, len(lams), increasing=True) @ np.linalg.solve(powers, np.reshape(values, (len(lams), -1)))
    return (rate * h / 2 * weights * np.exp(-rate * (h - u)) @ polynomial).reshape(X.shape)


@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("singlestep", [False, True])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_pp_integrates_a_polynomial_through_x_0(order, sde, singlestep, lower_order_final, x64):
    """DPM-Solver++ eq. 9, and the reverse SDE with twice the rate and with noise; singlestep starts from the first x in a
    group. With two values, the second weight is the authors' h/2 (1 - e^-h). The steps differ in length, and stop at a noise
    level.
    """
    x, rate, seen = X, 1 + sde, []
    for t in range(5, 0, -1):
        allowed = min(order, t) if lower_order_final else order
        if not singlestep:
            seen = seen[: allowed - 1]
        elif len(seen) == order or (lower_order_final and t == 1):
            seen = []
        if not singlestep or not seen:
            x_first, first, path = x, t, 0.0
        value = LAM[t], x_0_of(x, t)
        seen = [*seen, value] if singlestep else [value, *seen]  # the step's start comes first
        lams, values = zip(*seen, strict=True)
        h, length = LAM[t - 1] - LAM[t], LAM[t - 1] - LAM[first]
        if len(seen) == 2:
            slope = (values[1] - values[0]) / (lams[1] - lams[0])
            drift = -np.expm1(-rate * length) * (values[0] + length / 2 * slope)
        else:
            drift = integral(rate, length, lams, values)
        added = sde * SIGMAS[t - 1] * np.sqrt(-np.expm1(-2 * h)) * noise_of(t)
        path = SIGMAS[t - 1] / SIGMAS[t] * np.exp(-h) * path + added
        x = SIGMAS[t - 1] / SIGMAS[first] * np.exp(-sde * length) * x_first + ALPHAS[t - 1] * drift + path
    options = {"sde": sde, "singlestep": singlestep, "lower_order_final": lower_order_final}
    np.testing.assert_allclose(walk(sampling.dpm_solver_pp(order, **options), 5, final_step=False), x, rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_integrates_a_polynomial_through_eps(order, x64):
    """DPM-Solver eq. 3.4: (alpha'/alpha) x - sigma' int_0^h e^{h - u} eps(lambda + u) du."""
    x, seen = X, []
    for t in range(5, 0, -1):
        seen = [(LAM[t], eps_of(x, TIMES[t])), *seen][:order]
        x = ALPHAS[t - 1] / ALPHAS[t] * x + SIGMAS[t - 1] * integral(-1, LAM[t - 1] - LAM[t], *zip(*seen, strict=True))
    sampler = sampling.deis(order, lower_order_final=False)
    np.testing.assert_allclose(walk(sampler, 5, final_step=False), x, rtol=1e-9)


def test_ddim_with_half_the_noise(x64):
    """DDIM eq. 12 with sigma of eq. 16."""
    x = X
    for t in range(5, 0, -1):
        a, b = SCHEDULE.alpha_bar[[t, t - 1]]
        sigma = 0.5 * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = np.sqrt(b) * x_0_of(x, t) + np.sqrt(1 - b - sigma**2) * eps_of(x, TIMES[t]) + sigma * noise_of(t)
    np.testing.assert_allclose(walk(sampling.ddim(0.5), 5, final_step=False), x, rtol=1e-9)


RANGE = {"churn": 1.2, "churn_range": (1.0, 140.0), "churn_noise": 1.1}


@pytest.mark.parametrize(("options", "factor"), [({}, 1.0), ({"churn": 20.0}, 2**0.5), (RANGE, 1.2)])
def test_heun_is_edm_s_algorithm_2(options, factor, x64):
    """In x / alpha and sigma / alpha, with the exact network for N(M, S2): sigma is raised inside the range, up to the
    grid's end."""
    schedule = schedules.respace(FULL, [40, 150, 300, 620, 980, 990])
    levels, last = schedule.transitions.level, FULL.transitions.level
    alphas, sigmas, highest = levels.alpha, levels.sigma / levels.alpha, last.sigma[-1] / last.alpha[-1]
    low, high = options.get("churn_range", (0.0, np.inf))
    assert sigmas[1] < 1.0 < sigmas[2] and sigmas[4] < 140.0 < sigmas[5]
    assert sigmas[4] * 1.2 < highest < sigmas[4] * 2**0.5

    def eps(y, sigma):
        return sigma * (y - M) / (S2 + sigma**2)

    y = X / alphas[5]
    for t in range(5, 0, -1):
        sigma, lower = sigmas[t], sigmas[t - 1]
        raised = min(sigma * factor, highest) if low < sigma < high else sigma
        y = y + options.get("churn_noise", 1.0) * np.sqrt(raised**2 - sigma**2) * noise_of(t)
        slope = eps(y, raised)
        y = y + (lower - raised) / 2 * (slope + eps(y + (lower - raised) * slope, lower))
    exact = Denoiser(gaussian(), clip=False)
    got = sampling.sample(KEY, schedule, exact, X, sampling.heun(**options), final_step=False)
    np.testing.assert_allclose(got, alphas[0] * y, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "name", ["dpm_solver_pp {}", "dpm_solver_pp {} singlestep", "dpm_solver_pp {} sde", "deis {}", "unipc {}"]
)
def test_the_last_step_returns_the_predicted_x_0(name, order, lower_order_final, x64):
    """At any place in a group; the last step has order 1 even if the order of the final steps is not lowered."""
    sampler = MAKERS[name.format(order)](lower_order_final=lower_order_final)
    x_0, kept = walk(sampler, 2 * order - 1, trajectory=True)  # the last step would end a group
    # UniPC corrects the previous x, but the last step starts from the corrected x and predicts with the same x_0.
    np.testing.assert_allclose(x_0, kept.x_0[-1], rtol=1e-9)


SAMPLE = (np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2).astype(np.float32)
LINSPACE = np.round(np.linspace(0, 999, 11)).astype(int)
TWO_M = sampling.dpm_solver_pp(2, lower_order_final=False)
# diffusers' scheduler tests: (sampler, prediction, the visited levels, mean of |x| at index 0's level). With Karras's and
# Lu's levels diffusers ends there twice.
PUBLISHED = {
    "2M": (TWO_M, "eps", (LINSPACE,), 0.3301),
    "2M v": (TWO_M, "v", (LINSPACE,), 0.2251),
    "2M v karras": (TWO_M, "v", (10, "karras"), 0.2096),
    "2M v lu": (TWO_M, "v", (10, "log_snr"), 0.1554),
    "singlestep": (sampling.dpm_solver_pp(2, singlestep=True, lower_order_final=False), "eps", (LINSPACE,), 0.2791),
    "UniPC": (sampling.unipc(2), "eps", (LINSPACE,), 0.2464),
    "DEIS": (sampling.deis(2), "eps", (LINSPACE,), 0.23916),
    "PNDM": (sampling.pndm(), "eps", (10, "leading"), 0.2580),
}


def dummy_model(x, time):
    return x * (time / (time + 1)).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_solvers_agree_with_published_numbers(name):
    sampler, prediction, steps, mean = PUBLISHED[name]
    denoiser = Denoiser(dummy_model, prediction=prediction, clip=False)
    x = sampling.sample(KEY, schedules.respace(FULL, *steps), denoiser, SAMPLE, sampler, final_step=False)
    assert abs(np.abs(x).mean() - mean) < 1e-3


@pytest.mark.parametrize(("prediction", "total", "inverse"), [("eps", 172.0067, 671.6816), ("v", 52.5302, 1394.2185)])
def test_ddim_and_its_inverse_agree_with_published_numbers(prediction, total, inverse):
    schedule = schedules.respace(FULL, 10, "leading")
    denoiser = Denoiser(dummy_model, prediction=prediction)
    x_0 = sampling.sample(KEY, schedule, denoiser, SAMPLE, sampling.ddim(clipped_eps=False))
    x_T = sampling.encode(schedule, denoiser, SAMPLE)
    assert abs(np.abs(x_0).sum() - total) < 1e-2 and abs(np.abs(x_T).sum() - inverse) < 1e-2

"""Steps of the solvers against float64 NumPy: the first ones, the last ones, and those to x_0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import sampling, schedules

KEY = jax.random.key(0)
SCHEDULE = schedules.respace(schedules.from_betas(schedules.betas("linear", 1000)), [40, 150, 300, 450, 620, 800])
ALPHAS, SIGMAS, TIMES = SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar, SCHEDULE.timesteps
X = np.array([[0.4, -1.2], [1.7, 0.1]])


def eps_of(x, time, np=np):
    """Any smooth network."""
    return np.tanh(0.8 * x) * (0.6 + time / 3000)


def network(x, time):
    return eps_of(x, time[:, None], jnp)


def walk(sampler, start, **options):
    with jax.disable_jit():
        return sampling.sample(KEY, SCHEDULE, network, X, sampler, start=start, **options)


def move(x, eps, t, to=None):
    """Along eps from index t to the one before, or to the level (alpha, sigma)."""
    b, r = to or ((ALPHAS[t - 1], SIGMAS[t - 1]) if t else (1.0, 0.0))
    return b / ALPHAS[t] * x + (r - b / ALPHAS[t] * SIGMAS[t]) * eps


@pytest.mark.parametrize(("start", "last"), [(5, 0), (2, 0), (3, 1), (1, 1)])
@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm_is_the_recursion_of_its_paper(runge_kutta, start, last, x64):
    """Liu et al. 2022, algorithm 2 and eq. 12 (its first steps: Runge-Kutta, or the improved Euler of PLMS) and eq. 10.

    Without the step to x_0 (last = 1) the last one may be a first one.
    """
    x, seen = X, []
    for t in range(start, last - 1, -1):
        e = eps_of(x, TIMES[t])
        if t == 0:
            mean = e  # to x_0 by DDIM
        elif runge_kutta and len(seen) < 3:
            time = (TIMES[t] + TIMES[t - 1]) / 2
            log_snr = float(SCHEDULE.log_snr(time))
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
    sampler = sampling.pndm(runge_kutta=runge_kutta, clip=False)
    np.testing.assert_allclose(walk(sampler, start, final_step=last == 0), x, rtol=1e-9)


def x_0_of(x, t):
    return (x - SIGMAS[t] * eps_of(x, TIMES[t])) / ALPHAS[t]


def lam(t):
    return np.log(ALPHAS[t] / SIGMAS[t])


def first_order(x, x_0, t, to):
    return SIGMAS[to] / SIGMAS[t] * x + ALPHAS[to] * (1 - np.exp(lam(t) - lam(to))) * x_0


@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("singlestep", [False, True])
def test_lower_order_final_reduces_the_order_of_the_last_step(singlestep, lower_order_final, x64):
    """DPM-Solver++ 2M and 2S over two steps that stop at a noise level: the second is of order 2, or of order 1."""
    d_2 = x_0_of(X, 2)
    x_1 = first_order(X, d_2, 2, 1)
    d_1 = x_0_of(x_1, 1)
    slope = (d_1 - d_2) / (lam(1) - lam(2))
    if lower_order_final:
        x = first_order(x_1, d_1, 1, 0)
    elif singlestep:  # from the first x of the group
        x = first_order(X, d_2 + (lam(0) - lam(2)) / 2 * slope, 2, 0)
    else:
        x = first_order(x_1, d_1 + (lam(0) - lam(1)) / 2 * slope, 1, 0)
    sampler = sampling.dpm_solver_pp(2, singlestep=singlestep, lower_order_final=lower_order_final, clip=False)
    np.testing.assert_allclose(walk(sampler, 2, final_step=False), x, rtol=1e-9)


@pytest.mark.whole
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["dpm_solver_pp", "singlestep", "sde", "deis", "unipc"])
def test_the_last_step_returns_the_predicted_x_0(name, order, lower_order_final, x64):
    """Whatever its place in a group, and of the first order even where the final steps are not lowered."""
    options = {"lower_order_final": lower_order_final, "clip": False}
    make = {
        "dpm_solver_pp": sampling.dpm_solver_pp,
        "singlestep": lambda order, **k: sampling.dpm_solver_pp(order, singlestep=True, **k),
        "sde": lambda order, **k: sampling.dpm_solver_pp(order, sde=True, **k),
        "deis": sampling.deis,
        "unipc": sampling.unipc,
    }[name]
    x_0, kept = walk(make(order, **options), 2 * order - 1, trajectory=True)  # its last step would end a group
    # UniPC corrects the x before, but its last step starts from the corrected one and predicts with the same x_0.
    np.testing.assert_allclose(x_0, kept.x_0[-1], rtol=1e-9)

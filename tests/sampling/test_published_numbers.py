"""The numbers that diffusers publishes for its own solvers."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion_jax import sampling, schedules
from helpers.gaussian_mixtures import FULL

KEY = jax.random.key(0)
FREE = {"clip": False}
FULL_ORDER = FREE | {"lower_order_final": False}


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

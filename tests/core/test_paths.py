"""Paths: noise levels in continuous time, and the schedules made from them."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import coordinates, likelihood, losses, process, sampling, schedules, timesteps
from diffusion_jax.denoiser import convert
from helpers.path_networks import CUSTOM, EDM, FLOW, PATHS, exact_denoiser, gaussian, inner_times, levels

KEY = jax.random.key(0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_inverse_of_the_log_snr(path):
    times = inner_times(path)
    exact = path.log_snr(times)
    np.testing.assert_allclose(path.time_at_log_snr(exact), times, rtol=1e-12)
    np.testing.assert_allclose(path.log_snr(times.astype(np.float32)), exact, rtol=1e-5, atol=1e-5)
    span = float(path.interval[1] - path.interval[0])
    np.testing.assert_allclose(path.time_at_log_snr(exact.astype(np.float32)), times, atol=1e-6 * span)
    with jax.enable_x64(True):
        np.testing.assert_allclose(path.log_snr(jnp.asarray(times)), exact, rtol=1e-12)


def test_the_gradient_of_an_inverse_by_bisection():
    """1 / (d log_snr / d time) = -1 / (20 + 3 time^2)."""
    times = jnp.asarray(inner_times(CUSTOM), jnp.float32)
    gradient = jax.grad(lambda log_snr: CUSTOM.time_at_log_snr(log_snr).sum())(CUSTOM.log_snr(times))
    np.testing.assert_allclose(gradient, -1 / (20 + 3 * times**2), rtol=1e-5)


def test_the_levels_of_the_papers():
    u = np.linspace(0.01, 0.99, 7)
    ratio = {
        name: np.exp(-0.5 * PATHS[name].log_snr(1000 * u)) for name in ("vp_linear", "vp_cosine", "rectified_flow")
    }
    alpha_bar = np.exp(-(0.1 * u + (20 - 0.1) * u**2 / 2))
    np.testing.assert_allclose(ratio["vp_linear"], np.sqrt(1 / alpha_bar - 1), rtol=1e-10)
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(ratio["vp_cosine"], np.sqrt(f(0) / f(u) - 1), rtol=1e-10)
    np.testing.assert_allclose(ratio["rectified_flow"], u / (1 - u), rtol=1e-12)
    np.testing.assert_allclose(np.exp(4 * np.array(EDM.interval)), [0.002, 80])
    shifted = schedules.shifted(schedules.rectified_flow(), -2 * np.log(3.0))
    tau = 3 * u / (1 + 2 * u)  # SD3's shift by 3
    np.testing.assert_allclose(shifted.log_snr(1000 * u), 2 * np.log((1 - tau) / tau), rtol=1e-12)


def test_a_path_gives_the_tables_of_the_discrete_schedule():
    cosine = schedules.from_betas(schedules.betas("cosine", 100))
    for path, times in (
        (cosine.path, cosine.timesteps),
        (schedules.vp_cosine(interval=(0, 1000)), 10.0 * np.arange(1, 101)),
    ):
        schedule = schedules.from_path(path, times)
        for name in ("level.alpha", "beta", "posterior_variance", "posterior_mean_coef_x_t", "level.sigma"):
            found, table = (operator.attrgetter(name)(steps.transitions) for steps in (schedule, cosine))
            # The last beta of the discrete schedule has a bound.
            np.testing.assert_allclose(found[:-1], table[:-1], rtol=1e-9, atol=1e-15)
    assert schedules.from_path(schedules.vp_cosine(interval=(0, 1000)), [500.0, 1000.0]).zero_terminal_snr
    assert schedules.from_path(FLOW, [500.0, 1000.0]).zero_terminal_snr  # beyond the interval, in pure noise


def test_a_schedule_keeps_its_path():
    sigmas = np.geomspace(0.002, 80, 18)
    schedule = levels(EDM, sigmas)
    np.testing.assert_allclose(schedule.timesteps, np.log(sigmas) / 4, atol=1e-12)
    np.testing.assert_allclose(schedule.snr, sigmas**-2, rtol=1e-9)
    between = np.geomspace(0.0021, 79, 50)
    np.testing.assert_allclose(schedule.path.time_at_log_snr(-2 * np.log(between)), np.log(between) / 4, atol=1e-6)
    half = schedules.respace(schedule, 9, "log_snr")
    np.testing.assert_allclose(half.timesteps, np.log(np.geomspace(0.002, 80, 9)) / 4, atol=1e-9)
    assert schedules.respace(schedule, [-1.0, 0.0, 1.0]).path is EDM
    given = schedules.path(lambda time: -8 * time, lambda log_snr: log_snr / -8, interval=EDM.interval)
    np.testing.assert_array_equal(levels(given, sigmas).timesteps, schedule.timesteps)


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "gaussian"])
def test_spacings_of_a_schedule_that_ends_in_pure_noise(spacing):
    """All steps but the last are those of the schedule without it; samples of a Gaussian have its deviation."""
    times = np.linspace(1, 1000, 1000)
    whole, inner = (schedules.from_path(schedules.rectified_flow(), t) for t in (times, times[:-1]))
    spaced, expected = schedules.respace(whole, 61, spacing), schedules.respace(inner, 60, spacing)
    assert spaced.zero_terminal_snr and spaced.timesteps[-1] == 1000
    np.testing.assert_allclose(spaced.alpha_bar[:-1], expected.alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(spaced.timesteps[:-1], expected.timesteps, rtol=1e-12)
    assert schedules.respace(whole, 1, spacing).timesteps == [1000]
    x_T = jax.random.normal(KEY, (1000, 1))
    x_0 = sampling.sample(KEY, spaced, exact_denoiser(schedules.rectified_flow(), 0.25), x_T, sampling.dpm_solver_pp())
    assert abs(x_0.std() / x_T.std() - 0.5) < 0.02


def test_respacing_keeps_the_digits_of_almost_clean_levels():
    schedule = schedules.from_path(schedules.rectified_flow(), np.array([1e-6, 1e-3, 1.0, 500.0]))
    short = schedules.respace(schedule, [0, 1, 3])
    for name in ("alpha_bar", "transitions.level.sigma", "snr"):
        found, table = (operator.attrgetter(name)(steps) for steps in (short, schedule))
        np.testing.assert_allclose(found, table[[0, 1, 3]], rtol=1e-14)
    exact = 1 - (1 + 1e-18 / (1 - 1e-9) ** 2) / (1 + 1e-12 / (1 - 1e-6) ** 2)  # 1 / alpha_bar is 1 + (sigma / alpha)^2
    np.testing.assert_allclose(short.betas[1], exact, rtol=1e-3)


def test_bad_arguments_are_refused(unchecked_annotations):
    x, t, time = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), jnp.zeros(2)
    chain, flow = schedules.from_betas(schedules.betas("linear", 10)), schedules.rectified_flow()
    learned = lambda x, time: jnp.concatenate([x, x], axis=-1)  # noqa: E731
    for call, message in (
        (lambda: process.q_sample(EDM, x, t, x), "the time on a path must be float"),
        (lambda: process.q_sample(chain, x, time, x), "t must be int"),
        (lambda: process.q_sample(EDM, x, jnp.zeros(3), x), "one for each row"),
        (lambda: process.q_posterior(EDM, x, x, time), "from_path"),
        (lambda: process.p_mean_variance(EDM, gaussian(EDM), x, time), "from_path"),
        (lambda: convert(x, x, EDM.at(time, x), "x_prev"), "not at a single level"),
        (lambda: losses.simple(KEY, EDM, gaussian(EDM), x, prediction="x_prev"), "from_path"),
        (lambda: losses.vlb(KEY, EDM, learned, x), "from_path"),
        (lambda: losses.hybrid(KEY, EDM, learned, x), "from_path"),
        (lambda: losses.simple(KEY, EDM, gaussian(EDM), x, timestep_sampler="antithetic"), "on a path use stratified"),
        (lambda: losses.simple(KEY, chain, gaussian(chain), x, draw="log_normal"), "log_normal needs a path"),
        (lambda: losses.simple(KEY, EDM, gaussian(EDM), x, draw="gaussian"), "unknown timestep_sampler 'gaussian'"),
        (lambda: losses.continuous_vlb(KEY, chain, gaussian(chain), x), "needs a path"),
        (lambda: losses.continuous_vlb(KEY, flow, gaussian(EDM), x), "interval="),
        (lambda: timesteps.uniform_log_snr()(KEY, 4, flow), "interval="),
        (lambda: likelihood.bits_per_dim(KEY, EDM, gaussian(EDM), x), "from_path"),
        (lambda: sampling.sample(KEY, EDM, gaussian(EDM), x, sampling.ddim()), "from_path"),
        (lambda: sampling.encode(EDM, gaussian(EDM), x), "from_path"),
        (lambda: convert(x, x, flow.at(1000.0, x)), "alpha is 0"),
        (lambda: schedules.from_path(EDM, [1.0, 0.5]), "increasing"),
        (lambda: schedules.from_path(flow, [0.0, 500.0]), "inf at time 0"),
        (lambda: schedules.from_path(EDM, [0.002, 1.0, 80.0]), "time_at_log_snr"),
        (lambda: schedules.from_path(FLOW, [0.5, 500.0]), "1 ... 999, but one is 0.5"),
        (lambda: schedules.path(lambda time: time, interval=(0, 1)), "decrease strictly"),
        (lambda: schedules.path(lambda t: -8 * t, lambda v: v / 8, interval=(-1, 1)), "inverse"),
        (lambda: schedules.path(lambda t: -8 * t, lambda v: v * jnp.nan, interval=(-1, 1)), "inverse"),
        (lambda: schedules.edm(80, 0.002), "0 < sigma_min"),
        (lambda: schedules.edm_steps(1), "num_steps must be a whole number of at least 2, got 1"),
        (lambda: schedules.edm_steps(18, rho=0.0), "rho must be a number above 0"),
        *(
            (lambda make=make, ends=ends: make(interval=ends), "in 0 ... 1000")
            for make in (schedules.rectified_flow, schedules.vp_linear, schedules.vp_cosine)
            for ends in ((0.0, 1001.0), (-0.5, 1000.0))
        ),
        (lambda: timesteps.log_normal(std=0.0), "std must be a number above 0"),
        (lambda: losses.simple(KEY, flow, gaussian(EDM), x, weighting="edm"), "ends in pure noise"),
        (lambda: coordinates.precondition(gaussian(EDM), EDM, 0.0), "sigma_data must be a number above 0"),
        (lambda: schedules.rescale_zero_terminal_snr([0.1]), "one step"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rescaled_betas_end_in_pure_noise():
    betas = schedules.betas("linear", 1000)
    old, new = (schedules.from_betas(b) for b in (betas, schedules.rescale_zero_terminal_snr(betas)))
    assert new.alpha_bar[-1] == 0 and new.zero_terminal_snr
    np.testing.assert_allclose(new.alpha_bar[0], old.alpha_bar[0], rtol=1e-12)
    # the new sqrt(alpha_bar) is an affine function of the old.
    slope = np.diff(new.transitions.level.alpha) / np.diff(old.transitions.level.alpha)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-7)
    # The path ends at the last step with a signal, so that its levels have a finite log SNR.
    assert old.path.interval == (0, 999) and new.path.interval == (0, 998)


def test_the_first_time_outside_of_an_interval_is_named():
    with pytest.raises(ValueError, match="one is 2000;"):
        schedules.from_path(schedules.vp_linear(), [0.5, 2000.0, 3000.0])

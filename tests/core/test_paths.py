"""Paths: noise levels in continuous time, the schedules made from them, and the losses, draws and coordinates on them."""

import dataclasses
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import Denoiser, coordinates, draws, likelihood, losses, process, sampling, schedules, timesteps
from diffusion_jax.denoiser import convert
from helpers.decoder import scipy_log_prob

KEY = jax.random.key(0)
EDM = schedules.edm()
FLOW = schedules.rectified_flow(interval=(1.0, 999.0))
CUSTOM = schedules.path(lambda time: 10 - 20 * time - time**3, interval=(0.0, 1.0))
PATHS = {name: make() for name, make in schedules.PATHS.items()} | {
    "inner flow": FLOW,
    "shifted": schedules.shifted(schedules.vp_cosine(), -2.0),
    "custom": CUSTOM,
    "linear steps": schedules.from_betas(schedules.betas("linear", 1000)).path,
}
FINITE = {name: path for name, path in PATHS.items() if name != "rectified_flow"}
VALUES = ("eps", "x_0", "v", "score", "flow")


def inner_times(path, count=9):
    first, last = path.interval
    return np.linspace(first, last, count + 2)[1:-1]


def gaussian(path, variance=1.0, prediction="x_0"):
    """The exact network for x_0 ~ N(0, variance)."""

    def denoise_fn(x_t, time):
        at = path.at(time, x_t)
        x_0 = variance * at.alpha / (variance * at.alpha**2 + at.sigma**2) * x_t
        return x_0 if prediction == "x_0" else (x_t - at.alpha * x_0) / at.sigma

    return denoise_fn


def exact_denoiser(path, data_variance, **fields):
    """`gaussian` as an unclipped denoiser."""
    return Denoiser(gaussian(path, data_variance), "x_0", clip=False, **fields)


def levels(path, sigmas):
    """The schedule with these sigma / alpha, in increasing order."""
    return schedules.from_path(path, path.time_at_log_snr(-2 * np.log(sigmas)))


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


def test_samplers_see_exact_network_times():
    """PNDM calls the network between the steps, too. With x_0 = 0 every x_t is sigma eps, which shows its noise level."""
    seen = []

    def denoise_fn(x_t, time):
        jax.debug.callback(lambda x, time: seen.append((float(x[0, 0]), float(time[0]))), x_t, time)
        return jnp.zeros_like(x_t)

    schedule = levels(EDM, np.geomspace(0.002, 80, 18))
    x_T = schedule.transitions.level.sigma[-1] * jnp.ones((1, 1))
    sampling.sample(KEY, schedule, Denoiser(denoise_fn, "x_0"), x_T, sampling.pndm())
    jax.effects_barrier()
    sigma, times = np.array(seen).T
    informative = sigma < 0.9  # a sigma near 1 does not determine the level in float32
    exact = np.log(sigma / np.sqrt(1 - sigma**2))[informative] / 4
    assert len(seen) > 18 + 8 and informative.sum() > 10
    np.testing.assert_allclose(times[informative], exact, atol=1e-6)


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


def test_a_numpy_scalar_does_not_change_the_dtype():
    with jax.enable_x64(True):
        x = jnp.ones((2, 3), jnp.float32)
        path = schedules.shifted(EDM, -2 * np.log(3.0))
        assert path.at(jnp.zeros(2, jnp.float32), x).alpha.dtype == jnp.float32
        denoise_fn = coordinates.precondition(lambda x, time: x, EDM, np.float64(0.3))
        loss, _ = losses.simple(KEY, path, denoise_fn, x, prediction="x_0", weighting="edm")
        assert loss.dtype == jnp.float32 and losses.edm_weight(x, np.float64(0.3)).dtype == jnp.float32


def test_bad_arguments_are_refused(unchecked_annotations):
    x, t, time = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), jnp.zeros(2)
    chain = schedules.from_betas(schedules.betas("linear", 10))
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
        (lambda: losses.simple(KEY, chain, gaussian(chain), x, draw="log_normal"), "log_normal draws levels of a path"),
        (lambda: losses.simple(KEY, EDM, gaussian(EDM), x, draw="gaussian"), "unknown timestep_sampler 'gaussian'"),
        (lambda: losses.continuous_vlb(KEY, chain, gaussian(chain), x), "needs a path"),
        (lambda: losses.continuous_vlb(KEY, schedules.rectified_flow(), gaussian(EDM), x), "interval="),
        (lambda: timesteps.uniform_log_snr()(KEY, 4, schedules.rectified_flow()), "interval="),
        (lambda: likelihood.bits_per_dim(KEY, EDM, gaussian(EDM), x), "from_path"),
        (lambda: sampling.sample(KEY, EDM, gaussian(EDM), x, sampling.ddim()), "from_path"),
        (lambda: sampling.encode(EDM, gaussian(EDM), x), "from_path"),
        (lambda: convert(x, x, schedules.rectified_flow().at(1000.0, x)), "alpha is 0"),
        (lambda: schedules.from_path(EDM, [1.0, 0.5]), "increasing"),
        (lambda: schedules.from_path(schedules.rectified_flow(), [0.0, 500.0]), "inf at time 0"),
        (lambda: schedules.from_path(EDM, [0.002, 1.0, 80.0]), "time_at_log_snr"),
        (lambda: schedules.from_path(FLOW, [0.5, 500.0]), "1 ... 999, but one is 0.5"),
        (lambda: schedules.path(lambda time: time, interval=(0, 1)), "decrease strictly"),
        (lambda: schedules.path(lambda t: -8 * t, lambda v: v / 8, interval=(-1, 1)), "inverse"),
        (lambda: schedules.path(lambda t: -8 * t, lambda v: v * jnp.nan, interval=(-1, 1)), "inverse"),
        (lambda: schedules.edm(80, 0.002), "0 < sigma_min"),
        (lambda: schedules.edm_steps(1), "num_steps must be a whole number of at least 2, got 1"),
        (lambda: schedules.edm_steps(18, rho=0.0), "rho must be above 0"),
        *(
            (lambda make=make, ends=ends: make(interval=ends), "in 0 ... 1000")
            for make in (schedules.rectified_flow, schedules.vp_linear, schedules.vp_cosine)
            for ends in ((0.0, 1001.0), (-0.5, 1000.0))
        ),
        (lambda: timesteps.log_normal(std=0.0), "std must be above 0"),
        (
            lambda: losses.simple(KEY, schedules.rectified_flow(), gaussian(EDM), x, weighting="edm"),
            "ends in pure noise",
        ),
        (lambda: coordinates.precondition(gaussian(EDM), EDM, 0.0), "sigma_data must be above 0"),
        (lambda: schedules.rescale_zero_terminal_snr([0.1]), "one step"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def outputs(at, x_0, eps):
    return {
        "eps": eps,
        "x_0": x_0,
        "v": at.alpha * eps - at.sigma * x_0,
        "score": -eps / at.sigma,
        "flow": eps - x_0,
    }


@pytest.mark.parametrize("path", [EDM, FLOW, schedules.vp_cosine()], ids=["edm", "flow", "cosine"])
def test_every_prediction_gives_every_other(path):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x_0, eps = jnp.asarray(rng.normal(size=(2, 5, 3)))
        time = jnp.asarray(inner_times(path, 5))
        x_t = process.q_sample(path, x_0, time, eps)
        level = path.at(time, x_t)
        values = outputs(level, x_0, eps)
        for source, target in itertools.product(VALUES, VALUES):
            result, expected = convert(values[source], x_t, level, source, target), values[target]
            np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("prediction", ["v", "x_0", "flow"])
def test_pure_noise_is_finite(prediction):
    path, x_t = schedules.rectified_flow(), jnp.ones((2, 3))
    noise = path.at(jnp.full(2, 1000.0), x_t)
    for wanted in ("x_0", "eps", "v", "flow"):
        total = lambda output: convert(output, x_t, noise, prediction, wanted).sum()  # noqa: B023, E731
        value, gradient = jax.value_and_grad(total)(0.5 * x_t)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(convert(0.25 * x_t, x_t, noise, "flow"), 0.75)
    assert np.isnan(jax.jit(lambda level: convert(x_t, x_t, level))(noise)).all()


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


def fixed(time):
    """A draw that always returns one time."""
    return lambda key, batch_size, path: (jnp.full(batch_size, time), jnp.zeros(batch_size))


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_the_loss_of_edm_is_one_for_a_network_of_zeros(sigma):
    """For x_0 ~ N(0, d^2), the best F is 0 and the weighted loss is 1 at every level (Karras et al. 2022)."""
    d = 0.5
    x_0 = d * jax.random.normal(KEY, (20_000, 4))
    denoise_fn = coordinates.precondition(lambda x, time: jnp.zeros_like(x), EDM, d)
    draw = fixed(np.log(sigma) / 4)
    loss, _ = losses.simple(jax.random.key(1), EDM, denoise_fn, x_0, prediction="x_0", weighting="edm", draw=draw)
    assert abs(loss.mean() - 1) < 4 * loss.std() / np.sqrt(loss.size)


def test_preconditioning_makes_the_edm_loss_the_error_of_the_network():
    """lambda(s) c_out^2 = 1, and for d = 1 the network is -v."""
    x_0 = jax.random.normal(KEY, (64, 4))
    off = lambda x, time: jnp.sin(3 * x) + time[:, None]  # noqa: E731
    for d in (0.5, 1.0):
        denoise_fn = coordinates.precondition(off, EDM, d)
        weight = lambda snr: losses.edm_weight(snr, d)  # noqa: B023, E731
        loss, aux = losses.simple(KEY, EDM, denoise_fn, x_0, prediction="x_0", weighting=weight, draw="log_normal")
        at = EDM.at(aux.t, x_0)
        s = np.asarray(at.sigma / at.alpha, np.float64)
        y = np.asarray(aux.x_t / at.alpha, np.float64)
        target = (x_0 - d**2 / (s**2 + d**2) * y) * np.sqrt(s**2 + d**2) / (s * d)
        np.testing.assert_allclose(
            loss,
            np.mean((target - off(aux.x_t / np.sqrt(at.sigma**2 + (d * at.alpha) ** 2), aux.t)) ** 2, 1),
            rtol=2e-3,
        )
    v = convert(denoise_fn(aux.x_t, aux.t), aux.x_t, at, "x_0", "v")
    np.testing.assert_allclose(v, -off(aux.x_t, aux.t), rtol=1e-4, atol=1e-3)


WEIGHTS = {  # the weight on the eps error as a function of the SNR
    "snr": lambda snr: np.ones_like(snr),
    "min_snr": lambda snr: np.minimum(snr, 5) / snr,
    "truncated_snr": lambda snr: np.maximum(snr, 1) / snr,
    "p2": lambda snr: 1 / (1 + snr),
    "edm": lambda snr: (1 / snr + 0.25) / 0.25,
    "sigmoid": lambda snr: 1 / (1 + np.exp(1 + np.log(snr))),
}
ERRORS = {  # eps error over the error of each prediction
    "eps": lambda alpha, sigma: 1.0,
    "x_0": lambda alpha, sigma: (alpha / sigma) ** 2,
    "v": lambda alpha, sigma: alpha**2,
    "flow": lambda alpha, sigma: (alpha / (alpha + sigma)) ** 2,
    "score": lambda alpha, sigma: sigma**2,
}


@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
@pytest.mark.parametrize("prediction", VALUES)
def test_weights_on_every_error(weighting, prediction):
    x_0 = jax.random.normal(KEY, (32, 4))
    loss, aux = losses.simple(
        KEY, FLOW, lambda x, time: 0.3 * x + 0.1, x_0, prediction=prediction, weighting=weighting, draw="logit_normal"
    )
    at = FLOW.at(aux.t, aux.mse)
    alpha, sigma = np.asarray(at.alpha, np.float64), np.asarray(at.sigma, np.float64)
    weight = WEIGHTS[weighting]((alpha / sigma) ** 2) * ERRORS[prediction](alpha, sigma)
    np.testing.assert_allclose(loss, weight * aux.mse, rtol=1e-5)


@pytest.mark.whole
def test_the_flow_loss_is_a_weighted_eps_loss():
    x_0 = jax.random.normal(KEY, (64, 4))
    eps_fn = lambda x, time: jnp.tanh(x)  # noqa: E731
    flow_fn = lambda x, time: convert(eps_fn(x, time), x, FLOW.at(time, x), "eps", "flow")  # noqa: E731
    weight = lambda snr: (1 + 1 / jnp.sqrt(snr)) ** 2  # noqa: E731
    with jax.enable_x64(True):
        x_0 = jnp.asarray(x_0, jnp.float64)
        flow, _ = losses.simple(KEY, FLOW, flow_fn, x_0, prediction="flow")
        eps, _ = losses.simple(KEY, FLOW, eps_fn, x_0, prediction="eps", weighting=weight)
    np.testing.assert_allclose(flow, eps, rtol=1e-6)


def test_eps_determines_x_0_except_at_pure_noise():
    flow, x = schedules.rectified_flow(), jnp.ones((2, 3))
    level = flow.at(jnp.array([250.0, 750.0]), x)
    for prediction, eps in (("eps", x), ("score", -x / level.sigma)):
        x_0 = convert(eps, level.alpha * 0.5 + level.sigma * x, level, prediction)
        np.testing.assert_allclose(x_0, 0.5 * jnp.ones((2, 3)), rtol=1e-5)
        with pytest.raises(ValueError, match=f"alpha is 0: there {prediction} does not determine x_0"):
            convert(x, x, flow.at(jnp.array([500.0, 1000.0]), x), prediction)


@pytest.mark.parametrize(
    "path",
    [
        path if name in ("linear steps", "edm") else pytest.param(path, marks=pytest.mark.whole)
        for name, path in FINITE.items()
    ],
    ids=FINITE,
)
@pytest.mark.parametrize("name", ["uniform", "log_normal", "uniform_log_snr"])
def test_draws_have_the_density_that_they_return(name, path):
    """E[1 / p(l)] is the length of l's range, and E[l / p(l)] is the integral of l."""
    # A wide normal draw, so that the weights have finite variance; logit_normal would be the same draw.
    draw = timesteps.log_normal(-0.5, 2.5) if name == "log_normal" else getattr(draws, name)()
    time, log_density = jax.jit(lambda key, path: draw(key, 20_000, path))(KEY, path)
    first, last = path.interval
    assert time.dtype == log_density.dtype == jnp.float32 and (first <= time).all() and (time <= last).all()
    high, low = path.log_snr(np.array([first, last]))
    inner = (path.log_snr(time) < 6) & (path.log_snr(time) > -6)
    weight = np.where(inner, np.exp(-np.asarray(log_density, np.float64)), 0)
    np.testing.assert_allclose(weight.mean(), min(high, 6) - max(low, -6), rtol=0.01)
    alone = timesteps.uniform if name == "uniform" else dataclasses.replace(draw, stratified=False)
    independent, _ = jax.jit(alone, static_argnums=1)(jax.random.key(1), 20_000, path)
    assert stats.ks_2samp(np.asarray(time), np.asarray(independent)).pvalue > 1e-3


def test_an_inexact_inverse_draws_no_time_outside_the_interval():
    """An inverse with an error of 0.04%, which is accepted, maps log SNRs near the last to times above it."""
    path = schedules.path(lambda time: -8 * time, inverse=lambda log_snr: -1.0004 * log_snr / 8, interval=(0.5, 1.0))
    time, _ = timesteps.uniform_log_snr()(KEY, 10_000, path)
    assert time.min() >= 0.5 and time.max() == 1.0


def test_the_draws_of_the_papers():
    time, log_density = timesteps.log_normal()(KEY, 10_000, EDM)
    log_sigma = 4 * np.asarray(time, np.float64)
    assert stats.kstest((log_sigma + 1.2) / 1.2, "norm").pvalue > 0.01
    np.testing.assert_allclose(log_density, stats.norm(-1.2, 1.2).logpdf(log_sigma) - np.log(2), atol=1e-3)
    tau = np.asarray(timesteps.logit_normal()(KEY, 10_000, schedules.rectified_flow())[0], np.float64) / 1000
    assert stats.kstest(np.log(tau / (1 - tau)), "norm").pvalue > 0.01
    # Every stratum of a batch has one level.
    time, _ = timesteps.stratified(KEY, 64, FLOW)
    assert sorted(((time - 1) / 998 * 64).astype(int).tolist()) == list(range(64))
    # A narrow interval truncates the distribution, and its density stays normalized.
    narrow = schedules.edm(0.1, 0.5)
    time, log_density = timesteps.log_normal()(KEY, 10_000, narrow)
    truncated = stats.truncnorm(*((np.log([0.1, 0.5]) + 1.2) / 1.2), -1.2, 1.2)
    assert stats.kstest(4 * np.asarray(time, np.float64), truncated.cdf).pvalue > 0.01
    np.testing.assert_allclose(log_density, truncated.logpdf(4 * np.asarray(time)) - np.log(2), atol=1e-3)


ENDS = (-12.0, 9.0)  # log SNR
SAME_ENDS = {
    "edm": schedules.edm(np.exp(-ENDS[1] / 2), np.exp(-ENDS[0] / 2)),
    "custom": schedules.path(lambda u: ENDS[1] - 6 * u - 15 * u**2, interval=(0.0, 1.0)),
    "flow": schedules.rectified_flow(
        interval=tuple(schedules.rectified_flow().time_at_log_snr(np.array(ENDS[::-1])).tolist())
    ),
}


@pytest.mark.parametrize(
    "path",
    [SAME_ENDS["edm"], SAME_ENDS["custom"], pytest.param(SAME_ENDS["flow"], marks=pytest.mark.whole)],
    ids=SAME_ENDS,
)
@pytest.mark.parametrize("draw", ["uniform_log_snr", "uniform", timesteps.log_normal(0.0, 3.0)])
def test_the_continuous_bound_depends_on_the_ends_of_the_path_only(path, draw):
    """On N(0, c^2) with the exact network the bound is 1/2 ln[(1 + c^2 e^-g0) / (1 + c^2 e^-g1)] nats."""
    c2 = 0.7
    x_0 = np.sqrt(c2) * jax.random.normal(KEY, (40_000, 2))
    loss, aux = losses.continuous_vlb(jax.random.key(3), path, gaussian(path, c2), x_0, prediction="x_0", draw=draw)
    exact = 0.5 * np.log((1 + c2 * np.exp(ENDS[1])) / (1 + c2 * np.exp(ENDS[0]))) / np.log(2)
    assert abs(loss.mean() - exact) < 4 * loss.std() / np.sqrt(loss.size)
    np.testing.assert_array_equal(loss, aux.vlb)


@pytest.mark.whole
@pytest.mark.parametrize("steps", [10, 100])
def test_the_discrete_bound_falls_to_the_continuous_one(steps):
    c2, path = 0.7, SAME_ENDS["edm"]

    def closed_form(steps):
        g = -np.linspace(*ENDS[::-1], steps + 1)  # -log SNR, from the cleanest level
        alpha_bar = 1 / (1 + np.exp(g[1:]))
        eps_error = c2 * alpha_bar / (c2 * alpha_bar + 1 - alpha_bar)
        return 0.5 * np.sum(np.expm1(np.diff(g)) * eps_error) / np.log(2)

    limit = 0.5 * np.log((1 + c2 * np.exp(ENDS[1])) / (1 + c2 * np.exp(ENDS[0]))) / np.log(2)
    bounds = [closed_form(steps) for steps in (10, 100, 1000, 10_000)]
    gaps = np.array(bounds) - limit
    assert (gaps[:-1] > 5 * gaps[1:]).all() and 0 < gaps[-1] < 0.01

    schedule = schedules.from_path(path, np.linspace(*path.interval, steps + 1))
    x_0 = np.sqrt(c2) * jax.random.normal(KEY, (4000, 2))
    denoiser = exact_denoiser(path, c2, variance="fixed_small")
    terms = likelihood.bits_per_dim(KEY, schedule, denoiser, x_0, gray_levels=None)
    total = terms.vlb[:, 1:].sum(axis=1)
    assert abs(total.mean() - closed_form(steps)) < 4 * total.std() / np.sqrt(total.size)


STD = 0.5  # of the data in the bounds below
ENTROPY = 0.5 * np.log2(2 * np.pi * np.e * STD**2)


def chain_on(path, steps, is_even_in_log_snr):
    """Levels between the ends of the path, without the first time of rectified flow, where there is no noise."""
    first, last = path.interval
    times = np.linspace(first, last, steps + 1)[1:] if path.log_snr(first) == np.inf else None
    schedule = schedules.from_path(path, np.linspace(first, last, steps) if times is None else times)
    return schedules.respace(schedule, steps, "log_snr") if is_even_in_log_snr else schedule


def closed_form_bound(schedule, variance):
    """(total, decoder) in bits for N(0, STD^2), its exact network and a continuous decoder, from the levels in float64."""
    alpha2, sigma2 = schedule.alpha_bar, schedule.transitions.level.sigma**2
    error = STD**2 * sigma2 / (alpha2 * STD**2 + sigma2)  # E (x_0 - E[x_0 | x_t])^2
    beta = 1 - alpha2[1:] / alpha2[:-1]
    posterior = beta * sigma2[:-1] / sigma2[1:]
    model = beta if variance == "fixed_large" else posterior
    mean_error = beta**2 * alpha2[:-1] / sigma2[1:] ** 2 * error[1:]
    transitions = 0.5 * (np.log(model / posterior) - 1 + (posterior + mean_error) / model)
    level = sigma2[0] / alpha2[0]
    decoder = 0.5 * (np.log(2 * np.pi * level) + error[0] / level)
    prior = 0.5 * (alpha2[-1] * STD**2 - alpha2[-1] - np.log(sigma2[-1]))
    return (prior + transitions.sum() + decoder) / np.log(2), decoder / np.log(2)


@pytest.mark.parametrize("path", [name for name in PATHS if name != "linear steps"])
def test_the_bound_on_every_path_is_near_the_entropy(path):
    """In closed form for the exact network; with fixed_small the excess falls with T on levels even in the log SNR."""

    def excess(steps, variance):
        schedule = chain_on(PATHS[path], steps, variance == "fixed_small")
        steps = schedule.transitions
        at_0 = steps.level.sigma[0] ** 2 / schedule.alpha_bar[0]
        for variances in (steps.fixed_large_variance, np.exp(steps.posterior_log_variance)):
            np.testing.assert_allclose(variances[0], at_0, rtol=1e-12)
        return closed_form_bound(schedule, variance)[0] - ENTROPY

    large, small = ([excess(T, name) for T in (50, 300, 1000)] for name in ("fixed_large", "fixed_small"))
    assert 0.06 > large[0] > large[1] > large[2] > 0
    assert small[0] > small[1] > small[2] > 0 and small[2] < 0.15


@pytest.mark.parametrize(("variance", "steps"), [("fixed_large", 50), ("fixed_small", 1000)])
def test_the_bound_on_a_path_has_its_closed_form(variance, steps):
    schedule, x_0 = chain_on(EDM, steps, variance == "fixed_small"), STD * jax.random.normal(KEY, (2000, 4))
    bits = jax.jit(
        lambda key, x: likelihood.bits_per_dim(
            key, schedule, exact_denoiser(EDM, STD**2, variance=variance), x, gray_levels=None, tables=False
        )
    )(KEY, x_0)
    for values, expected in zip((bits.total, bits.decoder), closed_form_bound(schedule, variance), strict=True):
        assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(values.size)


def test_the_decoder_of_gray_levels_on_a_path_by_quadrature():
    """The exact network for a Gaussian, over 256 gray levels; the decoder's variance is sigma_0^2 / alpha_0^2."""
    schedule = chain_on(EDM, 1000, False)
    alpha, sigma = (table[0] for table in schedule.transitions.level[:2])
    grid = np.arange(256) / 127.5 - 1
    probabilities = np.exp(scipy_log_prob(grid, 0.0, STD, 256))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    mean = STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * (alpha * grid[:, None] + sigma * nodes)
    log_p = scipy_log_prob(np.broadcast_to(grid[:, None], mean.shape), mean, sigma / alpha, 256)
    expected = -(probabilities * (log_p @ weights / weights.sum())).sum() / np.log(2)
    assert expected == pytest.approx(0.29, abs=0.01)
    x_0 = np.random.default_rng(0).choice(grid, p=probabilities / probabilities.sum(), size=(40_000, 1))
    eps = np.random.default_rng(1).normal(size=x_0.shape)
    x_t, t = (alpha * x_0 + sigma * eps).astype(np.float32), np.zeros(len(x_0), np.int32)

    @jax.jit
    def decoder(x_0, x_t):
        denoiser = Denoiser(gaussian(EDM, STD**2), "x_0", "fixed_small")
        return likelihood.bound_term(schedule, denoiser, x_0, x_t, t)[0]

    bits = decoder(x_0.astype(np.float32), x_t)
    assert abs(bits.mean() - expected) < 4 * bits.std() / np.sqrt(bits.size) < 0.02


def rho_levels(count):
    return (0.002 ** (1 / 7) + np.arange(count) / (count - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def two_points(x_t, time):
    """The exact x_0 of equal weights at -1 and 1, each with variance 0.01."""
    at, variance = EDM.at(time, x_t), 0.01
    total = variance * at.alpha**2 + at.sigma**2
    mean = jnp.tanh(at.alpha * x_t / total)
    return mean + variance * at.alpha / total * (x_t - at.alpha * mean)


@pytest.mark.whole
def test_heun_has_order_2_on_a_mixture():
    """Against 2,000 steps; where the trajectories part, the error has not reached its order with fewer steps."""
    with jax.enable_x64(True):
        x_T = jnp.linspace(-2.0, 2.0, 40)[:, None]

        def draw(count):
            denoiser = Denoiser(two_points, "x_0", clip=False)
            return sampling.sample(KEY, levels(EDM, rho_levels(count)), denoiser, x_T, sampling.heun())

        limit = draw(2000)
        errors = [float(jnp.abs(draw(count) - limit).mean()) for count in (40, 80, 160)]
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert (ratios > 3.4).all() and (ratios < 5.5).all()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_orders_on_the_levels_of_edm(sampler, order):
    d = 0.5
    errors = []
    for count in (18, 36, 72):
        schedule = levels(EDM, rho_levels(count))
        x_T = jnp.full((1, 1), np.sqrt(schedule.alpha_bar[-1] * (d**2 + 80**2)))
        with jax.enable_x64(True):
            make = sampling.SAMPLERS[sampler]()
            x_0 = sampling.sample(KEY, schedule, exact_denoiser(EDM, d**2), jnp.asarray(x_T, jnp.float64), make)
        errors.append(abs(float(x_0[0, 0]) / d - 1))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert (ratios > 0.95 * 2**order).all() and (ratios < 1.25 * 2**order).all()


def test_others_coordinates_give_the_same_samples():
    """Euler's method in z and Heun's in y, in float64 NumPy with the papers' formulas, against the samplers."""
    d2 = 0.3
    sigma = rho_levels(18)[::-1]
    start = np.random.default_rng(0).normal(size=(6, 1))
    schedule = schedules.edm_steps(18)
    ratio = schedule.transitions.level.sigma / schedule.transitions.level.alpha
    np.testing.assert_allclose(ratio[::-1], sigma, rtol=1e-9)  # eq. 5
    steeper = schedules.edm_steps(5, sigma_min=0.01, sigma_max=10.0, rho=3.0)
    np.testing.assert_allclose(steeper.snr**-0.5, np.linspace(0.01 ** (1 / 3), 10 ** (1 / 3), 5) ** 3, rtol=1e-9)

    # EDM's Algorithm 2 with D(y; s) for N(0, d2), which ends at s = 0.
    denoiser = lambda y, s: d2 / (d2 + s**2) * y  # noqa: E731
    y = sigma[0] * start
    for s, s_next in zip(sigma, np.append(sigma[1:], 0), strict=True):
        slope = (y - denoiser(y, s)) / s
        end = y + (s_next - s) * slope
        if s_next:
            end = y + (s_next - s) * (slope + (end - denoiser(end, s_next)) / s_next) / 2
        y = end
    edm_fn = coordinates.from_edm(lambda y, s: d2 / (d2 + s[:, None] ** 2) * y, EDM)
    with jax.enable_x64(True):
        x_T = jnp.asarray(schedule.transitions.level.sigma[-1] * start)
        ours = sampling.sample(KEY, schedule, Denoiser(edm_fn, "x_0", clip=False), x_T, sampling.heun())
    np.testing.assert_allclose(ours, y, rtol=1e-7)

    # Flow matching from tau = 1 - 1e-3 to 0: Euler's method on dz/dtau = u(z, tau).
    tau = np.append(np.linspace(0.999, 0.05, 20), 0)
    velocity = lambda z, tau: (tau - (1 - tau) * d2) * z / ((1 - tau) ** 2 * d2 + tau**2)  # noqa: E731
    z = z_0 = start
    for now, after in itertools.pairwise(tau):
        z = z + (after - now) * velocity(z, now)
    path = schedules.rectified_flow()
    schedule = schedules.from_path(path, 1000 * tau[-2::-1])
    flow_fn = coordinates.from_flow(lambda z, tau: velocity(z, tau[:, None]), path)
    with jax.enable_x64(True):
        x_T = jnp.asarray(z_0 / np.hypot(0.999, 0.001))
        ours = sampling.sample(KEY, schedule, Denoiser(flow_fn, "flow", clip=False), x_T, sampling.euler())
    np.testing.assert_allclose(ours, z, rtol=1e-7)

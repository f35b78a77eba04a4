"""The bound on paths: its closed form, its ends, the limit of many steps, and the decoder."""

import jax
import numpy as np
import pytest

from diffusion_jax import Denoiser, likelihood, losses, schedules, timesteps
from helpers.decoder import scipy_log_prob
from helpers.path_networks import EDM, PATHS, exact_denoiser, gaussian

KEY = jax.random.key(0)


ENDS = (-12.0, 9.0)  # log SNR


SAME_ENDS = {
    "edm": schedules.edm(np.exp(-ENDS[1] / 2), np.exp(-ENDS[0] / 2)),
    "custom": schedules.path(lambda u: ENDS[1] - 6 * u - 15 * u**2, interval=(0.0, 1.0)),
    "flow": schedules.rectified_flow(
        interval=tuple(schedules.rectified_flow().time_at_log_snr(np.array(ENDS[::-1])).tolist())
    ),
}


@pytest.mark.parametrize("path", SAME_ENDS.values(), ids=SAME_ENDS)
@pytest.mark.parametrize("draw", ["uniform_log_snr", "uniform", timesteps.log_normal(0.0, 3.0)])
def test_the_continuous_bound_depends_on_the_ends_of_the_path_only(path, draw):
    """On N(0, c^2) with the exact network the bound is 1/2 ln[(1 + c^2 e^-g0) / (1 + c^2 e^-g1)] nats."""
    c2 = 0.7
    x_0 = np.sqrt(c2) * jax.random.normal(KEY, (40_000, 2))
    loss, aux = losses.continuous_vlb(jax.random.key(3), path, gaussian(path, c2), x_0, prediction="x_0", draw=draw)
    exact = 0.5 * np.log((1 + c2 * np.exp(ENDS[1])) / (1 + c2 * np.exp(ENDS[0]))) / np.log(2)
    assert abs(loss.mean() - exact) < 4 * loss.std() / np.sqrt(loss.size)
    np.testing.assert_array_equal(loss, aux.vlb)


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

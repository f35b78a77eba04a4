"""Timestep samplers: their distributions, on steps and on paths, and the history of losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import draws, schedules, timesteps
from helpers.path_networks import EDM, FLOW, PATHS

KEY = jax.random.key(0)
FINITE = {name: path for name, path in PATHS.items() if name != "rectified_flow"}


@pytest.mark.parametrize("name", ["uniform", "antithetic", "stratified", "loss_second_moment"])
def test_timesteps_are_uniform(name):
    """Chi-squared over 10 bins from independent batches; each draw alone must be uniform."""
    sampler, batches = timesteps.sampler_by_name(name, timesteps.loss_history(10)), 4000
    t, weight = jax.vmap(lambda key: sampler(key, 5, 10))(jax.random.split(jax.random.key(0), batches))
    assert t.shape == (batches, 5) and (abs(weight - 1) < 1e-6).all() and t.min() >= 0 and t.max() <= 9
    for column in range(5):
        counts = np.bincount(np.asarray(t[:, column]), minlength=10)
        assert ((counts - batches / 10) ** 2 / (batches / 10)).sum() < 33.7  # P(chi2_9 > 33.7) = 1e-4


def test_antithetic_pairs_and_strata():
    t, _ = timesteps.antithetic(jax.random.key(0), 7, 100)
    np.testing.assert_array_equal(t[:3] + t[4:], 99)
    for seed in range(20):
        t, _ = timesteps.stratified(jax.random.key(seed), 8, 80)
        np.testing.assert_array_equal(np.sort(np.asarray(t) // 10), np.arange(8))  # one timestep in each eighth


record = jax.jit(timesteps.record)


def test_the_history_keeps_the_last_losses_of_each_step():
    """The published rule, one loss at a time: each step has a list, whose oldest loss is dropped."""
    rng = np.random.default_rng(0)
    history, lists = timesteps.loss_history(5, length=3), [[] for _ in range(5)]
    for _ in range(20):
        t = rng.integers(0, 5, 12).astype(np.int32)  # some steps more often than a ring is long
        values = rng.normal(size=12).astype(np.float32)
        history = record(history, t, values)
        for step, value in zip(t, values, strict=True):
            lists[step] = [*lists[step], value][-3:]
        for step in range(5):
            kept = np.asarray(history.losses[step])[: min(int(history.counts[step]), 3)]
            np.testing.assert_array_equal(np.sort(kept), np.sort(lists[step]))


def test_the_sampler_is_uniform_until_every_step_is_full():
    history = timesteps.loss_history(4, length=2)
    for t in ([0, 0, 1, 1], [2, 2, 3, 0]):
        history = record(history, jnp.array(t), jnp.array([5.0, 1.0, 2.0, 3.0]))
        np.testing.assert_allclose(timesteps.step_probabilities(history), 0.25)
    history = record(history, jnp.array([3]), jnp.array([4.0]))
    kept = np.array([[1, 3], [2, 3], [5, 1], [2, 4]], float)  # step 0 saw 5, 1, 3
    root = np.sqrt((kept**2).mean(1))
    np.testing.assert_allclose(timesteps.step_probabilities(history), 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-6)


def test_the_uniform_part_of_importance_sampling():
    """Half of the distribution is uniform: a step whose losses are 0 keeps the probability 1 / (2 T) and has weight 2."""
    t = jnp.repeat(jnp.arange(4), 2)
    history = record(timesteps.loss_history(4, length=2), t, jnp.where(t == 0, 0.0, 1.0))
    np.testing.assert_allclose(timesteps.step_probabilities(history, 0.5), [1 / 8, *[7 / 24] * 3], rtol=1e-6)
    drawn, weight = timesteps.loss_second_moment(history, 0.5)(jax.random.key(0), 200, 4)
    assert (drawn == 0).any()
    np.testing.assert_allclose(weight, np.where(drawn == 0, 2.0, 6 / 7), rtol=1e-6)


def full_history(losses):
    """A history [T, 2] whose steps have two equal losses each."""
    t = jnp.tile(jnp.arange(len(losses)), 2)
    return record(timesteps.loss_history(len(losses), length=2), t, jnp.tile(jnp.array(losses), 2))


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [1e30, 2.0, 3.0], [1e-30, 2e-30, 0.0]])
def test_losses_without_usable_squares_are_drawn_uniformly(losses):
    """All losses 0 (squares that underflow included), or a square that overflows float32."""
    history = full_history(losses)
    np.testing.assert_allclose(timesteps.step_probabilities(history), 1 / 3, rtol=1e-6)
    _, weight = timesteps.loss_second_moment(history)(jax.random.key(0), 50, 3)
    np.testing.assert_allclose(weight, 1.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_not_recorded(bad):
    """The history contains only the finite losses, in order, also within one batch."""
    t, values = jnp.array([0, 1, 1, 0, 1, 0]), jnp.array([bad, 3.0, 5.0, 4.0, bad, 6.0])
    history = full_history([1.0, 2.0])
    found = record(history, t, values)
    finite = np.isfinite(values)
    for leaf, expected in zip(found, record(history, t[finite], values[finite]), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    np.testing.assert_allclose(np.sort(found.losses), [[4, 6], [3, 5]])
    root = np.sqrt([(16 + 36) / 2, (9 + 25) / 2])
    np.testing.assert_allclose(timesteps.step_probabilities(found), 0.999 * root / root.sum() + 0.001 / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        path if name in ("linear steps", "edm") else pytest.param(path, marks=pytest.mark.thorough)
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

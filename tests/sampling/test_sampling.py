"""Samplers against closed forms for Gaussian data, where the network, every step's variance and the map are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, guidance, sampling, schedules
from helpers.gaussian_mixtures import gaussian
from helpers.jaxprs import calls, equations, loops

NAMES = list(schedules.SCHEDULES)
S2 = 0.25
KEY = jax.random.key(0)


def thousand(name):
    return schedules.from_betas(schedules.betas(name, 1000))


def exact_x_0(schedule):
    """E[x_0 | x_t] for N(0, S2) data."""
    return Denoiser(gaussian("x_0", schedule, 0.0, S2), prediction="x_0", clip=False)


def bounds(schedule):
    """(beta, beta-tilde) of a respaced schedule, from alpha_bar alone."""
    before = np.append(1.0, schedule.alpha_bar[:-1])
    beta = 1 - schedule.alpha_bar / before
    return beta, beta * (1 - before) / (1 - schedule.alpha_bar)


def final_variance(schedule, sigma2):
    """The variance that ancestral sampling ends with: V <- A^2 V + sigma^2 (DDPM eq. 7, float64 NumPy)."""
    a, before, (beta, _) = schedule.alpha_bar, np.append(1.0, schedule.alpha_bar[:-1]), bounds(schedule)
    shrink = np.sqrt(1 - beta) * (1 - before) / (1 - a)
    shrink += beta * np.sqrt(before) / (1 - a) * np.sqrt(a) * S2 / (a * S2 + 1 - a)
    total = 1.0
    for factor, noise in zip(shrink[::-1], np.append(0.0, sigma2[1:])[::-1], strict=True):
        total = factor**2 * total + noise
    return total


def many_samples(denoiser, schedule, sampler):
    x_T = jax.random.normal(jax.random.key(1), (100_000, 1))
    return jax.jit(lambda key, x: sampling.sample(key, schedule, denoiser, x, sampler))(KEY, x_T)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_final_variance(name, variance):
    full = thousand(name)
    schedule = schedules.respace(full, 50, spacing="trailing")
    beta, small = bounds(schedule)
    expected = final_variance(schedule, beta if variance == "fixed_large" else small)
    x_0 = many_samples(exact_x_0(full), schedule, sampling.ddpm(variance))
    assert abs(x_0.mean()) < 4 * np.sqrt(expected / x_0.size)
    assert abs(x_0.var() - expected) < 4 * expected * np.sqrt(2 / x_0.size) + 1e-5


@pytest.mark.parametrize("steps", ["25", "ddim50"])
def test_a_learned_variance_respaced_from_four_thousand_rescaled_steps(steps):
    """Improved DDPM section 4: the network's fraction, trained at T = 4000, interpolates between the respaced bounds."""
    full = schedules.from_betas(schedules.betas("cosine", 4000), np.arange(4000) * 0.25)
    schedule = schedules.respace(full, steps)
    assert 0 <= schedule.timesteps[0] < schedule.timesteps[-1] <= 999.75  # the network's own unit
    fraction = 0.5 + 0.4 * np.sin(np.arange(4000) / 1500)

    def network(x_t, time):
        value = jnp.interp(time, jnp.asarray(full.timesteps), jnp.asarray(2 * fraction - 1))[:, None]
        return jnp.concatenate([exact_x_0(full).network(x_t, time), jnp.broadcast_to(value, x_t.shape)], axis=-1)

    f, (beta, small) = np.interp(schedule.timesteps, full.timesteps, fraction), bounds(schedule)
    denoiser = Denoiser(network, prediction="x_0", variance="learned_range", clip=False)
    x_0 = many_samples(denoiser, schedule, sampling.ddpm())
    expected = final_variance(schedule, beta**f * small ** (1 - f))
    assert abs(x_0.var() - expected) < 4 * expected * np.sqrt(2 / x_0.size)


@pytest.mark.parametrize("name", NAMES)
def test_the_variance_of_ddim_samples_has_its_closed_form(name, x64):
    """Each step multiplies x / sqrt(alpha_bar) by (s^2 + sigma sigma') / (s^2 + sigma^2); the last step returns E[x_0 |
    x_1]."""
    full = thousand(name)
    schedule = schedules.respace(full, 20, spacing="linspace" if name != "jsd" else "leading")
    sigma = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    before = np.append(0.0, sigma[:-1])
    factor = np.prod((S2 + sigma * before) / (S2 + sigma**2)) / np.sqrt(schedule.alpha_bar[-1])
    x_T = jnp.array([[1.0], [-0.4]])
    x_0 = sampling.sample(KEY, schedule, exact_x_0(full), x_T, sampling.ddim())
    np.testing.assert_allclose(x_0, factor * x_T, rtol=1e-6)


def test_ddim_eta_1_is_ancestral_with_the_small_variance(x64):
    """Step by step from the same noise, the clip included."""
    full = thousand("linear")
    schedule, x_T = schedules.respace(full, "ddim50"), 3 * jax.random.normal(KEY, (5, 1))
    wide = Denoiser(lambda x_t, time: 4 * exact_x_0(full).network(x_t, time), prediction="x_0")  # so that the clip acts
    _, a = sampling.sample(KEY, schedule, wide, x_T, sampling.ddpm("fixed_small"), trajectory=True)
    _, b = sampling.sample(KEY, schedule, wide, x_T, sampling.ddim(1.0), trajectory=True)
    np.testing.assert_allclose(a.x_t, b.x_t, rtol=1e-7, atol=1e-9)
    assert abs(a.x_0).max() == 1.0


def test_mean_shift_moves_by_variance_times_gradient(x64):
    """For a classifier with log p(y|x) linear in x, each step, including the last, moves by sigma^2 g; two shifts add up."""
    full = thousand("linear")
    schedule = schedules.respace(full, [499])
    keep = Denoiser(lambda x_t, time: 0 * x_t, prediction="x_0")
    x_T, g = jnp.ones((1, 2)), jnp.array([[0.5, -2.0]])
    shift = functools.partial(guidance.classifier, log_prob=lambda x_t, time: (x_t @ g.T)[:, 0], form="mean")
    guided = shift(shift(keep, scale=0.25), scale=0.75)
    plain, moved = (sampling.sample(KEY, schedule, denoiser, x_T, sampling.ddpm()) for denoiser in (keep, guided))
    np.testing.assert_allclose(moved - plain, schedule.transitions.fixed_large_variance[0] * g, rtol=1e-9)


def test_trajectory_start_and_final_step():
    full = thousand("linear")
    schedule, x_T = schedules.respace(full, "ddim25"), jnp.ones((2, 3))
    draw = functools.partial(sampling.sample, KEY, schedule, exact_x_0(full), sampler=sampling.ddpm())
    # Programs that keep different values may round differently, by a few 2^-24 in each of 25 steps.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    x_0, kept = draw(x_T, trajectory=True)
    close(draw(x_T), x_0)
    np.testing.assert_array_equal(kept.t, np.arange(24, -1, -1))
    assert kept.x_t.shape == kept.x_0.shape == (25, 2, 3)
    np.testing.assert_array_equal(kept.x_t[0], x_T)
    close(kept.x_0[-1], x_0)  # the last step has no noise and ends at the predicted x_0
    part, some = draw(kept.x_t[8], start=16, trajectory=[0, 16, 7])
    close(part, x_0)
    np.testing.assert_array_equal(some.t, [16, 7, 0])
    close(some.x_t, kept.x_t[np.array([8, 17, 24])])
    close(some.x_0, kept.x_0[np.array([8, 17, 24])])
    stopped, short = draw(x_T, final_step=False, trajectory=True)
    close(stopped, kept.x_t[-1])
    np.testing.assert_array_equal(short.t, np.arange(24, 0, -1))


def test_inversion_ends_where_the_probability_flow_does(x64):
    full, mean, x_0 = thousand("linear"), 0.3, np.array([[-0.7], [0.2], [1.0]])
    schedule, a = schedules.respace(full, 100, "log_snr"), full.alpha_bar[-1]
    truth = np.sqrt(a) * mean + np.sqrt((a * S2 + 1 - a) / S2) * (x_0 - mean)
    for order, tolerance in ((1, 0.1), (2, 4e-3)):
        found = sampling.encode(schedule, gaussian("eps", full, mean, S2), x_0, order=order)
        np.testing.assert_allclose(found, truth, atol=tolerance)


# The network calls of 20 steps.
@pytest.mark.parametrize(
    ("sampler", "final_step", "expected"),
    [
        (sampling.ddpm(), True, 20),
        (sampling.ddim(0.5), True, 20),
        (sampling.dpm_solver_pp(2), True, 20),
        (sampling.dpm_solver_pp(3, sde=True, singlestep=True), True, 20),
        (sampling.deis(3), True, 20),
        (sampling.unipc(3), True, 20),
        (sampling.heun(), True, 39),
        (sampling.heun(churn=4.0), False, 38),
        (sampling.pndm(), True, 3 * 4 + 17),
        (sampling.pndm(runge_kutta=False), True, 2 + 19),
        (editing.replacement(sampling.heun(), jnp.zeros((2, 3)), jnp.ones((2, 3))), True, 39),
    ],
)
def test_a_sampler_is_one_loop_that_calls_the_network_as_often_as_its_steps_need(sampler, final_step, expected):
    schedule, x_T, called = schedules.respace(thousand("linear"), 20, "karras"), jnp.zeros((2, 3)), []

    @jax.jit
    def network(x_t, time):
        return 0.1 * x_t

    def draw(x, network=network):
        return sampling.sample(KEY, schedule, network, x, sampler, final_step=final_step)

    def counted(x_t, time):
        jax.debug.callback(lambda: called.append(1))
        return 0.1 * x_t

    jax.jit(functools.partial(draw, network=counted))(x_T)
    jax.effects_barrier()
    assert len(called) == expected
    assert not final_step or sampler.num_calls(20) == expected
    program = jax.make_jaxpr(draw)(x_T).jaxpr
    names = [equation.primitive.name for equation in equations(program)]
    lengths = [loop.params["length"] for loop in loops(program) if calls(loop.params["jaxpr"], "network")]
    assert lengths == [20 if final_step else 19]
    # A branch, where GPUs wait for the host, only saves calls.
    assert names.count("cond") == (1 if expected > 20 else 0)
    assert not program.effects and not [name for name in names if "callback" in name]  # no host in the loop

"""Samplers against the closed forms of Gaussian data, where the network, every step's variance and the map are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import editing, sampling, schedules
from helpers.jaxprs import calls, equations, loops

NAMES = list(schedules.SCHEDULES)
S2 = 0.25
KEY = jax.random.key(0)


def thousand(name):
    return schedules.from_betas(schedules.betas(name, 1000))


def denoiser(schedule):
    """E[x_0 | x_t] of N(0, S2) data; network time is the index of the full schedule."""

    def denoise_fn(x_t, time):
        alpha_bar = jnp.exp(jax.nn.log_sigmoid(schedule.log_snr(time)))[:, None]
        return jnp.sqrt(alpha_bar) * S2 * x_t / (alpha_bar * S2 + 1 - alpha_bar)

    return denoise_fn


def ancestral_variance(schedule, variance):
    """The variance that ancestral sampling ends with: V <- A^2 V + sigma^2 (float64 NumPy)."""
    v = schedule.alpha_bar * S2 + 1 - schedule.alpha_bar
    sigma2 = schedule.betas if variance == "fixed_large" else schedule.posterior_variance
    total = 1.0
    for t in range(schedule.num_timesteps - 1, -1, -1):
        a2 = (
            schedule.posterior_mean_coef_x_0[t] * np.sqrt(schedule.alpha_bar[t]) * S2 / v[t]
            + schedule.posterior_mean_coef_x_t[t]
        )
        total = a2**2 * total + (sigma2[t] if t > 0 else 0.0)
    return total


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_final_variance(name, variance):
    full = thousand(name)
    schedule = schedules.respace(full, 50, spacing="trailing")
    n = 100_000
    sampler = sampling.ddpm(prediction="x_0", variance=variance, clip=False)
    x_T = jax.random.normal(jax.random.key(1), (n, 1))
    x_0 = jax.jit(lambda key, x: sampling.sample(key, schedule, denoiser(full), x, sampler))(KEY, x_T)
    expected = ancestral_variance(schedule, variance)
    assert abs(x_0.mean()) < 4 * np.sqrt(expected / n)
    assert abs(x_0.var() - expected) < 4 * expected * np.sqrt(2 / n) + 1e-5


@pytest.mark.parametrize("steps", ["25", "ddim50", 400])
def test_a_learned_variance_respaced_from_four_thousand_rescaled_steps(steps):
    """Improved DDPM section 4: the network's fraction, trained at T = 4000, interpolates between the respaced bounds."""
    full = schedules.from_betas(schedules.betas("cosine", 4000), np.arange(4000) * 0.25)
    schedule = schedules.respace(full, steps)
    assert 0 <= schedule.timesteps[0] < schedule.timesteps[-1] <= 999.75  # the network's own unit
    fraction = 0.5 + 0.4 * np.sin(np.arange(4000) / 1500)

    def network(x_t, time):
        value = jnp.interp(time, jnp.asarray(full.timesteps), jnp.asarray(2 * fraction - 1))[:, None]
        return jnp.concatenate([denoiser(full)(x_t, time), jnp.broadcast_to(value, x_t.shape)], axis=-1)

    n = 100_000
    x_T = jax.random.normal(jax.random.key(1), (n, 1))
    sampler = sampling.ddpm("learned_range", prediction="x_0", clip=False)
    x_0 = jax.jit(lambda key, x: sampling.sample(key, schedule, network, x, sampler))(KEY, x_T)
    f = np.interp(schedule.timesteps, full.timesteps, fraction)
    alpha_bar, before = schedule.alpha_bar, np.append(1.0, schedule.alpha_bar[:-1])
    beta = 1 - alpha_bar / before  # the respaced ones, from their definition
    small = beta * (1 - before) / (1 - alpha_bar)
    total = 1.0
    for t in range(schedule.num_timesteps - 1, -1, -1):
        shrink = np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - alpha_bar[t]) + beta[t] * np.sqrt(before[t]) * np.sqrt(
            alpha_bar[t]
        ) * S2 / ((1 - alpha_bar[t]) * (alpha_bar[t] * S2 + 1 - alpha_bar[t]))
        noise = beta[t] ** f[t] * small[t] ** (1 - f[t]) if t else 0.0
        total = shrink**2 * total + noise
    assert abs(x_0.var() - total) < 4 * total * np.sqrt(2 / n)


@pytest.mark.parametrize("name", NAMES)
def test_the_variance_of_ddim_samples_has_its_closed_form(name, x64):
    """Each step multiplies x / sqrt(alpha_bar) by (s^2 + sigma sigma') / (s^2 + sigma^2); the last leaves E[x_0 | x_1]."""
    full = thousand(name)
    schedule = schedules.respace(full, 20, spacing="linspace" if name != "jsd" else "leading")
    sigma = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    before = np.append(0.0, sigma[:-1])
    factor = np.prod((S2 + sigma * before) / (S2 + sigma**2)) / np.sqrt(schedule.alpha_bar[-1])
    x_T = jnp.array([[1.0], [-0.4]])
    x_0 = sampling.sample(KEY, schedule, denoiser(full), x_T, sampling.ddim(prediction="x_0", clip=False))
    np.testing.assert_allclose(x_0, factor * x_T, rtol=1e-6)


def test_ddim_eta_1_is_ancestral_with_the_small_variance(x64):
    """Step by step from the same noise, the clip included."""
    full = thousand("linear")
    schedule, x_T = schedules.respace(full, "ddim50"), 3 * jax.random.normal(KEY, (5, 1))
    wide = lambda x_t, time: 4 * denoiser(full)(x_t, time)  # noqa: E731  # so that the clip acts
    _, a = sampling.sample(KEY, schedule, wide, x_T, sampling.ddpm("fixed_small", prediction="x_0"), trajectory=True)
    _, b = sampling.sample(KEY, schedule, wide, x_T, sampling.ddim(1.0, prediction="x_0"), trajectory=True)
    np.testing.assert_allclose(a.x_t, b.x_t, rtol=1e-7, atol=1e-9)
    assert abs(a.x_0).max() == 1.0


def test_mean_shift_moves_by_variance_times_gradient(x64):
    """With a Gaussian classifier log p(y|x) linear in x, each step moves by sigma^2 g, the last included."""
    full = thousand("linear")
    schedule = schedules.respace(full, [499])
    keep = lambda x_t, time: 0 * x_t  # noqa: E731
    x_T, g = jnp.ones((1, 2)), jnp.array([[0.5, -2.0]])
    plain = sampling.sample(KEY, schedule, keep, x_T, sampling.ddpm(prediction="x_0"))
    moved = sampling.sample(KEY, schedule, keep, x_T, sampling.ddpm(prediction="x_0", mean_shift=lambda x_t, time: g))
    np.testing.assert_allclose(moved - plain, schedule.fixed_large_variance[0] * g, rtol=1e-9)


def test_trajectory_holds_every_step():
    full = thousand("linear")
    schedule, x_T = schedules.respace(full, "ddim25"), jnp.ones((2, 3))
    plain = sampling.sample(KEY, schedule, denoiser(full), x_T, sampling.ddpm(prediction="x_0"))
    x_0, kept = sampling.sample(KEY, schedule, denoiser(full), x_T, sampling.ddpm(prediction="x_0"), trajectory=True)
    # Programs that keep different things may round differently, by a few 2^-24 in each of 25 steps.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(plain, x_0)
    np.testing.assert_array_equal(kept.t, np.arange(24, -1, -1))
    assert kept.x_t.shape == kept.x_0.shape == (25, 2, 3)
    np.testing.assert_array_equal(kept.x_t[0], x_T)
    close(kept.x_0[-1], x_0)  # the last step has no noise and ends at its x_0
    x_0, some = sampling.sample(
        KEY, schedule, denoiser(full), x_T, sampling.ddpm(prediction="x_0"), trajectory=[0, 24, 7]
    )
    np.testing.assert_array_equal(some.t, [24, 7, 0])
    close(some.x_t, kept.x_t[np.array([0, 17, 24])])
    close(some.x_0, kept.x_0[np.array([0, 17, 24])])
    with pytest.raises(ValueError, match="keeps indices in 0"):
        sampling.sample(KEY, schedule, denoiser(full), x_T, sampling.ddpm(prediction="x_0"), trajectory=[25])


# The lengths of the loops, and the network calls of one of their steps.
@pytest.mark.parametrize(
    ("sampler", "final_step", "expected"),
    [
        (sampling.ddpm(), True, [(20, 1)]),
        (sampling.ddim(0.5), True, [(20, 1)]),
        (sampling.dpm_solver_pp(2), True, [(20, 1)]),
        (sampling.dpm_solver_pp(3, sde=True, singlestep=True), True, [(20, 1)]),
        (sampling.deis(3), True, [(20, 1)]),
        (sampling.unipc(3), True, [(20, 1)]),
        (sampling.heun(), True, [(19, 2), (1, 1)]),
        (sampling.heun(churn=4.0), False, [(19, 2)]),
        (sampling.pndm(), True, [(3, 4), (17, 1)]),
        (sampling.pndm(runge_kutta=False), True, [(1, 2), (19, 1)]),
        (editing.replacement(sampling.heun(), jnp.zeros((2, 3)), jnp.ones((2, 3))), True, [(19, 2), (1, 1)]),
    ],
)
def test_the_loops_call_the_network_as_often_as_their_steps_need_and_never_the_host(sampler, final_step, expected):
    schedule = schedules.respace(thousand("linear"), 20, "karras")

    @jax.jit
    def network(x_t, time):
        return 0.1 * x_t

    def program(progress=None):
        draw = lambda x: sampling.sample(  # noqa: E731
            KEY, schedule, network, x, sampler, final_step=final_step, progress=progress
        )
        return jax.make_jaxpr(draw)(jnp.zeros((2, 3))).jaxpr

    counts = [(loop.params["length"], len(calls(loop.params["jaxpr"], "network"))) for loop in loops(program())]
    assert [count for count in counts if count[1]] == expected
    # What asks the host has an effect, and progress is the only such thing; GPUs also wait for the host where they branch.
    assert not program().effects and program(progress=print).effects
    assert not [e for e in equations(program()) if "callback" in e.primitive.name or e.primitive.name == "cond"]

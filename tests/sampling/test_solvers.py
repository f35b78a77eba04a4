"""The solvers' orders of convergence, and their behavior as pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, sampling, schedules
from helpers.gaussian_mixtures import FULL, S2, M, gaussian, mixture
from helpers.path_networks import EDM, exact_denoiser, levels, rho_levels
from helpers.samplers import MAKERS, METHODS, NAMED, is_deterministic

KEY = jax.random.key(0)
FULL_ORDER = {"lower_order_final": False}

# name: (sampler, least order measured).
DETERMINISTIC = {
    "dpm_solver_pp 1": (sampling.dpm_solver_pp(1, **FULL_ORDER), 0.9),
    "deis 1": (sampling.deis(1, **FULL_ORDER), 0.9),
    "dpm_solver_pp 2": (sampling.dpm_solver_pp(2, **FULL_ORDER), 1.8),
    "dpm_solver_pp 2, lower final": (sampling.dpm_solver_pp(2), 1.8),
    "dpm_solver_pp 2 singlestep": (sampling.dpm_solver_pp(2, singlestep=True, **FULL_ORDER), 1.8),
    "deis 2": (sampling.deis(2, **FULL_ORDER), 1.8),
    "heun": (sampling.heun(), 1.8),
    "pndm": (sampling.pndm(), 1.8),
    "plms": (sampling.pndm(runge_kutta=False), 1.8),
    "unipc 1": (sampling.unipc(1, **FULL_ORDER), 1.8),
    "dpm_solver_pp 3": (sampling.dpm_solver_pp(3, **FULL_ORDER), 2.5),
    "dpm_solver_pp 3 singlestep": (sampling.dpm_solver_pp(3, singlestep=True, **FULL_ORDER), 2.5),
    "deis 3": (sampling.deis(3, **FULL_ORDER), 2.5),
    "unipc 2": (sampling.unipc(2, **FULL_ORDER), 2.5),
    "unipc 2 bh1": (sampling.unipc(2, variant="bh1", **FULL_ORDER), 2.5),
    "unipc 3": (sampling.unipc(3, **FULL_ORDER), 2.5),
}
DETERMINISTIC |= {
    name: (make(), 0.9) for name, make in NAMED.items() if name not in DETERMINISTIC and is_deterministic(name)
}
MIXTURE = Denoiser(mixture(), clip=False)
TOP, LOW = 800.0, 100.0  # two noise levels; x_0 itself would hide the order


def between(steps):
    """The schedule from TOP to LOW, with steps even in log SNR."""
    ends = np.asarray(FULL.path.log_snr(np.array([LOW, TOP])))
    return schedules.respace(FULL, np.asarray(FULL.path.time_at_log_snr(np.linspace(*ends, steps + 1))))


def walk(sampler, x, steps):
    schedule = between(steps)
    return jax.jit(lambda x: sampling.sample(KEY, schedule, MIXTURE, x, sampler, final_step=False))(x)


POINTS = np.linspace(-1.5, 1.5, 7)[:, None]


@pytest.fixture(scope="module")
def truth_of_the_mixture():
    """The exact map in float64 by 2,400 third-order steps; another method agrees."""
    with jax.enable_x64(True):
        fine = walk(sampling.dpm_solver_pp(3, singlestep=True, **FULL_ORDER), POINTS, 2400)
        other = walk(sampling.deis(3, **FULL_ORDER), POINTS, 2400)
        np.testing.assert_allclose(fine, other, atol=2e-9)
        return np.asarray(fine)


@pytest.mark.thorough
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_orders_of_convergence_on_a_mixture(name, truth_of_the_mixture, x64):
    sampler, least = DETERMINISTIC[name]
    errors = [np.sqrt(np.mean((walk(sampler, POINTS, n) - truth_of_the_mixture) ** 2)) for n in (36, 72)]
    assert errors[0] > 1e-7
    assert np.log2(errors[0] / errors[1]) > least


@pytest.mark.parametrize("sampler", [sampling.unipc(2), sampling.deis(2), sampling.dpm_solver_pp(2)])
def test_gradients_are_finite_from_equal_parts_of_signal_and_noise(sampler):
    """lambda is 0 there, as at the levels before the first step, whose values are unused."""
    schedule = schedules.from_betas([0.2, 0.375])
    assert schedule.alpha_bar[-1] == 0.5
    denoiser = Denoiser(lambda x_t, time: 0.5 * x_t, clip=False)
    slope = jax.grad(lambda x: sampling.sample(KEY, schedule, denoiser, x, sampler).sum())(jnp.ones((1, 1)))
    # Two steps of DDIM: x_0 and eps are 0.5 x at sigma = alpha, and the last step returns x_0.
    (alpha, sigma), first = np.sqrt([0.8, 0.2]), (1 - 0.5 * np.sqrt(0.5)) / np.sqrt(0.5)
    x = alpha * first + sigma * 0.5
    np.testing.assert_allclose(slope, (1 - 0.5 * sigma) / alpha * x, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_every_solver_under_jit_vmap_grad_and_bfloat16(name):
    schedule = schedules.respace(FULL, 6, "log_snr")
    sampler = MAKERS[name]()
    x_T = jax.random.normal(jax.random.key(1), (3, 2))
    traced = []

    def run(key, schedule, x):
        traced.append(name)
        return sampling.sample(key, schedule, MIXTURE, x, sampler)

    compiled = jax.jit(run)
    x_0 = compiled(KEY, schedule, x_T)
    assert x_0.shape == x_T.shape and np.isfinite(x_0).all()
    compiled(jax.random.key(5), schedules.respace(FULL, 6, "karras"), 2 * x_T)
    assert len(traced) == 1  # other arrays, the same program
    stacked = jax.vmap(lambda x: run(KEY, schedule, x[None])[0])(x_T)
    assert stacked.shape == x_T.shape
    if is_deterministic(name):
        np.testing.assert_allclose(stacked, x_0, rtol=2e-4, atol=1e-5)
    x_T = x_T[:1]
    slope = jax.grad(lambda x: run(KEY, schedule, x).sum())(x_T)
    step = 1e-2
    for i in range(2):
        moved = [compiled(KEY, schedule, x_T.at[0, i].add(sign * step)).sum() for sign in (1, -1)]
        np.testing.assert_allclose(slope[0, i], (moved[0] - moved[1]) / (2 * step), rtol=0.05, atol=5e-3)

    def half(x, time):
        return mixture()(x.astype(jnp.bfloat16), time).astype(jnp.bfloat16)

    low = sampling.sample(KEY, schedule, Denoiser(half, clip=False), x_T.astype(jnp.bfloat16), sampler)
    assert low.dtype == jnp.float32 and np.isfinite(low).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_solver_from_pure_noise(name):
    """A schedule whose alpha_bar ends at 0, with a network that predicts v; the samples must have the Gaussian data's
    standard deviation."""
    zero = schedules.from_betas(np.append(FULL.betas[:-1], 1.0))
    schedule = schedules.respace(zero, 100, "trailing")
    assert schedule.zero_terminal_snr
    x_T = jax.random.normal(jax.random.key(1), (20_000, 1))
    sampler, denoiser = MAKERS[name](), Denoiser(gaussian("v", zero), prediction="v", clip=False)
    x_0 = jax.jit(lambda x: sampling.sample(KEY, schedule, denoiser, x, sampler))(x_T)
    assert abs(x_0.mean() - M) < 0.02 and abs(x_0.std() - np.sqrt(S2)) < 0.05


ZERO_TERMINAL = schedules.from_betas(schedules.rescale_zero_terminal_snr(schedules.betas("linear", 1000)))
FLOW = schedules.from_path(schedules.rectified_flow(), np.linspace(1, 1000, 1000))


@pytest.mark.parametrize(
    "full", [FLOW, pytest.param(ZERO_TERMINAL, marks=pytest.mark.thorough)], ids=["flow", "zero terminal"]
)
def test_ten_steps_from_pure_noise(full):
    """Churn adds no noise to pure noise, and UniPC does not correct the step from it, which is infinitely long.

    The deviations of Gaussian samples are as close to Heun's as ten steps allow; they were up to 250 times too large.
    """
    schedule, x_T = schedules.respace(full, 10, "trailing"), jax.random.normal(jax.random.key(1), (20_000, 1))
    denoiser = Denoiser(gaussian("v", full), prediction="v", clip=False)
    published = sampling.heun(churn=40, churn_range=(0.05, 50.0), churn_noise=1.003)

    def draw(sampler):
        return jax.jit(lambda x: sampling.sample(KEY, schedule, denoiser, x, sampler))(x_T)

    plain = draw(sampling.heun())
    assert abs(plain.std() / np.sqrt(S2) - 1) < 0.15
    assert abs(np.log(draw(published).std() / plain.std())) < 0.1
    assert abs(np.log(draw(sampling.unipc(variant="bh1")).std() / plain.std())) < 0.05
    np.testing.assert_allclose(draw(sampling.heun(churn=40, churn_range=(1e3, np.inf))), plain, atol=1e-5)


def round_trip(order, steps):
    schedule, x_0 = schedules.respace(FULL, steps, "log_snr"), np.linspace(-1.1, 1.1, 23)[:, None]
    x_T = sampling.encode(schedule, mixture(), x_0, order=order)
    back = sampling.sample(KEY, schedule, MIXTURE, x_T, (sampling.ddim(), sampling.heun())[order - 1])
    return float(np.sqrt(np.mean((back - x_0) ** 2)))


@pytest.mark.thorough
def test_inversion_reconstructs_and_the_second_order_does_so_better(x64):
    first, second = [round_trip(1, n) for n in (50, 100)], [round_trip(2, n) for n in (50, 100)]
    assert first[0] > 1.7 * first[1] and second[0] > 3 * second[1]
    assert second[0] < 0.3 * first[0] and second[0] < 0.5 * first[1]  # also at the same number of network calls


@pytest.mark.thorough
def test_learned_variances_do_not_change_deterministic_solvers():
    schedule, x_T = schedules.respace(FULL, 5, "log_snr"), jax.random.normal(KEY, (3, 2))

    def doubled(x, time):
        return jnp.concatenate([mixture()(x, time), 7 * jnp.ones_like(x)], axis=-1)

    for name in ("ddim", "dpm_solver_pp", "heun churn"):
        sampler = MAKERS[name]()
        plain = sampling.sample(KEY, schedule, mixture(), x_T, sampler)
        learned = sampling.sample(KEY, schedule, Denoiser(doubled, variance="learned_range"), x_T, sampler)
        np.testing.assert_allclose(learned, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_memory_of_every_solver_is_flat_in_the_number_of_steps():
    def temporary_bytes(make, steps):
        schedule = schedules.respace(FULL, steps)
        run = jax.jit(lambda x: sampling.sample(KEY, schedule, mixture(), x, make()))
        analysis = run.lower(jnp.zeros((512, 512))).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    for name in ("ddim", "heun", "unipc 3", "pndm", "dpm_solver_pp 3 singlestep"):
        assert temporary_bytes(MAKERS[name], 1000) < 1.05 * temporary_bytes(MAKERS[name], 10), name


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

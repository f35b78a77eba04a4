"""Editing with Gaussian data, where the unknown values' conditional distribution has a closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, sampling, schedules
from diffusion_jax.measurements import Measurement
from helpers.gaussian_mixtures import FULL, gaussian

KEY = jax.random.key(0)
S2, RHO = 0.3, 0.8
COVARIANCE = S2 * np.array([[1.0, RHO], [RHO, 1.0]])
pixels = Denoiser(gaussian(mean=0.0, variance=S2), clip=False)  # the exact eps of independent N(0, S2)


def correlated_eps(x, time):
    """The exact eps of N(0, COVARIANCE); x [..., 2]."""
    log_snr = FULL.path.log_snr(time)[0]
    a, s2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    return jnp.sqrt(s2) * x @ jnp.linalg.inv(a * COVARIANCE + s2 * jnp.eye(2))


correlated = Denoiser(correlated_eps, clip=False)
KNOWN, N = 0.7, 20_000
MASK = jnp.array([True, False])


def repainted(resamplings):
    """The unknown number's mean and variance, and the returned known number."""
    schedule = schedules.respace(FULL, 50, "log_snr")
    x_0 = jnp.tile(jnp.array([KNOWN, -9.0]), (N, 1))

    @jax.jit
    def run(x_0):
        sampler = sampling.ddpm("fixed_small")
        return editing.repaint(KEY, schedule, correlated, x_0, MASK, sampler, resamplings=resamplings, jump=5)

    x = np.asarray(run(x_0))
    np.testing.assert_array_equal(x[:, 0], np.float32(KNOWN))
    return x[:, 1].mean(), x[:, 1].var()


@pytest.mark.thorough
def test_repaint_approaches_the_conditional_mean_with_too_small_a_variance():
    mean, variance = RHO * KNOWN, S2 * (1 - RHO**2)
    found = {r: repainted(r) for r in (1, 5, 20)}
    errors = {r: abs(m - mean) for r, (m, _) in found.items()}
    bar = {r: np.sqrt(v / N) for r, (_, v) in found.items()}
    print({r: (float(m), float(v)) for r, (m, v) in found.items()}, "exact", mean, variance)
    assert errors[1] - errors[5] > 4 * (bar[1] + bar[5])
    assert errors[5] - errors[20] > 4 * (bar[5] + bar[20])
    assert found[20][1] < variance  # stated in the docstring


def test_the_steps_of_repaint():
    """Counts steps by the published example's rules: every stretch is repeated as often as requested, and each jump returns
    to the stretch's start."""
    downs, climbs = editing._repaint_steps(12, 3, 4)
    np.testing.assert_array_equal(downs[:4], [11, 10, 9, 8])
    assert {j: int((climbs == j).sum()) for j in set(climbs.tolist()) - {-1}} == {4: 2, 8: 2}
    level = 11
    for t, climb in zip(downs, climbs, strict=True):
        assert t == level
        level = t - 1 if climb < 0 else climb
    assert level == -1
    plain, never = editing._repaint_steps(12, 1, 4)
    np.testing.assert_array_equal(plain, np.arange(11, -1, -1))
    assert (never == -1).all()


@pytest.mark.thorough
def test_replacement_returns_the_known_pixels_with_any_sampler():
    schedule = schedules.respace(FULL, 12, "log_snr")
    x_0 = jnp.tile(jnp.array([KNOWN, 5.0]), (4000, 1))
    x_T = jax.random.normal(KEY, x_0.shape)
    for sampler in (sampling.ddpm(), sampling.dpm_solver_pp(2), sampling.unipc()):
        wrapped = editing.replacement(sampler, x_0, MASK)
        x = jax.jit(lambda x, w=wrapped: sampling.sample(KEY, schedule, correlated, x, w))(x_T)
        np.testing.assert_array_equal(x[:, 0], x_0[:, 0])
        assert 0.1 < x[:, 1].mean() < RHO * KNOWN + 0.1  # drawn toward what is known


def test_compiled_samplers_keep_their_own_known_pixels():
    """A sampler that wraps another one equals only itself, so that `jax.jit` does not use the program of an equal one."""
    schedule, draw = schedules.respace(FULL, 3, "log_snr"), jax.jit(sampling.sample, static_argnames="sampler")
    for known in (0.25, -0.75):
        sampler = editing.replacement(sampling.ddim(), jnp.full((1, 2), known), MASK)
        x = draw(KEY, schedule, correlated, jnp.zeros((1, 2)), sampler=sampler)
        np.testing.assert_array_equal(x[:, 0], known)
    assert sampler == sampler and sampler != editing.replacement(sampling.ddim(), sampler.x_0, MASK)


def test_replacement_of_one_example_with_a_mask_for_each_row():
    schedule, x_0 = schedules.respace(FULL, 5, "log_snr"), jnp.array([[KNOWN, -0.4]])
    mask = jnp.array([[True, False], [False, True], [True, True]])
    sampler = editing.replacement(sampling.ddim(), x_0, mask)
    x = sampling.sample(KEY, schedule, correlated, jax.random.normal(KEY, (3, 2)), sampler)
    known = jnp.broadcast_to(x_0, x.shape)
    np.testing.assert_array_equal(x[mask], known[mask])
    assert (x[~mask] != known[~mask]).all()


def test_sdedit_has_the_mean_and_variance_of_its_closed_form():
    """From x_0 through q(x_t | x_0) and back along DDIM: mean and variance in closed form."""
    n, value = 50_000, 1.2
    x_0 = jnp.full((n, 1), value)
    schedule = schedules.respace(FULL, 200, "log_snr")
    for strength in (0.1, 1.0):
        run = jax.jit(lambda x, s=strength: editing.sdedit(KEY, schedule, pixels, x, sampling.heun(), strength=s))
        x = run(x_0)
        t = round(200 * strength) - 1
        a, v = schedule.alpha_bar[t], schedule.alpha_bar[t] * S2 + 1 - schedule.alpha_bar[t]
        # The flow divides by the growth of the spread; the last step gives E[x_0 | x_1].
        factor = np.sqrt(S2 / v)
        assert abs(x.mean() - factor * np.sqrt(a) * value) < 4 * factor / np.sqrt(n) + 1e-3
        assert abs(x.var() / (factor**2 * (1 - a)) - 1) < 0.05


OPERATORS = {
    "gray": editing.gray(3),
    "average_pool": editing.average_pool(4),
    "masked": editing.masked(jnp.zeros((8, 8, 1), bool).at[2:6].set(True)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_projection_changes_only_the_measured_part(name, x64):
    linear = OPERATORS[name]
    image, other = jax.random.uniform(KEY, (2, 3, 8, 8, 3), minval=-1)
    y = linear.measure(image)
    np.testing.assert_allclose(linear.measure(linear.invert(y)), y, atol=1e-12)  # A A+ = I
    level = FULL.at(jnp.int32(0), other)

    def project(x_0, clip=False):
        known = Denoiser(lambda x_t, time: x_0, prediction="x_0", clip=clip)
        return editing.project(known, Measurement(linear, y))(other, level).x_0

    moved = project(other)
    np.testing.assert_allclose(linear.measure(moved), y, atol=1e-12)
    # Changes are along A+ only: the null space of A is unchanged, and no nearer x_0 fits (A+ is a multiple of the
    # transpose).
    np.testing.assert_allclose(moved - other, linear.invert(linear.measure(moved - other)), atol=1e-12)
    np.testing.assert_allclose(project(moved), moved, atol=1e-12)
    # The clip precedes the projection; otherwise measured values near the ends of the range would be clipped.
    clipped = jnp.clip(3 * other, -1, 1)
    expected = clipped + linear.invert(y - linear.measure(clipped))
    np.testing.assert_allclose(project(3 * other, clip=True), expected, atol=1e-12)


@pytest.mark.parametrize("noise", [0.1, np.array([0.0, 0.1]), lambda u: 0 * u])
def test_projection_is_for_measurements_without_noise(noise):
    network, x = Denoiser(lambda x_t, time: x_t), np.zeros((2, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="project is for y without noise; use posterior.mmps"):
        editing.project(network, Measurement(editing.gray(), x[..., :1], noise))
    with pytest.raises(ValueError, match="needs an operator with a right inverse"):
        editing.project(network, Measurement(lambda x: x, x))


@pytest.mark.parametrize("name", ["gray", pytest.param("average_pool", marks=pytest.mark.thorough)])
def test_restored_images_agree_with_the_measurement(name):
    """Independent Gaussian pixels: the results have the measured means, and the remaining components keep their variance."""
    linear = OPERATORS[name]
    image = np.sqrt(S2) * jax.random.normal(jax.random.key(5), (200, 8, 8, 3))
    y = linear.measure(image)
    schedule = schedules.respace(FULL, 60, "log_snr")
    x_T = jax.random.normal(jax.random.key(1), image.shape)
    restored = editing.project(pixels, Measurement(linear, y))
    for sampler in (sampling.ddpm(), sampling.dpm_solver_pp(), sampling.ddim()):
        x = jax.jit(lambda x, s=sampler: sampling.sample(KEY, schedule, restored, x, s))(x_T)
        np.testing.assert_allclose(linear.measure(x), y, atol=1e-5)
        free = x - linear.invert(linear.measure(x))
        expected = image - linear.invert(linear.measure(image))
        assert abs(free.std() / expected.std() - 1) < 0.15, sampler


def test_slerp():
    x, y = jax.random.normal(KEY, (2, 4, 8, 8, 1))
    slerp = jax.jit(editing.slerp)
    gradient = jax.jit(jax.grad(lambda x, other: slerp(x, other, 0.3).sum()))
    np.testing.assert_allclose(slerp(x, y, 0.0), x, atol=1e-6)
    np.testing.assert_allclose(slerp(x, y, 1.0), y, atol=1e-5)
    u, v = jnp.eye(2)
    middle = slerp(u[None], v[None], 1 / 3)
    np.testing.assert_allclose(middle, [[np.cos(np.pi / 6), np.sin(np.pi / 6)]], atol=1e-6)
    np.testing.assert_allclose(slerp(x, x, 0.3), x, atol=1e-6)
    np.testing.assert_allclose(slerp(x, 0 * x, 0.25), 0.75 * x, atol=1e-6)
    for other in (x, 0 * x, y):
        assert np.isfinite(gradient(x, other)).all()
    length = jnp.linalg.norm(slerp(x, y, 0.5).reshape(4, -1), axis=1)
    assert (abs(length / 8 - 1) < 0.2).all()


def test_interpolation_half_way_up_the_chain():
    """Ho et al.'s interpolation is linear in x_t, so with a linear sampler and the same noise also in x_0."""
    schedule, sampler = schedules.respace(FULL, 50, "log_snr"), sampling.ddim()
    weights, x, y = jnp.linspace(0, 1, 5), jnp.full((3, 1), -0.7), jnp.full((3, 1), 0.9)
    held = editing.interpolate(KEY, schedule, pixels, x, y, weights, sampler, t=25)
    np.testing.assert_allclose(held, held[0] + weights[:, None, None] * (held[-1] - held[0]), atol=1e-5)
    assert np.std(held[0]) > 0.01
    many = jnp.full((N, 1), 0.2)
    ends = editing.interpolate(KEY, schedule, pixels, many, many, [0.0, 1.0], sampler, t=25)
    assert abs(np.corrcoef(ends[0, :, 0], ends[1, :, 0])[0, 1]) < 4 / np.sqrt(N)  # each end has its own noise


def test_known_pixels_are_drawn_one_step_earlier():
    """Known pixels follow q(x_{t-1} | x_0) at every t and equal x_0 at 0; unknown pixels do not change."""
    schedule = schedules.respace(FULL, 10)
    x_0, x_prev = jnp.tile(jnp.array([KNOWN, 5.0]), (N, 1)), jnp.tile(jnp.array([9.0, -3.0]), (N, 1))
    for t in (9, 4, 1, 0):
        x = editing._replace_known(KEY, schedule.transition(jnp.int32(t), x_prev), x_prev, x_0, MASK)
        np.testing.assert_array_equal(x[:, 1], -3.0)
        a = schedule.alpha_bar[t - 1] if t else 1.0
        assert abs(x[:, 0].mean() - np.sqrt(a) * KNOWN) < 4 * np.sqrt((1 - a) / N) + 1e-6
        assert abs(x[:, 0].var() - (1 - a)) < 4 * (1 - a) * np.sqrt(2 / N) + 1e-9


class constant_state(sampling.ddim):
    """DDIM with a state that no step changes, in a new tuple."""

    def init_state(self, schedule, x_T, num_steps):
        return (jnp.float32(1.0),)

    def step(self, key, denoiser, x_t, transition, state):
        return super().step(key, denoiser, x_t, transition, ())._replace(state=(state[0],))


def test_repaint_of_one_resampling_is_replacement():
    """Without known pixels, and with a deterministic sampler, RePaint equals the sampler; known pixels are returned without
    noise."""
    schedule, x_0 = schedules.respace(FULL, 6, "trailing"), jnp.array([[KNOWN, -9.0], [0.2, 1.0]])
    sampler = constant_state()
    run = jax.jit(lambda mask: editing.repaint(KEY, schedule, correlated, x_0, mask, sampler, resamplings=1))
    x_T = jax.random.normal(jax.random.split(KEY)[0], x_0.shape)
    expected = sampling.sample(KEY, schedule, correlated, x_T, sampler)
    np.testing.assert_allclose(run(jnp.array([False, False])), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run(jnp.array([True, False]))[:, 0], x_0[:, 0])


@pytest.mark.parametrize(("prediction", "start"), [("v", 60), ("x_0", None)])
def test_interpolation_encodes_with_any_prediction_up_to_the_start(prediction, start, x64):
    """For Gaussian data with an exact network, the ends are recovered for any prediction and any start."""
    schedule, sampler = schedules.respace(FULL, 200, "log_snr"), sampling.heun()
    x, y = np.array([[-0.7], [0.2]]), np.array([[0.9], [-0.4]])
    denoiser = Denoiser(gaussian(prediction), prediction=prediction, clip=False)
    interpolate = partial(editing.interpolate, KEY, schedule, denoiser, order=2, start=start)
    between = jax.jit(lambda x, y: interpolate(x, y, [0.0, 0.4, 1.0], sampler))(x, y)
    np.testing.assert_allclose(between, [x, 0.6 * x + 0.4 * y, y], atol=2e-3)  # in one dimension the path is a line


@pytest.mark.parametrize("resamplings", [2, 5])
def test_repaint_without_known_pixels_returns_the_prior(resamplings):
    """Data N(10, 1) with the exact network, for which ancestral steps are exact for any number of steps.

    With x_t ~ N(sqrt(alpha_bar) 10, 1) the mean of q(x_{t-1} | x_t) is exact and its variance is beta; the last step returns
    E[x_0 | x_1], whose variance is alpha_bar at index 0.
    """
    schedule, mask = schedules.respace(FULL, 12, "trailing"), jnp.array([False, False])
    denoiser = Denoiser(gaussian(mean=10.0, variance=1.0), clip=False)
    options = {"resamplings": resamplings, "jump": 3}
    run = jax.jit(lambda x: editing.repaint(KEY, schedule, denoiser, x, mask, **options))
    x = np.asarray(run(jnp.full((N, 2), 100.0)), np.float64)
    # With x_T ~ N(0, 1) instead of N(sqrt(alpha_bar_T) 10, 1), a share alpha_bar_T of the difference remains.
    expected, variance = 10.0 * (1 - FULL.alpha_bar[-1]), schedule.alpha_bar[0]
    assert (abs(x.mean(axis=0) - expected) < 4 * np.sqrt(variance / N)).all()
    assert (abs(x.var(axis=0) - variance) < 4 * variance * np.sqrt(2 / N)).all()
    assert abs(np.corrcoef(x.T)[0, 1]) < 4 / np.sqrt(N)

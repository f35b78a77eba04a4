"""Posterior samplers against exact Gaussian posteriors, in float64 NumPy."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, covariances, posterior, sampling, schedules
from diffusion_jax.measurements import LinearOperator, Measurement, masked, mix_channels

PATH = schedules.edm(0.002, 80.0)
X = np.zeros((2, 8), np.float32)

NUM_MEASURED = {2: 1, 8: 5, 64: 30}


class Problem:
    """A prior N(0, C) with random axes, y = A x_0 + N(0, diag(noise^2)) of one x_0, and the exact posterior."""

    def __init__(self, d, noise=None, eigenvalues=None):
        rng, m = np.random.default_rng(d), NUM_MEASURED[d]
        axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
        self.eigenvalues = np.geomspace(2, 0.05, d) if eigenvalues is None else eigenvalues
        self.axes, self.covariance = axes, axes * self.eigenvalues @ axes.T
        self.a, self.noise = (
            rng.normal(size=(m, d)) / np.sqrt(d),
            np.geomspace(0.02, 0.5, m) if noise is None else noise,
        )
        x_0 = axes @ (np.sqrt(self.eigenvalues) * rng.normal(size=d))
        self.y = self.a @ x_0 + self.noise * rng.normal(size=m)

    def given(self, x_t=0.0, alpha=0.0, sigma=1.0):
        """Mean and covariance of x_0 given y and x_t = alpha x_0 + sigma eps."""
        weighted = self.a.T / self.noise**2
        precision = np.linalg.inv(self.covariance) + alpha**2 / sigma**2 * np.eye(len(self.a.T)) + weighted @ self.a
        covariance = np.linalg.inv(precision)
        return covariance @ (alpha / sigma**2 * x_t + weighted @ self.y), covariance

    def denoiser(self):
        """The exact denoiser of the prior."""
        axes, eigenvalues = jnp.asarray(self.axes), jnp.asarray(self.eigenvalues)

        def network(x_t, time):
            level = PATH.at(time, x_t)
            gain = level.alpha * eigenvalues / (level.alpha**2 * eigenvalues + level.sigma**2)
            return x_t @ axes * gain @ axes.T

        return Denoiser(network, prediction="x_0", clip=False)

    def measurement(self, rows):
        return Measurement(mix_channels(self.a), np.tile(self.y, (rows, 1)), np.broadcast_to(self.noise, self.y.shape))


def level_at(s, rows, d):
    return PATH.at_log_snr(jnp.full(rows, -2 * np.log(s)), jnp.zeros((rows, d)))


@pytest.mark.parametrize("s", [80.0, 1.0, 0.05])
@pytest.mark.parametrize("d", [2, 8, 64])
def test_mmps_is_the_exact_conditional_mean_of_gaussian_data(d, s, x64):
    problem, x_t = Problem(d), np.random.default_rng(1).normal(size=(3, d))
    level = level_at(s, 3, d)
    alpha, sigma = float(level.alpha[0, 0]), float(level.sigma[0, 0])
    found = posterior.mmps(problem.denoiser(), problem.measurement(3), iterations=50, tolerance=1e-12)(x_t, level)
    expected = np.stack([problem.given(row, alpha, sigma)[0] for row in x_t])
    np.testing.assert_allclose(found.x_0, expected, atol=1e-9)
    np.testing.assert_allclose(alpha * found.x_0 + sigma * found.eps, x_t, atol=1e-9)


def affine_map(draw, d):
    """(mean, covariance) of draw(N(0, I)), for an affine draw of rows [d + 1, d]."""
    found = np.asarray(draw(jnp.concatenate([jnp.zeros((1, d)), jnp.eye(d)])))
    jacobian = (found[1:] - found[0]).T
    return found[0], jacobian @ jacobian.T


def in_deviations(mean, covariance, problem):
    """The root mean square error of the mean in posterior deviations, and the extremes of the variances' ratios."""
    exact_mean, exact = problem.given()
    root = np.linalg.cholesky(exact)
    whitened = np.linalg.solve(root, np.linalg.solve(root, covariance).T)
    ratios = np.linalg.eigvalsh(whitened)
    return np.sqrt(np.mean(np.linalg.solve(root, mean - exact_mean) ** 2)), ratios[0], ratios[-1]


@pytest.mark.parametrize("sampler", [sampling.dpm_solver_pp(2), sampling.heun()], ids=["2m", "heun"])
@pytest.mark.parametrize("d", [2, 8, 64])
def test_samplers_with_mmps_draw_from_the_exact_posterior(d, sampler, x64):
    """Mean within 0.02 deviations (the start from the prior at s = 80 leaves about 1 / 80), variances within 2%."""
    problem = Problem(d)
    denoiser = posterior.mmps(problem.denoiser(), problem.measurement(d + 1), iterations=40, tolerance=1e-9)
    draw = lambda x_T: sampling.sample(jax.random.key(0), schedules.edm_steps(100), denoiser, x_T, sampler)  # noqa: E731
    error, low, high = in_deviations(*affine_map(draw, d), problem)
    assert error < 0.02 and 0.98 < low <= high < 1.02


@pytest.mark.parametrize("covariance", [None, covariances.white()])
def test_an_example_is_the_same_to_the_bit_whatever_stands_beside_it(covariance):
    problem, rng = Problem(8), np.random.default_rng(3)
    x_t, y = rng.normal(size=(2, 4, 8)).astype(np.float32), rng.normal(size=(2, 4, 5)).astype(np.float32)
    x_t[1, 2], y[1, 2] = x_t[0, 2], y[0, 2]
    operator = mix_channels(problem.a)
    level = level_at(0.7, 4, 8)

    def given(y):
        return posterior.mmps(problem.denoiser(), Measurement(operator, y, 0.1), covariance)

    call = jax.jit(lambda y, x_t: given(y)(x_t, level).x_0)
    first, second = (np.asarray(call(y[i], x_t[i])) for i in range(2))
    np.testing.assert_array_equal(first[2], second[2])
    assert (first[0] != second[0]).any()


def test_rows_at_different_levels_are_single_rows(x64):
    problem = Problem(8)
    denoiser, x_t = problem.denoiser(), np.random.default_rng(4).normal(size=(3, 8))
    levels = [level_at(s, 1, 8) for s in (0.1, 1.0, 20.0)]
    together = type(levels[0])(*map(jnp.concatenate, zip(*levels, strict=True)))
    found = posterior.mmps(denoiser, problem.measurement(3), iterations=5)(x_t, together).x_0
    for i, level in enumerate(levels):
        single = posterior.mmps(denoiser, problem.measurement(1), iterations=5)(x_t[i : i + 1], level).x_0
        np.testing.assert_allclose(found[i], single[0], atol=1e-9)


def test_rows_with_conditions_of_their_own(x64):
    """The condition is the mean of x_0, given as an array beside x_t, as a conditional model gets it."""
    problem, rng = Problem(8), np.random.default_rng(7)
    means, x_t, level = rng.normal(size=(3, 8)), rng.normal(size=(3, 8)), level_at(1.0, 3, 8)
    network = problem.denoiser().network

    def conditional(x_t, time, *, condition):
        alpha = PATH.at(time, x_t).alpha
        return condition + network(x_t - alpha * condition, time)

    denoiser = Denoiser(conditional, inputs={"condition": means}, prediction="x_0", clip=False)
    found = posterior.mmps(denoiser, problem.measurement(3), iterations=10)(x_t, level).x_0
    alpha, sigma = (float(np.asarray(each).ravel()[0]) for each in (level.alpha, level.sigma))
    for i, mean in enumerate(means):
        centered = copy.copy(problem)
        centered.y = problem.y - problem.a @ mean
        expected = mean + centered.given(x_t[i] - alpha * mean, alpha, sigma)[0]
        np.testing.assert_allclose(found[i], expected, atol=1e-7)


def test_pure_noise_is_not_corrected():
    schedule = schedules.from_path(schedules.rectified_flow(), np.array([300.0, 1000.0]))
    x_t = jnp.ones((2, 3))
    denoiser = Denoiser(lambda x_t, time: 0.5 * x_t, prediction="flow", clip=False)
    conditional = posterior.mmps(denoiser, Measurement(lambda x: x, np.ones((2, 3)), 0.1))
    level = schedule.at(jnp.array([1, 0]), x_t)
    found, prior = conditional(x_t, level), denoiser(x_t, level)
    np.testing.assert_allclose(found.x_0[0], prior.x_0[0], rtol=1e-6)
    assert (found.x_0[1] != prior.x_0[1]).all() and np.isfinite(found.x_0).all()


@pytest.mark.parametrize("jacobian", [[[-3.0, 5.0], [-5.0, -3.0]], [[-0.0099, 0.0], [0.0, -0.0099]]])
def test_a_jacobian_that_is_no_covariance_gives_small_corrections(jacobian):
    """A network whose Jacobian turns and has negative values, as a trained network's may; the second leaves M = 0.3 R."""
    turn = np.array(jacobian, np.float32)
    denoiser = Denoiser(lambda x_t, time: x_t @ turn, prediction="x_0", clip=False)
    operator = LinearOperator(lambda x: x, diagonal=1.0)
    measurement, level = Measurement(operator, np.ones((1, 2)), 0.1), level_at(1.0, 1, 2)
    x_t = jnp.array([[0.3, -0.2]])
    prior, found = denoiser(x_t, level), posterior.mmps(denoiser, measurement)(x_t, level)
    # The first iteration stops with b / (R + sigma^2 diag(A A^T)) = (y - D) / (0.01 + 0.5).
    u = (1 - prior.x_0) / 0.51
    expected = prior.x_0 + level.sigma**2 / level.alpha * (u @ turn.T)
    np.testing.assert_allclose(found.x_0, expected, rtol=1e-5)


def test_a_later_curvature_below_0_keeps_the_solution_so_far():
    """M = diag(2.01, -0.5): the first step is convex, and the second is not."""
    jacobian = np.diag([2.0, -0.51]).astype(np.float32)
    denoiser = Denoiser(lambda x_t, time: x_t @ jacobian, prediction="x_0", clip=False)
    measurement, level = (
        Measurement(LinearOperator(lambda x: x, diagonal=1.0), np.ones((1, 2)), 0.1),
        level_at(1.0, 1, 2),
    )
    x_t, scale = jnp.zeros((1, 2)), float(level.sigma[0, 0] ** 2 / level.alpha[0, 0])
    found = posterior.mmps(denoiser, measurement)(x_t, level).x_0
    length = 2 / (0.02 + scale * np.trace(jacobian))  # b^T b / (b^T M b) for b = (1, 1)
    np.testing.assert_allclose(found, [scale * length * np.diag(jacobian)], rtol=1e-5)


def test_more_iterations_leave_a_smaller_residual(x64):
    problem, x_t = Problem(64), np.random.default_rng(5).normal(size=(3, 64))
    arguments = problem.denoiser(), problem.measurement(3), x_t, level_at(1.0, 3, 64)
    left = [posterior.relative_residual(*arguments, tolerance=1e-9, iterations=count) for count in (1, 10, 60)]
    assert (left[0] > 0.3).all() and (left[1] < left[0]).all() and (left[2] < 1e-6).all()


def test_the_preconditioner_is_of_the_operator_and_the_noise():
    """For a mask and white data it is the inverse of the matrix, so that one iteration is exact, whatever the noise."""
    mask = np.array([1, 1, 0, 1], bool)
    noise = np.array([0.02, 0.1, 0.3, 0.5], np.float32)
    denoiser = Denoiser(lambda x_t, time: PATH.at(time, x_t).alpha * x_t, prediction="x_0", clip=False)
    measurement = Measurement(masked(mask), np.where(mask, 2.0, 0.0)[None].astype(np.float32), noise)
    x_t, level = jnp.full((1, 4), 0.3), level_at(1.0, 1, 4)
    found = posterior.mmps(denoiser, measurement, iterations=1)(x_t, level).x_0[0]
    prior = 0.3 * np.sqrt(0.5)
    expected = prior + np.where(mask, 0.5 / (0.5 + noise**2) * (2.0 - prior), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_noise_of_known_entries_correlates_with_known_entries_alone(x64):
    """White data, a mask and correlated noise: the mean given the known entries of y alone."""
    mask, y, x_t = np.arange(6) % 2 == 0, np.linspace(-1, 2, 6), np.random.default_rng(3).normal(size=(1, 6))
    noise = 0.25 * 0.9 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    denoiser = Denoiser(lambda x_t, time: PATH.at(time, x_t).alpha * x_t, prediction="x_0", clip=False)
    measurement = Measurement(masked(mask), np.where(mask, y, np.nan)[None], lambda u: u @ jnp.asarray(noise))
    found = posterior.mmps(denoiser, measurement, iterations=10)(x_t, level_at(1.0, 1, 6)).x_0[0]
    prior = np.sqrt(0.5) * x_t[0]  # the variance given x_t is 0.5
    gain = 0.5 * np.linalg.inv(0.5 * np.eye(3) + noise[np.ix_(mask, mask)])
    np.testing.assert_allclose(found[mask], prior[mask] + gain @ (y - prior)[mask], rtol=1e-8)
    np.testing.assert_allclose(found[~mask], prior[~mask], rtol=1e-8)


@pytest.mark.parametrize("form", ["noise as a function", "operator without a diagonal"])
def test_another_form_of_a_measurement_has_the_same_solution(form, x64):
    problem, x_t = Problem(8), np.random.default_rng(6).normal(size=(2, 8))
    given, variances = problem.measurement(2), jnp.asarray(problem.noise**2)
    other = dataclasses.replace(given, operator=LinearOperator(given.operator.measure))
    if form == "noise as a function":
        other = dataclasses.replace(given, noise=lambda u: variances * u)
    found = (
        posterior.mmps(problem.denoiser(), measurement, iterations=30)(x_t, level_at(0.5, 2, 8)).x_0
        for measurement in (given, other)
    )
    np.testing.assert_allclose(*found, atol=1e-8)


def test_new_measurements_and_inputs_do_not_compile_again():
    schedule = schedules.edm_steps(4)
    draw = jax.jit(lambda key, denoiser, x_T: sampling.sample(key, schedule, denoiser, x_T, sampling.ddim()))
    base = Problem(8).denoiser()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        measurement = Measurement(
            mix_channels(rng.normal(size=(5, 8)).astype(np.float32)),
            rng.normal(size=(2, 5)).astype(np.float32),
            0.1 + seed,
        )
        draw(jax.random.key(seed), posterior.mmps(base, measurement), jnp.ones((2, 8)))
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d, m: posterior.mmps(d, m, iterations=0), "iterations must be a whole number of at least 1, got 0"),
        (lambda d, m: posterior.relative_residual(d, m, X, level_at(1.0, 2, 8), iterations=0), "iterations must be"),
        (lambda d, m: posterior.mmps(d, dataclasses.replace(m, noise=-1.0)), "noise is a standard deviation above 0"),
        (lambda d, m: posterior.mmps(d, m)(jnp.zeros((3, 8)), level_at(1.0, 3, 8)), "its own row of y"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make, words):
    problem = Problem(8)
    with pytest.raises(ValueError, match=words) as caught:
        make(problem.denoiser(), problem.measurement(2))
    assert "\n" not in str(caught.value)

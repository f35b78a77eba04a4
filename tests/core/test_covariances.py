"""Covariances of x_0 given x_t, against dense float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, covariances, posterior, sampling, schedules
from diffusion_jax.measurements import LinearOperator, Measurement, average_pool, blur

PATH = schedules.edm(0.002, 80.0)
RNG = np.random.default_rng(0)


def dense(covariance, shape, level=None):
    """The matrix that `times` multiplies by."""
    size = int(np.prod(shape))
    return np.asarray(covariance.times(jnp.eye(size).reshape(size, *shape), level)).reshape(size, size)


def given_x_t(c, s):
    """(C^-1 + I / s^2)^-1, also for a singular C."""
    return c @ np.linalg.inv(c + s**2 * np.eye(len(c))) * s**2


def correlated(count, shape):
    size = int(np.prod(shape))
    return (RNG.normal(size=(count, size)) @ RNG.normal(size=(size, size)) / np.sqrt(size)).reshape(count, *shape)


def shrunk(s, degrees):
    """Chen et al. 2010, eq. 23."""
    d, total, squares = len(s), np.trace(s), np.sum(s**2)
    share = ((1 - 2 / d) * squares + total**2) / ((degrees + 1 - 2 / d) * (squares - total**2 / d))
    return (1 - min(share, 1)) * s + min(share, 1) * total / d * np.eye(d)


@pytest.mark.parametrize("s", [20.0, 0.5, 0.01])
def test_the_covariance_given_x_t_is_that_of_gaussian_data(s, x64):
    shape, x = (3, 2), correlated(400, (3, 2))
    level = PATH.at_log_snr(jnp.full(6, -2 * np.log(s)), jnp.zeros((6, *shape)))
    ratio = float(level.sigma[0, 0, 0] / level.alpha[0, 0, 0])
    for found in (covariances.principal(x), covariances.fourier(x), covariances.white(0.7)):
        c = dense(found, shape)
        np.testing.assert_allclose(dense(found, shape, level), given_x_t(c, ratio), rtol=1e-6, atol=1e-9)
        one = jax.tree.map(lambda each: each[0], level)._replace(time=level.time[0])
        one = one._replace(**{name: getattr(one, name).reshape(()) for name in ("alpha", "sigma", "log_snr")})
        np.testing.assert_allclose(dense(found, shape, one), given_x_t(c, ratio), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [12, 300])
def test_principal_components_have_the_shrunk_covariance(count, x64):
    """With fewer examples than numbers, too; and of what a linear regression on the inputs leaves."""
    shape, inputs = (4, 5), RNG.normal(size=(count, 2))
    x = correlated(count, shape) + np.tensordot(inputs, RNG.normal(size=(2, *shape)), 1) + 3
    flat, known = x.reshape(count, -1), np.concatenate([np.ones((count, 1)), inputs], axis=1)
    for given, used in ((None, known[:, :1]), (inputs, known)):
        left = flat - used @ np.linalg.lstsq(used, flat, rcond=None)[0]
        degrees = count - used.shape[1]
        expected = shrunk(left.T @ left / degrees, degrees)
        np.testing.assert_allclose(dense(covariances.principal(x, given), shape), expected, atol=1e-9)
    two = dense(covariances.principal(x, inputs, components=2), shape)
    values = np.linalg.eigvalsh(expected)
    np.testing.assert_allclose(np.linalg.eigvalsh(two), [values[:-2].mean()] * 18 + values[-2:].tolist(), rtol=1e-9)


def test_few_examples_are_a_warning():
    with pytest.warns(UserWarning, match="of 300 numbers from 10 examples is uncertain"):
        covariances.principal(RNG.normal(size=(10, 300)))


@pytest.mark.parametrize(("shape", "axes"), [((6, 1), None), ((4, 6, 1), (0, 1)), ((5, 4, 1), (1,)), ((5, 4, 1), (0,))])
def test_the_fourier_basis_averages_the_covariance_over_shifts(shape, axes, x64):
    """Without shrinkage where one number is left for each frequency; with it, the trace is kept."""
    x = correlated(50, shape)
    found = dense(covariances.fourier(x, axes=axes), shape)
    periodic = tuple(range(len(shape) - 1)) if axes is None else axes
    shifts = [[*np.ndindex(*(shape[axis] for axis in periodic))]][0]
    x = x - x.mean(axis=0)
    rolled = [np.roll(x, shift, [1 + axis for axis in periodic]).reshape(50, -1) for shift in shifts]
    expected = np.mean([each.T @ each / 49 for each in rolled], axis=0)
    if len(periodic) == len(shape) - 1:
        np.testing.assert_allclose(found, expected, atol=1e-10)
    np.testing.assert_allclose(np.trace(found), np.trace(expected), rtol=1e-10)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


SIDE = 8
GRID = np.minimum(np.arange(SIDE), SIDE - np.arange(SIDE))
SPECTRUM = (1 + np.hypot(*np.meshgrid(GRID, GRID))) ** -3.0
SPECTRUM *= SIDE**2 / SPECTRUM.sum()
TRANSFORM = np.fft.fft2(np.eye(SIDE**2).reshape(-1, SIDE, SIDE), norm="ortho").reshape(SIDE**2, -1)
FIELD = (TRANSFORM.conj().T * SPECTRUM.ravel() @ TRANSFORM).real  # covariance of a periodic field
SHAPE = (SIDE, SIDE, 1)
KERNEL = np.exp(-0.5 * (np.arange(-2, 3)[:, None] ** 2 + np.arange(-2, 3) ** 2) / 1.5**2)


def running_sums(x):
    return jnp.cumsum(x.reshape(len(x), -1), axis=1) / 4


OPERATORS = {
    "blur": lambda: blur((KERNEL / KERNEL.sum()).astype(np.float32), "wrap"),
    "sums": lambda: LinearOperator(running_sums),
    "means": lambda: average_pool(4),
}


def exact(operator, noise, y, x_t, s):
    """The mean and the deviations of x_0 given y and x_0 + s eps = x_t / alpha, in float64."""
    size = SIDE**2
    a = np.asarray(operator.measure(jnp.eye(size).reshape(size, *SHAPE)), np.float64).reshape(size, -1).T
    precision = np.linalg.inv(FIELD) + np.eye(size) / s**2 + a.T @ a / noise**2
    covariance = np.linalg.inv(precision)
    return covariance @ (x_t.ravel() / s**2 + a.T @ y.ravel() / noise**2), np.sqrt(np.diag(covariance))


EIGENVALUES, VECTORS = np.linalg.eigh(FIELD)


def network(x_t, time):
    """The exact prediction of x_0."""
    level, vectors = PATH.at(time, x_t.reshape(len(x_t), -1)), jnp.asarray(VECTORS, x_t.dtype)
    gain = level.alpha * EIGENVALUES / (level.alpha**2 * EIGENVALUES + level.sigma**2)
    with jax.default_matmul_precision("highest"):
        return (x_t.reshape(len(x_t), -1) @ vectors * gain.astype(x_t.dtype) @ vectors.T).reshape(x_t.shape)


DENOISER = Denoiser(network, prediction="x_0", clip=False)
KNOWN = covariances.from_eigenvectors(EIGENVALUES, VECTORS.T.reshape(-1, *SHAPE))


def measured(name, noise, rows=1):
    """A measurement of a field in the prior."""
    operator = OPERATORS[name]()
    x_0 = (np.sqrt(np.maximum(EIGENVALUES, 0)) * np.random.default_rng(1).normal(size=SIDE**2)) @ VECTORS.T
    y = np.asarray(operator.measure(jnp.asarray(x_0.reshape(1, *SHAPE), jnp.float32)))
    y = y + noise * np.random.default_rng(2).normal(size=y.shape)
    return x_0.reshape(SHAPE), Measurement(operator, np.repeat(y.astype(np.float32), rows, axis=0), noise)


@pytest.mark.parametrize("s", [10.0, 1.0, 0.05])
@pytest.mark.parametrize("noise", [0.1, 0.01])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_product_in_float32_is_the_exact_conditional_mean(name, noise, s):
    """Within 0.01 posterior deviations: rounding of values of the size of y, relative to the noise, is 1e-4 at most."""
    x_0, measurement = measured(name, noise)
    level = PATH.at_log_snr(jnp.full(1, -2 * np.log(s)), jnp.zeros((1, *SHAPE)))
    alpha, sigma = float(level.alpha.ravel()[0]), float(level.sigma.ravel()[0])
    x_t = alpha * x_0 + sigma * np.random.default_rng(3).normal(size=SHAPE)
    given_y = KNOWN.given(measurement, SHAPE)
    denoiser = posterior.mmps(DENOISER, measurement, KNOWN, given_y=given_y)
    found = np.asarray(denoiser(jnp.asarray(x_t[None], jnp.float32), level).x_0)[0].ravel()
    mean, deviations = exact(measurement.operator, noise, np.asarray(measurement.y), x_t / alpha, sigma / alpha)
    assert np.sqrt(np.mean(((found - mean) / deviations) ** 2)) < 0.01


def test_without_the_factorization_the_solver_ends_at_its_tolerance(x64):
    _, measurement = measured("blur", 0.1)
    level, x_t = PATH.at_log_snr(jnp.zeros(1), jnp.zeros((1, *SHAPE))), jnp.asarray(RNG.normal(size=(1, *SHAPE)))
    given = posterior.mmps(DENOISER, measurement, KNOWN, given_y=KNOWN.given(measurement, SHAPE))(x_t, level).x_0
    errors = []
    for tolerance in (1e-1, 1e-3, 1e-9):
        left = posterior.relative_residual(DENOISER, measurement, x_t, level, KNOWN, tolerance=tolerance)
        found = posterior.mmps(DENOISER, measurement, KNOWN, tolerance=tolerance)(x_t, level).x_0
        errors.append(float(jnp.abs(found - given).max()))
        assert tolerance * 1e-4 < float(left[0]) < tolerance
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-7


def affine_map(measurement, covariance, given_y, steps):
    """The mean and the covariance of samples, exactly: sampling is affine in x_T."""
    size = SIDE**2
    denoiser = posterior.mmps(DENOISER, measurement, covariance, given_y=given_y)
    x_T = jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)]).reshape(-1, *SHAPE)
    found = sampling.sample(jax.random.key(0), schedules.edm_steps(steps), denoiser, x_T, sampling.dpm_solver_pp())
    found = np.asarray(found).reshape(size + 1, size)
    jacobian = found[1:] - found[0]
    return found[0], jacobian.T @ jacobian


@pytest.mark.parametrize("source", ["known", "3,000 examples"])
@pytest.mark.parametrize("name", OPERATORS)
def test_samples_follow_the_exact_posterior(name, source, x64):
    """Deviations within 4%, means within 0.15 deviations; 50 steps alone make deviations 0.6% larger."""
    _, measurement = measured(name, 0.1, rows=SIDE**2 + 1)
    examples = (np.random.default_rng(4).normal(size=(3000, SIDE**2)) * np.sqrt(EIGENVALUES)) @ VECTORS.T
    covariance = KNOWN if source == "known" else covariances.fourier(examples.reshape(-1, *SHAPE))
    mean, covariance = affine_map(measurement, covariance, covariance.given(measurement, SHAPE), 50)
    expected, deviations = exact(measurement.operator, 0.1, np.asarray(measurement.y[0]), np.zeros(SHAPE), 1e6)
    assert abs(np.sqrt(np.mean(np.diag(covariance) / deviations**2)) - 1) < 0.04
    assert np.sqrt(np.mean(((mean - expected) / deviations) ** 2)) < 0.15


def test_what_cannot_be_factorized_is_none():
    _, measurement = measured("means", 0.1)
    for other in (0.1 * np.ones((2, 2, 2, 1), np.float32), lambda u: 0.01 * u):
        rows = np.repeat(measurement.y, 2, axis=0)
        assert KNOWN.given(Measurement(measurement.operator, rows, other), SHAPE) is None
    assert jax.jit(lambda m: KNOWN.given(m, SHAPE) is None)(measurement)
    wide = Measurement(lambda x: x, np.zeros((1, 70, 70, 1), np.float32), 0.1)
    assert covariances.white().given(wide, (70, 70, 1)) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: covariances.white(0.0), "std must be a number above 0"),
        (lambda: covariances.principal(np.full((9, 2), np.nan)), "finite"),
        (lambda: covariances.principal(np.zeros((2, 3))), "give more examples"),
        (lambda: covariances.principal(np.zeros((9, 3)), np.zeros((8, 1))), "inputs must be finite and [9, K]"),
        (
            lambda: covariances.principal(np.zeros((9, 3)), components=4),
            "components must be a whole number in [1, 3]",
        ),
        (lambda: covariances.fourier(np.zeros((9, 3))), "axes must be different spatial axes"),
        (lambda: covariances.fourier(np.zeros((9, 3, 1)), axes=(1,)), "axes must be different spatial axes"),
        (lambda: posterior.mmps(DENOISER, measured("means", 0.1)[1], given_y=KNOWN), "given_y needs"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)

"""Ready-made operators against NumPy and SciPy, and what a measurement computes, against dense matrices."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from diffusion_jax import measurements
from diffusion_jax.measurements import LinearOperator, Measurement
from helpers.jaxprs import equations

RNG = np.random.default_rng(0)
SHAPES = {1: (8, 2), 2: (8, 6, 2), 3: (4, 6, 4, 2)}


def x_of(axes, rows=2):
    return RNG.normal(size=(rows, *SHAPES[axes])).astype(np.float32)


def dense(operator, shape):
    """The matrix of an operator, by its columns."""
    size = int(np.prod(shape))
    return np.asarray(operator.measure(jnp.eye(size).reshape(size, *shape))).reshape(size, -1).T


OPERATORS = {
    "masked": lambda axes: measurements.masked(RNG.random(SHAPES[axes]) < 0.5),
    "gray": lambda axes: measurements.gray(2),
    "mix_channels": lambda axes: measurements.mix_channels(np.array([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]])),
    "average_pool": lambda axes: measurements.average_pool(2, axes),
    "decimate": lambda axes: measurements.decimate(2, axes),
    "blur": lambda axes: measurements.blur(RNG.random((3,) * axes), "wrap"),
    "at_points": lambda axes: measurements.at_points(RNG.random((5, axes)) * (np.array(SHAPES[axes][:-1]) - 1)),
    "fourier": lambda axes: measurements.fourier(RNG.random(SHAPES[axes][:-1]) < 0.5),
}


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_the_diagonal_and_the_inverse_are_of_the_matrix(name, axes):
    operator, x = OPERATORS[name](axes), x_of(axes)
    matrix = dense(operator, SHAPES[axes])
    y = np.asarray(operator.measure(x))
    np.testing.assert_allclose(y.reshape(2, -1), x.reshape(2, -1) @ matrix.T, rtol=1e-4, atol=1e-5)
    u = RNG.normal(size=y.shape).astype(np.float32)
    np.testing.assert_allclose(
        np.asarray(operator.adjoint(x)(u)).reshape(2, -1), u.reshape(2, -1) @ matrix, rtol=1e-4, atol=1e-5
    )
    diagonal = np.broadcast_to(operator.squared_norms(x), y.shape)[0].ravel()
    np.testing.assert_allclose(diagonal, np.sum(matrix**2, axis=1), rtol=1e-5, atol=1e-6)
    if operator.invert is not None and name != "mix_channels":
        np.testing.assert_allclose(operator.measure(operator.invert(y)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*OPERATORS, "radon"])
def test_products_and_convolutions_have_full_precision(name):
    """By default, accelerators round the inputs of products to bfloat16 or TF32."""
    make = OPERATORS.get(name, lambda axes: measurements.radon(np.zeros(2)))
    operator, x = make(2), jnp.ones((1, 6, 6, 2) if name == "radon" else (1, *SHAPES[2]))
    y = operator.measure(x)
    for function, argument in ((operator.measure, x), (operator.adjoint(x), y), (operator.invert, y)):
        program = jax.make_jaxpr(function or (lambda y: y))(argument).jaxpr
        found = [e for e in equations(program) if e.primitive.name in ("dot_general", "conv_general_dilated")]
        assert {precision for e in found for precision in e.params["precision"] or (None,)} <= {
            jax.lax.Precision.HIGHEST
        }
        assert found or name not in ("mix_channels", "blur") or function is None


def test_decimation_keeps_every_second_entry_of_images():
    x = x_of(2)
    np.testing.assert_array_equal(measurements.decimate(2).measure(x), x[:, ::2, ::2])


def test_the_pseudoinverse_of_mixed_channels_gives_the_channels_back():
    operator, x = OPERATORS["mix_channels"](1), x_of(1)
    np.testing.assert_allclose(operator.invert(operator.measure(x)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "of_scipy"), [("reflect", "mirror"), ("edge", "nearest"), ("wrap", "wrap")])
def test_a_blur_is_scipy_s_convolution(mode, of_scipy):
    """Odd sizes, because SciPy centers even kernels at another entry."""
    x, kernel = x_of(2), RNG.random((3, 5))
    expected = np.stack([scipy.ndimage.convolve(x[0, ..., c], kernel, mode=of_scipy) for c in range(2)], axis=-1)
    np.testing.assert_allclose(measurements.blur(kernel, mode).measure(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_points_between_entries_are_interpolated():
    ramp = (10 * np.arange(8.0)[:, None] + np.arange(6.0))[None, ..., None]
    points = np.array([[0, 0], [7, 5], [2.5, 1.25], [3, 4.75]])
    found = measurements.at_points(points).measure(ramp)
    np.testing.assert_allclose(found[0, :, 0], points @ [10, 1], rtol=1e-6)
    beyond = jnp.array([[-0.5, 2.0], [9, 2], [np.nan, 2]])
    np.testing.assert_allclose(measurements.at_points(beyond[:1]).measure(ramp).ravel(), [2])  # up to half an entry
    traced = jax.jit(lambda points: measurements.at_points(points).measure(ramp))(beyond)
    np.testing.assert_allclose(traced.ravel(), [2, 72, np.nan], rtol=1e-6)


def test_a_kernel_whose_sum_is_not_1_has_a_warning():
    with pytest.warns(UserWarning, match="the kernel's sum is 0; for a blur, divide"):
        measurements.blur(np.array([-0.5, 0, 0.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measurements.blur(np.full((3, 3), 1 / 9, np.float32))
        jax.jit(lambda kernel: measurements.blur(kernel).measure(x_of(1)))(np.ones(3))


def test_fourier_coefficients_keep_the_norm_where_all_are_measured():
    x = x_of(2)
    y = np.asarray(measurements.fourier(np.ones((8, 6))).measure(x))
    expected = np.fft.rfftn(x[0, ..., 0], norm="ortho")
    np.testing.assert_allclose(y[0, ..., 0, 0] + 1j * y[0, ..., 0, 1], expected, rtol=1e-4, atol=1e-5)


def test_rays_sum_along_the_axes_and_the_angle_turns_with_the_image():
    x = np.zeros((1, 9, 9, 1), np.float32)
    x[0, 2:7, 3:6, 0] = RNG.random((5, 3))
    y = np.asarray(measurements.radon(np.array([0, np.pi / 2])).measure(x))[0, ..., 0]
    np.testing.assert_allclose(y[0], x[0, ..., 0].sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.sort(y[1]), np.sort(x[0, ..., 0].sum(axis=1)), atol=1e-5)
    disk = (np.hypot(*np.mgrid[-8:9, -8:9]) < 5).astype(np.float32)[None, ..., None]
    turned = np.asarray(measurements.radon(np.linspace(0, 3, 7)).measure(disk))[0, ..., 0]
    np.testing.assert_allclose(turned.sum(axis=1), disk.sum(), rtol=0.02)


def test_a_composition_applies_the_inner_operator_first():
    inner, outer, x = measurements.average_pool(2), measurements.gray(2), x_of(2)
    np.testing.assert_allclose(
        measurements.compose(outer, inner).measure(x), outer.measure(inner.measure(x)), rtol=1e-6
    )


def test_the_diagonal_of_an_unknown_operator_is_estimated():
    matrix = RNG.normal(size=(40, 30)).astype(np.float32)
    operator = LinearOperator(lambda x: x @ matrix.T)
    ratio = np.asarray(operator.squared_norms(jnp.zeros((1, 30)))) / np.sum(matrix**2, axis=1)
    assert 0.2 < ratio.min() and ratio.max() < 3 and abs(ratio.mean() - 1) < 0.25


@pytest.mark.parametrize("noise", [0.5, np.array([0.1, 0.2, 0.3, 0.4, 0.5])])
def test_chi_squared_of_the_truth_is_one(noise):
    """The standard error of the mean of 5 x 2,000 squares is sqrt(2 / 10,000)."""
    matrix, x = RNG.normal(size=(5, 3)), RNG.normal(size=(2000, 3))
    y = x @ matrix.T + noise * RNG.normal(size=(2000, 5))
    found = Measurement(measurements.mix_channels(matrix), y, noise).chi_squared(x)
    assert found.shape == (2000,) and abs(float(found.mean()) - 1) < 4 * np.sqrt(2 / 10_000)


@pytest.mark.parametrize("hidden", [0.0, 7.0, np.nan])
def test_what_an_operator_hides_is_ignored(hidden):
    mask = np.array([1, 0, 0, 1])
    measurement = Measurement(measurements.masked(mask), np.array([[1.0, hidden, hidden, 2]]), 1.0)
    np.testing.assert_array_equal(measurement.residual(jnp.full((1, 4), 0.5)), [[0.5, 0, 0, 1.5]])
    np.testing.assert_allclose(measurement.chi_squared(jnp.zeros((1, 4))), [(1 + 4) / 2])


def test_a_measurement_is_a_pytree_of_any_leaves():
    """Of axes for `jax.vmap`, of zeros and of derivatives."""
    measurement = Measurement(measurements.masked(np.array([1, 0])), np.ones((3, 2), np.float32), 0.5)
    assert jax.tree.leaves(jax.tree.map(lambda _: 0, measurement)) == [0] * len(jax.tree.leaves(measurement))
    total = lambda noise: Measurement(measurement.operator, measurement.y, noise).covariance(jnp.ones((3, 2))).sum()  # noqa: E731
    assert float(jax.grad(total)(0.5)) == 6.0


def test_the_noise_of_a_function_is_its_matrix():
    covariance = np.diag([1.0, 4.0, 9.0]).astype(np.float32)
    measurement = Measurement(lambda x: x, np.zeros((2, 3)), lambda u: u @ covariance)
    np.testing.assert_allclose(measurement.covariance(jnp.ones((2, 3))), [[1, 4, 9]] * 2)
    np.testing.assert_allclose(measurement.variances(jnp.float32), [1, 4, 9])
    with pytest.raises(ValueError, match="needs the noise as standard deviations"):
        measurement.chi_squared(jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Measurement(lambda x: x, np.zeros((1, 3)), 0.0).check(), "noise is a standard.*project"),
        (lambda: Measurement(lambda x: x, np.zeros((1, 3)), [0.1, -0.1, 1]).check(), "noise is a standard deviation"),
        (lambda: Measurement(lambda x: x, np.zeros((1, 3), int), 1.0).check(), "y must be float"),
        (lambda: Measurement(lambda x: x, np.zeros((2, 4, 4, 1)), np.ones((4, 4))).check(), "noise has shape"),
        (lambda: Measurement(lambda x: x, np.array([[np.nan, 1]]), 1.0).check(), "y has .*not finite; hide"),
        (lambda: measurements.masked(np.ones((4, 4))).measure(np.zeros((2, 4, 4, 1))), "the mask has shape"),
        (lambda: Measurement(lambda x: x, np.zeros((1, 3)), 1.0).residual(jnp.zeros((2, 3))), r"its own row of y"),
        (lambda: measurements.average_pool(3).measure(np.zeros((1, 8, 8, 1))), "8x8 cannot be divided"),
        (lambda: measurements.average_pool(2).measure(np.zeros((1, 8, 1))), "takes 2 spatial axes"),
        (lambda: measurements.blur(np.ones((3, 3)), "mirror"), "unknown mode 'mirror'; known: reflect"),
        (lambda: measurements.blur(np.ones((3, 3))).measure(np.zeros((1, 8, 1))), "as many spatial axes"),
        (lambda: measurements.blur(np.ones((9,))).measure(np.zeros((1, 4, 1))), "too large"),
        (lambda: measurements.at_points(np.zeros(3)), r"must be \[P, axes\]"),
        *(
            (
                lambda p=p: measurements.at_points(p).measure(np.zeros((1, 8, 6, 1))),
                rf"1 of 2 points, .*{words}, .*\(8, 6\)",
            )
            for p, words in (
                (np.array([[0, 0], [5.0, 7]]), r"\[5. 7.\]"),  # swapped axes
                (np.array([[0, 0], [-1.0, 2]]), r"\[-1.  2.\]"),
                (np.array([[np.nan, 0], [2, 2]]), r"\[nan  0.\]"),
            )
        ),
        (lambda: measurements.fourier(np.ones(4)).measure(np.zeros((1, 6, 1))), "mask of frequencies has shape"),
        (lambda: measurements.radon(np.zeros(1)).measure(np.zeros((1, 4, 6, 1))), "square images"),
    ],
)
def test_bad_measurements_are_refused_in_one_line(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_another_mask_and_another_y_do_not_compile_again():
    """`average_pool` is a new value at every call, too."""
    measure = jax.jit(lambda measurement, x: measurement.residual(x))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        mask, kernel, y = rng.random((4, 4, 1)) < 0.5, rng.random((3, 3)), rng.normal(size=(2, 2, 2, 1))
        operator = measurements.compose(measurements.blur(kernel), measurements.masked(mask))
        operator = measurements.compose(measurements.average_pool(2), operator)
        found = measure(Measurement(operator, y.astype(np.float32), 0.1 + seed), jnp.zeros((2, 4, 4, 1)))
        np.testing.assert_array_equal(found, y.astype(np.float32))
    assert measure._cache_size() == 1


def test_a_constant_of_the_operator_is_subtracted_from_y():
    """Units such as degrees: 2 x + 3."""
    operator = LinearOperator(lambda x: 2 * x + 3)
    x = x_of(2)
    np.testing.assert_allclose(operator.linear(x), 2 * x, rtol=1e-6)
    np.testing.assert_allclose(operator.adjoint(x)(x), 2 * x, rtol=1e-6)
    np.testing.assert_allclose(operator.squared_norms(x), 4 * np.mean(operator.squared_norms(x) / 4), rtol=2)
    np.testing.assert_allclose(Measurement(operator, 2 * x + 3, 0.1).residual(x), 0, atol=1e-6)
    with pytest.warns(UserWarning, match=r"adds a constant, from 3 to 3; it is subtracted from y"):
        operator.check(SHAPES[2])


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_passes_its_check(name, axes, recwarn):
    operator = OPERATORS[name](axes)
    recwarn.clear()
    operator.check(SHAPES[axes])
    jax.jit(lambda x: operator.check(SHAPES[axes]))(0.0)  # as in a denoiser that is compiled
    assert not recwarn.list


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda x: jnp.round(x), "must be linear"),
        (lambda x: jnp.clip(x, -3, 3), "must be linear"),
        (lambda x: x + 0.05 * x**2, "must be linear"),
        (lambda x: jax.lax.stop_gradient(x), "must be linear"),
        (lambda x: x - jnp.mean(x, axis=0), "row by row"),
        (lambda x: x[::-1], "row by row"),
        (lambda x: jnp.sum(x, axis=0), "must return a float array"),
        (lambda x: (x > 0).astype(jnp.int32), "must return a float array"),
        (lambda x: (x, x), "must return a float array"),
        (lambda x: np.asarray(x) @ np.eye(2), "no function of jax arrays"),
    ],
)
def test_operators_that_are_not_linear_are_refused(measure, words):
    with pytest.raises(ValueError, match=words) as error:
        LinearOperator(measure).check(SHAPES[2])
    assert "\n" not in str(error.value)


def test_infinite_noise_is_not_measured():
    operator, x = LinearOperator(lambda x: x), x_of(2, 1)
    noise = np.where(RNG.random(SHAPES[2]) < 0.5, 0.5, np.inf).astype(np.float32)
    y = np.where(np.isfinite(noise), x, np.nan)
    measurement = Measurement(operator, y, noise)
    measurement.check()
    np.testing.assert_array_equal(measurement.residual(x), 0)
    np.testing.assert_allclose(
        measurement.covariance(np.where(np.isfinite(noise), 1.0, 0.0)), np.where(np.isfinite(noise), 0.25, 0.0)
    )
    np.testing.assert_allclose(measurement.chi_squared(x + 0.5), [1.0], rtol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        Measurement(operator, y, 0.5).check()


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (lambda u: jnp.cumsum(u, axis=1), "not symmetric"),
        (lambda u: -0.1 * u, "gives a value below"),
        (np.nan, "noise is a standard deviation above 0"),
    ],
)
def test_noise_that_is_no_covariance_is_refused(noise, words):
    x = x_of(2)
    with pytest.raises(ValueError, match=words):
        Measurement(LinearOperator(lambda x: x), x, noise).check()

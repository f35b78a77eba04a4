"""The decoder for discretized data, against SciPy and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import likelihood
from helpers.decoder import scipy_log_prob

SDS = (1e-9, 1e-6, 1e-4, 1e-3, 4e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e3, 1e8)
MEANS = (-50.0, -1.3, -1.0, -0.37, -0.9999, 0.0, 1e-3, 0.501, 1.0, 1.2, 1e6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoder_s_probabilities_sum_to_1_and_its_gradients_are_finite(levels):
    mean, log_variance, x_0 = np.meshgrid(MEANS, 2 * np.log(SDS), np.arange(levels) * 2 / (levels - 1) - 1)
    mean, log_variance, x_0 = (a.astype(np.float32) for a in (mean, log_variance, x_0))
    log_p = jax.jit(likelihood.decoder_log_prob, static_argnums=3)(x_0, mean, log_variance, levels)
    assert np.isfinite(log_p).all() and (log_p <= 0).all()
    np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)).sum(-1), 1, atol=1e-6)
    total = lambda mean, log_variance: likelihood.decoder_log_prob(x_0, mean, log_variance, levels).sum()  # noqa: E731
    for gradient in jax.jit(jax.grad(total, (0, 1)))(mean, log_variance):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("levels", [17, 256])
def test_the_decoder_is_the_gaussian_s_mass_in_the_bin(levels, x64):
    """In float64 against SciPy, gradients against central differences of SciPy's values."""
    mean, sd, x_0 = np.meshgrid([-1.1, -0.4, 0.0, 0.63, 1.0], [0.002, 0.02, 0.3, 5.0], np.linspace(-1, 1, levels))
    keep = abs(x_0 - mean) / sd < 60
    mean, sd, x_0 = mean[keep], sd[keep], x_0[keep]
    log_p = jax.jit(lambda mean, log_variance: likelihood.decoder_log_prob(x_0, mean, log_variance, levels))
    np.testing.assert_allclose(log_p(mean, 2 * np.log(sd)), scipy_log_prob(x_0, mean, sd, levels), rtol=1e-9, atol=1e-9)
    by_mean, by_log_variance = jax.jit(jax.grad(lambda m, v: log_p(m, v).sum(), (0, 1)))(mean, 2 * np.log(sd))
    h = 1e-5 * sd
    difference = scipy_log_prob(x_0, mean + h, sd, levels) - scipy_log_prob(x_0, mean - h, sd, levels)
    np.testing.assert_allclose(by_mean, difference / (2 * h), rtol=1e-4, atol=1e-4)
    difference = scipy_log_prob(x_0, mean, sd * np.exp(5e-6), levels)
    difference -= scipy_log_prob(x_0, mean, sd * np.exp(-5e-6), levels)
    np.testing.assert_allclose(by_log_variance, difference / 2e-5, rtol=1e-4, atol=1e-4)


def in_float32(x_0, mean, sd):
    """float32 arguments for the decoder, and the same values in float64 for the reference."""
    single = [np.asarray(a, np.float32) for a in (x_0, mean, 2 * np.log(sd))]
    x_0, mean, log_variance = (a.astype(np.float64) for a in single)
    return single, (x_0, mean, np.exp(0.5 * log_variance))


def test_the_decoder_in_float32_is_close_to_float64():
    mean, sd, x_0 = np.meshgrid([-1.1, -0.4, 0.63, 1.0], [0.01, 0.1, 1.0], np.linspace(-1, 1, 256))
    single, double = in_float32(x_0, mean, sd)
    expected = scipy_log_prob(*double, 256)
    # (edge - mean) / sd has an error of 1e-7 / sd, so the square has an error of 1e-7 z / sd nats.
    allowed = 1e-4 + 2e-7 * np.sqrt(2 * abs(expected)) / sd + 1e-6 * abs(expected)
    assert (abs(jax.jit(likelihood.decoder_log_prob)(*single) - expected) < allowed).all()


def test_a_far_tail_s_gradient_in_float32_is_the_mills_ratio():
    """d log p / d mean -> (edge - mean) / sd^2; a difference of logarithms would be off by a factor there."""
    log_p = lambda mean: likelihood.decoder_log_prob(jnp.float32(0.0039216), mean, jnp.float32(2 * np.log(1e-4)))  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(log_p))(jnp.float32(0.9)), (2 / 255 - 0.9) / 1e-8, rtol=1e-4)


def test_log_variances_below_minus_60_count_as_minus_60():
    """In float32, the standard deviation exp(-100) would have no inverse; 1 / 255 is half a bin."""
    mean = jnp.array([0.0, 0.1, -1.1, 1.1]) + 1 / 255
    log_p = jax.jit(likelihood.decoder_log_prob)(jnp.full((2, 4), 1 / 255), mean, jnp.array([[-200.0], [-60.0]]))
    np.testing.assert_array_equal(*log_p)
    distance = np.array([0, 0.1, 1.1, 1.1]) - [0, *3 * [1 / 255]]
    np.testing.assert_allclose(log_p[0], -0.5 * (distance * np.exp(30)) ** 2, rtol=1e-5)


def test_openai_s_tanh_decoder():
    """OpenAI's formula, written in float64 from the description: edges at +-1/255, tanh CDF, floor of 1e-12."""
    mean, sd, x_0 = np.meshgrid([-0.99, -0.2, 0.7], [0.01, 0.2], np.arange(256) / 127.5 - 1)
    single, (x_0, mean, sd) = in_float32(x_0, mean, sd)
    cdf = lambda z: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    upper, lower = cdf((x_0 + 1 / 255 - mean) / sd), cdf((x_0 - 1 / 255 - mean) / sd)
    mass = np.where(x_0 < -0.999, upper, np.where(x_0 > 0.999, 1 - lower, upper - lower))
    decoders = jax.jit(lambda *a: [likelihood.decoder_log_prob(*a, cdf=cdf) for cdf in ("tanh", "exact")])
    got, exact = (np.asarray(log_p, np.float64) for log_p in decoders(*single))
    np.testing.assert_allclose(np.exp(got), np.maximum(mass, 1e-12), atol=1e-5)  # x_0 rounds by 1e-7, sd 0.01
    assert got.min() == pytest.approx(-27.631, abs=1e-3)
    assert 1e-5 < abs(np.exp(got) - np.exp(exact)).max() < 2 * 1.8e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_every_gray_level_is_recovered_from_its_rounded_value(dtype, levels):
    """A mean at level k makes level k's bin the likeliest; x_0 is level k in the dtype's own rounding."""
    k = np.arange(levels)
    exact = 2 * k / (levels - 1) - 1
    x_0 = jnp.asarray(exact, dtype)
    log_variance = jnp.full(levels, 2 * np.log(0.1 / (levels - 1)), jnp.float32)
    decoder = jax.jit(likelihood.decoder_log_prob, static_argnums=3)
    log_p = decoder(x_0, jnp.float32(exact), log_variance, levels)
    # The bin is 10 standard deviations wide to each side.
    np.testing.assert_allclose(log_p, 0.0, atol=1e-6)

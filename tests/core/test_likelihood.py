"""The variational bound against closed forms on Gaussian data, quadrature and float64 SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from diffusion_jax import Denoiser, likelihood, schedules
from diffusion_jax.denoiser import PREDICTIONS, convert
from helpers.decoder import scipy_log_prob
from helpers.gaussian_mixtures import gaussian

M, S2, T = 0.2, 0.16, 50  # data N(M, S2) in every dimension, 50 steps that end near noise
SCHEDULE = schedules.from_betas(schedules.betas("linear", T, beta_start=2e-3, beta_end=0.25))
V = SCHEDULE.alpha_bar * S2 + 1 - SCHEDULE.alpha_bar  # variance of x_t
V_PREV = np.append(S2, V[:-1])
EXACT_VARIANCE = SCHEDULE.betas * V_PREV / V
FRACTION = (np.log(EXACT_VARIANCE) - SCHEDULE.transitions.posterior_log_variance) / (
    np.log(SCHEDULE.betas) - SCHEDULE.transitions.posterior_log_variance
)
VARIANCES = {
    "fixed_small": np.exp(SCHEDULE.transitions.posterior_log_variance),
    "fixed_large": SCHEDULE.transitions.fixed_large_variance,
    "learned_range": EXACT_VARIANCE,
}


def optimal(variance):
    """The exact posterior mean as eps, and for learned_range the exact variance as its fraction."""

    def network(x_t, time):
        eps = gaussian("eps", SCHEDULE, M, S2)(x_t, time)
        if variance != "learned_range":
            return eps
        fraction = jnp.asarray(2 * FRACTION - 1, x_t.dtype)[time.astype(jnp.int32), None]
        return jnp.concatenate([eps, jnp.broadcast_to(fraction, eps.shape)], -1)

    return Denoiser(network, variance=variance, clip=False)


def gaussian_data(n, key=0, d=4):
    return M + np.sqrt(S2) * jax.random.normal(jax.random.key(key), (n, d))


def closed_form(variance):
    """E L_t in bits per dimension for the optimal mean and a continuous decoder; index 0 is the decoder."""
    sigma2 = VARIANCES[variance]
    error = S2 * (1 - SCHEDULE.alpha_bar) / V  # E (x_0 - E[x_0 | x_t])^2
    small = SCHEDULE.transitions.posterior_variance[1:]
    mean = SCHEDULE.transitions.posterior_mean_coef_x_0[1:] ** 2 * error[1:]
    kl = 0.5 * (np.log(sigma2[1:] / small) - 1 + (small + mean) / sigma2[1:])
    decoder = 0.5 * (np.log(2 * np.pi * sigma2[0]) + error[0] / sigma2[0])
    return np.append(decoder, kl) / np.log(2)


def evaluate(variance, x_0, key=1, **options):
    run = functools.partial(likelihood.bits_per_dim, **options)
    return jax.jit(run)(jax.random.key(key), SCHEDULE, optimal(variance), x_0)


def mean_and_error(values):
    values = np.asarray(values, np.float64)
    return values.mean(0), values.std(0) / np.sqrt(len(values))


# The terms.


def test_the_kl_of_two_gaussians_by_quadrature():
    for mean_1, sd_1, mean_2, sd_2 in [(0.0, 1.0, 0.3, 0.5), (-2.0, 0.1, -1.9, 0.11), (0.0, 3.0, 0.0, 3.0)]:
        p, q = scipy.stats.norm(mean_1, sd_1), scipy.stats.norm(mean_2, sd_2)
        integrand = lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x))  # noqa: E731
        expected, _ = scipy.integrate.quad(integrand, mean_1 - 12 * sd_1, mean_1 + 12 * sd_1)
        got = likelihood.gaussian_kl(mean_1, 2 * np.log(sd_1), mean_2, 2 * np.log(sd_2))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


def test_the_prior_term():
    for schedule in (SCHEDULE, schedules.from_betas(schedules.betas("linear", 1000))):
        x_0 = np.array([[-1.0, 0.3], [1.0, 0.0]])
        a = schedule.alpha_bar[-1]
        expected = 0.5 * (a * x_0**2 + (1 - a) - 1 - np.log(1 - a)) / np.log(2)
        np.testing.assert_allclose(likelihood.prior_term(schedule, x_0.astype(np.float32)), expected.mean(1), rtol=2e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_every_term_has_its_closed_form(variance):
    """Gaussian data and the exact posterior mean: each L_t, both squared errors and the total, within error bars.

    With the exact variance the bound is attained: 1/2 ln(2 pi e s^2) + KL(N(sqrt(abar_T) m, v_T) || N(0, 1)).
    """
    bits = evaluate(variance, gaussian_data(20_000), gray_levels=None)
    assert bits.vlb.shape == bits.mse.shape == bits.x_0_mse.shape == bits.t.shape == (20_000, T)
    a = SCHEDULE.alpha_bar
    prior = 0.5 * (a[-1] * (S2 + M**2) - a[-1] - np.log1p(-a[-1])) / np.log(2)
    total = closed_form(variance).sum() + prior
    attained = 0.5 * np.log(2 * np.pi * np.e * S2) + 0.5 * (V[-1] + a[-1] * M**2 - 1 - np.log(V[-1]))
    assert total == pytest.approx(attained / np.log(2), abs=1e-12) or variance != "learned_range"
    expected = {"vlb": closed_form(variance), "mse": a * S2 / V, "x_0_mse": S2 * (1 - a) / V, "total": total}
    for name, values in expected.items():
        mean, error = mean_and_error(getattr(bits, name))
        assert (abs(mean - values) < 4.5 * error + 1e-6).all(), name
    np.testing.assert_allclose(bits.total, bits.prior + bits.vlb.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bits.decoder, bits.vlb[:, 0], rtol=1e-6)
    assert bits.standard_error is None


def test_the_discretized_decoder_term_by_quadrature():
    """E of -log2 P(level | x_1) over the levels of a rounded Gaussian and, by Gauss-Hermite, over the noise."""
    levels = 17
    grid = np.arange(levels) * 2 / (levels - 1) - 1
    probabilities = np.exp(scipy_log_prob(grid, M, np.sqrt(S2), levels))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    a = SCHEDULE.alpha_bar[0]
    x_t = np.sqrt(a) * grid[:, None] + np.sqrt(1 - a) * nodes
    mean = M + np.sqrt(a) * S2 * (x_t - np.sqrt(a) * M) / V[0]
    log_p = scipy_log_prob(np.broadcast_to(grid[:, None], mean.shape), mean, np.sqrt(EXACT_VARIANCE[0]), levels)
    expected = -(probabilities * (log_p @ weights / weights.sum())).sum() / np.log(2)
    x_0 = np.random.default_rng(0).choice(grid, p=probabilities / probabilities.sum(), size=(40_000, 4))
    bits = evaluate("learned_range", x_0.astype(np.float32), gray_levels=levels, tables=False)
    measured, error = mean_and_error(bits.decoder)
    assert abs(measured - expected) < 4 * error and error < 0.01 * expected


def test_with_the_fixed_small_variance_terms_are_snr_differences(x64):
    """L_{t-1} = 1/2 (SNR_{t-1} - SNR_t) ||x_0 - x0hat||^2 (Kingma et al. 2021), for any network output."""
    x_0 = jax.random.uniform(jax.random.key(0), (5, 3), minval=-1)
    denoiser = Denoiser(lambda x, time: 0.3 * x + 0.1, variance="fixed_small")
    bits = likelihood.bits_per_dim(jax.random.key(1), SCHEDULE, denoiser, x_0)
    drops = 0.5 * (SCHEDULE.snr[:-1] - SCHEDULE.snr[1:]) / np.log(2)
    np.testing.assert_allclose(bits.vlb[:, 1:], drops * bits.x_0_mse[:, 1:], rtol=1e-8)


@pytest.mark.thorough
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_does_not_depend_on_the_prediction(prediction, x64):
    def network(x_t, time):
        return convert(0.8 * x_t, x_t, SCHEDULE.transition(time.astype(jnp.int32), x_t), "x_0", prediction)

    x_0 = jnp.clip(gaussian_data(6), -1, 1)
    bits, by_x_0 = (
        likelihood.bits_per_dim(jax.random.key(0), SCHEDULE, Denoiser(function, prediction=name, clip=False), x_0)
        for function, name in [(network, prediction), (lambda x, time: 0.8 * x, "x_0")]
    )
    np.testing.assert_allclose(bits.vlb, by_x_0.vlb, rtol=1e-6)


def test_rate_and_distortion_of_a_gaussian():
    """As T grows, R = 1/2 log2(1 + s^2 SNR) and D = s^2 2^(-2R) of the scaled data; here from the closed forms of L_t."""
    steps = 20_000
    schedule = schedules.from_betas(schedules.betas("linear", steps, beta_start=0.1 / steps, beta_end=20 / steps))
    a = schedule.alpha_bar
    v = a * S2 + 1 - a
    error = S2 * (1 - a) / v
    kl = np.append(0.0, 0.5 * (schedule.snr[:-1] - schedule.snr[1:]) * error[1:]) / np.log(
        2
    )  # the fixed small variance
    prior = 0.5 * (a[-1] * (S2 + M**2) - a[-1] - np.log1p(-a[-1])) / np.log(2)
    rate, distortion = likelihood.rate_distortion(prior, kl, error)
    expected = 0.5 * np.log2(1 + S2 * schedule.snr)
    # The first steps are coarse for every T: the SNR halves between these steps, which costs up to half a bit.
    np.testing.assert_allclose(rate[steps // 50 :], expected[steps // 50 :], atol=2e-3)
    np.testing.assert_allclose(distortion, 127.5 * np.sqrt(S2) * 2.0**-expected, rtol=1e-4)
    assert rate[-1] == pytest.approx(prior) and (np.diff(rate) <= 0).all()


# Data in their own units.


@pytest.mark.parametrize(
    "shape", [(5, 2), *(pytest.param(s, marks=pytest.mark.thorough) for s in ((2,), (2, 3, 2, 2)))]
)
def test_the_bound_of_standardized_data_in_their_units(shape):
    """Independent normal channels. After standardization x_t is N(0, 1) at every t, and beta_t is the exact variance, so
    that only the decoder has a gap to the entropy: the decoder's variance at index 0 is the posterior variance at index
    1."""
    n, offset, scale = 4000, np.array([3.0, -20.0]), np.array([0.05, -40.0])
    schedule = schedules.from_betas(schedules.betas("linear", 100, beta_start=1e-3, beta_end=0.12))
    data = offset + np.abs(scale) * np.random.default_rng(0).normal(size=(n, *shape))
    options = {"gray_levels": None, "tables": False}
    denoiser = Denoiser(gaussian("eps", schedule, 0.0, 1.0), clip=False)
    run = jax.jit(lambda x: likelihood.bits_per_dim(jax.random.key(1), schedule, denoiser, x, **options).total)
    bits = np.asarray(run(np.float32((data - offset) / scale)), np.float64)
    in_units = bits + float(likelihood.standardization_bits(scale))
    exact = -scipy.stats.norm(offset, np.abs(scale)).logpdf(data).reshape(n, -1).mean(1) / np.log(2)
    ratio = schedule.betas[0] / schedule.transitions.fixed_large_variance[0]
    gap = 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2)
    mean, error = mean_and_error(in_units - exact)
    assert abs(mean - gap) < 4 * error + 1e-5 and error < gap / 2
    assert 0 < gap < 0.15  # in bits per dimension


def test_the_bits_of_a_standardization():
    """log2 |scale| for a number, a value per channel, and an array with the data's shape."""
    assert likelihood.standardization_bits(8.0) == 3 and likelihood.standardization_bits(-0.25) == -2
    scale = np.array([2.0, 32.0], np.float32)
    assert likelihood.standardization_bits(scale) == 3
    assert likelihood.standardization_bits(np.broadcast_to(scale, (4, 4, 2))) == 3


# The estimate from a subset of the steps.


@pytest.mark.parametrize("strata", [7, *(pytest.param(number, marks=pytest.mark.thorough) for number in (1, 49))])
def test_strata_are_an_unbiased_estimate(strata):
    """The first half has other examples in each row, the second half one example in all rows."""
    n = 20_000
    x_0 = jnp.concatenate([other := gaussian_data(n, 5), jnp.repeat(other[:1], n, axis=0)])
    bits = evaluate("learned_range", x_0, key=2, gray_levels=None, strata=strata)
    assert bits.vlb.shape == (2 * n, 1 + 2 * strata) and (bits.t[:, 0] == 0).all()
    assert bits.t[:, 1:].min() == 1 and bits.t[:, 1:].max() == T - 1
    transitions = np.asarray(bits.total - bits.prior - bits.decoder)
    mean, error = mean_and_error(transitions[:n])
    assert abs(mean - closed_form("learned_range")[1:].sum()) < 4 * error
    # The stated error, against the spread of repeated estimates for the same example.
    spread = transitions[n:].astype(np.float64).var()
    assert abs(np.mean(np.square(bits.standard_error[n:], dtype=np.float64)) / spread - 1) < 0.07


# How it behaves.


def test_without_tables_the_memory_does_not_grow_with_t():
    def memory(steps):
        schedule = schedules.from_betas(schedules.betas("linear", steps))
        run = lambda key, x_0: likelihood.bits_per_dim(key, schedule, lambda x, time: x, x_0, tables=False)  # noqa: E731
        compiled = jax.jit(run).lower(jax.random.key(0), jnp.zeros((64, 32, 32, 3))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(1000) < 1.05 * memory(10)


@pytest.mark.thorough
def test_tables_do_not_change_the_bound():
    x_0 = jnp.clip(gaussian_data(8), -1, 1)
    for strata in (None, 3):
        run = functools.partial(evaluate, "fixed_small", x_0, strata=strata)
        with_tables, without = run(), run(tables=False)
        # Two programs: sums of up to 52 terms, each addition rounded to 2^-24.
        np.testing.assert_allclose(with_tables.total, without.total, rtol=1e-5)
        assert without.vlb is without.mse is without.t is None


@pytest.mark.parametrize("levels", [256, None])
def test_gradients_are_finite_at_any_learned_log_variance(levels):
    """In float32, exp overflows beyond 88: neither the term at t nor the unused branch may overflow. One row for each of
    five log variances, at index 0 and at T / 2."""
    log_variances = jnp.array([-200.0, -89.0, -60.0, -20.0, 20.0])
    x_0, x_t = jnp.tile(jnp.array([-1.0, 0.3, 1.0]), (10, 1)), jnp.tile(jnp.array([-0.9, 0.2, 0.8]), (10, 1))
    t = jnp.repeat(jnp.array([0, T // 2]), 5)

    def term(output):
        denoiser = Denoiser(lambda x_t, time: output, prediction="x_0", variance="learned")
        values, _ = likelihood.bound_term(SCHEDULE, denoiser, x_0, x_t, t, gray_levels=levels)
        return values.sum(), values

    output = jnp.concatenate([0.9 * x_0, jnp.tile(jnp.repeat(log_variances[:, None], 3, 1), (2, 1))], axis=-1)
    slopes, values = jax.jit(jax.grad(term, has_aux=True))(output)
    assert np.isfinite(values).all() and np.isfinite(slopes).all()
    values = values.reshape(2, 5)
    np.testing.assert_array_equal(values[:, :2], values[:, [2, 2]])  # values below -60 count as -60


def test_the_prior_term_is_0_at_zero_terminal_snr():
    jsd = schedules.from_betas(schedules.betas("jsd", 10))
    x_0 = jnp.ones((2, 3))
    denoiser = Denoiser(lambda x, time: 0 * x, prediction="v", variance="fixed_small")
    bits = likelihood.bits_per_dim(jax.random.key(0), jsd, denoiser, x_0)
    assert (bits.prior == 0).all() and np.isfinite(bits.total).all()

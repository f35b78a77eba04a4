"""The bound on float arrays of any shape, in data units: Gaussian distributions whose entropy is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion_jax import likelihood, schedules

SCHEDULE = schedules.from_betas(schedules.betas("linear", 100, beta_start=1e-3, beta_end=0.12))
OFFSET, SCALE = np.array([3.0, -20.0]), np.array([0.05, -40.0])


def bound(denoise_fn, x, variance):
    run = jax.jit(
        lambda x: (
            likelihood.bits_per_dim(
                jax.random.key(1),
                SCHEDULE,
                denoise_fn,
                x,
                variance=variance,
                clip=False,
                gray_levels=None,
                tables=False,
            ).total
        )
    )
    return np.asarray(run(jnp.asarray(x, jnp.float32)), np.float64)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (2, 3, 2, 2)])
def test_the_bound_of_standardized_data_in_their_units(shape):
    """Independent normal channels with scales of 0.05 and 40. After standardization x_t is N(0, 1) at every t, and beta_t is
    the exact variance, so that only the decoder has a gap: its variance at index 0 is the posterior one of index 1."""
    n = 4000
    data = OFFSET + np.abs(SCALE) * np.random.default_rng(0).normal(size=(n, *shape))
    x = (data - OFFSET) / SCALE
    bits = bound(lambda x, t: SCHEDULE.at(t.astype(int), x).sigma * x, x, "fixed_large")
    in_units = bits + float(likelihood.standardization_bits(SCALE))
    exact = -scipy.stats.norm(OFFSET, np.abs(SCALE)).logpdf(data).reshape(n, -1).mean(1) / np.log(2)
    ratio = SCHEDULE.betas[0] / SCHEDULE.fixed_large_variance[0]
    gap = 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2)
    difference = in_units - exact
    error = difference.std() / np.sqrt(n)
    assert abs(difference.mean() - gap) < 4 * error + 1e-5 and error < gap / 2
    assert 0 < gap < 0.15  # the slack, in bits per dimension
    # The entropy: 1/2 log2(2 pi e scale^2), on average over the channels.
    entropy = 0.5 * np.log2(2 * np.pi * np.e * SCALE**2).mean()
    error = in_units.std() / np.sqrt(n)
    assert abs(in_units.mean() - entropy - gap) < 4 * error


def test_the_bound_of_a_correlated_series():
    """An AR(1) series: the bound has a closed form in the eigenvectors of its covariance, above the entropy by the slack."""
    length, n, rho, scale = 8, 4000, 0.8, 7.0
    covariance = rho ** np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    eigenvalues, basis = np.linalg.eigh(covariance)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, length)) * np.sqrt(eigenvalues)) @ basis.T

    def exact(x, time):
        a = SCHEDULE.at(time.astype(int), x[:, 0]).alpha_bar
        along = (x[..., 0] @ basis) / (a * eigenvalues + 1 - a)
        return jnp.sqrt(1 - a)[..., None] * (along @ basis.T)[..., None]

    bits = bound(exact, x[..., None], "fixed_small") + float(likelihood.standardization_bits(scale))
    a, posterior = SCHEDULE.alpha_bar[:, None], np.exp(SCHEDULE.posterior_log_variance)[:, None]
    error = eigenvalues * (1 - a) / (a * eigenvalues + 1 - a)  # E (x_0 - E[x_0 | x_t])^2
    transitions = 0.5 * (SCHEDULE.snr[:-1] - SCHEDULE.snr[1:])[:, None] * error[1:]
    decoder = 0.5 * (np.log(2 * np.pi * posterior[0]) + error[0] / posterior[0])
    prior = 0.5 * (a[-1] * eigenvalues - a[-1] - np.log1p(-a[-1]))
    expected = (prior + decoder + transitions.sum(0)).mean() / np.log(2) + np.log2(scale)
    entropy = 0.5 * np.log2(2 * np.pi * np.e * eigenvalues * scale**2).mean()
    assert abs(bits.mean() - expected) < 4 * bits.std() / np.sqrt(n)
    assert (
        0 < expected - entropy < 1.5
    )  # the slack of 100 steps, most of it where beta_t is far above the posterior variance


def test_the_bits_of_a_standardization(unchecked_annotations):
    """log2 |scale|: of one number, of channels, and of an array of the data's shape."""
    assert likelihood.standardization_bits(8.0) == 3 and likelihood.standardization_bits(-0.25) == -2
    scale = np.array([2.0, 32.0], np.float32)
    assert likelihood.standardization_bits(scale) == 3
    assert likelihood.standardization_bits(np.broadcast_to(scale, (4, 4, 2))) == 3
    with pytest.raises(ValueError, match="scale must be float"):
        likelihood.standardization_bits(np.array([1, 2]))

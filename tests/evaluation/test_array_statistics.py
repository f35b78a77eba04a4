"""Statistics of sets of arrays: NumPy, closed forms of known processes, and z-scores of unit variance."""

import numpy as np
import pytest

from diffusion_jax.evaluation import array_statistics, example_sets

RHO = 0.7
MIXING = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 2.0]])


def ar_1(rng, n, length, channels=1, rho=RHO):
    """Stationary series of variance 1, by the recursion."""
    noise = rng.normal(size=(n, length, channels))
    x = [noise[:, 0]]
    for i in range(1, length):
        x.append(rho * x[-1] + np.sqrt(1 - rho**2) * noise[:, i])
    return np.stack(x, axis=1)


def periodic_field(rng, n, spectrum):
    """A Gaussian field of a given spectrum on the grid, from white noise."""
    white = np.fft.fftn(rng.normal(size=(n, *spectrum.shape)), axes=range(1, 1 + spectrum.ndim))
    return np.fft.ifftn(white * np.sqrt(spectrum), axes=range(1, 1 + spectrum.ndim)).real[..., None]


def smooth_spectrum(shape, power=2.0):
    squares = sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
    return 1 / (0.02 + squares) ** power


def shell_average(spectrum):
    """A spectrum on the grid, averaged over shells as wide as the lowest frequency."""
    squares = sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, spectrum.shape), indexing="ij"))
    shells = np.round(np.sqrt(squares) * max(spectrum.shape))
    return np.array([spectrum[shells == shell].mean() for shell in np.unique(shells)])


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(example_sets, "_BLOCK", 5)


def test_vectors_have_the_mean_and_covariance_of_numpy(tiny_blocks):
    x = np.random.default_rng(0).normal(50, 1, (23, 3)) @ MIXING.T
    found = array_statistics.mean_and_covariance(x)
    np.testing.assert_allclose(found.mean.value, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.mean.standard_error, x.std(0, ddof=1) / np.sqrt(23), rtol=1e-10)
    np.testing.assert_allclose(found.covariance.value, np.cov(x, rowvar=False), rtol=1e-10)


def test_the_covariance_of_correlated_channels_of_a_series():
    """AR(1) series, mixed: positions depend on each other, and the errors know it."""
    rng, means, covariances = np.random.default_rng(0), [], []
    for _ in range(300):
        found = array_statistics.mean_and_covariance(2.0 + ar_1(rng, 60, 12, 3) @ MIXING.T)
        means.append(array_statistics.z_scores(found.mean, np.full(3, 2.0)))
        covariances.append(array_statistics.z_scores(found.covariance, MIXING @ MIXING.T))
    means = np.array(means)  # errors that are estimated from n examples make the variance larger by about 2 / n
    assert (abs(means.mean(0)) < 5 / np.sqrt(300)).all() and (abs(means.var(0) - 1) < 5 * np.sqrt(2 / 300) + 0.05).all()
    # Sums of squares of 60 examples are skewed, and their z-scores lean to the negative side by up to 0.3.
    covariances = np.array(covariances)
    assert (abs(covariances.mean(0)) < 0.45).all() and (abs(covariances.var(0) - 1) < 0.6).all()
    wrong = MIXING @ np.diag([1, 1.6, 1]) @ MIXING.T
    many = array_statistics.mean_and_covariance(ar_1(rng, 4000, 12, 3) @ MIXING.T)
    assert abs(array_statistics.z_scores(many.covariance, wrong)).max() > 6
    assert abs(array_statistics.z_scores(many.covariance, MIXING @ MIXING.T)).max() < 4.5


@pytest.mark.parametrize("shape", [(9,), (8,), (6, 4), (4, 3, 5)])
def test_parseval(shape, tiny_blocks):
    x = np.random.default_rng(0).normal(3, 2, (17, *shape, 3)) @ MIXING.T
    covariance = array_statistics.mean_and_covariance(x).covariance.value
    found = array_statistics.power_spectrum(x)
    assert found.num_averaged.sum() == np.prod(shape)
    mean = (found.num_averaged[:, None] * found.value).sum(axis=0) / np.prod(shape)
    # The correction of the mean is that of frequency 0 here, and of the whole variance there: the same number.
    np.testing.assert_allclose(mean, np.diag(covariance), rtol=1e-10, atol=1e-10)


def test_spectra_of_few_examples_are_unbiased():
    """Four AR(1) series around a mean that is estimated: at every frequency the definition
    sum_{r,s} rho^|r-s| cos(2 pi k (r - s)) / L, within four standard errors of the mean of all repetitions."""
    rng, length, repetitions = np.random.default_rng(0), 8, 4000
    x = 3 + ar_1(rng, 4 * repetitions, length, 2)
    spectra = np.array([array_statistics.power_spectrum(part).value for part in np.split(x, repetitions)])
    np.testing.assert_allclose(array_statistics.power_spectrum(x).frequencies, np.arange(5) / 8)
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    shared = RHO ** abs(lags) / length
    exact = np.array([(shared * np.cos(2 * np.pi * k * lags / length)).sum() for k in range(length // 2 + 1)])
    error = spectra.std(axis=0, ddof=1) / np.sqrt(repetitions)
    assert (abs(spectra.mean(axis=0) - exact[:, None]) < 4 * error).all() and (error < 0.05 * exact.max()).all()


def test_the_spectrum_of_a_periodic_field_is_recovered_and_a_wrong_one_detected():
    shape = (12, 16)
    rng, exact = np.random.default_rng(0), smooth_spectrum(shape)
    found = array_statistics.power_spectrum(periodic_field(rng, 2000, exact))
    shells = shell_average(exact)
    assert abs(array_statistics.z_scores(found, shells[:, None])).max() < 4.5
    wrong = smooth_spectrum(shape, 2.2) * (exact.mean() / smooth_spectrum(shape, 2.2).mean())  # of the same variance
    assert abs(array_statistics.z_scores(found, shell_average(wrong)[:, None])).max() > 8
    other = array_statistics.power_spectrum(periodic_field(rng, 1000, exact))
    assert abs(array_statistics.z_scores(found, other)).max() < 4.5
    different = array_statistics.power_spectrum(periodic_field(rng, 1000, wrong))
    assert abs(array_statistics.z_scores(found, different)).max() > 6


def test_the_autocorrelation_by_its_definition(tiny_blocks):
    x = np.random.default_rng(0).gamma(2.0, size=(17, 9, 2))
    centered = x - x.mean((0, 1))
    of_mean = centered.mean(1).var(0, ddof=1) / 17
    for periodic in (False, True):
        covariance = np.stack(
            [
                (
                    (centered * np.roll(centered, -h, axis=1)) if periodic else (centered[:, : 9 - h] * centered[:, h:])
                ).mean((0, 1))
                + of_mean
                for h in range(5)
            ]
        )
        found = array_statistics.autocorrelation(x, periodic=periodic)
        np.testing.assert_allclose(found.value, covariance / covariance[0], rtol=1e-10)
        assert (found.lags == np.arange(5)).all() and (found.standard_error[0] == 0).all()


def test_the_autocorrelation_of_an_ar_1_process():
    rng, lags = np.random.default_rng(0), np.arange(7)
    z = []
    for _ in range(200):
        found = array_statistics.autocorrelation(5.0 + ar_1(rng, 100, 12))
        z.append(array_statistics.z_scores(found, RHO ** lags[:, None])[1:, 0])
    z = np.array(z)
    # A ratio of means of 100 examples: biased by about 1 / 100 of its scatter per example.
    assert (abs(z.mean(0)) < 0.4).all() and (abs(z.var(0) - 1) < 0.55).all()
    found = array_statistics.autocorrelation(ar_1(rng, 4000, 12))
    assert abs(array_statistics.z_scores(found, RHO ** lags[:, None])).max() < 4.5
    assert abs(array_statistics.z_scores(found, (RHO - 0.04) ** lags[:, None])).max() > 6


def test_z_scores_of_equal_numbers_without_errors():
    one = array_statistics.Measurement(np.array([1.0, 2.0]), np.array([0.0, 0.5]))
    np.testing.assert_allclose(array_statistics.z_scores(one, np.array([1.0, 1.0])), [0, 2])
    np.testing.assert_allclose(array_statistics.z_scores(one, one), [0, 0])
    other = array_statistics.Measurement(np.array([0.0, 1.0]), np.array([2.0, 1.2]))
    np.testing.assert_allclose(array_statistics.z_scores(one, other), [1 / 2, 1 / 1.3])
    assert np.isinf(array_statistics.z_scores(one, np.array([0.0, 2.0]))[0])


def test_bad_arguments():
    x = np.random.default_rng(0).normal(size=(6, 8, 2))
    mean, spectrum, correlation = (
        getattr(array_statistics, name) for name in ("mean_and_covariance", "power_spectrum", "autocorrelation")
    )
    for function, argument, words in (
        (spectrum, x[:, 0], "needs at least one spatial axis"),
        (correlation, x[..., None], r"needs series \[n, L, C\]"),
        (correlation, x * [1, 0], "channel 1 is constant"),
        *((function, x[:1], "x has 1 examples; this needs at least 2") for function in (mean, spectrum, correlation)),
        (mean, x * np.inf, "example 0 has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            function(argument)

"""Statistics and distances for sets of arrays: NumPy, SciPy, closed forms for known processes, and standard errors against
the scatter of estimates."""

import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion_jax.metrics import of_arrays

REPETITIONS = 200
RHO = 0.7
MIXING = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 2.0]])


def gaussian(rng, n, shape=(3,), scale=1.0, shift=0.0):
    return rng.normal(shift, scale, (n, *shape))


def mean_norm(dimensions, scale):
    """E|Z| of Z ~ N(0, scale^2 I), the mean of a chi distribution."""
    ratio = scipy.special.gammaln((dimensions + 1) / 2) - scipy.special.gammaln(dimensions / 2)
    return scale * np.sqrt(2) * np.exp(ratio)


def repeat(function, repetitions=REPETITIONS, seed=0):
    rng = np.random.default_rng(seed)
    found = [function(rng) for _ in range(repetitions)]
    return np.array([f.value for f in found]), np.array([f.standard_error for f in found])


def z_scores(found, exact):
    error = np.where(found.standard_error == 0, np.inf, found.standard_error)  # the autocorrelation at lag 0 is exact
    return (found.value - exact) / error


def ar_1(rng, n, length, channels=1, rho=RHO):
    """Stationary series with variance 1, by the recursion."""
    noise = rng.normal(size=(n, length, channels))
    x = [noise[:, 0]]
    for i in range(1, length):
        x.append(rho * x[-1] + np.sqrt(1 - rho**2) * noise[:, i])
    return np.stack(x, axis=1)


def periodic_field(rng, n, spectrum):
    """A Gaussian field with a given spectrum on the grid, from white noise."""
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
    monkeypatch.setattr(of_arrays, "_BLOCK", 5)


# ---- Statistics


def test_vectors_have_the_mean_and_covariance_of_numpy(tiny_blocks):
    x = np.random.default_rng(0).normal(50, 1, (23, 3)) @ MIXING.T
    found = of_arrays.mean_and_covariance(x)
    np.testing.assert_allclose(found.mean.value, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.mean.standard_error, x.std(0, ddof=1) / np.sqrt(23), rtol=1e-10)
    np.testing.assert_allclose(found.covariance.value, np.cov(x, rowvar=False), rtol=1e-10)


def test_the_covariance_of_correlated_channels_of_a_series():
    """Mixed AR(1) series: positions depend on each other, and the standard errors include this dependence."""
    rng, means, covariances = np.random.default_rng(0), [], []
    for _ in range(300):
        found = of_arrays.mean_and_covariance(2.0 + ar_1(rng, 60, 12, 3) @ MIXING.T)
        means.append(z_scores(found.mean, np.full(3, 2.0)))
        covariances.append(z_scores(found.covariance, MIXING @ MIXING.T))
    means = np.array(means)  # errors that are estimated from n examples make the variance larger by about 2 / n
    assert (abs(means.mean(0)) < 5 / np.sqrt(300)).all() and (abs(means.var(0) - 1) < 5 * np.sqrt(2 / 300) + 0.05).all()
    # Sums of squares over 60 examples are skewed, so the mean z-score is as low as -0.3.
    covariances = np.array(covariances)
    assert (abs(covariances.mean(0)) < 0.45).all() and (abs(covariances.var(0) - 1) < 0.6).all()
    wrong = MIXING @ np.diag([1, 1.6, 1]) @ MIXING.T
    many = of_arrays.mean_and_covariance(ar_1(rng, 4000, 12, 3) @ MIXING.T)
    assert abs(z_scores(many.covariance, wrong)).max() > 6
    assert abs(z_scores(many.covariance, MIXING @ MIXING.T)).max() < 4.5


@pytest.mark.parametrize("shape", [(9,), (8,), (6, 4), (4, 3, 5)])
def test_parseval(shape, tiny_blocks):
    x = np.random.default_rng(0).normal(3, 2, (17, *shape, 3)) @ MIXING.T
    covariance = of_arrays.mean_and_covariance(x).covariance.value
    found = of_arrays.power_spectrum(x, periodic=True)
    frequencies = np.linalg.norm(np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"), axis=0)
    _, sizes = np.unique(np.round(frequencies * max(shape)), return_counts=True)
    mean = sizes @ found.value / np.prod(shape)
    # Correcting for the estimated mean changes frequency 0 here and the variance there, by the same number.
    np.testing.assert_allclose(mean, np.diag(covariance), rtol=1e-10, atol=1e-10)


def test_spectra_of_few_examples_are_unbiased():
    """Four AR(1) series around an estimated mean: at every frequency, the mean over all repetitions equals the definition
    sum_{r,s} rho^|r-s| cos(2 pi k (r - s)) / L within four standard errors."""
    rng, length, repetitions = np.random.default_rng(0), 8, 4000
    x = 3 + ar_1(rng, 4 * repetitions, length, 2)
    spectra = np.array([of_arrays.power_spectrum(part, periodic=True).value for part in np.split(x, repetitions)])
    np.testing.assert_allclose(of_arrays.power_spectrum(x).x, np.arange(5) / 8)
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    shared = RHO ** abs(lags) / length
    exact = np.array([(shared * np.cos(2 * np.pi * k * lags / length)).sum() for k in range(length // 2 + 1)])
    error = spectra.std(axis=0, ddof=1) / np.sqrt(repetitions)
    assert (abs(spectra.mean(axis=0) - exact[:, None]) < 4 * error).all() and (error < 0.05 * exact.max()).all()


def test_the_spectrum_of_a_periodic_field_is_recovered_and_a_wrong_one_detected():
    shape = (12, 16)
    rng, exact = np.random.default_rng(0), smooth_spectrum(shape)
    found = of_arrays.power_spectrum(periodic_field(rng, 2000, exact), periodic=True)
    shells = shell_average(exact)
    assert abs(z_scores(found, shells[:, None])).max() < 4.5
    wrong = smooth_spectrum(shape, 2.2) * (exact.mean() / smooth_spectrum(shape, 2.2).mean())  # with the same variance
    assert abs(z_scores(found, shell_average(wrong)[:, None])).max() > 8


def test_a_window_shows_a_floor_that_a_step_between_the_ends_hides():
    """Random slopes and white noise of 0.3: at the upper half of the frequencies, the spectrum is that of the noise."""
    rng = np.random.default_rng(0)
    position = np.stack(np.meshgrid(np.arange(32), np.arange(24), indexing="ij"), axis=-1)
    x = np.einsum("xya,na->nxy", position, rng.normal(size=(400, 2)))[..., None] + 0.3 * rng.normal(
        size=(400, 32, 24, 1)
    )
    found, without = (of_arrays.power_spectrum(x, periodic=periodic) for periodic in (False, True))
    high = found.x > 0.3
    np.testing.assert_allclose(found.value[high], 0.3**2, rtol=0.05)
    assert (without.value[high & (found.x < 0.4)] > 50 * 0.3**2).all()
    white = of_arrays.power_spectrum(3 + 2 * rng.normal(size=(2000, 9, 7, 2)))
    assert abs(z_scores(white, np.full((1, 2), 4.0))).max() < 4.5


def test_the_autocorrelation_by_its_definition(tiny_blocks):
    x = np.random.default_rng(0).gamma(2.0, size=(17, 9, 2))
    centered = x - x.mean((0, 1))
    of_mean = centered.mean(1).var(0, ddof=1) / 17
    for periodic in (False, True):
        later = [np.roll(centered, -h, axis=1)[:, : 9 if periodic else 9 - h] for h in range(5)]
        covariance = np.stack([(centered[:, : x.shape[1]] * x).mean((0, 1)) + of_mean for x in later])
        found = of_arrays.autocorrelation(x, periodic=periodic)
        np.testing.assert_allclose(found.value, covariance / covariance[0], rtol=1e-10)
        assert (found.x == np.arange(5)).all() and (found.standard_error[0] == 0).all()


def test_the_autocorrelation_of_an_ar_1_process():
    rng, lags = np.random.default_rng(0), np.arange(7)
    z = []
    for _ in range(200):
        found = of_arrays.autocorrelation(5.0 + ar_1(rng, 100, 12))
        z.append(z_scores(found, RHO ** lags[:, None])[1:, 0])
    z = np.array(z)
    # A ratio of means over 100 examples has a bias of about 1 / 100 of the scatter per example.
    assert (abs(z.mean(0)) < 0.4).all() and (abs(z.var(0) - 1) < 0.55).all()
    found = of_arrays.autocorrelation(ar_1(rng, 4000, 12))
    assert abs(z_scores(found, RHO ** lags[:, None])).max() < 4.5
    assert abs(z_scores(found, (RHO - 0.04) ** lags[:, None])).max() > 6


# ---- Distances


def energy_by_definition(x, y):
    def mean(a, b, exclude):
        pairs = [(i, j) for i, j in itertools.product(range(len(a)), range(len(b))) if not (exclude and i == j)]
        return np.mean([np.linalg.norm(a[i] - b[j]) for i, j in pairs])

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def test_energy_distance_by_its_definition(tiny_blocks):
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 13, (4, 2)), gaussian(rng, 17, (4, 2), 1.3, 40.0)
    assert of_arrays.energy_distance(x, y).value == pytest.approx(energy_by_definition(x, y), rel=1e-10)
    assert of_arrays.energy_distance(x, x).value == pytest.approx(energy_by_definition(x, x), rel=1e-6)


def test_energy_distance_of_two_gaussians_and_its_standard_error():
    """N(0, I) and N(0, s^2 I) in five dimensions: every term is the mean of a chi distribution. 200 estimates give a
    standard deviation to 5%, and z-scores have mean 0 and variance 1 within four standard errors."""
    s = 1.6
    exact = 2 * mean_norm(5, np.hypot(1, s)) - mean_norm(5, np.sqrt(2)) - mean_norm(5, s * np.sqrt(2))
    values, errors = repeat(lambda rng: of_arrays.energy_distance(gaussian(rng, 120, (5,)), gaussian(rng, 80, (5,), s)))
    z = (values - exact) / errors
    assert abs(z.mean()) < 4 / np.sqrt(REPETITIONS) and abs(z.std() - 1) < 4 / np.sqrt(2 * REPETITIONS)
    assert exact > 4 * errors.mean()  # it is seen


@pytest.mark.parametrize(("dimensions", "sizes"), [(1, (30, 30)), (3, (8, 60)), (10, (30, 20))])
def test_energy_distance_of_equal_distributions(dimensions, sizes):
    """The estimate is unbiased, and same_distribution_std^2 equals its variance within four standard errors of the ratio, 4
    to 11% (the estimate is a weighted sum of chi-squares, whose fourth moment is measured). The standard error is never
    below same_distribution_std."""
    rng, count = np.random.default_rng(0), 3000
    found = [of_arrays.energy_distance(*(gaussian(rng, n, (dimensions,)) for n in sizes)) for _ in range(count)]
    values, errors, same_distribution = np.array([(f.value, f.standard_error, f[3]) for f in found]).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(count)
    squares, claimed = (values - values.mean()) ** 2, same_distribution**2
    error = np.hypot(squares.std() / squares.mean(), claimed.std() / claimed.mean()) / np.sqrt(count)
    assert abs(claimed.mean() / squares.mean() - 1) < 4 * error < 0.35
    assert (errors >= same_distribution).all() and 0.005 < np.mean(values > 3 * same_distribution) < 0.04


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_shifted_sets(shift):
    """A shift d in one dimension has the distance d; in D dimensions the distance is |d| / sqrt(D) on average."""
    x, key = gaussian(np.random.default_rng(0), 50, (1,)), jax.random.key(0)
    found = of_arrays.sliced_wasserstein(key, x, x + shift, projections=4)
    assert found.value == pytest.approx(shift, abs=1e-12)
    # A squared entry of a random unit vector has mean 1/D and variance 2 (D - 1) / (D^2 (D + 2)).
    x = gaussian(np.random.default_rng(0), 50, (2, 3))
    found = of_arrays.sliced_wasserstein(key, x, x + shift, projections=4000, permutations=2)
    assert abs(found.value - shift) <= 4 * shift * 0.5 * np.sqrt(2 * 5 / 8 / 4000)


def test_sets_of_different_sizes_in_one_dimension():
    """Equal to sets of one size, in which every number is repeated."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(45, 1)), rng.gamma(2.0, size=(60, 1))
    found = of_arrays.sliced_wasserstein(jax.random.key(0), x, y, projections=2)
    repeated = np.sort(x[:, 0].repeat(4)) - np.sort(y[:, 0].repeat(3))
    assert found.value == pytest.approx(np.sqrt(np.mean(repeated**2)), rel=1e-12)


def test_the_jackknife_of_few_groups():
    """From a single point the squared distance is a mean of squares. The jackknife splits six numbers into three pairs."""
    x, y = np.array([[0.0], [1.0], [3.0], [7.0], [12.0], [20.0]]), np.full((6, 1), 50.0)
    errors = {
        round(of_arrays.sliced_wasserstein(jax.random.key(i), x, y, groups=3, projections=2).standard_error, 6)
        for i in range(8)
    }
    expected = set()
    for order in itertools.permutations((x[:, 0] - 50) ** 2):
        pairs = np.reshape(order, (3, 2))
        roots = np.sqrt([np.delete(pairs, i, axis=0).mean() for i in range(3)])
        expected.add(round(np.sqrt(2 * roots.var()), 6))
    assert len(errors) > 1 and errors <= expected
    # Examples 0 and 2 are the histograms' first group, 1 and 3 the second group; the distance is the share above 25.
    x, y = np.zeros((4, 4, 1)), np.array([[0, 0, 0, 0], [50, 50, 50, 0], [50, 0, 0, 0], [50, 50, 50, 50]])[..., None]
    found = of_arrays.marginal_histograms(x, y, bins=2, limits=(0, 50), groups=2).distance
    np.testing.assert_allclose(found[:2], [[0.5], [(7 / 8 - 1 / 8) / 2]], rtol=1e-12)


def test_sliced_wasserstein_of_one_distribution():
    """Permutations estimate the distance between finite sets from one distribution; another distribution is far above this
    distance."""
    keys = iter(jax.random.split(jax.random.key(1), 60))
    rng = np.random.default_rng(0)

    def draw(scale):
        sets = gaussian(rng, 80), gaussian(rng, 100, scale=scale)
        return of_arrays.sliced_wasserstein(next(keys), *sets, projections=32)

    found = [draw(1.0) for _ in range(50)]
    z = np.array([(f.value - f.same_distribution) / f.same_distribution_std for f in found])
    assert abs(z.mean()) < 4 * z.std() / np.sqrt(50) and 0.6 < z.std() < 1.6
    other = draw(2.0)
    assert other.value > other.same_distribution + 6 * other.same_distribution_std


def test_shares_are_those_of_numpy(tiny_blocks):
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 60, (7, 2)), gaussian(rng, 47, (7, 2), 1.5)
    found = of_arrays.marginal_histograms(x, y, bins=9, limits=of_arrays.value_range(np.concatenate([x, y])))
    for channel, (values, other) in enumerate(zip(x.T, y.T, strict=True)):
        edges = np.linspace(min(values.min(), other.min()), max(values.max(), other.max()), 10)
        np.testing.assert_allclose(found.edges[channel], edges, rtol=1e-12)
        shares = [np.histogram(v, edges)[0] / v.size for v in (values, other)]
        np.testing.assert_allclose([found.reference.value[channel], found.samples.value[channel]], shares, rtol=1e-12)
        assert found.distance.value[channel] == pytest.approx(0.5 * np.abs(shares[0] - shares[1]).sum(), rel=1e-12)


def test_histograms_against_the_normal_distribution():
    """Shares and standard errors: an example has equal values at all positions here, so the errors are sqrt(p (1 - p) /
    n)."""
    n, edges = 20_000, np.linspace(-2, 2, 9)
    rng = np.random.default_rng(0)
    x, y = (np.repeat(rng.normal(shift, 1, (n, 1, 1)), 5, axis=1) for shift in (0.0, 1.0))
    found = of_arrays.marginal_histograms(x, y, bins=8, limits=(-2, 2))
    inner = np.concatenate([[-np.inf], edges[1:-1], [np.inf]])
    exact = np.stack([np.diff(scipy.stats.norm(shift, 1).cdf(inner)) for shift in (0.0, 1.0)])
    for measured, p in zip((found.reference, found.samples), exact, strict=True):
        np.testing.assert_allclose(measured.standard_error[0], np.sqrt(p * (1 - p) / n), rtol=0.1)
        assert (abs(measured.value[0] - p) < 4.5 * measured.standard_error[0]).all()
    distance = 0.5 * np.abs(exact[0] - exact[1]).sum()
    assert abs(found.distance.value[0] - distance) < 4 * found.distance.standard_error[0] < 0.05


def test_the_standard_error_of_the_distance_and_the_distance_of_one_distribution():
    def distances(shift):
        rng, found = np.random.default_rng(1), []
        for _ in range(100):
            x, y = gaussian(rng, 300, (1,)), gaussian(rng, 200, (1,), 1.0, shift)
            found.append(of_arrays.marginal_histograms(x, y, bins=8, limits=(-2, 2)))
        return np.array([f.distance[:3] for f in found])[..., 0].T

    values, errors, _ = distances(1.0)
    assert abs(np.sqrt(np.mean(errors**2)) / values.std(ddof=1) - 1) < 0.35
    values, errors, same_distribution = distances(0.0)
    assert abs(values.mean() / same_distribution.mean() - 1) < 0.05 and np.sqrt(np.mean(errors**2)) > 0.9 * values.std()


def test_bad_arguments():
    x, key = np.random.default_rng(0).normal(size=(50, 8, 2)), jax.random.key(0)
    not_finite = x.copy()
    not_finite[7, 1, 0] = np.nan
    sliced = functools.partial(of_arrays.sliced_wasserstein, key)
    histograms = functools.partial(of_arrays.marginal_histograms, limits=(-1, 1))
    cases = [
        (of_arrays.power_spectrum, [x[:, 0]], "needs at least one spatial axis"),
        (of_arrays.autocorrelation, [x[..., None]], r"needs series \[n, L, C\]"),
        (of_arrays.autocorrelation, [x * [1, 0]], "channel 1 is constant"),
        (of_arrays.mean_and_covariance, [x[:1]], "x has 1 examples; this needs at least 2"),
        (of_arrays.mean_and_covariance, [not_finite], "example 7 has values that are not finite"),
    ]
    for function in (of_arrays.energy_distance, sliced, histograms):
        cases += [(function, [x, x[..., :1]], r"shape \(8, 2\), but samples has \(8, 1\); the shapes must be equal")]
        cases += [(function, [x, x[:3]], "samples has 3 examples; this needs at least")]
    for function, arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            function(*arguments)

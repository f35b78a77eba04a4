"""Distances of sets of arrays: closed forms of Gaussians, SciPy, and standard errors against the scatter of estimates."""

import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion_jax.evaluation import array_metrics, example_sets

REPETITIONS = 200


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


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(example_sets, "_BLOCK", 5)


def energy_by_definition(x, y):
    def mean(a, b, exclude):
        pairs = [(i, j) for i, j in itertools.product(range(len(a)), range(len(b))) if not (exclude and i == j)]
        return np.mean([np.linalg.norm(a[i] - b[j]) for i, j in pairs])

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def test_energy_distance_by_its_definition(tiny_blocks):
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 13, (4, 2)), gaussian(rng, 17, (4, 2), 1.3, 40.0)
    assert array_metrics.energy_distance(x, y).value == pytest.approx(energy_by_definition(x, y), rel=1e-10)
    assert array_metrics.energy_distance(x, x).value == pytest.approx(energy_by_definition(x, x), rel=1e-6)


def test_energy_distance_of_two_gaussians_and_its_standard_error():
    """N(0, I) and N(0, s^2 I) in five dimensions: every term is the mean of a chi distribution. 200 estimates know their
    standard deviation to 5%, and z-scores have a mean of 0 and a variance of 1 within four of their own errors."""
    s = 1.6
    exact = 2 * mean_norm(5, np.hypot(1, s)) - mean_norm(5, np.sqrt(2)) - mean_norm(5, s * np.sqrt(2))
    values, errors = repeat(
        lambda rng: array_metrics.energy_distance(gaussian(rng, 120, (5,)), gaussian(rng, 80, (5,), s))
    )
    z = (values - exact) / errors
    assert abs(z.mean()) < 4 / np.sqrt(REPETITIONS) and abs(z.std() - 1) < 4 / np.sqrt(2 * REPETITIONS)
    assert exact > 4 * errors.mean()  # it is seen


@pytest.mark.parametrize(("dimensions", "sizes"), [(1, (30, 30)), (3, (8, 60)), (10, (30, 20))])
def test_energy_distance_of_equal_distributions(dimensions, sizes):
    """Unbiased, and the square of same_law_std is the variance within four errors of the ratio, which are 4 to 11% of it (the
    estimate is a weighted sum of chi-squares, whose fourth moment is measured). The standard error is never below it."""
    rng, count = np.random.default_rng(0), 3000
    found = [array_metrics.energy_distance(*(gaussian(rng, n, (dimensions,)) for n in sizes)) for _ in range(count)]
    values, errors, same_law = np.array(found).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(count)
    squares = (values - values.mean()) ** 2
    error = np.hypot(squares.std() / squares.mean(), (same_law**2).std() / (same_law**2).mean()) / np.sqrt(count)
    assert abs((same_law**2).mean() / squares.mean() - 1) < 4 * error < 0.35
    assert (errors >= same_law).all() and 0.005 < np.mean(values > 3 * same_law) < 0.04


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_shifted_sets(shift):
    """A shift d in one dimension is the distance d; in D dimensions it is |d| / sqrt(D) on average."""
    x, key = gaussian(np.random.default_rng(0), 50, (1,)), jax.random.key(0)
    found = array_metrics.sliced_wasserstein(key, x, x + shift, projections=4)
    assert found.value == pytest.approx(shift, abs=1e-12)
    # The square of an entry of a unit vector has the mean 1/D and the variance 2 (D - 1) / (D^2 (D + 2)).
    x = gaussian(np.random.default_rng(0), 50, (2, 3))
    found = array_metrics.sliced_wasserstein(key, x, x + shift, projections=4000, permutations=2)
    assert abs(found.value - shift) <= 4 * shift * 0.5 * np.sqrt(2 * 5 / 8 / 4000)


def test_sets_of_different_sizes_in_one_dimension():
    """As sets of one size, in which every number is repeated."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(45, 1)), rng.gamma(2.0, size=(60, 1))
    found = array_metrics.sliced_wasserstein(jax.random.key(0), x, y, projections=2)
    repeated = np.sort(x[:, 0].repeat(4)) - np.sort(y[:, 0].repeat(3))
    assert found.value == pytest.approx(np.sqrt(np.mean(repeated**2)), rel=1e-12)


def test_the_jackknife_of_few_groups():
    """From a single point the squared distance is a mean of squares. Three groups of six numbers are pairs of them."""
    x, y = np.array([[0.0], [1.0], [3.0], [7.0], [12.0], [20.0]]), np.full((6, 1), 50.0)
    errors = {
        round(array_metrics.sliced_wasserstein(jax.random.key(i), x, y, groups=3, projections=2).standard_error, 6)
        for i in range(8)
    }
    expected = set()
    for order in itertools.permutations((x[:, 0] - 50) ** 2):
        pairs = np.reshape(order, (3, 2))
        roots = np.sqrt([np.delete(pairs, i, axis=0).mean() for i in range(3)])
        expected.add(round(np.sqrt(2 * roots.var()), 6))
    assert len(errors) > 1 and errors <= expected
    # Examples 0 and 2 are one group of the histograms, 1 and 3 the other; the distance is the share above 25.
    x, y = np.zeros((4, 4, 1)), np.array([[0, 0, 0, 0], [50, 50, 50, 0], [50, 0, 0, 0], [50, 50, 50, 50]])[..., None]
    found = array_metrics.marginal_histograms(x, y, bins=2, limits=(0, 50), groups=2).distance
    np.testing.assert_allclose(found, [[0.5], [(7 / 8 - 1 / 8) / 2]], rtol=1e-12)


def test_sliced_wasserstein_of_one_law():
    """The permutations give the distance of finite sets of one law, and a different law is far above it."""
    keys = iter(jax.random.split(jax.random.key(1), 60))
    rng = np.random.default_rng(0)

    def draw(scale):
        return array_metrics.sliced_wasserstein(
            next(keys), gaussian(rng, 80), gaussian(rng, 100, scale=scale), projections=32
        )

    found = [draw(1.0) for _ in range(50)]
    z = np.array([(f.value - f.same_law) / f.same_law_std for f in found])
    assert abs(z.mean()) < 4 * z.std() / np.sqrt(50) and 0.6 < z.std() < 1.6
    other = draw(2.0)
    assert other.value > other.same_law + 6 * other.same_law_std


def test_shares_are_those_of_numpy(tiny_blocks):
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 60, (7, 2)), gaussian(rng, 47, (7, 2), 1.5)
    found = array_metrics.marginal_histograms(x, y, bins=9, limits=array_metrics.value_range(np.concatenate([x, y])))
    for channel, (values, other) in enumerate(zip(x.T, y.T, strict=True)):
        edges = np.linspace(min(values.min(), other.min()), max(values.max(), other.max()), 10)
        np.testing.assert_allclose(found.edges[channel], edges, rtol=1e-12)
        shares = [np.histogram(v, edges)[0] / v.size for v in (values, other)]
        np.testing.assert_allclose([found.reference.value[channel], found.samples.value[channel]], shares, rtol=1e-12)
        assert found.distance.value[channel] == pytest.approx(0.5 * np.abs(shares[0] - shares[1]).sum(), rel=1e-12)


def test_histograms_against_the_normal_distribution():
    """Shares and their errors: positions of an example are equal here, which makes errors sqrt(p (1 - p) / n)."""
    n, edges = 20_000, np.linspace(-2, 2, 9)
    rng = np.random.default_rng(0)
    x, y = (np.repeat(rng.normal(shift, 1, (n, 1, 1)), 5, axis=1) for shift in (0.0, 1.0))
    found = array_metrics.marginal_histograms(x, y, bins=8, limits=(-2, 2))
    inner = np.concatenate([[-np.inf], edges[1:-1], [np.inf]])
    exact = np.stack([np.diff(scipy.stats.norm(shift, 1).cdf(inner)) for shift in (0.0, 1.0)])
    for measured, p in zip((found.reference, found.samples), exact, strict=True):
        np.testing.assert_allclose(measured.standard_error[0], np.sqrt(p * (1 - p) / n), rtol=0.1)
        assert (abs(measured.value[0] - p) < 4.5 * measured.standard_error[0]).all()
    distance = 0.5 * np.abs(exact[0] - exact[1]).sum()
    assert abs(found.distance.value[0] - distance) < 4 * found.distance.standard_error[0] < 0.05


def test_the_standard_error_of_the_distance_and_the_distance_of_one_law():
    def distances(shift):
        rng, found = np.random.default_rng(1), []
        for _ in range(100):
            x, y = gaussian(rng, 300, (1,)), gaussian(rng, 200, (1,), 1.0, shift)
            found.append(array_metrics.marginal_histograms(x, y, bins=8, limits=(-2, 2)))
        values, errors = (np.array([getattr(f.distance, name)[0] for f in found]) for name in found[0].distance._fields)
        return values, errors, np.array([f.same_law[0] for f in found])

    values, errors, _ = distances(1.0)
    assert abs(np.sqrt(np.mean(errors**2)) / values.std(ddof=1) - 1) < 0.35
    values, errors, same_law = distances(0.0)
    assert abs(values.mean() / same_law.mean() - 1) < 0.05 and np.sqrt(np.mean(errors**2)) > 0.9 * values.std()


def test_a_constant_channel_has_one_bin():
    x = np.zeros((40, 2))
    found = array_metrics.marginal_histograms(x, x, limits=array_metrics.value_range(x))
    assert (found.distance.value == 0).all() and (found.reference.value.max(axis=1) == 1).all()


def test_bad_arguments():
    x, key = np.zeros((50, 3, 2)), jax.random.key(0)
    not_finite = x.copy()
    not_finite[7, 1, 0] = np.nan
    sliced = functools.partial(array_metrics.sliced_wasserstein, key)
    histograms = functools.partial(array_metrics.marginal_histograms, limits=(-1, 1))
    for function in (array_metrics.energy_distance, sliced, histograms):
        for one, other, words in (
            (x, not_finite, "example 7 has values that are not finite"),
            (x, x[..., :1], r"shape \(3, 2\) and samples of \(3, 1\); they must be equal"),
            (x, x[:3], "samples has 3 examples; this needs at least"),
        ):
            with pytest.raises(ValueError, match=words):
                function(one, other)

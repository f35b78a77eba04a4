"""Sample metrics: closed forms, definitions in plain NumPy, and edge cases."""

import numpy as np
import pytest

from diffusion_jax import metrics
from diffusion_jax.metrics import of_features


def gaussian(seed, n, dimensions, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (n, dimensions))


def test_commuting_covariances():
    """If both covariances have the same axes, the distance is sum (sqrt a - sqrt b)^2, also over fourteen orders of
    magnitude."""
    axes, rng = np.linalg.qr(gaussian(0, 60, 60))[0], np.random.default_rng(1)
    a, b = 10 ** rng.uniform(-12, 2, 60), 10 ** rng.uniform(-12, 2, 60)
    one, other = (of_features.Moments(np.zeros(60), axes * values @ axes.T, 100) for values in (a, b))
    exact = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert of_features.frechet_distance(one, other) == pytest.approx(exact, rel=1e-8)
    assert of_features.frechet_distance(one, one) == pytest.approx(0, abs=1e-12 * a.sum())


def test_fewer_images_than_dimensions():
    """Then both covariances are singular: the trace is the nuclear norm of the centered arrays' product."""
    x, y = gaussian(0, 30, 200), gaussian(1, 40, 200, 1.5, 0.2)
    cx, cy = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.svd(cx @ cy.T, compute_uv=False).sum() / np.sqrt(29 * 39)
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx**2).sum() / 29 + (cy**2).sum() / 39 - 2 * cross
    assert of_features.frechet_distance(of_features.moments(x), of_features.moments(y)) == pytest.approx(
        exact, rel=1e-12
    )


def test_moments_in_chunks():
    x = gaussian(0, 100, 7, 3.0, 50.0)
    whole, parts = of_features.moments(x), of_features.moments_of_chunks([x[:2], x[2:30], x[30:]])
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-12)
    assert parts.count == whole.count == 100
    for one, other in ((whole.mean, parts.mean), (whole.covariance, parts.covariance)):
        np.testing.assert_allclose(one, other, rtol=1e-11)


def test_kid_by_its_definition():
    """With whole sets as one subset, KID equals the explicit sums over pairs."""
    x, y = gaussian(0, 12, 5), gaussian(1, 12, 5, 1.2, 0.3)

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    exact = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
    found = of_features.kid(x, y, subsets=3, subset_size=12)
    assert found.mean == pytest.approx(exact, rel=1e-12) and found.std == pytest.approx(0, abs=1e-12)


def test_kid_has_the_published_subsets_of_1000_and_smaller_ones_of_few_examples():
    x = gaussian(0, 4100, 2)
    for count, size in ((100, 25), (4100, 1000)):
        found = metrics.METRICS["kid"].compute(x[:count], x[:count], metrics.Options()).values
        assert (found["_subset_size"], found["_subsets"]) == (size, 100)


def test_kid_of_one_distribution_is_zero_and_its_error_is_honest():
    """Over 60 repetitions, KID is unbiased, and the standard error equals the means' scatter, which 60 repetitions give to
    9%."""

    def repeated(shift, n, subsets, size):
        sets = [(gaussian(2 * i, n, 6), gaussian(2 * i + 1, n, 6, 1, shift)) for i in range(60)]
        found = [of_features.kid(*pair, subsets, size) for pair in sets]
        return np.array([estimate.mean for estimate in found]), np.mean([estimate.standard_error for estimate in found])

    means, claimed = repeated(0, 400, 20, 100)
    assert abs(means.mean()) < 4 * means.std(ddof=1) / np.sqrt(60)
    assert means.std(ddof=1) < claimed
    for n, subsets, size in ((400, 20, 100), (1000, 100, 20)):
        means, claimed = repeated(0.7, n, subsets, size)
        assert 0.7 < means.std(ddof=1) / claimed < 1.3


def test_inception_score():
    sure = 1e3 * np.eye(10)[np.arange(100) % 10]
    assert of_features.inception_score(sure).mean == pytest.approx(10)  # every class, each with certainty
    some = 1e3 * np.eye(10)[np.arange(60) % 3]  # three of ten classes, in equal parts
    for scale in (1, 1e300):  # p of the other classes is no float64
        assert of_features.inception_score(scale * some).mean == pytest.approx(3, rel=1e-12)
    assert of_features.inception_score(np.zeros((50, 10))).mean == pytest.approx(1)  # no image has information
    logits = gaussian(0, 25, 4)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    splits = [p[:10], p[10:20], p[20:]]  # the last image is kept
    scores = [np.exp(np.mean([sum(q * np.log(q / part.mean(0))) for q in part])) for part in splits]
    found = of_features.inception_score(logits, split_size=10)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12) and found.std == pytest.approx(np.std(scores))


def distances(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


def plain_manifolds(reference, samples, k):
    """The papers' definitions, pair by pair."""
    radius_r = np.sort(distances(reference, reference), axis=1)[:, k]
    radius_s = np.sort(distances(samples, samples), axis=1)[:, k]
    d = distances(samples, reference)
    precision, recall = (d <= radius_r).any(1).mean(), (d <= radius_s[:, None]).any(0).mean()
    return precision, recall, (d <= radius_r).sum() / (k * len(samples)), (d <= radius_r).any(0).mean()


@pytest.mark.parametrize("k", [3, 5])
def test_manifolds_by_their_definitions(k, monkeypatch):
    monkeypatch.setattr(of_features, "_BLOCK", 32)  # several blocks, and a rest
    reference, samples = gaussian(0, 150, 6), gaussian(1, 170, 6, 0.8, 0.4)
    precision, recall, density, coverage = plain_manifolds(reference, samples, k)
    assert of_features.precision_recall(reference, samples, k) == pytest.approx((precision, recall), abs=1e-12)
    assert of_features.density_coverage(reference, samples, k) == pytest.approx((density, coverage), rel=1e-6)
    assert 0.05 < recall < 0.95 and 0.05 < coverage < 0.95


def test_equal_distances_count_as_equal():
    """One-hot features: all other features are at the squared distance 2, up to rounding."""
    x = np.eye(30, dtype=np.float32)
    assert of_features.density_coverage(x[:20], x[10:], k=3) == (20 * 20 / (3 * 20), 1)
    assert of_features.precision_recall(x[:20], x[20:].repeat(5, axis=0)) == (1, 0)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_shares_have_no_unit(scale):
    """Also if the features' squares overflow or underflow in float32."""
    x, y = gaussian(0, 60, 6), gaussian(1, 50, 6, 0.7, 0.3)
    assert of_features.precision_recall(x * scale, y * scale) == of_features.precision_recall(x, y)
    assert of_features.density_coverage(x * scale, y * scale) == of_features.density_coverage(x, y)
    one, other = of_features.nearest_neighbors(x * scale, y * scale, 2), of_features.nearest_neighbors(x, y, 2)
    assert (one.indices == other.indices).all()
    np.testing.assert_array_equal(one.distances, scale * other.distances)


def test_nearest_neighbors():
    x, q = gaussian(0, 80, 5), gaussian(1, 30, 5)
    q[3] = x[17]
    d = distances(q, x)
    found = of_features.nearest_neighbors(x, q, k=4)
    assert (found.indices == np.argsort(d, axis=1)[:, :4]).all() and found.distances[3, 0] < 1e-6
    np.testing.assert_allclose(found.distances, np.sort(d, axis=1)[:, :4], atol=1e-6)
    others = of_features.nearest_neighbors(x, x, others=True)
    d = distances(x, x) + np.diag(np.full(80, np.inf))
    assert (others.indices[:, 0] == d.argmin(1)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: of_features.moments(x[:1]), "1 images are too few: a covariance needs 2"),
        (lambda x: of_features.moments(np.where(np.arange(20)[:, None] == 3, np.nan, x)), "of 1 images are not finite"),
        (lambda x: of_features.frechet_distance(*(of_features.moments(x[:, :n]) for n in (5, 3))), "5 and 3 dim"),
        (lambda x: of_features.kid(x, x, subset_size=21), r"subset_size of the KID .* in \[2, 20\], got 21"),
        (lambda x: of_features.precision_recall(x, x[:3]), "features has 3 examples; this needs at least 4"),
        (lambda x: of_features.precision_recall(x - 1.7e308 * np.sign(x), x), "too far apart"),
        (lambda x: of_features.frechet_distance(*[of_features.Moments(x[0], np.nan * np.eye(5), 9)] * 2), "not finite"),
    ],
)
def test_what_cannot_be_measured_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian(0, 20, 5))

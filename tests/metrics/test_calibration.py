"""Calibration of exact, narrow, wide, shifted and prior samplers of a Gaussian posterior."""

import re
import statistics

import numpy as np
import pytest

from diffusion_jax.metrics import calibration

D, L, N = 4, 19, 1000
TWO = np.zeros((5, 2)), np.zeros((3, 5, 2))


def simulate(rng, count=N, fault="none"):
    """(truth, samples, references): truths of N(0, C), y = truth + N(0, 0.5^2), and L draws of a sampler of the posterior.

    The references are y itself.
    """
    mixing = np.eye(D) + 0.5 * np.tri(D)
    covariance = mixing @ mixing.T / 2
    truth = rng.normal(size=(count, D)) @ np.linalg.cholesky(covariance).T
    y = truth + 0.5 * rng.normal(size=(count, D))
    if fault == "prior":
        samples = rng.normal(size=(L, count, D)) @ np.linalg.cholesky(covariance).T
        return truth, samples, y
    posterior = np.linalg.inv(np.linalg.inv(covariance) + np.eye(D) / 0.5**2)
    noise = rng.normal(size=(L, count, D)) @ np.linalg.cholesky(posterior).T
    deviations = np.sqrt(np.diag(posterior))
    scale, shift = {"none": (1, 0), "narrow": (0.8, 0), "wide": (1.2, 0), "shifted": (1, 0.3)}[fault]
    return truth, y @ posterior / 0.5**2 + scale * noise + shift * deviations, y


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("narrow", "is too narrow"),
        ("wide", "is too wide"),
        ("shifted", r"is shifted \(its true values are below the samples\)"),
        ("prior", "^the samples ignore the measurement"),
    ],
)
def test_faults_are_named_in_at_least_95_percent_of_repetitions(fault, words):
    named = [
        re.search(words, calibration.find_calibration(*simulate(np.random.default_rng(seed), fault=fault)).sentence)
        for seed in range(40)
    ]
    assert sum(each is not None for each in named) >= 38


def test_exact_posteriors_are_accepted_in_at_least_95_percent_of_repetitions():
    found = [calibration.find_calibration(*simulate(np.random.default_rng(seed))) for seed in range(40)]
    assert sum(each.sentence.startswith("no error found with 1,000 examples of 19") for each in found) >= 38
    shares = np.array([[share for share, _ in each.coverage.values()] for each in found])
    error = np.mean([[error for _, error in each.coverage.values()] for each in found])
    assert abs(shares.mean() - 0.9) < 4 * error / np.sqrt(40)
    assert error == pytest.approx(np.sqrt(0.09 / N), rel=0.02)


def test_a_prior_passes_without_references_that_depend_on_the_measurement():
    truth, samples, _ = simulate(np.random.default_rng(0), fault="prior")
    independent = np.random.default_rng(1).normal(size=truth.shape)
    for references in (None, independent):
        assert calibration.find_calibration(truth, samples, references).sentence.startswith("no error found")


def test_one_test_of_the_distances_is_enough_for_a_fault():
    """Equal quantities, and samples with independent quantities: at this size only the ranks' variance exceeds the limit."""
    rng = np.random.default_rng(2)
    found = calibration.find_calibration(
        np.repeat(rng.normal(size=(120, 1)), 2, axis=1), rng.normal(size=(99, 120, 2)), np.zeros((120, 2))
    )
    limit = statistics.NormalDist().inv_cdf(1 - 0.0027 / 2 / 6)
    assert abs(found.tests["distance"].z_mean) < limit < found.tests["distance"].z_variance
    assert found.sentence.startswith("the samples ignore the measurement")


@pytest.mark.parametrize("bins", [1, 4, 10, 20])
def test_uniform_ranks_have_even_shares_half_and_one(bins):
    found = np.repeat(np.arange(20), 50)
    shares, error = calibration.histogram(found, 19, bins)
    np.testing.assert_allclose(shares, 1 / bins)
    assert error == pytest.approx(np.sqrt((1 / bins) * (1 - 1 / bins) / 1000))
    test = calibration.rank_test(found, 19)
    assert (test.mean, test.variance, test.z_mean, test.z_variance) == pytest.approx((0.5, 1, 0, 0))
    assert calibration.coverage(found, 19) == pytest.approx((0.9, np.sqrt(0.09 / 1000)))


def test_the_standard_errors_are_the_scatter_of_uniform_ranks():
    rng = np.random.default_rng(2)
    tests = [calibration.rank_test(rng.integers(0, 20, 500), 19) for _ in range(400)]
    for z in ("z_mean", "z_variance"):
        assert 0.85 < np.std([getattr(test, z) for test in tests]) < 1.15


def test_equal_numbers_are_ordered_at_random():
    found = calibration.ranks(np.zeros(4000), np.zeros((3, 4000)))
    np.testing.assert_allclose(np.bincount(found) / 4000, 0.25, atol=4 * np.sqrt(0.1875 / 4000))


def test_distances_are_of_whole_examples():
    truth, references = np.zeros((2, 1, 2)), np.full((2, 1, 2), 3.0)
    samples = np.stack([truth + 1, truth - 1, truth + [[[9.0, 0.0]]]])
    np.testing.assert_array_equal(calibration.distance_ranks(truth, samples, references), [1, 1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: calibration.ranks(np.zeros(3), np.zeros((4, 2))), r"samples must be \[L, \*truth.shape\]"),
        (lambda: calibration.ranks(np.array([np.nan]), np.zeros((4, 1))), "not finite"),
        (lambda: calibration.histogram(np.zeros(5, int), 20, 10), "bins=10 must divide the 21 ranks of 20 samples"),
        (lambda: calibration.coverage(np.zeros(5, int), 10), "use 19 or 99 samples"),
        (lambda: calibration.rank_test(np.zeros(5, int), 1), "at least 2 samples .* got 1"),
        (lambda: calibration.find_calibration(*TWO, names=("a", "a")), "names must be 2 different names"),
        (
            lambda: calibration.find_calibration(*TWO, names=("a", "distance")),
            "names other than distance and classifier",
        ),
        (lambda: calibration.find_calibration(*TWO, names=("a",)), "names must be 2 different names"),
        (lambda: calibration.find_calibration(np.zeros(5), np.zeros((3, 5))), r"truth must be \[N, Q\]"),
        (lambda: calibration.distance_ranks(np.zeros((5, 2)), np.zeros((3, 5, 2)), np.zeros(5)), "the shape of truth"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_predictions_from_the_other_half_do_not_use_the_own_truth():
    """They follow the inputs, and changing an example's truth changes predictions of the other half alone."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 2))
    inputs = 5 * truth @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(200, 4)) + 7
    found = calibration.cross_predict(inputs, truth)
    assert np.corrcoef(found[:, 0], truth[:, 0])[0, 1] > 0.95 and np.abs(found - truth).mean() < 0.15
    changed = truth.copy()
    changed[4] += 100
    moved = np.abs(calibration.cross_predict(inputs, changed) - found).max(axis=1)
    assert (moved[::2] == 0).all() and (moved[1::2] > 0).all()
    np.testing.assert_allclose(calibration.cross_predict(inputs, truth, penalty=1e9), 0, atol=0.2)  # the mean
    missing, zero = inputs.copy(), inputs.copy()
    missing[7], zero[7] = np.nan, 0
    np.testing.assert_array_equal(calibration.cross_predict(missing, truth), calibration.cross_predict(zero, truth))


@pytest.mark.parametrize("kind", ["shifted", "too narrow", "too wide"])
def test_detectable_errors_are_found_in_95_percent(kind):
    """Monte Carlo at the default numbers of examples and samples; three standard errors of 2,000 repetitions are 0.014."""
    count, num_samples, quantities, repetitions = 100, 19, 10, 2000
    shift, narrow, wide = calibration.detectable_errors(count, num_samples, quantities)
    center, width = {"shifted": (shift, 1), "too narrow": (0, narrow), "too wide": (0, wide)}[kind]
    limit = statistics.NormalDist().inv_cdf(1 - 0.0027 / 2 / (2 * quantities + 3))
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repetitions):
        truth, samples = rng.normal(size=count), center + width * rng.normal(size=(num_samples, count))
        test = calibration.rank_test((samples < truth).sum(axis=0), num_samples)
        z = {"shifted": -test.z_mean, "too narrow": test.z_variance, "too wide": -test.z_variance}[kind]
        hits += z > limit
    assert 0.945 < hits / repetitions < 0.97


def test_detectable_errors_that_no_count_finds():
    _, narrow, wide = calibration.detectable_errors(10, 19, 10)
    assert narrow < 0.1 and wide == np.inf
    shift, narrow, _ = calibration.detectable_errors(2, 3, 10)
    assert shift == np.inf and narrow == 0
    assert calibration.detectable_errors(10_000, 19)[0] < 0.1

"""Classifier two-sample tests: closed forms for shifts, false alarms, and samples that leave a subspace."""

from statistics import NormalDist

import numpy as np
import pytest

from diffusion_jax.metrics import calibration
from diffusion_jax.metrics.classifier import classifier_scores, classifier_two_sample


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_the_area_of_a_shift_is_its_closed_form(shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20_000, 3)) * [3, 1, 0.1]
    y[:, 1] += shift
    found = classifier_two_sample(x, y)
    assert abs(found.value - NormalDist().cdf(shift / 2**0.5)) < 4 * found.standard_error + 0.003
    assert found.same_distribution == 0.5


def test_equal_distributions_have_half_the_area_with_the_stated_deviation():
    """Sets of different sizes, with heavy tails; the deviation of 800 repetitions has an error of 0.025."""
    rng = np.random.default_rng(1)
    found = [classifier_two_sample(*(rng.standard_t(4, size=(n, 2, 3)) for n in (60, 90))) for _ in range(800)]
    z = np.array([(each.value - 0.5) / each.same_distribution_std for each in found])
    assert abs(z.mean()) < 4 / 800**0.5 and abs(z.std() - 1) < 0.1
    errors = np.mean([each.standard_error for each in found])
    assert abs(errors / found[0].same_distribution_std - 1) < 0.1


@pytest.mark.parametrize("factor", [1, 3])
def test_samples_that_leave_a_subspace_are_found(factor):
    """20 numbers on 4 directions, with noise of 0.02: samples have three times this noise."""
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0][:4]
    x, y = (rng.normal(size=(400, 4)) @ basis + noise * rng.normal(size=(400, 20)) for noise in (0.02, factor * 0.02))
    found = classifier_two_sample(x, y)
    z = (found.value - 0.5) / found.same_distribution_std
    assert (z > 10) == (factor == 3)


def simulate(seed, wrong):
    """Truths given y with the sign of their slope; wrong samples have the mean and deviation of all truths given |y|."""
    rng = np.random.default_rng(seed)
    references = rng.normal(size=(400, 2))
    truth = references + 0.5 * rng.normal(size=references.shape)
    samples = references + 0.5 * rng.normal(size=(19, *references.shape))
    if wrong:  # each quantity is calibrated on average: half of the examples are shifted up, the other half down
        samples = samples + 0.3 * np.sign(references)
    return truth, samples, references


def test_a_shift_that_depends_on_the_measurement_is_found_and_exact_samples_are_not():
    """The deviation of z in 400 repetitions has an error of 0.035."""
    found = []
    for seed in range(400):
        truth, samples, _ = simulate(seed, False)
        ranks = calibration.ranks(*classifier_scores(truth[:100], samples[:, :100]))
        found.append(calibration.rank_test(ranks, 19).z_mean)
    assert abs(np.mean(found)) < 4 / 400**0.5 and abs(np.std(found) - 1) < 0.14
    truth, samples, references = simulate(0, True)
    result = calibration.find_calibration(truth, samples, references)
    assert all(abs(result.tests[name].z_mean) < 3 for name in ("quantity 0", "quantity 1"))
    assert "a classifier tells the true values from the samples" in result.sentence


def test_the_classifier_is_fitted_to_other_truths():
    truth, samples, _ = simulate(3, False)
    changed = truth.copy()
    changed[1] += 100  # scored, and not fitted to
    one, other = (classifier_scores(each, samples) for each in (truth, changed))
    assert one[0].shape == (200,) and one[1].shape == (19, 200)
    np.testing.assert_array_equal(one[0][1:], other[0][1:])
    changed[0] += 100
    assert (classifier_scores(changed, samples)[0][1:] != one[0][1:]).any()

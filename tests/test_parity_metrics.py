"""The metrics beside torch-fidelity's, on the same features; and the FID Inception beside pytorch-fid's and torch-fidelity's,
with the same weights. Run by `make parity`.
"""

import numpy as np
import pytest

from diffusion_jax.evaluation import metrics

pytestmark = pytest.mark.parity


def features(seed, n, dimensions=96, shift=0.0):
    """Skewed, positive and correlated, as pooled activations are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(shift, 1, (n, dimensions)) @ np.random.default_rng(9).normal(size=(dimensions, dimensions))
    return np.maximum(mixed, -2) / 4


@pytest.fixture(scope="module")
def pair():
    return features(0, 700), features(1, 600, shift=0.05)


def tensors(*arrays):
    import torch

    return [torch.from_numpy(array) for array in arrays]


def test_frechet_distance(pair):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity import metric_fid

    ours = metrics.frechet_distance(*map(metrics.moments, pair))
    theirs = [metric_fid.fid_features_to_statistics(t) for t in tensors(*pair)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert ours == pytest.approx(expected, rel=1e-6)
    statistics = [value for moments in theirs for value in (moments["mu"], moments["sigma"])]
    assert ours == pytest.approx(calculate_frechet_distance(*statistics), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_dimensions():
    """Where the eigenvalues of a product stray, and ours, checked against the closed form elsewhere, do not."""
    from torch_fidelity import metric_fid

    pair = features(0, 60), features(1, 50, shift=0.2)
    theirs = [metric_fid.fid_features_to_statistics(t) for t in tensors(*pair)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert metrics.frechet_distance(*map(metrics.moments, pair)) == pytest.approx(expected, rel=1e-6)


def test_kid(pair):
    from torch_fidelity import metric_kid

    reference, samples = pair
    theirs = metric_kid.kid_features_to_metric(
        *tensors(samples, reference), kid_subsets=20, kid_subset_size=300, verbose=False
    )
    ours = metrics.kid(reference, samples, subsets=20, subset_size=300)
    assert ours.mean == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_STD], rel=1e-6)


def test_inception_score(pair):
    """Its splits are ten, of images that it shuffles."""
    from torch_fidelity import metric_isc

    logits = pair[0]
    theirs = metric_isc.isc_features_to_metric(*tensors(logits), splits=10, shuffle=True, rng_seed=2020)
    shuffled = logits[np.random.RandomState(2020).permutation(len(logits))]
    ours = metrics.inception_score(shuffled, split_size=len(logits) // 10)
    assert ours.mean == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_STD], rel=1e-6)


def test_precision_and_recall(pair):
    from torch_fidelity import metric_prc

    reference, samples = pair
    theirs = metric_prc.prc_features_to_metric(
        *tensors(samples, reference), prc_neighborhood=3, prc_batch_size=256, save_cpu_ram=False, verbose=False
    )
    ours = metrics.precision_recall(reference, samples, k=3)
    assert ours.precision == pytest.approx(theirs[metric_prc.KEY_METRIC_PRECISION], rel=1e-6)
    assert ours.recall == pytest.approx(theirs[metric_prc.KEY_METRIC_RECALL], rel=1e-6)
    assert 0.1 < ours.precision < 0.99

"""The metrics against torch-fidelity's, on the same features; the FID Inception against pytorch-fid's and torch-fidelity's,
with the same weights. Run by `make parity`.
"""

import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.evaluation.features import inception
from diffusion_jax.metrics import of_features
from helpers import inception_peer

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
    """Against torch-fidelity, and against pytorch-fid's and ADM's formula, with SciPy's root of the product."""
    from torch_fidelity import metric_fid

    ours = of_features.frechet_distance(*map(of_features.moments, pair))
    theirs = [metric_fid.fid_features_to_statistics(t) for t in tensors(*pair)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert ours == pytest.approx(expected, rel=1e-6)
    (mu, sigma), (other_mu, other_sigma) = ((moments["mu"], moments["sigma"]) for moments in theirs)
    root = scipy.linalg.sqrtm(sigma @ other_sigma).real
    expected = ((mu - other_mu) ** 2).sum() + np.trace(sigma + other_sigma - 2 * root)
    assert ours == pytest.approx(expected, rel=1e-6)


def test_kid(pair):
    from torch_fidelity import metric_kid

    reference, samples = pair
    theirs = metric_kid.kid_features_to_metric(
        *tensors(samples, reference), kid_subsets=20, kid_subset_size=300, verbose=False
    )
    ours = of_features.kid(reference, samples, subsets=20, subset_size=300)
    assert ours.mean == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_STD], rel=1e-6)


def test_precision_and_recall(pair):
    from torch_fidelity import metric_prc

    reference, samples = pair
    theirs = metric_prc.prc_features_to_metric(
        *tensors(samples, reference), prc_neighborhood=3, prc_batch_size=256, save_cpu_ram=False, verbose=False
    )
    precision, recall = of_features.precision_recall(reference, samples, k=3)
    assert precision == pytest.approx(theirs[metric_prc.KEY_METRIC_PRECISION], rel=1e-6)
    assert recall == pytest.approx(theirs[metric_prc.KEY_METRIC_RECALL], rel=1e-6)
    assert 0.1 < precision < 0.99


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A state dict with the port's names and shapes."""
    import torch

    path = tmp_path_factory.mktemp("inception") / "redrawn.pth"
    torch.save(
        {name: torch.from_numpy(value) for name, value in inception_peer.as_port(inception_peer.redrawn()).items()},
        path,
    )
    return path


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and theirs.std() > 1e-3 * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(47, 33), (299, 299), (400, 301)])
def test_pytorch_fid(weights_file, size, monkeypatch):
    """pytorch-fid's network with the resize inside, its fully connected layer, and Mixed_6d for the spatial features."""
    import pytorch_fid.inception as theirs
    import torch

    monkeypatch.setattr(
        theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(weights_file, weights_only=True)
    )
    images, made, build = inception_peer.images(*size, 3), [], theirs.fid_inception_v3
    monkeypatch.setattr(theirs, "fid_inception_v3", lambda: made.append(build()) or made[0])
    network = theirs.InceptionV3([3]).eval()
    seen = {}
    made[0].Mixed_6d.register_forward_hook(lambda _, __, out: seen.update(spatial=out))
    with torch.no_grad():
        (pool,) = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        pool = pool[:, :, 0, 0]
        logits = made[0].fc(pool)
    extractor = inception(weights_file, "pytorch")
    found = extractor.function(extractor.params, images)
    close(found["pool"], pool)
    close(np.asarray(found["pool"]) @ extractor.head + made[0].fc.bias.detach().numpy(), logits)
    spatial = seen["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
    close(found["spatial"], spatial)

"""Weights of FID's Inception, redrawn, and torch-fidelity's features with them.

As a program (with `make parity`'s packages) writes the fixture that test_inception.py reads without these packages:

    PYTHONPATH=tests python -m helpers.inception_peer
"""

import tempfile

import flax.traverse_util
import jax
import numpy as np

from diffusion_jax.evaluation import inception
from diffusion_jax.evaluation.inception import Inception
from helpers.paths import FIXTURES

FIXTURE = FIXTURES / "inception.npz"


def redrawn() -> dict[tuple[str, ...], np.ndarray]:
    """This package's parameters by path, random, so that no norm is trivial and no activation is always 0."""
    shape = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), shape)["params"]
    rng, drawn = np.random.default_rng(0), {}
    for path, leaf in sorted(flax.traverse_util.flatten_dict(tree).items()):
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.2
        drawn[path] = rng.normal(path[-1] in ("scale", "var"), spread, leaf.shape).astype(np.float32)
        drawn[path] = np.abs(drawn[path]) if path[-1] == "var" else drawn[path]
    return drawn


def as_port(drawn) -> dict[str, np.ndarray]:
    """The same with the names and layouts of the PyTorch port."""

    def turned(value):
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)

    return {inception._torch_name(path): turned(value) for path, value in drawn.items()}


def images(height: int, width: int, count: int) -> np.ndarray:
    """Waves with some noise, uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.sin(
        rng.uniform(3, 25, (count, 1, 1, 3)) * x[..., None] + rng.uniform(3, 25, (count, 1, 1, 3)) * y[..., None]
    )
    return np.clip(127 + 100 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def torch_fidelity(weights_file, batch: np.ndarray) -> dict[str, np.ndarray]:
    """torch-fidelity's features: pool, logits without bias, and spatial features from Mixed_6d."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    wanted = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("theirs", wanted, feature_extractor_weights_path=str(weights_file))
    seen = {}
    network.Mixed_6d.register_forward_hook(lambda _, __, out: seen.update(spatial=out))
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(batch).permute(0, 3, 1, 2))
    spatial = seen["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(batch), -1)
    return {"pool": pool.numpy(), "logits": logits.numpy(), "spatial": spatial.numpy()}


def main() -> None:
    import torch

    batch = images(33, 47, 2)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({name: torch.from_numpy(value) for name, value in as_port(redrawn()).items()}, file.name)
        found = torch_fidelity(file.name, batch)
    np.savez_compressed(FIXTURE, images=batch, **found)
    print({name: float(value.std()) for name, value in found.items()})


if __name__ == "__main__":
    main()

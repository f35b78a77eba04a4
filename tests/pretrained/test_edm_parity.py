"""Pickles that EDM's own code writes, against that code: outputs and gradients. EDM_CODE names a copy of NVlabs/edm."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained
from helpers.edm_networks import OF_NCSNPP
from helpers.published_files import worst

CODE = os.environ.get("EDM_CODE")
pytestmark = [pytest.mark.parity, pytest.mark.skipif(not CODE, reason="EDM_CODE names no copy of NVlabs/edm")]

NARROW = {"img_resolution": 16, "img_channels": 3, "label_dim": 5, "channel_mult": [1, 2], "num_blocks": 1}
NARROW |= {"model_channels": 128, "attn_resolutions": [8], "augment_dim": 9, "dropout": 0.13}
CIFAR10 = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 128, "channel_mult": [2, 2, 2]}
CIFAR10 |= {"augment_dim": 9, "dropout": 0.13}
FFHQ = CIFAR10 | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
SONG = {"model_type": "SongUNet"}
NETWORKS = {
    "adm": NARROW | {"model_type": "DhariwalUNet"},
    "ddpm++": NARROW | SONG,
    "ncsn++": NARROW | SONG | OF_NCSNPP,
    "ddpm++ without classes": NARROW | SONG | {"label_dim": 0},
    "cifar10 vp": CIFAR10 | SONG,
    "cifar10 ve": CIFAR10 | SONG | OF_NCSNPP,
    "ffhq vp": FFHQ | SONG,
    "ffhq ve": FFHQ | SONG | OF_NCSNPP,
}
FULL = ("cifar10 vp", "cifar10 ve", "ffhq vp", "ffhq ve")


def redraw(model, seed):
    """Draws parameters of a scale that keeps activations near 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(drawn + ("norm" in name and name.endswith("weight")))


def read(model, path):
    with open(path, "wb") as file:
        pickle.dump({"ema": model}, file)
    return pretrained.load(path)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in FULL else ()) for n in NETWORKS])
def test_edm_s_own_code_has_these_outputs_and_gradients(name, tmp_path, monkeypatch):
    """D(x; sigma) with EDM's scaling, and the derivative of its product with u along drawn weights."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(CODE)
    networks = __import__("training.networks", fromlist=["networks"])
    arguments = NETWORKS[name]
    model = networks.EDMPrecond(**arguments).eval()
    redraw(model, 0)
    net = read(model, tmp_path / "weights.pkl")
    size, classes = arguments["img_resolution"], arguments["label_dim"]
    x, u = (np.float32(np.random.default_rng(seed).standard_normal((2, size, size, 3))) for seed in (1, 2))
    sigma, y = np.float32([0.3, 7.0]), np.array([3, 1]) if classes else None
    labels = torch.eye(classes)[[3, 1]] if classes else None
    x *= sigma[:, None, None, None]

    def denoise(params):
        s, keys = sigma[:, None, None, None], () if y is None else (y,)
        c_in = 1 / np.sqrt(s**2 + 0.25)
        output = net.model.apply({"params": params}, c_in * x, jnp.log(sigma) / 4, *keys)
        return 0.25 * c_in**2 * x + 0.5 * s * c_in * output

    theirs = model(torch.tensor(np.moveaxis(x, -1, 1)), torch.tensor(sigma), labels)
    (theirs * torch.tensor(np.moveaxis(u, -1, 1))).sum().backward()
    with jax.default_matmul_precision("highest"):
        ours, pull = jax.vjp(jax.jit(denoise), net.params)
        gradients = pull(jnp.asarray(u))[0]
    assert worst(np.moveaxis(ours, -1, 1), theirs.detach().numpy()) < 3e-6

    gradient = {key: value.grad.double() for key, value in model.named_parameters() if value.grad is not None}
    redraw(model, 3)
    along = read(model, tmp_path / "direction.pkl").params
    expected = sum(
        float((gradient[key] * value.detach()).sum()) for key, value in model.named_parameters() if key in gradient
    )
    products = jax.tree.leaves(
        jax.tree.map(lambda g, a: float(np.vdot(np.float64(g), np.float64(a))), gradients, along)
    )
    assert abs(sum(products) - expected) < 3e-6 * np.linalg.norm(products)

"""The U-Net against diffusers' on the same weights: a stored narrow fixture always, the full network with `make parity`."""

import diffusers_unet as peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models


def worst(ours, theirs):
    """The largest difference over the largest value."""
    return abs(np.asarray(ours) - theirs).max() / abs(theirs).max()


def run_ours(model, weights, x, time, y=None):
    params = peer.our_params(weights, levels=len(model.channel_multipliers))
    init = lambda: model.init(jax.random.key(0), jnp.zeros_like(x), jnp.zeros(len(x)), y)["params"]  # noqa: E731
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(init))
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: model.apply({"params": p}, x, jnp.float32(time), y))(params)


@pytest.mark.parametrize("name", peer.NARROW)
def test_narrow_network_gives_the_stored_output(name):
    with np.load(peer.FIXTURES / f"{name}.npz") as stored:
        arrays = dict(stored)
    weights = {key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")}
    inputs, model = {k: arrays[k] for k in ("x", "time", "y") if k in arrays}, models.UNet(**peer.NARROW[name][1])
    assert arrays["out"].std() > 0.1
    assert worst(run_ours(model, weights, **inputs), arrays["out"]) < 1e-5
    # The same check must see a wrong time, or it would prove nothing of the embedding.
    inputs["time"] = inputs["time"] + 1
    assert worst(run_ours(model, weights, **inputs), arrays["out"]) > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("size", [32, 16])
def test_full_network_equals_diffusers(size):
    pytest.importorskip("diffusers")
    model = peer.random_peer(peer.PUBLISHED)
    x = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    time = np.array([3, 777])
    theirs = peer.run_peer(model, x, time)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    assert sum(value.size for value in weights.values()) == 35_746_307
    assert theirs.std() > 0.1
    assert worst(run_ours(models.UNet(), weights, x, time), theirs) < 1e-5

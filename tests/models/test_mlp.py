"""The network for vectors: against float64 NumPy, and the behavior shared with the U-Net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from helpers.networks import apply, init_shapes, redraw, silu

FIELDS = {"channels": 8, "num_res_blocks": 2, "dropout": 0.0}


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def norm(x, layer):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return x * layer["norm"]["scale"] + layer["norm"]["bias"]


@pytest.mark.parametrize("scale_shift", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_the_network_in_numpy(scale_shift):
    model = models.MLP(**FIELDS, num_classes=3, scale_shift_norm=scale_shift, out_channels=4)
    x, time, y = (
        jax.random.normal(jax.random.key(0), (5, 2)),
        np.array([0.0, 3, 40, 500, 999]),
        np.array([0, 1, 2, 0, 1]),
    )
    params = redraw(init_shapes(model, (1, 2), y[:1]))
    out = apply(model, params, x, jnp.float32(time), y)
    p = jax.tree.map(np.float64, params)
    w = 10_000.0 ** (-np.arange(4) / 3)
    embedding = np.concatenate([np.sin(time[:, None] * w), np.cos(time[:, None] * w)], axis=1)
    embedding = dense(silu(dense(embedding, p["time_0"])), p["time_1"]) + p["class"]["embedding"][y]
    h = dense(np.float64(x), p["dense_in"])
    for block in (p["block_0"], p["block_1"]):
        inner, given = dense(silu(norm(h, block["norm1"])), block["dense1"]), dense(silu(embedding), block["time_proj"])
        if scale_shift:
            inner = norm(inner, block["norm2"]) * (1 + given[:, :8]) + given[:, 8:]
        else:
            inner = norm(inner + given, block["norm2"])
        h = h + dense(silu(inner), block["dense2"])
    np.testing.assert_allclose(out, dense(silu(norm(h, p["norm_out"])), p["dense_out"]), rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("initializer", ["ho", "openai"])
def test_it_starts_near_zero_and_every_parameter_has_a_gradient(initializer):
    model = models.MLP(**FIELDS, num_classes=3, condition_features=2, initializer=initializer)
    x, time, y, c = (
        jax.random.normal(jax.random.key(0), (4, 2)),
        jnp.arange(4.0),
        jnp.array([0, 1, 2, 0]),
        jnp.ones((4, 2)),
    )
    params = jax.jit(model.init)(jax.random.key(0), x, time, y, condition=c)["params"]
    assert abs(apply(model, params, x, time, y, condition=c)).max() < 1e-4
    grads = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, x, time, y, condition=c) ** 2).sum()))(
        redraw(params)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
    params = redraw(params)
    remat = apply(model.clone(remat=True), params, x, time, y, condition=c)
    np.testing.assert_allclose(remat, apply(model, params, x, time, y, condition=c), rtol=1e-5, atol=1e-5)


def test_from_config_takes_the_settings_of_its_kind():
    config = {"kind": "mlp", "channels": 16, "attention_levels": [1], "num_groups": 32}  # the U-Net's defaults
    assert models.from_config(config) == models.MLP(channels=16)
    assert models.from_config({"kind": "unet", "spatial_dims": 1}) == models.UNet(spatial_dims=1)
    with pytest.raises(ValueError, match=r"model.attention_levels=\(2,\) has no effect on an MLP"):
        models.from_config(config | {"attention_levels": (2,)})
    with pytest.raises(ValueError, match=r"model.kind='cnn' must be unet or mlp"):
        models.from_config({"kind": "cnn"})

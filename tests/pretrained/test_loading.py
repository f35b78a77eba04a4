"""Every family's stored networks, TensorFlow checkpoints and work directories load and give the stored outputs."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.pretrained import PretrainedError
from helpers.published_files import NARROW_FLAGS, ho_variables, save_with_tensorflow, stored, worst, write, write_folder
from helpers.stored_networks import FAMILIES, load, output


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_stored_networks_give_their_stored_outputs_and_come_back_from_one_file(name, tmp_path):
    net, arrays = load(tmp_path, name)
    assert arrays["out"].std() > 0.1
    assert worst(output(net, arrays), arrays["out"]) < 2e-5
    # The same check must detect a wrong time; otherwise the check would not test the embedding.
    assert worst(output(net, arrays, shift=1), arrays["out"]) > 1e-4
    if "classifier" in name:
        np.testing.assert_allclose(net.logits(arrays["x"], jnp.float32(arrays["time"])), output(net, arrays), atol=1e-4)
        tall = arrays["x"].reshape(len(arrays["x"]), -1, net.image_size[1] // 2, net.channels)  # as many positions
        with pytest.raises(ValueError, match="takes examples of shape"):
            net.logits(tall, arrays["time"])
        for wrong in (net.denoiser, lambda: net.sample(jax.random.key(0))):
            with pytest.raises(TypeError, match="use logits"):
                wrong()
    else:
        with pytest.raises(TypeError, match=r"use denoiser\(\)"):
            net.logits(arrays["x"], arrays["time"])
    file = tmp_path / "net.safetensors"
    pretrained.save_safetensors(net, file)
    again = pretrained.load(file)
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)
    for field in ("model", "image_size", "channels", "prediction", "variance", "clip", "low_resolution", "diffusion"):
        assert getattr(again, field) == getattr(net, field), field
    np.testing.assert_array_equal(again.schedule.betas, net.schedule.betas)
    assert pretrained.describe(file).params is None
    with pytest.raises(PretrainedError, match="contains its own description"):
        pretrained.load(file, "adm_lsun")


@pytest.mark.thorough
def test_older_names_of_attention_layers_load(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    folder = write_folder(tmp_path / "old", json.loads(str(arrays["config"])), weights)
    assert worst(output(pretrained.load(folder), arrays), arrays["out"]) < 2e-5


@pytest.mark.thorough
def test_both_orders_of_attention_rows(tmp_path):
    """(head, 3, d) as (3, head, d): the same network if its flags match the order, and another network otherwise."""
    weights, arrays = stored("openai_narrow")
    moved = {}
    for name, value in weights.items():
        if ".qkv." in name:
            heads = value.shape[0] // 3 // 16
            rows = np.arange(value.shape[0]).reshape(heads, 3, 16).transpose(1, 0, 2).ravel()
            value = value[rows]
        moved[name] = value
    path = write(tmp_path / "new.safetensors", moved)
    net = pretrained.load(path, NARROW_FLAGS.replace("False", "True"))
    assert worst(output(net, arrays), arrays["out"]) < 2e-5
    assert worst(output(pretrained.load(path, NARROW_FLAGS), arrays), arrays["out"]) > 1e-3


@pytest.mark.thorough
def test_tensorflow_checkpoints(tmp_path):
    """The EMA equals the port's network; the raw weights differ."""
    weights, arrays = stored("port_narrow")
    variables, flags = ho_variables(weights), {"image_size": 16, "variance": "fixed_small"}
    others = {f"{name}/ExponentialMovingAverage": value for name, value in variables.items()}
    others |= {f"{name}/Adam": 0 * value for name, value in variables.items()} | {"global_step": np.int64(7)}
    doubled = {name: 2 * value for name, value in variables.items()}
    path = save_with_tensorflow(tmp_path / "model.ckpt", doubled | others, global_step=7)
    net = pretrained.load(path, flags)
    assert path.endswith("model.ckpt-7") and worst(output(net, arrays), arrays["out"]) < 2e-5
    raw = pretrained.load(path, flags, ema=False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), raw.params, net.params)
    assert net.variance == "fixed_small" and net.model.attention_levels == (1,)
    path = save_with_tensorflow(tmp_path / "without_average.ckpt", variables)
    with pytest.raises(PretrainedError, match="no moving average; load the raw weights with ema=False"):
        pretrained.load(path, flags)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(path, flags, ema=False).params, net.params)

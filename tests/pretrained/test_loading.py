"""Stored networks of every family, TensorFlow's checkpoints and work directories load and give their stored outputs."""

import dataclasses
import json
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, pretrained
from diffusion_jax.pretrained import PretrainedError, description, parameters
from helpers.published_files import NARROW_FLAGS, ho_variables, stored, worst, write, write_folder
from helpers.stored_networks import FAMILIES, load, output


@pytest.mark.whole
@pytest.mark.parametrize("name", FAMILIES)
def test_stored_networks_give_their_stored_outputs_and_come_back_from_one_file(name, tmp_path):
    net, arrays = load(tmp_path, name)
    assert arrays["out"].std() > 0.1
    assert worst(output(net, arrays), arrays["out"]) < 2e-5
    # The same check must detect a wrong time, or it would not test the embedding.
    assert worst(output(net, arrays, shift=1), arrays["out"]) > 1e-4
    if "classifier" in name:
        np.testing.assert_allclose(net.logits(arrays["x"], jnp.float32(arrays["time"])), output(net, arrays), atol=1e-4)
        for wrong in (net.denoise_fn, net.sample):
            with pytest.raises(TypeError, match="use logits"):
                wrong(arrays["x"], arrays["time"])
    else:
        with pytest.raises(TypeError, match="use denoise_fn"):
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


@pytest.mark.whole
def test_older_names_of_attention_layers_load(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    folder = write_folder(tmp_path / "old", json.loads(str(arrays["config"])), weights)
    assert worst(output(pretrained.load(folder), arrays), arrays["out"]) < 2e-5


@pytest.mark.whole
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Written by TensorFlow itself: the EMA is the port's network, the raw weights another."""
    import tensorflow as tf

    weights, _ = stored("port_narrow")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        made = [tf.compat.v1.get_variable("global_step", initializer=np.int64(7))]
        for name, value in ho_variables(weights).items():
            made.append(tf.compat.v1.get_variable(name, initializer=2 * value))
            made.append(tf.compat.v1.get_variable(f"{name}/ExponentialMovingAverage", initializer=value))
            made.append(tf.compat.v1.get_variable(f"{name}/Adam", initializer=0 * value))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(made)
        return saver.save(session, str(tmp_path_factory.mktemp("tf") / "model.ckpt"), global_step=7)


@pytest.mark.whole
def test_tensorflow_checkpoints(checkpoint):
    _, arrays = stored("port_narrow")
    flags = {"image_size": 16, "variance": "fixed_small"}
    net = pretrained.load(checkpoint, flags)
    assert checkpoint.endswith("model.ckpt-7") and worst(output(net, arrays), arrays["out"]) < 2e-5
    raw = pretrained.load(checkpoint, flags, ema=False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), raw.params, net.params)
    assert net.variance == "fixed_small" and net.model.attention_levels == (1,)


def test_a_tensorflow_checkpoint_without_an_average(tmp_path):
    import tensorflow as tf

    weights, arrays = stored("port_narrow")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        made = [tf.compat.v1.get_variable(name, initializer=value) for name, value in ho_variables(weights).items()]
        session.run(tf.compat.v1.global_variables_initializer())
        path = tf.compat.v1.train.Saver(made).save(session, str(tmp_path / "model.ckpt"))
    with pytest.raises(PretrainedError, match="no moving average; load the raw weights with ema=False"):
        pretrained.load(path, {"image_size": 16, "variance": "fixed_small"})
    net = pretrained.load(path, {"image_size": 16, "variance": "fixed_small"}, ema=False)
    assert worst(output(net, arrays), arrays["out"]) < 2e-5


@pytest.mark.whole
def test_upsamplers_take_their_small_images(tmp_path):
    """As the network of x_t and the enlarged image in six channels, which has the same parameters."""
    from diffusion_jax.models import upsampling

    model = models.UNet(channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), out_channels=3)
    shapes = parameters.parameter_shapes(model, (8, 8, 6))
    rng = np.random.default_rng(0)
    params = flax.traverse_util.unflatten_dict(
        {p: 0.1 * rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    )
    described = description.make_description("x", model, 8, {}, low_resolution=4)
    net = dataclasses.replace(described, params=params)
    x, low, time = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(2, 4, 4, 3)), jnp.array([1.0, 2.0])
    large = upsampling.enlarge(jnp.float32(low), (8, 8))
    expected = model.apply({"params": params}, jnp.concatenate([jnp.float32(x), large], axis=-1), time)
    np.testing.assert_allclose(net.denoise_fn(jnp.float32(x), time, low=jnp.float32(low)), expected, atol=1e-6)
    for options in ({}, {"low": jnp.float32(low), "condition": large}):
        with pytest.raises(TypeError, match="give low=, the small images, and no condition"):
            net.denoise_fn(jnp.float32(x), time, **options)

"""Networks that are saved and loaded again are bit-identical; fields that a format cannot store are refused by name."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax import pretrained, schedules
from diffusion_jax.pretrained import PretrainedError, __main__, diffusers
from diffusion_jax.pretrained.model import make_clip, make_model
from helpers import torch_networks
from helpers.published_files import NARROW_FLAGS, SCHEDULER, stored, worst, write, write_folder
from helpers.stored_networks import load, output


@pytest.mark.thorough
@pytest.mark.parametrize("name", torch_networks.DIFFUSERS)
def test_diffusers_and_back_to_the_bit(name, tmp_path):
    net, _ = load(tmp_path, name)
    pretrained.save_diffusers(net, tmp_path / "out")
    before = stored(name)[0]
    after = safetensors.numpy.load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert diffusers.unet_from_config(config) == net.model
    with pytest.raises(PretrainedError, match="exists and is not empty"):
        pretrained.save_diffusers(net, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert diffusers.scheduler_from_config(scheduler)[0].items() <= dict(net.diffusion).items()
    again = pretrained.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        ({"channel_multipliers": (0.5, 1)}, {}, "channel_multipliers"),
        ({"num_heads": 2, "attention_levels": (0, 1)}, {}, "num_heads"),
        ({"downsample_padding": (1, 0)}, {}, "downsample_padding"),
        ({}, {"prediction": "x_prev"}, "prediction"),
        ({}, {"variance": "learned"}, "variance"),
        ({}, {"low_resolution": 8}, "low_resolution"),
        ({}, {"schedule": schedules.from_betas(10 * [0.1], np.arange(10) * 100.0)}, "rescale_timesteps"),
        ({}, {"clip": jnp.tanh}, "clip"),
    ],
)
def test_what_diffusers_cannot_store_is_refused_by_field(fields, changes, words, tmp_path):
    net, _ = load(tmp_path, "port_narrow")
    net = dataclasses.replace(net, model=net.model.clone(**fields), **changes)
    with pytest.raises(PretrainedError, match=words):
        pretrained.save_diffusers(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusual_diffusions_come_back_from_diffusers(tmp_path):
    net, _ = load(tmp_path, "port_narrow")
    settings = dict(net.diffusion) | {"schedule": "quadratic", "beta_end": 0.015, "beta_start": 2e-4, "prediction": "v"}
    changed = make_model("x", net.model, (16, 16), settings, clip=False, params=net.params)
    pretrained.save_diffusers(changed, tmp_path / "out")
    again = pretrained.load(tmp_path / "out")
    assert (again.clip, again.prediction, again.variance) == (False, "v", "fixed_small")
    np.testing.assert_array_equal(again.schedule.betas, changed.schedule.betas)


@pytest.mark.thorough
def test_a_table_of_betas_goes_through_diffusers(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    scheduler = {**SCHEDULER, "trained_betas": [0.01, 0.02, 0.5]}
    net = pretrained.load(write_folder(tmp_path / "in", json.loads(str(arrays["config"])), weights, scheduler))
    assert net.diffusion is None
    np.testing.assert_allclose(net.schedule.betas, [0.01, 0.02, 0.5])
    pretrained.save_diffusers(net, tmp_path / "out")
    np.testing.assert_array_equal(pretrained.load(tmp_path / "out").schedule.betas, net.schedule.betas)
    net = dataclasses.replace(net, clip=make_clip(1.5))
    pretrained.save_safetensors(net, tmp_path / "x.safetensors")
    again = pretrained.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(again.schedule.betas, net.schedule.betas)
    assert again.diffusion is None and again.variance == net.variance and float(again.clip(jnp.float32(7))) == 1.5
    with pytest.raises(PretrainedError, match="only True, False and a range"):
        pretrained.save_safetensors(dataclasses.replace(net, clip=jnp.tanh), tmp_path / "y.safetensors")
    with pytest.raises(PretrainedError, match="beta table"):
        pretrained.config_settings(net)


@pytest.mark.whole
def test_inspect_and_convert(tmp_path, capsys):
    weights, arrays = stored("openai_narrow")
    path = write(tmp_path / "model.safetensors", weights)
    __main__.main(["convert", str(path), str(tmp_path / "folder"), f"--flags={NARROW_FLAGS}"])
    __main__.main(["inspect", str(tmp_path / "folder")])
    out = capsys.readouterr().out
    assert "956,358 in" in out and "learned_range" in out and re.search(r"model.head_channels +16", out)
    assert worst(output(pretrained.load(tmp_path / "folder"), arrays), arrays["out"]) < 2e-5
    __main__.main(["convert", str(tmp_path / "folder"), str(tmp_path / "one.safetensors")])
    assert worst(output(pretrained.load(tmp_path / "one.safetensors"), arrays), arrays["out"]) < 2e-5
    with pytest.raises(SystemExit):
        __main__.main(["convert", str(path)])

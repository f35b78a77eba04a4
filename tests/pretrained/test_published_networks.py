"""Published flags, tensor shapes and configs give the presets; the presets have the published parameter counts."""

import warnings

import numpy as np
import pytest

from diffusion_jax import models, pretrained, sampling, schedules
from diffusion_jax.config import experiment, find_broken, presets, resolve
from diffusion_jax.denoiser import Denoiser
from diffusion_jax.pretrained import PretrainedError, ho, openai
from diffusion_jax.pretrained.parameters import Tensors, parameter_shapes, torch_shape
from helpers.published_files import README


def named(model, size, naming, channels=3):
    """Shapes under the other project's names, as PyTorch lists shapes; OpenAI's q, k and v are one tensor."""
    shapes = {}
    for path, shape in parameter_shapes(model, (size, size, channels)).items():
        name, shape = naming(path, model), torch_shape(shape, path)
        if naming is openai.NAMING:
            name = name.replace("out.2.proj_out", "out.2.c_proj")
            if ".k." in name or ".v." in name:
                continue
            if ".q." in name:
                name = name.replace(".q.", ".qkv_proj." if name.startswith("out.2") else ".qkv.")
                shape = (3 * shape[0], *shape[1:], 1) if name.endswith("weight") else (3 * shape[0],)
        shapes[name] = shape
    return shapes


@pytest.mark.thorough
@pytest.mark.parametrize("name", README)
def test_published_flags_and_the_tensors_shapes_give_the_presets(name, tmp_path):
    """A file's shapes and flags determine every field of the preset, and so does the file's name."""
    size, *_ = openai.PRESETS[name]
    shapes = named(models.preset(name), min(size, 256), openai.NAMING)
    if "classifier" in name:
        tokens = (size >> len(models.preset(name).channel_multipliers) - 1) ** 2 + 1
        shapes["out.2.positional_embedding"] = (shapes["out.2.positional_embedding"][0], tokens)
    tensors = Tensors("PyTorch", shapes, None)
    flags = README[name]
    if "classifier" not in name and "order" not in flags and "--num_heads 1" not in flags:
        with pytest.raises(PretrainedError, match="do not determine use_new_attention_order"):
            openai.describe_openai(tmp_path / "any.pt", tensors, flags)
        flags += " --use_new_attention_order False"
    from_flags, new_order = openai.describe_openai(tmp_path / "any.pt", tensors, flags)
    from_name, its_order = openai.describe_openai(tmp_path / "any.pt", tensors, name)
    for field in ("model", "prediction", "variance", "image_size", "low_resolution", "channels"):
        if not ("classifier" in name and field == "variance"):
            assert getattr(from_flags, field) == getattr(from_name, field), field
    assert new_order == its_order == (name == "adm_imagenet64")
    np.testing.assert_array_equal(from_flags.schedule.betas, from_name.schedule.betas)
    np.testing.assert_array_equal(from_flags.schedule.timesteps, from_name.schedule.timesteps)
    files = [file for file, preset in openai.FILES.items() if preset == name]
    assert files
    for file in files:
        model = openai.describe_openai(tmp_path / f"{file}.pt", tensors, None)[0].model
        assert model == (from_name.model.clone(dropout=0.0) if file.endswith("nodropout") else from_name.model)


def test_every_published_file_and_preset_is_known():
    assert set(openai.FILES.values()) == set(openai.PRESETS) == set(README) | EDM.keys() | CONSISTENCY.keys()
    assert set(presets.PRESETS) == set(openai.PRESETS) | set(ho.PRESETS)


# OpenAI's networks with EDM's preconditioning, whose code has no flags for them: {preset: (labels, files)}.
EDM = {"edm_imagenet64": (1000, ["edm_imagenet64_ema"]), "edm_lsun": (0, ["edm_bedroom256_ema", "edm_cat256_ema"])}


@pytest.mark.parametrize("name", EDM)
def test_networks_with_edm_s_preconditioning(name, tmp_path):
    """Their time is 250 log(sigma), and their rows of q, k and v have the new order."""
    num_classes, files = EDM[name]
    for file in files:
        net, new_order = openai.describe_openai(tmp_path / f"{file}.pt", Tensors("PyTorch", {}, None), None)
        assert new_order and net.model == models.preset(name)
        assert (net.sigma_data, net.prediction, net.num_classes, net.model.out_channels) == (0.5, "x_0", num_classes, 3)
        assert net.model.scale_shift_norm == (name == "edm_imagenet64")
        sampler, schedule = net.configure(Denoiser(lambda x_t, time: x_t, "x_0", sigma_data=0.5))
        assert isinstance(sampler, sampling.heun)
        np.testing.assert_allclose(schedule.alpha_bar, schedules.edm_steps(40).alpha_bar, rtol=1e-9)
        times = net.model.time_scale * schedule.timesteps
        np.testing.assert_allclose(times[[0, -1]], 250 * np.log([0.002, 80.0]), rtol=1e-6)


CONSISTENCY = {
    "consistency_imagenet64": (1000, ["cd_imagenet64_l2", "cd_imagenet64_lpips", "ct_imagenet64"]),
    "consistency_lsun": (0, ["cd_bedroom256_l2", "cd_cat256_lpips", "ct_bedroom256", "ct_cat256"]),
}


@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_networks(name, tmp_path):
    """EDM's networks with another scaling, sampled in one step from sigma = 80; they have no training and no bound."""
    num_classes, files = CONSISTENCY[name]
    for file in files:
        net, new_order = openai.describe_openai(tmp_path / f"{file}.pt", Tensors("PyTorch", {}, None), None)
        assert new_order and net.model == models.preset(name) and net.num_classes == num_classes
    assert net.model == models.preset(name.replace("consistency", "edm")).clone(dropout=0.0)
    assert (net.sigma_data, net.sigma_min) == (0.5, pytest.approx(0.002))
    given = net.denoiser()
    assert (given.sigma_data, given.sigma_min) == (net.sigma_data, net.sigma_min)
    for arguments in ((), (None, 1)):
        with warnings.catch_warnings():  # that one step blurs is a warning for other networks
            warnings.simplefilter("error")
            sampler, schedule = net.configure(given, *arguments)
        assert isinstance(sampler, sampling.consistency)
        np.testing.assert_allclose(schedule.alpha_bar, 1 / (1 + 80**2), rtol=1e-6)
    with pytest.raises(ValueError, match="heun does not fit these weights"):
        net.configure(given, sampling.heun(), 10)
    edm = openai.describe_openai(tmp_path / "edm_cat256_ema.pt", Tensors("PyTorch", {}, None), None)[0]
    with pytest.raises(ValueError, match="consistency does not fit these weights"):
        edm.configure(edm.denoiser(), sampling.consistency(), 1)
    assert edm.find_differences(net)
    settings = pretrained.config_settings(net)
    assert settings["sampling"] == {"clip": True, "sampler": "consistency", "steps": 1, "spacing": "trailing"}
    assert not pretrained.from_config(settings).find_differences(net)
    config = resolve(settings)
    for table, setting in (("train step", "diffusion.preconditioning"), ("evaluation", "evaluation.likelihood")):
        (message,) = [text for text in find_broken(config, table) if text.startswith(setting)]
        assert "consistency" in message


# Each preset's parameter count, and the configs that train the preset.
NETWORKS = {
    "ddpm_cifar10": (35_746_307, ["cifar10"]),
    "ddpm_256": (113_673_219, ["celeba_hq_256", "lsun_bedroom_256", "lsun_cat_256", "lsun_church_256"]),
    "improved_cifar10": (52_546_438, ["cifar10_improved", "cifar10_improved:vlb"]),
    "improved_imagenet64": (121_063_942, ["imagenet64_improved", "imagenet64_improved:vlb"]),
    "improved_imagenet64_conditional": (273_049_350, ["imagenet64_improved:conditional"]),
    "improved_lsun": (113_676_678, []),
    "improved_upsampler_64_256": (279_792_390, []),
    "adm_imagenet64": (295_904_454, ["imagenet64_adm"]),
    "adm_imagenet128": (421_529_606, ["imagenet_adm:128"]),
    "adm_imagenet256": (553_838_086, ["imagenet_adm", "imagenet_adm:256"]),
    "adm_imagenet256_unconditional": (552_814_086, ["imagenet_adm:256_unconditional"]),
    "adm_imagenet512": (558_997_638, ["imagenet_adm:512"]),
    "adm_lsun": (552_814_086, ["lsun_bedroom_adm", "lsun_cat_adm", "lsun_horse_adm"]),
    "edm_imagenet64": (295_899_267, []),  # ADM's 295,904,454 without the three channels of the variance
    "edm_lsun": (526_304_771, []),
    "consistency_imagenet64": (295_899_267, []),
    "consistency_lsun": (526_304_771, []),
    "adm_upsampler_64_256": (311_795_910, ["imagenet256_upsample"]),
    "adm_upsampler_128_512": (308_835_270, ["imagenet512_upsample"]),
    "adm_classifier64": (65_438_568, ["imagenet_classifier:64"]),
    "adm_classifier128": (42_568_040, ["imagenet_classifier:128"]),
    "adm_classifier256": (54_096_360, ["imagenet_classifier:256"]),
    "adm_classifier512": (54_448_360, ["imagenet_classifier:512"]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_have_the_published_numbers_of_parameters_and_configs_are_presets(name):
    (count, configs), (size, *_) = NETWORKS[name], openai.PRESETS.get(name) or ho.PRESETS[name]
    model = models.preset(name)
    shapes = parameter_shapes(model, (size, size, 3))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    for config in map(experiment, configs):
        made = models.from_config(config.model, type(model))
        if isinstance(model, models.UNet):
            made = made.clone(out_channels=model.out_channels, condition_channels=model.condition_channels)
        assert made == model


def test_published_networks_of_ho_are_recognized(tmp_path):
    for name, (size, diffusion) in ho.PRESETS.items():
        shapes = named(models.preset(name), size, ho.NAMING)
        found = ho.load_ho(tmp_path, Tensors("PyTorch", shapes, None), None, with_params=False)
        assert found.image_size == (size, size) and found.variance == diffusion["variance"]

"""Weights of others: stored networks of every family give their stored outputs, what does not fit is refused in a line."""

import json
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax import models, pretrained, schedules
from diffusion_jax.pretrained import (
    PretrainedError,
    __main__,
    description,
    diffusers_scheduler,
    diffusers_unet,
    ho,
    openai,
    parameters,
)
from diffusion_jax.pretrained.tensors import Tensors
from helpers import torch_networks
from helpers.configs import tiny_config
from helpers.published_files import (
    CLASSIFIER_FLAGS,
    NARROW_FLAGS,
    README,
    SCHEDULER,
    ho_variables,
    stored,
    worst,
    write,
    write_folder,
)
from helpers.work_directories import untrained


def load(directory, name):
    """A fixture's network, from a file or a folder as its family has them."""
    weights, arrays = stored(name)
    if name in torch_networks.DIFFUSERS:
        return pretrained.load(write_folder(directory / name, json.loads(str(arrays["config"])), weights)), arrays
    flags = {"openai_narrow": NARROW_FLAGS, "openai_classifier_narrow": CLASSIFIER_FLAGS}.get(
        name, {"image_size": 16, "variance": "fixed_small"}
    )
    return pretrained.load(write(directory / f"{name}.safetensors", weights), flags), arrays


def output(net, arrays, shift=0):
    """Our network on a fixture's inputs, in float32 at the highest precision."""
    labels = (arrays["y"],) if "y" in arrays else ()
    with jax.default_matmul_precision("highest"):
        return jax.jit(
            lambda p: net.model.apply({"params": p}, arrays["x"], jnp.float32(arrays["time"] + shift), *labels)
        )(net.params)


FAMILIES = (*torch_networks.DIFFUSERS, *torch_networks.STORED_OPENAI, "port_narrow")


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_networks_give_their_stored_outputs(name, tmp_path):
    net, arrays = load(tmp_path, name)
    assert arrays["out"].std() > 0.1
    assert worst(output(net, arrays), arrays["out"]) < 2e-5
    # The same check must see a wrong time, or it would prove nothing of the embedding.
    assert worst(output(net, arrays, shift=1), arrays["out"]) > 1e-4
    if "classifier" in name:
        np.testing.assert_allclose(net.logits(arrays["x"], jnp.float32(arrays["time"])), output(net, arrays), atol=1e-4)
        with pytest.raises(TypeError, match="use logits"):
            net.denoise_fn(arrays["x"], arrays["time"])
    else:
        with pytest.raises(TypeError, match="use denoise_fn"):
            net.logits(arrays["x"], arrays["time"])


def test_what_is_known_of_a_folder(tmp_path):
    net, _ = load(tmp_path, "unet_improved_narrow")
    assert (net.prediction, net.variance, net.image_size, net.clip, net.channels) == (
        "eps",
        "learned_range",
        (32, 32),
        True,
        3,
    )
    np.testing.assert_allclose(net.schedule.betas, schedules.betas("linear", 1000))
    assert net.num_classes == 5 and net.diffusion["schedule"] == "linear"


def test_attention_s_older_names_load_too(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    folder = write_folder(tmp_path / "old", json.loads(str(arrays["config"])), weights)
    assert worst(output(pretrained.load(folder), arrays), arrays["out"]) < 2e-5


def test_the_other_order_of_attention_s_rows(tmp_path):
    """(head, 3, d) as (3, head, d): the same network, where its flags say so, and another where they do not."""
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


# ------------------------------------------------------------------------------------------- TensorFlow, as Ho et al. wrote


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
    with pytest.raises(PretrainedError, match="no moving average; load the weights themselves with ema=False"):
        pretrained.load(path, {"image_size": 16, "variance": "fixed_small"})
    net = pretrained.load(path, {"image_size": 16, "variance": "fixed_small"}, ema=False)
    assert worst(output(net, arrays), arrays["out"]) < 2e-5


# --------------------------------------------------------------------------------------- published networks, by shapes alone


def named(model, size, channels, naming):
    """Shapes under other people's names, as PyTorch lists them; OpenAI's q, k and v as one."""
    shapes = {}
    for path, shape in parameters.parameter_shapes(model, (size, size), channels).items():
        name, shape = naming(path, model), parameters.torch_shape(shape, path)
        if naming is parameters.OPENAI:
            name = name.replace("out.2.proj_out", "out.2.c_proj")
            for layer in ("k", "v"):
                if f".{layer}." in name:
                    name = None
                    break
            if name is None:
                continue
            if ".q." in name:
                name = name.replace(".q.", ".qkv_proj." if name.startswith("out.2") else ".qkv.")
                shape = (3 * shape[0], *shape[1:], 1) if name.endswith("weight") else (3 * shape[0],)
        shapes[name] = shape
    return shapes


@pytest.mark.parametrize("name", README)
def test_published_flags_and_the_tensors_shapes_give_the_presets(name, tmp_path):
    """What is seen from a file and told by flags is the preset, to the field; and so is what the file's own name says."""
    size, low, _ = openai.PRESETS[name]
    shapes = named(models.preset(name), min(size, 256), 6 if low else 3, parameters.OPENAI)
    if "classifier" in name:
        tokens = (size >> len(models.preset(name).channel_multipliers) - 1) ** 2 + 1
        shapes["out.2.positional_embedding"] = (shapes["out.2.positional_embedding"][0], tokens)
    tensors = Tensors("PyTorch", shapes, None)
    flags = README[name]
    if "classifier" not in name and "order" not in flags and "--num_heads 1" not in flags:
        with pytest.raises(PretrainedError, match="do not determine use_new_attention_order"):
            openai.describe_openai(tmp_path / "any.pt", tensors, flags)
        flags += " --use_new_attention_order False"
    seen, new_order = openai.describe_openai(tmp_path / "any.pt", tensors, flags)
    said, its_order = openai.describe_openai(tmp_path / "any.pt", tensors, name)
    for field in ("model", "prediction", "variance", "image_size", "low_resolution", "channels", "in_channels"):
        if not ("classifier" in name and field == "variance"):
            assert getattr(seen, field) == getattr(said, field), field
    assert new_order == its_order == (name == "adm_imagenet64")
    np.testing.assert_array_equal(seen.schedule.betas, said.schedule.betas)
    np.testing.assert_array_equal(seen.schedule.timesteps, said.schedule.timesteps)
    files = [file for file, preset in openai.FILES.items() if preset == name]
    for file in files:
        dropout = 0.0 if file.endswith("nodropout") else said.model.dropout
        if "classifier" not in name:
            said_model = said.model.clone(dropout=dropout)
        else:
            said_model = said.model
        assert openai.describe_openai(tmp_path / f"{file}.pt", tensors, None)[0].model == said_model
    assert files


def test_every_published_file_and_preset_is_known():
    assert set(openai.FILES.values()) == set(openai.PRESETS) == set(README)
    assert set(models.PRESETS) == set(openai.PRESETS) | set(ho.PRESETS)


COUNTS = {
    "ddpm_cifar10": 35_746_307,
    "ddpm_256": 113_673_219,
    "improved_cifar10": 52_546_438,
    "improved_imagenet64": 121_063_942,
    "improved_imagenet64_conditional": 273_049_350,
    "improved_lsun": 113_676_678,
    "improved_upsampler_64_256": 279_792_390,
    "adm_imagenet64": 295_904_454,
    "adm_imagenet128": 421_529_606,
    "adm_imagenet256": 553_838_086,
    "adm_imagenet256_unconditional": 552_814_086,
    "adm_imagenet512": 558_997_638,
    "adm_lsun": 552_814_086,
    "adm_upsampler_64_256": 311_795_910,
    "adm_upsampler_128_512": 308_835_270,
    "adm_classifier64": 65_438_568,
    "adm_classifier128": 42_568_040,
    "adm_classifier256": 54_096_360,
    "adm_classifier512": 54_448_360,
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_presets_have_the_published_numbers_of_parameters(name):
    size, low, *_ = openai.PRESETS.get(name) or (ho.PRESETS[name][0], 0)
    shapes = parameters.parameter_shapes(models.preset(name), (size, size), 6 if low else 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == COUNTS[name]
    assert f"| {name} | {COUNTS[name]:,} |" in models.presets.__doc__
    with pytest.raises(ValueError, match="unknown preset"):
        models.preset(name + "x")


def test_published_networks_of_ho_are_recognized(tmp_path):
    for name, (size, diffusion) in ho.PRESETS.items():
        shapes = named(models.preset(name), size, 3, parameters.HO)
        found, _ = ho.load_ho(tmp_path, Tensors("PyTorch", shapes, None), None, with_params=False)
        assert found.image_size == (size, size) and found.variance == diffusion["variance"]
        assert diffusion["variance"] == {"ddpm_cifar10": "fixed_large", "ddpm_256": "fixed_small"}[name]
        with pytest.raises(PretrainedError, match="its tensors are not those of"):
            other = next(one for one in ho.PRESETS if one != name)
            ho.load_ho(tmp_path, Tensors("PyTorch", shapes, None), other, with_params=False)


# --------------------------------------------------------------------------------------------------- diffusers' configs


def test_a_config_that_does_not_name_a_field_means_diffusers_default():
    """The silent trap: the published shapes load with the library's own values, which are others."""
    bare = diffusers_unet.unet_from_config({"block_out_channels": [224, 448, 672, 896]})
    assert (bare.embedding_cos_first, bare.embedding_freq_shift, bare.norm_epsilon, bare.head_channels) == (
        True,
        0,
        1e-5,
        8,
    )
    assert bare.downsample_padding == (1, 1) and bare.attention_levels == (1, 2, 3)
    published = diffusers_unet.unet_from_config(torch_networks.PUBLISHED)
    assert published == models.preset("ddpm_cifar10").clone(dropout=0.0)
    assert diffusers_unet.unet_from_config(torch_networks.LARGE) == models.preset("ddpm_256")
    for field in ("downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps", "attention_head_dim"):
        without = {key: value for key, value in torch_networks.PUBLISHED.items() if key != field}
        assert diffusers_unet.unet_from_config(without) != published, field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 7),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2),
        ("act_fn", "gelu"),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("resnet_time_scale_shift", "ada_group"),
        ("attn_norm_num_groups", 8),
        ("down_block_types", ["SkipDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("encoder_hid_dim", 3),
    ],
)
def test_fields_that_cannot_be_had_are_named(field, value):
    with pytest.raises(PretrainedError, match=field):
        diffusers_unet.unet_from_config({**torch_networks.PUBLISHED, field: value})


def test_scale_shift_without_a_norm_in_the_middle_is_named():
    with pytest.raises(PretrainedError, match="attn_norm_num_groups=None"):
        diffusers_unet.unet_from_config({**torch_networks.IMPROVED, "attn_norm_num_groups": None})


def test_schedulers():
    leaves, table, clip = diffusers_scheduler.scheduler_from_config({})
    assert (leaves["schedule"], leaves["variance"], leaves["prediction"], table, clip) == (
        "linear",
        "fixed_small",
        "eps",
        None,
        True,
    )
    leaves, table, clip = diffusers_scheduler.scheduler_from_config(
        {"trained_betas": [0.1, 0.2], "clip_sample_range": 2.0, "prediction_type": "v_prediction"}
        | {"variance_type": "fixed_large_log", "beta_schedule": "scaled_linear"}
    )
    assert (leaves["prediction"], leaves["variance"], leaves["num_timesteps"]) == ("v", "fixed_large", 2)
    np.testing.assert_array_equal(table, [0.1, 0.2])
    np.testing.assert_array_equal(clip(jnp.array([-3.0, 1.5])), [-2.0, 1.5])
    assert diffusers_scheduler.scheduler_from_config({"clip_sample": False})[2] is False
    assert diffusers_scheduler.scheduler_from_config({"_class_name": "PNDMScheduler", "steps_offset": 1})[2] is False
    for field, value in (
        ("beta_schedule", "laplace"),
        ("prediction_type", "flow"),
        ("variance_type", "learned"),
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("clip_sample", "false"),
        ("foo", 1),
        ("_class_name", "CMStochasticIterativeScheduler"),
    ):
        with pytest.raises(PretrainedError, match=field):
            diffusers_scheduler.scheduler_from_config({field: value})


# ------------------------------------------------------------------------------------------------------------ in and out


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
    assert diffusers_unet.unet_from_config(config) == net.model
    with pytest.raises(PretrainedError, match="exists and is not empty"):
        pretrained.save_diffusers(net, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert diffusers_scheduler.scheduler_from_config(scheduler)[0].items() <= dict(net.diffusion).items()
    again = pretrained.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_file_and_back_to_the_bit(name, tmp_path):
    net, _ = load(tmp_path, name)
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    again = pretrained.load(tmp_path / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)
    for field in ("model", "image_size", "channels", "prediction", "variance", "clip", "low_resolution"):
        assert getattr(again, field) == getattr(net, field)
    np.testing.assert_array_equal(again.schedule.betas, net.schedule.betas)
    with pytest.raises(PretrainedError, match="contains its own description"):
        pretrained.load(tmp_path / "net.safetensors", "adm_lsun")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channel_multipliers": (0.5, 1)}, "channel_multipliers"),
        ({"num_heads": 2, "attention_levels": (0, 1)}, "num_heads"),
        ({"num_heads_up": 2}, "num_heads_up"),
        ({"downsample_padding": (1, 0)}, "downsample_padding"),
    ],
)
def test_networks_that_diffusers_cannot_say_are_refused_by_field(fields, words, tmp_path):
    net, _ = load(tmp_path, "port_narrow")
    net = pretrained.Pretrained(**{**vars(net), "model": net.model.clone(**fields)})
    with pytest.raises(PretrainedError, match=words):
        pretrained.save_diffusers(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prediction": "x_prev"}, "prediction"),
        ({"variance": "learned"}, "variance"),
        ({"low_resolution": 8}, "low_resolution"),
        ({"schedule": schedules.from_betas(schedules.betas("linear", 10), np.arange(10) * 100.0)}, "rescale_timesteps"),
        ({"clip": jnp.tanh}, "clip"),
    ],
)
def test_diffusions_that_diffusers_cannot_say_are_refused_by_field(fields, words, tmp_path):
    net, _ = load(tmp_path, "port_narrow")
    with pytest.raises(PretrainedError, match=words):
        pretrained.save_diffusers(pretrained.Pretrained(**{**vars(net), **fields}), tmp_path / "out")


def test_unusual_diffusions_come_back_from_diffusers(tmp_path):
    net, _ = load(tmp_path, "port_narrow")
    leaves = dict(net.diffusion) | {"schedule": "quadratic", "beta_end": 0.015, "beta_start": 2e-4, "prediction": "v"}
    changed = description.make_description("x", net.model, (16, 16), leaves, clip=False)
    pretrained.save_diffusers(pretrained.Pretrained(**vars(changed), params=net.params), tmp_path / "out")
    again = pretrained.load(tmp_path / "out")
    assert (again.clip, again.prediction, again.variance) == (False, "v", "fixed_small")
    np.testing.assert_array_equal(again.schedule.betas, changed.schedule.betas)


def test_a_table_of_betas_goes_through_diffusers(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    scheduler = {**SCHEDULER, "trained_betas": [0.01, 0.02, 0.5]}
    net = pretrained.load(write_folder(tmp_path / "in", json.loads(str(arrays["config"])), weights, scheduler))
    assert net.diffusion is None
    np.testing.assert_allclose(net.schedule.betas, [0.01, 0.02, 0.5])
    pretrained.save_diffusers(net, tmp_path / "out")
    np.testing.assert_array_equal(pretrained.load(tmp_path / "out").schedule.betas, net.schedule.betas)
    net = pretrained.Pretrained(**{**vars(net), "clip": description.make_clip(1.5)})
    pretrained.save_safetensors(net, tmp_path / "x.safetensors")
    again = pretrained.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(again.schedule.betas, net.schedule.betas)
    assert again.diffusion is None and again.variance == net.variance and float(again.clip(jnp.float32(7))) == 1.5
    with pytest.raises(PretrainedError, match="only True, False and a range"):
        pretrained.save_safetensors(
            pretrained.Pretrained(**{**vars(net), "clip": jnp.tanh}), tmp_path / "y.safetensors"
        )
    with pytest.raises(PretrainedError, match="table of betas"):
        pretrained.config_leaves(net)


def test_a_scheduler_s_fields_can_be_given(tmp_path):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    folder = write_folder(tmp_path / "in", json.loads(str(arrays["config"])), weights, scheduler=None)
    with pytest.raises(PretrainedError, match="contains no scheduler_config.json"):
        pretrained.load(folder)
    net = pretrained.load(folder, {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small"})
    np.testing.assert_allclose(net.schedule.betas, schedules.betas("cosine", 1000))
    assert pretrained.describe(folder / "unet", {"beta_schedule": "linear"}).variance == "fixed_small"


# ------------------------------------------------------------------------------------------------- what is asked for, and not


def test_what_shapes_cannot_say_is_asked_for_by_name(tmp_path):
    path = write(tmp_path / "model.safetensors", stored("openai_narrow")[0])
    with pytest.raises(PretrainedError) as caught:
        pretrained.load(path)
    for flag in ("image_size", "num_heads", "diffusion_steps", "noise_schedule"):
        assert flag in str(caught.value)
    with pytest.raises(PretrainedError, match="do not determine rescale_timesteps"):
        pretrained.load(path, NARROW_FLAGS.replace("1000", "4000"))
    with pytest.raises(PretrainedError, match="classifier_depth"):
        pretrained.load(write(tmp_path / "c.safetensors", stored("openai_classifier_narrow")[0]))
    with pytest.raises(PretrainedError, match="image_size and variance"):
        pretrained.load(write(tmp_path / "p.safetensors", stored("port_narrow")[0]))


def test_flags_are_opened_lists_of_openai(tmp_path):
    assert openai.parse_flags("--a 1 --b=True --c 0.5 --d 32,16") == {"a": 1, "b": True, "c": 0.5, "d": "32,16"}
    with pytest.raises(PretrainedError, match="neither a preset's name nor pairs"):
        openai.parse_flags("image_size 64")


def rewritten(change):
    """A maker of a broken file: the narrow network of OpenAI's after `change` of its weights."""

    def make(directory):
        weights = stored("openai_narrow")[0]
        change(weights)
        return write(directory / "model.safetensors", weights), NARROW_FLAGS

    return make


def bytes_of(content, name="model.pt"):
    def make(directory):
        (directory / name).write_bytes(content)
        return directory / name, None

    return make


def folder_with(**fields):
    def make(directory):
        weights, arrays = stored("unet_ddpm_cifar10_narrow")
        return write_folder(directory / "f", {**json.loads(str(arrays["config"])), **fields}, weights), None

    return make


def truncated(directory):
    path = write(directory / "model.safetensors", stored("openai_narrow")[0])
    path.write_bytes(path.read_bytes()[:-1000])
    return path, None


def empty_folder(directory):
    (directory / "empty").mkdir()
    return directory / "empty", None


def bad_json(directory):
    path, _ = folder_with()(directory)
    (path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel", ')
    return path, None


def no_weights(directory):
    path, _ = folder_with()(directory)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return path, None


def latent(directory):
    path, _ = folder_with()(directory)
    (path / "model_index.json").write_text('{"_class_name": "LDMPipeline", "unet": [], "scheduler": [], "vqvae": []}')
    return path, None


def with_flags(flags):
    return lambda directory: (write(directory / "model.safetensors", stored("openai_narrow")[0]), flags)


BROKEN = {
    "no such file": (lambda directory: (directory / "nothing.pt", None), "no such file or folder"),
    "an empty folder": (empty_folder, "neither a diffusers folder"),
    "an empty file": (bytes_of(b""), "is not a file of weights"),
    "text": (bytes_of(b"hello world, these are no weights"), "is not a file of weights"),
    "a web page": (bytes_of(b"<!DOCTYPE html><html>"), "a web page"),
    "a pointer of git-lfs": (bytes_of(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "truncated safetensors": (truncated, "corrupted safetensors"),
    "truncated in its head": (bytes_of((500).to_bytes(8, "little") + b'{"a": {'), "truncated safetensors"),
    "corrupted safetensors": (bytes_of((20).to_bytes(8, "little") + b'{"a": [1, 2, 3   ]} '), "corrupted safetensors"),
    "a tensor missing": (rewritten(lambda w: w.pop("out.2.bias")), "1 tensors are missing (out.2.bias)"),
    "an unexpected tensor": (rewritten(lambda w: w.update(extra=w["out.2.bias"])), "1 are unexpected (extra)"),
    "another shape": (
        rewritten(lambda w: w.update({"out.2.bias": w["out.2.bias"][:3]})),
        "out.2.bias is (3,), not (6,)",
    ),
    "NaN": (
        rewritten(lambda w: w["out.2.bias"].__setitem__(0, np.nan)),
        "out.2.bias contains values that are not finite",
    ),
    "another family": (
        lambda directory: (write(directory / "x.safetensors", {"a.b": np.zeros(3, np.float32)}), None),
        "no network known here",
    ),
    "an unknown flag": (with_flags(NARROW_FLAGS + " --color blue"), "color is not a flag of OpenAI's"),
    "an unknown preset": (with_flags("adm_imagenet1024"), "is not a preset of OpenAI's"),
    "another preset": (with_flags("adm_imagenet256"), "does not fit the network"),
    "flags that the tensors deny": (
        with_flags(NARROW_FLAGS + " --num_channels 64 --class_cond False"),
        "num_channels=64, not 32; class_cond=False, not True",
    ),
    "heads that do not divide": (with_flags(NARROW_FLAGS.replace("16", "7")), "head_channels=7 does not divide"),
    "flags without values": (with_flags("--image_size --num_heads 4"), "nor pairs of --name value"),
    "flags that are not JSON": (with_flags('{"image_size": '), "are not valid JSON"),
    "an unknown schedule": (with_flags(NARROW_FLAGS.replace("linear", "fancy")), "unknown schedule 'fancy'"),
    "an unsupported field": (folder_with(act_fn="gelu"), "act_fn='gelu' is not supported"),
    "a conditional UNet": (folder_with(_class_name="UNet2DConditionModel"), "UNet2DConditionModel is not supported"),
    "another width": (folder_with(in_channels=1, out_channels=1), "shapes differ"),
    "a string for a number": (folder_with(in_channels="3"), "in_channels='3' must be int"),
    "no image size": (folder_with(sample_size=None), "has no sample_size"),
    "an odd image size": (folder_with(sample_size={"a": 1}), "error: "),
    "a negative image": (folder_with(sample_size=-32), "error: "),
    "a word for a truth": (folder_with(flip_sin_to_cos="false"), "flip_sin_to_cos='false' must be bool"),
    "resampling by FIR": (folder_with(downsample_type="fir"), "downsample_type='fir' is not supported"),
    "a learned variance's channels": (folder_with(out_channels=6), "do not fit in_channels=3"),
    "a latent model": (latent, "vqvae is not supported"),
    "whole numbers for weights": (
        rewritten(lambda w: w.update({"out.2.bias": w["out.2.bias"].astype(np.int32)})),
        "convert quantized weights",
    ),
    "a flag of another type": (with_flags(NARROW_FLAGS.replace("False", "maybe")), "must be True or False"),
    "no steps": (with_flags(NARROW_FLAGS.replace("1000", "0")), "diffusion_steps=0 must be a whole number"),
    "an image of two numbers": (with_flags(NARROW_FLAGS.replace("64", "64,64")), "image_size='64,64' must be a whole"),
    "another pooling": (with_flags(NARROW_FLAGS + " --classifier_pool spatial"), "classifier_pool='spatial'"),
    "a dropout of letters": (with_flags(NARROW_FLAGS + " --dropout abc"), "cannot be loaded"),
    "a scalar for a kernel": (
        rewritten(lambda w: w.update({"input_blocks.0.0.weight": np.array(1, np.float32)})),
        "cannot be loaded",
    ),
    "broken JSON": (bad_json, "cannot be read as JSON"),
    "a folder without weights": (no_weights, "contains no weights"),
    "diffusers' file without its folder": (
        lambda directory: (write(directory / "d.safetensors", stored("unet_improved_narrow")[0]), None),
        "give its folder",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_one_line_and_exit_code_2(name, tmp_path, capsys):
    make, words = BROKEN[name]
    path, flags = make(tmp_path)
    with pytest.raises(SystemExit) as caught:
        __main__.main(["inspect", str(path), *([f"--flags={flags}"] if flags else [])])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("error: ")


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


def test_upsamplers_take_their_small_images(tmp_path):
    """As one network: the enlarged image beside x_t."""
    from diffusion_jax.models import upsampling

    model = models.UNet(channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), out_channels=3)
    shapes = parameters.parameter_shapes(model, (8, 8), 6)
    rng = np.random.default_rng(0)
    params = flax.traverse_util.unflatten_dict(
        {p: 0.1 * rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    )
    described = description.make_description("x", model, 8, {}, low_resolution=4)
    net = pretrained.Pretrained(**vars(described), params=params)
    x, low, time = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(2, 4, 4, 3)), jnp.array([1.0, 2.0])
    expected = model.apply({"params": params}, upsampling.condition(jnp.float32(x), jnp.float32(low)), time)
    np.testing.assert_allclose(net.denoise_fn(jnp.float32(x), time, low=jnp.float32(low)), expected, atol=1e-6)
    with pytest.raises(TypeError, match="give low="):
        net.denoise_fn(x, time)


def test_configs_of_published_weights_are_the_presets():
    import importlib

    for config_name, name in {
        "cifar10": "ddpm_cifar10",
        "celeba_hq_256": "ddpm_256",
        "cifar10_improved": "improved_cifar10",
        "imagenet64_improved": "improved_imagenet64",
        "imagenet64_improved:conditional": "improved_imagenet64_conditional",
        "imagenet64_adm": "adm_imagenet64",
        "imagenet_adm:128": "adm_imagenet128",
        "imagenet_adm:256": "adm_imagenet256",
        "imagenet_adm:256_unconditional": "adm_imagenet256_unconditional",
        "imagenet_adm:512": "adm_imagenet512",
        "lsun_bedroom_adm": "adm_lsun",
        "lsun_cat_adm": "adm_lsun",
        "lsun_horse_adm": "adm_lsun",
        "imagenet256_upsample": "adm_upsampler_64_256",
        "imagenet512_upsample": "adm_upsampler_128_512",
        "imagenet_classifier:64": "adm_classifier64",
        "imagenet_classifier:128": "adm_classifier128",
        "imagenet_classifier:256": "adm_classifier256",
        "imagenet_classifier:512": "adm_classifier512",
    }.items():
        module, _, variant = config_name.partition(":")
        config = importlib.import_module(f"configs.{module}").get_config(*([variant] if variant else []))
        model = models.preset(name)
        made = models.from_config(config.model, type(model))
        if isinstance(model, models.UNet):
            made = made.clone(out_channels=model.out_channels)
        assert made == model, config_name


def test_work_directories_are_weights_too(tmp_path):
    leaves = {"prediction": "v", "schedule": "cosine", "variance": "fixed_small", "num_timesteps": 20}
    config = tiny_config(**{f"diffusion.{leaf}": value for leaf, value in leaves.items()}, **{"sampling.clip": False})
    directory = untrained(tmp_path / "run", config)
    net = pretrained.load(directory)
    assert (net.prediction, net.variance, net.clip) == ("v", "fixed_small", False)
    np.testing.assert_array_equal(net.schedule.betas, schedules.betas("cosine", 20))
    assert net.schedule.num_timesteps == 20 and net.image_size == (8, 8) and net.channels == 1
    pretrained.save_safetensors(net, tmp_path / "net.safetensors")
    again = pretrained.load(tmp_path / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)
    assert again.model == net.model
    raw = pretrained.load(directory, ema=False)
    assert jax.tree.structure(raw.params) == jax.tree.structure(net.params)
    with pytest.raises(PretrainedError, match="contains its own description"):
        pretrained.load(directory, {"image_size": 8})

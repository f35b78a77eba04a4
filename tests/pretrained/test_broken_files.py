"""Files, folders and flags that cannot be loaded: each is one line of error and exit code 2."""

import json

import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.pretrained import PretrainedError, __main__, openai
from helpers.published_files import NARROW_FLAGS, stored, write, write_folder


def test_settings_that_shapes_do_not_determine_are_requested_by_name(tmp_path):
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


@pytest.mark.parametrize("leaf", ["prediction", "variance"])
def test_flags_of_ho_with_an_unknown_name_are_refused(leaf, tmp_path):
    path = write(tmp_path / "p.safetensors", stored("port_narrow")[0])
    flags = {"image_size": 16, "variance": "fixed_small"} | {leaf: "other"}
    with pytest.raises(
        PretrainedError, match=f"flags are invalid .*diffusion.{leaf}='other' is unknown; use "
    ) as caught:
        pretrained.load(path, flags)
    assert "\n" not in str(caught.value)


def test_flags_of_openai_are_parsed(tmp_path):
    assert openai.parse_flags("--a 1 --b=True --c 0.5 --d 32,16") == {"a": "1", "b": "True", "c": "0.5", "d": "32,16"}
    with pytest.raises(PretrainedError, match="neither the name of a preset nor pairs"):
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
    "an empty folder": (empty_folder, "a folder of an unknown network; known: a diffusers folder"),
    "a web page": (bytes_of(b"<!DOCTYPE html><html>"), "a web page"),
    "truncated safetensors": (truncated, "corrupted safetensors"),
    "a tensor missing": (rewritten(lambda w: w.pop("out.2.bias")), "1 tensors are missing (out.2.bias)"),
    "an unexpected tensor": (rewritten(lambda w: w.update(extra=w["out.2.bias"])), "1 are unexpected (extra)"),
    "another shape": (
        rewritten(lambda w: w.update({"out.2.bias": w["out.2.bias"][:3]})),
        "out.2.bias is (3,), not (6,)",
    ),
    "NaN": (
        rewritten(lambda w: w["out.2.bias"].__setitem__(0, np.nan)),
        "out.2.bias is float32 or contains values that are not finite",
    ),
    "another family": (
        lambda directory: (write(directory / "x.safetensors", {"a.b": np.zeros(3, np.float32)}), None),
        "of an unknown network",
    ),
    "an unknown flag": (with_flags(NARROW_FLAGS + " --color blue"), "color is not a flag of OpenAI's"),
    "an unknown preset": (with_flags("adm_imagenet1024"), "is not a preset of OpenAI's"),
    "flags that are not JSON": (with_flags('{"image_size": '), "are not valid JSON"),
    "an unknown schedule": (with_flags(NARROW_FLAGS.replace("linear", "fancy")), "unknown schedule 'fancy'"),
    "an unsupported field": (folder_with(act_fn="gelu"), "act_fn='gelu' is not supported"),
    "a conditional UNet": (folder_with(_class_name="UNet2DConditionModel"), "UNet2DConditionModel is not supported"),
    "another width": (folder_with(in_channels=1, out_channels=1), "shapes differ"),
    "a string for a number": (folder_with(in_channels="3"), "error: "),
    "no image size": (folder_with(sample_size=None), "has no sample_size"),
    "a learned variance's channels": (folder_with(out_channels=6), "do not fit in_channels=3"),
    "a latent model": (latent, "vqvae is not supported"),
    "a flag of another type": (with_flags(NARROW_FLAGS.replace("False", "maybe")), "must be True or False"),
    "a scalar for a kernel": (
        rewritten(lambda w: w.update({"input_blocks.0.0.weight": np.array(1, np.float32)})),
        "cannot be loaded",
    ),
    "broken JSON": (bad_json, "cannot be read as JSON"),
    "a folder without weights": (no_weights, "contains no weights"),
    "diffusers' file without its folder": (
        lambda directory: (write(directory / "d.safetensors", stored("unet_improved_narrow")[0]), None),
        "of an unknown network",
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_one_line_and_exit_code_2(name, tmp_path, capsys):
    make, words = BROKEN[name]
    path, flags = make(tmp_path)
    with pytest.raises(SystemExit) as caught:
        __main__.main(["inspect", str(path), *([f"--flags={flags}"] if flags else [])])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("error: ")

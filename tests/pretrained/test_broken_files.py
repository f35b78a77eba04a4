"""Files, folders and flags that cannot be loaded: each is one line of error and exit code 2."""

import json

import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.pretrained import PretrainedError, __main__
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


def rewritten(change):
    """A maker of a broken file: the narrow network of OpenAI's after `change` of its weights."""

    def make(directory):
        weights = stored("openai_narrow")[0]
        change(weights)
        return write(directory / "model.safetensors", weights), NARROW_FLAGS

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


def web_page(directory):
    (directory / "model.pt").write_bytes(b"<!DOCTYPE html><html>")
    return directory / "model.pt", None


BROKEN = {
    "no such file": (lambda directory: (directory / "nothing.pt", None), "no such file or folder"),
    "a web page": (web_page, "a web page"),
    "truncated safetensors": (truncated, "corrupted safetensors"),
    "a tensor missing": (rewritten(lambda w: w.pop("out.2.bias")), "1 tensors are missing (out.2.bias)"),
    "an unexpected tensor": (rewritten(lambda w: w.update(extra=w["out.2.bias"])), "1 are unexpected (extra)"),
    "another shape": (
        rewritten(lambda w: w.update({"out.2.bias": w["out.2.bias"][:3]})),
        "out.2.bias is (3,), not (6,)",
    ),
    "NaN": (
        rewritten(lambda w: w["out.2.bias"].__setitem__(0, np.nan)),
        "out.2.bias has values that are not finite",
    ),
    "integers": (
        rewritten(lambda w: w.update({"out.2.bias": np.zeros(6, np.int32)})),
        "is int32; convert quantized weights",
    ),
    "another family": (
        lambda directory: (write(directory / "x.safetensors", {"a.b": np.zeros(3, np.float32)}), None),
        "of an unknown network",
    ),
    "an unknown flag": (with_flags(NARROW_FLAGS + " --color blue"), "color is not a flag of OpenAI's"),
    "an unsupported flag": (
        with_flags(NARROW_FLAGS.replace("num_head_channels 16", "num_heads 4") + " --num_heads_upsample 2"),
        "num_heads_upsample=2 is not supported",
    ),
    "an unknown preset": (with_flags("adm_imagenet1024"), "is not a preset of OpenAI's"),
    "a flag of another type": (with_flags(NARROW_FLAGS.replace("False", "maybe")), "must be True or False"),
    "an unknown schedule": (with_flags(NARROW_FLAGS.replace("linear", "fancy")), "unknown schedule 'fancy'"),
    "a conditional UNet": (folder_with(_class_name="UNet2DConditionModel"), "UNet2DConditionModel is not supported"),
    "a latent model": (latent, "vqvae is not supported"),
    "a folder without weights": (no_weights, "contains no weights"),
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

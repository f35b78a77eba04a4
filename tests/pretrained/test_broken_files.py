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


def openai(directory, change=lambda weights: None, flags=NARROW_FLAGS):
    """Writes OpenAI's narrow network after `change` was applied to the weights."""
    weights = stored("openai_narrow")[0]
    change(weights)
    return write(directory / "model.safetensors", weights), flags


def folder(directory, **fields):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    return write_folder(directory / "f", {**json.loads(str(arrays["config"])), **fields}, weights), None


def file(directory, name, content):
    (directory / name).write_bytes(content)
    return directory / name, None


def truncated(directory):
    path, _ = openai(directory)
    return file(directory, "t.safetensors", path.read_bytes()[:-1000])


def without_weights(directory):
    path, _ = folder(directory)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return path, None


def latent(directory):
    path, _ = folder(directory)
    (path / "model_index.json").write_text('{"_class_name": "LDMPipeline", "unet": [], "scheduler": [], "vqvae": []}')
    return path, None


def bias(value):
    return lambda weights: weights.update({"out.2.bias": value})


FOUR_HEADS = NARROW_FLAGS.replace("num_head_channels 16", "num_heads 4")
BROKEN = {
    "no such file or folder": lambda directory: (directory / "nothing.pt", None),
    "a web page": lambda directory: file(directory, "model.pt", b"<!DOCTYPE html><html>"),
    "corrupted safetensors": truncated,
    "1 tensors are missing (out.2.bias)": lambda directory: openai(directory, lambda w: w.pop("out.2.bias")),
    "1 are unexpected (extra)": lambda directory: openai(directory, lambda w: w.update(extra=w["out.2.bias"])),
    "out.2.bias is (3,), not (6,)": lambda directory: openai(directory, bias(np.zeros(3, np.float32))),
    "out.2.bias has values that are not finite": lambda directory: openai(directory, bias(np.full(6, np.nan))),
    "is int32; convert quantized weights": lambda directory: openai(directory, bias(np.zeros(6, np.int32))),
    "with an unknown network": lambda directory: (write(directory / "x.safetensors", {"a": np.zeros(3)}), None),
    "color is not a flag of OpenAI's": lambda directory: openai(directory, flags=NARROW_FLAGS + " --color blue"),
    "num_heads_upsample=2 is not supported": lambda directory: openai(
        directory, flags=FOUR_HEADS + " --num_heads_upsample 2"
    ),
    "is not a preset of OpenAI's": lambda directory: openai(directory, flags="adm_imagenet1024"),
    "must be True or False": lambda directory: openai(directory, flags=NARROW_FLAGS.replace("False", "maybe")),
    "unknown schedule 'fancy'": lambda directory: openai(directory, flags=NARROW_FLAGS.replace("linear", "fancy")),
    "UNet2DConditionModel is not supported": lambda directory: folder(directory, _class_name="UNet2DConditionModel"),
    "vqvae is not supported": latent,
    "contains no weights": without_weights,
}


@pytest.mark.whole
@pytest.mark.parametrize("words", BROKEN)
def test_broken_inputs_are_one_line_and_exit_code_2(words, tmp_path, capsys):
    path, flags = BROKEN[words](tmp_path)
    with pytest.raises(SystemExit) as caught:
        __main__.main(["inspect", str(path), *([f"--flags={flags}"] if flags else [])])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("error: ")

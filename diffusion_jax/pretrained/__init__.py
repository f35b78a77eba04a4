"""Weights of others, in and out: every published DDPM, Improved DDPM and ADM.

    from diffusion_jax import pretrained, sampling

    net = pretrained.load("64x64_diffusion.pt")
    images = net.sample(jax.random.key(0), 16, y=207, sampler=sampling.ddim(), steps=50)  # float32 [16, 64, 64, 3] in [-1, 1]

`python -m diffusion_jax.pretrained inspect PATH` says what a file is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import PretrainedError
from diffusion_jax.models import Classifier, fields_of
from diffusion_jax.pretrained import diffusers, ho, native, openai
from diffusion_jax.pretrained.description import Description, Pretrained
from diffusion_jax.pretrained.files import is_tensorflow, open_tensors

__all__ = [
    "Description",
    "Pretrained",
    "PretrainedError",
    "config_leaves",
    "describe",
    "is_workdir",
    "load",
    "read_flags",
    "save_diffusers",
    "save_safetensors",
]

Flags = str | Mapping[str, Any] | None


def load(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Pretrained:
    """Published weights, with the network, the schedule and all else that they need.

    path: one of
      - a folder of diffusers' (a DDPMPipeline's; UNet2DModel with a scheduler's config);
      - OpenAI's .pt, at its published name or with flags;
      - a TensorFlow checkpoint of Ho et al.'s code, by its prefix .../model.ckpt-N, or its PyTorch port's .ckpt;
      - a work directory, or a file of `save_safetensors`.
    flags: of OpenAI's files, a preset's name ("adm_imagenet256"), or the flags of OpenAI's scripts, as a dict or as text
      ("--num_heads 4 --noise_schedule cosine ..."); of Ho et al.'s, a preset's name or leaves of `config.diffusion` and
      image_size, for networks that were not published; of a diffusers folder without one, the scheduler's config.
    ema: of TensorFlow checkpoints and work directories, the moving average of the weights, or else the weights themselves.
    Raises: PretrainedError, one line, for anything that does not fit: tensors that are missing, left over, of another shape
    or not finite; fields that our networks do not have; what the file does not say; a file that is none.
    """
    found, params = _read_or_refuse(path, flags, ema, with_params=True)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Pretrained(**values, params=params)


def describe(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Description:
    """What `load` would load, without reading the weights. Raises: as `load`, but for what is wrong with the numbers."""
    return _read_or_refuse(path, flags, ema, with_params=False)[0]


def _read_or_refuse(path, flags: Flags, ema: bool, with_params: bool) -> tuple[Description, Any]:
    """As `_read`, for files that may hold anything at all."""
    try:
        return _read(pathlib.Path(path).expanduser(), flags, ema, with_params)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PretrainedError(
            f"{path} cannot be loaded: something in it, or in its flags, is not as it should be "
            f"({type(error).__name__}: {reason})"
        ) from error


def _read(path: pathlib.Path, flags: Flags, ema: bool, with_params: bool) -> tuple[Description, Any]:
    if path.is_dir():
        if native.is_workdir(path):
            _no_flags(path, flags)
            return native.load_workdir(path, ema, with_params)
        if diffusers.find(path):
            return diffusers.load_diffusers(path, flags, with_params)
        raise PretrainedError(
            f"{path} is neither a diffusers folder (model_index.json, unet/config.json) nor a work directory with checkpoints"
        )
    if not path.exists() and not is_tensorflow(path):
        raise PretrainedError(f"{path}: no such file or folder")
    tensors = open_tensors(path, ema)
    if native.is_native(tensors):
        _no_flags(path, flags)
        return native.load_file(path, tensors, with_params)
    if ho.is_ho(tensors):
        return ho.load_ho(path, tensors, flags, with_params)
    if openai.is_openai(tensors):
        found, new_order = openai.describe_openai(path, tensors, flags)
        return found, openai.load_params(path, tensors, found, new_order) if with_params else None
    if "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors):
        raise PretrainedError(f"{path} is diffusers': name its folder, whose configs say what the tensors do not")
    raise PretrainedError(
        f"{path} holds {len(tensors)} tensors of no network known here ({', '.join(list(tensors)[:3])})"
    )


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether a path is a work directory of this program, with its config and checkpoints."""
    return native.is_workdir(pathlib.Path(path).expanduser())


def read_flags(text: str | None) -> Flags:
    """Flags as a command line has them: JSON where they begin with "{". Raises: PretrainedError."""
    if not text or not text.startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise PretrainedError(f"flags={text!r} are no JSON: {error}") from None


def config_leaves(found: Description) -> dict[str, dict[str, Any]]:
    """Leaves of a config that build the same network, schedule and images. Raises: PretrainedError."""
    if found.diffusion is None or not isinstance(found.clip, bool):
        raise PretrainedError(
            "no config says these weights' table of betas, or the range of their clip; use pretrained.load in a program"
        )
    learned = found.variance.startswith("learned")
    loss = "classify" if isinstance(found.model, Classifier) else "hybrid" if learned else "simple"
    height, width = found.image_size
    return {
        "model": fields_of(found.model),
        "diffusion": dict(found.diffusion) | {"loss": loss, "conditioning_noise": found.conditioning_noise},
        "data": {
            "image_size": height if height == width else (height, width),
            "channels": found.channels,
            "low_resolution": found.low_resolution,
        },
        "sampling": {"clip": found.clip},
    }


def _no_flags(path: pathlib.Path, flags: Flags) -> None:
    if flags:
        raise PretrainedError(f"flags={flags!r}: {path} says all of itself; leave them out")


def save_diffusers(net: Pretrained, folder: str | os.PathLike) -> None:
    """A folder that diffusers' `DDPMPipeline.from_pretrained` loads: safetensors and both configs.

    Raises: PretrainedError that names the field which diffusers cannot say, before anything is written; OSError.
    """
    diffusers.write_folder(net, net.params, pathlib.Path(folder).expanduser())


def save_safetensors(net: Pretrained, path: str | os.PathLike) -> None:
    """One file with the weights and all that is known of them, for any network. Raises: PretrainedError, OSError."""
    native.write_file(net, net.params, pathlib.Path(path).expanduser())

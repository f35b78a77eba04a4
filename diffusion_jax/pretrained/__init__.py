"""Pretrained weights, read and written: every published DDPM, Improved DDPM and ADM, and the runs of this program.

    from diffusion_jax import pretrained, sampling

    net = pretrained.load("64x64_diffusion.pt")
    images = net.sample(jax.random.key(0), 16, y=207, sampler=sampling.ddim(), steps=50)  # float32 [16, 64, 64, 3] in [-1, 1]

`python -m diffusion_jax.pretrained inspect PATH` prints the description of a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.models import MLP, Classifier, fields_of
from diffusion_jax.pretrained import diffusers, ho, native, openai
from diffusion_jax.pretrained.description import Description, Pretrained, format_summary
from diffusion_jax.pretrained.tensors import is_tensorflow_checkpoint, open_tensors
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "Description",
    "Pretrained",
    "PretrainedError",
    "config_leaves",
    "describe",
    "format_summary",
    "is_workdir",
    "load",
    "read_flags",
    "save_diffusers",
    "save_safetensors",
]

Flags = str | Mapping[str, Any] | None


def load(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Pretrained:
    """Pretrained weights with their network, schedule and settings.

    path: one of
      - a folder of diffusers (of a DDPMPipeline; UNet2DModel with a scheduler's config);
      - OpenAI's .pt, with its published name or with flags;
      - a TensorFlow checkpoint of Ho et al.'s code, by its prefix .../model.ckpt-N, or its PyTorch port's .ckpt;
      - a work directory, or a file of `save_safetensors`.
    flags: for OpenAI's files, the name of a preset ("adm_imagenet256"), or the flags of OpenAI's scripts, as a dict or as
      text ("--num_heads 4 --noise_schedule cosine ..."); for networks of Ho et al.'s code that were not published,
      image_size, variance and other leaves of `config.diffusion`.
    ema: whether to read the moving average of the weights, from TensorFlow checkpoints and work directories. While the
      average of a work directory holds more than a tenth of the random initial weights, the raw weights replace it, with a
      warning.
    Raises: PretrainedError, one line, for tensors that are missing, unexpected, of another shape or not finite; fields that
    `models` does not support; flags that are missing; a file that is not readable.
    """
    description, params = _read_or_raise(path, flags, ema, with_params=True)
    values = {field.name: getattr(description, field.name) for field in dataclasses.fields(description)}
    return Pretrained(**values, params=params)


def describe(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Description:
    """The description of the weights that `load` would load, without reading them. Raises: as `load`, except for values."""
    return _read_or_raise(path, flags, ema, with_params=False)[0]


def _read_or_raise(path, flags: Flags, ema: bool, with_params: bool) -> tuple[Description, Any]:
    """As `_read`, with every error of an invalid file as a PretrainedError."""
    try:
        return _read(local_path(path), flags, ema, with_params)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PretrainedError(
            f"{path} cannot be loaded: its content or the flags are invalid ({type(error).__name__}: {reason}); "
            "`python -m diffusion_jax.pretrained inspect PATH` shows the description of the weights"
        ) from error


def _read(path: pathlib.Path, flags: Flags, ema: bool, with_params: bool) -> tuple[Description, Any]:
    if path.is_dir():
        if native.is_workdir(path):
            _check_no_flags(path, flags)
            return native.load_workdir(path, ema, with_params)
        if diffusers.find_configs(path):
            _check_no_flags(path, flags)
            return diffusers.load_diffusers(path, with_params)
        raise PretrainedError(
            f"{path} is neither a diffusers folder (model_index.json, unet/config.json) nor a work directory with checkpoints"
        )
    if not path.exists() and not is_tensorflow_checkpoint(path):
        raise PretrainedError(f"{path}: no such file or folder")
    tensors = open_tensors(path, ema)
    if native.is_native(tensors):
        _check_no_flags(path, flags)
        return native.load_file(path, tensors, with_params)
    if ho.is_ho(tensors):
        return ho.load_ho(path, tensors, flags, with_params)
    if openai.is_openai(tensors):
        description, new_order = openai.describe_openai(path, tensors, flags)
        return description, openai.load_params(path, tensors, description, new_order) if with_params else None
    if "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors):
        raise PretrainedError(f"{path} is a file of diffusers: give its folder, whose configs describe the network")
    raise PretrainedError(
        f"{path} contains {len(tensors)} tensors of an unknown network ({list_names(tensors, 3)}); known: Ho et al.'s, "
        "OpenAI's, diffusers' and this package's"
    )


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether a path is a work directory with a config and checkpoints."""
    return native.is_workdir(local_path(path))


def read_flags(text: str | None) -> Flags:
    """The flags in a command-line argument: JSON if the text starts with "{". Raises: PretrainedError."""
    if not text or not text.startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise PretrainedError(f"flags={text!r} are not valid JSON: {error}") from None


def config_leaves(description: Description) -> dict[str, dict[str, Any]]:
    """Leaves of a config that build the same network, schedule and shape of the data. Raises: PretrainedError."""
    if description.diffusion is None or not isinstance(description.clip, bool):
        raise PretrainedError(
            "a config cannot describe these weights' table of betas, or the range of their clip; use pretrained.load in a "
            "program"
        )
    is_learned = description.variance.startswith("learned")
    loss = "classify" if isinstance(description.model, Classifier) else "hybrid" if is_learned else "simple"
    size, model = description.image_size, fields_of(description.model)
    model.pop("spatial_dims", None)  # no leaf: the number of sizes
    if description.low_resolution:
        del model["condition_channels"]  # follows from low_resolution
    if isinstance(description.model, MLP):
        model["kind"] = "mlp"
    normalization = "auto"
    if description.levels is None:
        normalization = "limits" if description.limits else "auto" if "x" in description.normalizations else "none"
    return {
        "model": model,
        "diffusion": dict(description.diffusion) | {"loss": loss, "conditioning_noise": description.conditioning_noise},
        "data": {
            "image_size": size[0] if len(size) == 2 and size[0] == size[1] else size,
            "channels": description.channels,
            "low_resolution": description.low_resolution,
            "levels": description.levels,
            "normalization": normalization,
            "limits": description.limits,
        }
        | ({} if description.is_images else {"random_flip": False}),
        "sampling": {"clip": description.clip},
    }


def _check_no_flags(path: pathlib.Path, flags: Flags) -> None:
    if flags:
        raise PretrainedError(f"flags={flags!r}: {path} contains its own description; omit the flags")


def save_diffusers(net: Pretrained, folder: str | os.PathLike) -> None:
    """Writes a folder for diffusers' `DDPMPipeline.from_pretrained`: safetensors and both configs.

    Raises: PretrainedError that names the field which diffusers does not support, before anything is written; OSError.
    """
    diffusers.write_folder(net, net.params, pathlib.Path(folder).expanduser())


def save_safetensors(net: Pretrained, path: str | os.PathLike) -> None:
    """Writes one file with the weights of any network and their description. Raises: PretrainedError, OSError."""
    native.write_file(net, net.params, pathlib.Path(path).expanduser())

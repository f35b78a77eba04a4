"""Model weights, read and written: every published DDPM, Improved DDPM and ADM, and the runs of this program.

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

from diffusion_jax.errors import CheckpointError, DataError, PretrainedError, list_names
from diffusion_jax.models import MLP, Classifier, fields_of
from diffusion_jax.pretrained import diffusers, ho, native, openai, parameters
from diffusion_jax.pretrained.diffusers import save_diffusers
from diffusion_jax.pretrained.model import Model, format_summary
from diffusion_jax.pretrained.native import from_config, is_workdir, read_class_names, restore, save_safetensors
from diffusion_jax.provenance import Provenance
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "Model",
    "PretrainedError",
    "config_leaves",
    "describe",
    "format_summary",
    "from_config",
    "is_workdir",
    "load",
    "read_class_names",
    "restore",
    "save_diffusers",
    "save_safetensors",
]

Flags = str | Mapping[str, Any] | None


def load(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Model:
    """A trained network with its weights, schedule and settings.

    path: one of
      - a folder of diffusers (of a DDPMPipeline; UNet2DModel with a scheduler's config);
      - OpenAI's .pt, with its published name or with flags;
      - a TensorFlow checkpoint of Ho et al.'s code, by its prefix .../model.ckpt-N, or its PyTorch port's .ckpt;
      - a work directory, or a file of `save_safetensors`.
    flags: for OpenAI's files, the name of a preset ("adm_imagenet256"), or the flags of OpenAI's scripts, as a dict or as
      text ("--num_heads 4 --noise_schedule cosine ...") or JSON; for networks of Ho et al.'s code that were not published,
      image_size, variance and other leaves of `config.diffusion`.
    ema: whether to read the moving average of the weights, from TensorFlow checkpoints and work directories. While the
      average of a work directory holds more than a tenth of the random initial weights, the raw weights replace it, with a
      warning.
    Raises: PretrainedError, one line, for tensors that are missing, unexpected, of another shape or not finite; fields that
    `models` does not support; flags that are missing; a file that is not readable.
    """
    return _read_or_raise(path, flags, ema, with_params=True)


def describe(path: str | os.PathLike, flags: Flags = None, ema: bool = True) -> Model:
    """As `load`, but with None as the parameters, which are not read. Raises: as `load`, except for values."""
    return _read_or_raise(path, flags, ema, with_params=False)


def _read_or_raise(path, flags: Flags, ema: bool, with_params: bool) -> Model:
    """As `_read`, with every error of an invalid file as a PretrainedError."""
    try:
        flags = json.loads(flags) if isinstance(flags, str) and flags.startswith("{") else flags
        net = _read(local_path(path), flags, ema, with_params)
    except (CheckpointError, DataError) as error:
        raise PretrainedError(str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PretrainedError(
            f"{path} cannot be loaded: its content or the flags are invalid ({type(error).__name__}: {reason}); "
            "`python -m diffusion_jax.pretrained inspect PATH` shows the description of the weights"
        ) from error
    if net.provenance.settings:  # of a run
        return net
    return dataclasses.replace(net, provenance=Provenance(pathlib.Path(path).stem, {"family": net.family}))


def _read(path: pathlib.Path, flags: Flags, ema: bool, with_params: bool) -> Model:
    tensors = None
    if not path.is_dir():
        if not path.exists() and not parameters.is_tensorflow_checkpoint(path):
            raise PretrainedError(f"{path}: no such file or folder")
        tensors = parameters.open_tensors(path, ema)
        if ho.is_ho(tensors.shapes):
            return ho.load_ho(path, tensors, flags, with_params)
        if openai.is_openai(tensors.shapes):
            return openai.load_openai(path, tensors, flags, with_params)
    if flags:
        raise PretrainedError(f"flags={flags!r}: {path} contains its own description; omit the flags")
    if tensors is None and is_workdir(path):
        return native.load_workdir(path, ema, with_params)
    if tensors is None and diffusers.find_configs(path):
        return diffusers.load_diffusers(path, with_params)
    if tensors is not None and native.is_native(tensors):
        return native.load_file(path, tensors, with_params)
    found = f"a file with {len(tensors.shapes)} tensors ({list_names(tensors.shapes, 3)})" if tensors else "a folder"
    raise PretrainedError(
        f"{path} is {found} of an unknown network; known: a diffusers folder (model_index.json, unet/config.json), a work "
        "directory with checkpoints, and files of Ho et al., of OpenAI and of this package"
    )


def config_leaves(description: Model) -> dict[str, dict[str, Any]]:
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

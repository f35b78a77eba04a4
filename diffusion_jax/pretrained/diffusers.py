"""Folders of diffusers, read and written: a UNet2DModel and a scheduler, each with its config."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from diffusion_jax import schedules
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.files import atomic_directory
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import Description, make_description
from diffusion_jax.pretrained.diffusers_scheduler import scheduler_from_config, scheduler_to_config
from diffusion_jax.pretrained.diffusers_unet import UNET_DEFAULTS, unet_from_config, unet_to_config
from diffusion_jax.pretrained.tensors import open_tensors, read_json, save_tensors

__all__ = ["find_configs", "load_diffusers", "write_folder"]


def find_configs(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """(the network's folder, the scheduler's config) of a pipeline's folder, in the newer or older layout; else None."""
    for network in (folder / "unet", folder):
        config = network / "config.json"
        if config.is_file() and '"_class_name"' in config.read_text(errors="replace"):
            folders = [folder / "scheduler", folder, folder.parent / "scheduler", folder.parent]
            configs = [path / "scheduler_config.json" for path in folders]
            return network, next((path for path in configs if path.is_file()), configs[0])
    return None


def load_diffusers(
    folder: pathlib.Path, flags: str | Mapping[str, Any] | None, with_params: bool
) -> tuple[Description, dict | None]:
    """The description of a pipeline's folder, and its parameters if `with_params`, else None.

    flags: fields of the scheduler's config, for a folder without one. Raises: PretrainedError.
    """
    paths = find_configs(folder)
    if paths is None:
        raise PretrainedError(f"{folder} contains no config.json of a network; give the folder of a pipeline")
    network, scheduler_path = paths
    if isinstance(flags, str):
        raise PretrainedError(
            f"flags={flags!r}: for a diffusers folder they are fields of the scheduler's config, as a dict"
        )
    _check_pipeline(folder, network)
    fields = dict(flags or {})
    scheduler = read_json(scheduler_path) if scheduler_path.is_file() else {}
    if not scheduler_path.is_file() and not fields:
        raise PretrainedError(
            f"{folder} contains no scheduler_config.json: give the folder of the whole pipeline, or its fields as flags"
        )
    size = fields.pop("sample_size", None)
    try:
        description = _describe(read_json(network / "config.json"), scheduler | fields, size)
    except PretrainedError as error:
        raise PretrainedError(f"{network}: {error}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise PretrainedError(f"{network} or {scheduler_path}: {error}") from None
    return description, _load_params(network, description) if with_params else None


def _check_pipeline(folder: pathlib.Path, network: pathlib.Path) -> None:
    """Raises: PretrainedError for a pipeline of another kind than DDPMPipeline."""
    index = folder / "model_index.json"
    others = {name for name in (read_json(index) if index.is_file() else {}) if not name.startswith("_")}
    others -= {"unet", "scheduler"}
    if others:
        raise PretrainedError(
            f"{folder}: a pipeline with {list_names(sorted(others))} is not supported, only an unet and a scheduler, whose "
            "output is an image"
        )
    kind = read_json(network / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise PretrainedError(f"{network}: {kind} is not supported, only UNet2DModel")


def _describe(config: Mapping[str, Any], scheduler: Mapping[str, Any], size: Any) -> Description:
    """The description of a UNet2DModel's config and a scheduler's. size: overrides the config's sample_size."""
    size = size or config.get("sample_size")
    model = unet_from_config(config)
    settings = scheduler_from_config(scheduler)
    channels = config.get("in_channels", UNET_DEFAULTS["in_channels"])
    if size is None:
        raise PretrainedError("the config has no sample_size, the image size in pixels: give it in flags")
    family = f"diffusers, {config.get('_diffusers_version', '')}"
    description = make_description(family, model, size, settings.leaves, channels=channels, clip=settings.clip)
    needed = channels * (2 if description.variance.startswith("learned") else 1)
    if model.out_channels != needed:
        raise PretrainedError(
            f"out_channels={model.out_channels} and variance_type={description.variance!r} do not fit "
            f"in_channels={channels}, which would need {needed}"
        )
    if settings.betas is None:
        return description
    return dataclasses.replace(description, schedule=schedules.from_betas(settings.betas), diffusion=None)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _load_params(network: pathlib.Path, description: Description) -> dict:
    files = [f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((network / file for file in files if (network / file).is_file()), None)
    if path is None:
        raise PretrainedError(f"{network} contains no weights: neither {' nor '.join(files)}")
    tensors = open_tensors(path)

    def new_name(name: str) -> str:
        parts = name.split(".")
        return ".".join(_OLD_ATTENTION.get(part, part) for part in parts) if "attentions" in parts else name

    names = {new_name(name): name for name in tensors}
    shapes = parameters.parameter_shapes(description.model, description.example_shape)

    def read(name, parameter, shape):
        return parameters.from_torch(tensors[names[name]], parameter, shape)

    return parameters.build_params(str(path), shapes, names, lambda p: parameters.DIFFUSERS(p, description.model), read)


def write_folder(description: Description, params, folder: pathlib.Path) -> None:
    """Writes the folder of a DDPMPipeline completely or not at all. Raises: PretrainedError, before writing; OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} exists and is not empty: choose another path")
    network, scheduler = unet_to_config(description), scheduler_to_config(description)
    tensors = {
        parameters.DIFFUSERS(path, description.model): parameters.to_torch(np.asarray(value), path)
        for path, value in flax.traverse_util.flatten_dict(params).items()
    }
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    contents = {"unet/config.json": network, "scheduler/scheduler_config.json": scheduler, "model_index.json": index}
    with atomic_directory(folder) as temporary:
        for name in ("unet", "scheduler"):
            (temporary / name).mkdir()
        save_tensors(tensors, temporary / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")

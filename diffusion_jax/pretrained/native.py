"""Weights of this package: work directories, and single .safetensors files that include their description."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from diffusion_jax import data, models, schedules, training
from diffusion_jax.config import resolve, resolve_clip
from diffusion_jax.errors import CheckpointError, DataError, PretrainedError
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import DIFFUSION_DEFAULTS, Description, make_clip, make_description
from diffusion_jax.pretrained.tensors import Tensors, read_json, save_tensors
from diffusion_jax.training import checkpoints
from diffusion_jax.training.ema import raw_weights_note, weights_kind
from diffusion_jax.training.state import abstract_params

__all__ = ["is_native", "is_workdir", "load_file", "load_workdir", "write_file"]

_METADATA_KEY = "diffusion_jax"


def is_workdir(path: pathlib.Path) -> bool:
    """Whether a directory is a work directory with a config and checkpoints."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def is_native(tensors: Tensors) -> bool:
    """Whether a safetensors file was written by `write_file`."""
    return _METADATA_KEY in tensors.metadata


def load_workdir(path: pathlib.Path, ema: bool, with_params: bool) -> tuple[Description, Any]:
    """The description and parameters of a run's newest checkpoint; without parameters None.

    Warns if the raw weights replace the EMA (`training.ema.weights_kind`). Raises: PretrainedError.
    """
    try:
        config = resolve(read_json(path / "config.json"))
        model, shape = training.model_from_config(config), data.example_shape(config["data"])
        diffusion = config["diffusion"]
        description = make_description(
            "diffusion_jax, a work directory",
            model,
            shape[:-1],
            {name: diffusion[name] for name in DIFFUSION_DEFAULTS},
            channels=shape[-1],
            clip=bool(resolve_clip(config)),
            low_resolution=config["data"]["low_resolution"],
            conditioning_noise=diffusion["conditioning_noise"],
            levels=config["data"]["levels"],
            normalizations=training.stored_normalizations(config, path),
            limits=config["data"]["limits"] if config["data"]["normalization"] == "limits" else (),
        )
    except CheckpointError as error:
        raise PretrainedError(str(error)) from None
    except (KeyError, ValueError, TypeError, DataError) as error:
        raise PretrainedError(f"{path / 'config.json'} is not a config of this version: {error}") from None
    if not with_params:
        return description, None
    abstract = abstract_params(model, shape)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
    try:
        with checkpoints.Checkpoints(path / "checkpoints", read_only=True) as saved:
            restored = saved.restore_weights(abstract, lambda step: weights_kind(config, step, ema))
    except CheckpointError as error:
        raise PretrainedError(str(error)) from None
    if restored is None:
        raise PretrainedError(f"{path} contains no finished checkpoint yet")
    step, params = restored
    if ema and weights_kind(config, step) == "raw":
        warnings.warn(f"{path}: {raw_weights_note(config, step)}", stacklevel=2)
    if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise PretrainedError(f"{path}: the checkpoint of step {step} contains values that are not finite")
    return description, params


def write_file(description: Description, params, path: pathlib.Path) -> None:
    """Writes one .safetensors: tensors by their paths, in Flax's layout, and the description as JSON metadata.

    Raises: PretrainedError, OSError.
    """
    clip = description.clip
    clip = clip if isinstance(clip, bool) else getattr(clip, "keywords", {}).get("max")
    if clip is None:
        raise PretrainedError("clip: a file can store only True, False and a range")
    schedule, diffusion = description.schedule, description.diffusion
    if diffusion is None:  # a table of betas, which is not in the leaves of a config
        diffusion = {"prediction": description.prediction, "variance": description.variance}
        diffusion |= {"betas": schedule.betas.tolist(), "timesteps": schedule.timesteps.tolist()}
    stored = {
        "kind": type(description.model).__name__,
        "model": models.fields_of(description.model),
        "image_size": description.image_size,
        "channels": description.channels,
        "diffusion": dict(diffusion),
        "clip": clip,
        "low_resolution": description.low_resolution,
        "conditioning_noise": description.conditioning_noise,
        "levels": description.levels,
        "normalizations": {name: value.to_json() for name, value in description.normalizations.items()},
        "limits": description.limits,
    }
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {_METADATA_KEY: json.dumps(stored)})


def load_file(path: pathlib.Path, tensors: Tensors, with_params: bool) -> tuple[Description, dict | None]:
    """The description and, if `with_params`, the parameters of a file of `write_file`. Raises: PretrainedError."""
    try:
        stored: Mapping[str, Any] = json.loads(tensors.metadata[_METADATA_KEY])
        diffusion = stored["diffusion"]
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (models.UNet, models.MLP, models.Classifier)}
        description = make_description(
            "diffusion_jax, one file",
            models.from_config(stored["model"], kinds[stored["kind"]]),
            stored["image_size"],
            {name: value for name, value in diffusion.items() if name not in ("betas", "timesteps")},
            channels=stored["channels"],
            clip=make_clip(stored["clip"]),
            low_resolution=stored["low_resolution"],
            conditioning_noise=stored["conditioning_noise"],
            levels=stored["levels"],
            normalizations={
                name: data.Normalization.from_json(value) for name, value in stored["normalizations"].items()
            },
            limits=stored["limits"],
        )
        if "betas" in diffusion:
            table = schedules.from_betas(diffusion["betas"], diffusion["timesteps"])
            description = dataclasses.replace(description, schedule=table, diffusion=None)
    except (KeyError, ValueError, TypeError) as error:
        raise PretrainedError(
            f"{path}: its description cannot be read ({error}); it may be of another version: convert it with that version"
        ) from None
    if not with_params:
        return description, None
    shapes = parameters.parameter_shapes(description.model, description.example_shape)
    params = parameters.build_params(
        str(path), shapes, tensors, ".".join, lambda name, parameter, shape: np.asarray(tensors[name])
    )
    return description, params

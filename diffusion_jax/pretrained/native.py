"""This project's own weights: work directories, and one .safetensors file with all that is known of them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from diffusion_jax import data, models, schedules, training
from diffusion_jax.config import migrate, resolve
from diffusion_jax.errors import PretrainedError
from diffusion_jax.pretrained import layers
from diffusion_jax.pretrained.description import DIFFUSION, Description, clip_to, describe
from diffusion_jax.pretrained.files import Tensors, read_json, save_tensors
from diffusion_jax.training import checkpoints
from diffusion_jax.training.state import initial_params

_KEY = "diffusion_jax"


def is_workdir(path: pathlib.Path) -> bool:
    """Whether a directory holds a run of ours."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def is_native(tensors: Tensors) -> bool:
    """Whether a safetensors file is one that `write_file` made."""
    return _KEY in tensors.metadata


def load_workdir(path: pathlib.Path, ema: bool, with_params: bool) -> tuple[Description, dict | None]:
    """The newest checkpoint of a run. Raises: PretrainedError."""
    stored = read_json(path / "config.json")
    try:
        config = resolve(migrate(stored))
        model, shape = training.model_from_config(config), training.input_shape(config)
        height, width, channels = data.image_shape(config["data"])
        diffusion = config["diffusion"]
        found = dataclasses.replace(
            describe(
                "diffusion_jax, a work directory",
                model,
                (height, width),
                {name: diffusion[name] for name in DIFFUSION},
                channels=channels,
                clip=bool(config["sampling"]["clip"]),
                low_resolution=config["data"]["low_resolution"],
            ),
            conditioning_noise=diffusion["conditioning_noise"],
        )
    except (KeyError, ValueError, TypeError, data.DataError) as error:
        raise PretrainedError(f"{path / 'config.json'} is no config of this version: {error}") from None
    if not with_params:
        return found, None
    abstract = jax.eval_shape(lambda: initial_params(jax.random.key(0), model, shape))
    whole = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), abstract)
    try:
        with checkpoints.Checkpoints(path / "checkpoints", read_only=True) as saved:
            restored = saved.restore_weights(abstract, ema)
    except checkpoints.CheckpointError as error:
        raise PretrainedError(str(error)) from None
    if restored is None:
        raise PretrainedError(f"{path} holds no finished checkpoint yet")
    if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(restored[1])):
        raise PretrainedError(f"{path} holds values that are not finite, in the checkpoint of step {restored[0]}")
    return found, restored[1]


def write_file(found: Description, params, path: pathlib.Path) -> None:
    """One .safetensors: tensors by their paths here, in Flax's layout, and a JSON description. Raises: PretrainedError."""
    clip = found.clip if isinstance(found.clip, bool) else getattr(found.clip, "keywords", {}).get("max")
    if clip is None:
        raise PretrainedError("clip: only True, False and a range have a place in the file's description")
    schedule, diffusion = found.schedule, found.diffusion
    if diffusion is None:  # a table, which no config can say
        diffusion = {"prediction": found.prediction, "variance": found.variance}
        diffusion |= {"betas": schedule.betas.tolist(), "timesteps": schedule.timesteps.tolist()}
    description = {
        "kind": type(found.model).__name__,
        "model": models.fields_of(found.model),
        "image_size": found.image_size,
        "channels": found.channels,
        "diffusion": dict(diffusion),
        "clip": clip,
        "low_resolution": found.low_resolution,
        "conditioning_noise": found.conditioning_noise,
    }
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {_KEY: json.dumps(description)})


def load_file(path: pathlib.Path, tensors: Tensors, with_params: bool) -> tuple[Description, dict | None]:
    """What `write_file` wrote. Raises: PretrainedError."""
    try:
        stored: Mapping[str, Any] = json.loads(tensors.metadata[_KEY])
        diffusion = stored["diffusion"]
        kind = {"UNet": models.UNet, "Classifier": models.Classifier}[stored["kind"]]
        found = dataclasses.replace(
            describe(
                "diffusion_jax, one file",
                models.from_config(stored["model"], kind),
                stored["image_size"],
                {name: value for name, value in diffusion.items() if name not in ("betas", "timesteps")},
                channels=stored["channels"],
                clip=clip_to(stored["clip"]),
                low_resolution=stored["low_resolution"],
            ),
            conditioning_noise=stored["conditioning_noise"],
        )
        if "betas" in diffusion:
            table = schedules.from_betas(diffusion["betas"], diffusion["timesteps"])
            found = dataclasses.replace(found, schedule=table, diffusion=None)
    except (KeyError, ValueError, TypeError) as error:
        raise PretrainedError(
            f"{path}: its description cannot be read ({error}); was it written by another version?"
        ) from None
    if not with_params:
        return found, None
    shapes = layers.shapes_of(found.model, found.image_size, found.in_channels)
    return found, layers.fill(
        str(path), shapes, tensors, ".".join, lambda name, parameter, shape: np.asarray(tensors[name])
    )

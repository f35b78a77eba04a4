"""Weights of this package: work directories, and single .safetensors files that include their description."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import data, models, schedules, training
from diffusion_jax.config import resolve, resolve_clip
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import PretrainedError
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.model import DIFFUSION_DEFAULTS, Model, make_clip, make_model
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.training import checkpoints
from diffusion_jax.training.optimizer import raw_weights_note, weights_kind
from diffusion_jax.training.state import abstract_params

__all__ = [
    "from_config",
    "is_native",
    "is_workdir",
    "load_file",
    "load_workdir",
    "read_class_names",
    "restore",
    "save_safetensors",
]

_METADATA_KEY = "diffusion_jax"
_STORED_FIELDS = ("image_size", "channels", "low_resolution", "conditioning_noise", "levels", "limits", "class_names")


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether a path is a work directory with a config and checkpoints."""
    path = local_path(path)
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def is_native(tensors: parameters.Tensors) -> bool:
    """Whether a safetensors file was written by `save_safetensors`."""
    return _METADATA_KEY in tensors.metadata


def from_config(
    config: Mapping[str, Any],
    params: Any = None,
    *,
    normalizations: data.Normalizations = types.MappingProxyType({}),
    class_names: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Model:
    """The model that a config describes, with these parameters, for instance those of a `TrainState`.

    config: any mapping that `config.resolve` takes. normalizations, class_names, mesh: fields of the model.
    Raises: ConfigError for a value that its leaf does not allow; ValueError for a config that cannot be built.
    """
    config = resolve(config)
    shape, diffusion = data.example_shape(config["data"]), config["diffusion"]
    net = make_model(
        "diffusion_jax",
        training.model_from_config(config),
        shape[:-1],
        {name: diffusion[name] for name in DIFFUSION_DEFAULTS},
        shape[-1],
        clip=bool(resolve_clip(config)),
        low_resolution=config["data"]["low_resolution"],
        conditioning_noise=diffusion["conditioning_noise"],
        levels=config["data"]["levels"],
        normalizations=normalizations,
        limits=config["data"]["limits"] if config["data"]["normalization"] == "limits" else (),
        class_names=tuple(class_names),
        mesh=mesh,
    )
    return net.with_params(params)


def load_workdir(path: pathlib.Path, ema: bool, with_params: bool) -> Model:
    """The network of a run; with the parameters of its newest checkpoint if `with_params`.

    Warns if the raw weights replace the EMA (`training.optimizer.weights_kind`). Raises: PretrainedError, CheckpointError,
    DataError.
    """
    config = resolve(parameters.read_json(path / "config.json"))
    names = read_class_names(path)
    net = from_config(config, normalizations=training.stored_normalizations(config, path), class_names=names)
    if not with_params:
        return net
    net = restore(net, config, open_run_dir(path, read_only=True), ema)
    if ema and net.weights == "raw":
        warnings.warn(f"{path}: {raw_weights_note(config, net.step or 0)}", stacklevel=2)
    return net


def read_class_names(directory: str | os.PathLike) -> tuple[str, ...]:
    """The names of the classes in data.json of a run; () for published weights, and if it cannot be read."""
    try:
        stored = json.loads((local_path(directory, "data.json") / "data.json").read_text())
        return tuple(map(str, stored["classes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def restore(net: Model, config: Mapping[str, Any], workdir: RunDir, ema: bool) -> Model:
    """The model with the parameters of the newest intact checkpoint, replicated on its mesh or on one device.

    config: the run's. Raises: PretrainedError if there is none, or if its values are not finite; CheckpointError.
    """
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = place if net.mesh is None else sharding.replicated(net.mesh)
    shapes = abstract_params(net.model, net.example_shape)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    restored = None
    if (workdir / "checkpoints").is_dir():
        with checkpoints.Checkpoints(workdir.subdirectory("checkpoints"), read_only=True) as saved:
            restored = saved.restore_weights(abstract, lambda step: weights_kind(config, step, ema))
    if restored is None:
        raise PretrainedError(
            f"{workdir} contains no finished checkpoint; train first: python main.py --config=... --workdir={workdir}"
        )
    step, params = restored
    if not all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise PretrainedError(f"{workdir}: the checkpoint of step {step} contains values that are not finite")
    kind = weights_kind(config, step, ema)
    provenance = Provenance(f"step{step}_{kind}", {"step": step, "weights": kind})
    return dataclasses.replace(net, params=params, provenance=provenance)


def save_safetensors(net: Model, path: str | os.PathLike) -> None:
    """Writes one file with the weights of any network, in Flax's layout, and their description as JSON metadata.

    Raises: PretrainedError, OSError.
    """
    path = pathlib.Path(path).expanduser()
    clip = net.clip if isinstance(net.clip, bool) else getattr(net.clip, "keywords", {}).get("max")
    if clip is None:
        raise PretrainedError("clip: a file can store only True, False and a range")
    diffusion = net.diffusion
    if diffusion is None:  # a table of betas, which is not in the leaves of a config
        diffusion = {"prediction": net.prediction, "variance": net.variance}
        diffusion |= {"betas": net.schedule.betas.tolist(), "timesteps": net.schedule.timesteps.tolist()}
    stored = {name: getattr(net, name) for name in _STORED_FIELDS} | {
        "kind": type(net.model).__name__,
        "model": models.fields_of(net.model),
        "diffusion": dict(diffusion),
        "clip": clip,
        "normalizations": {name: value.to_json() for name, value in net.normalizations.items()},
    }
    flat = flax.traverse_util.flatten_dict(net.params, sep=".")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters.save_tensors(tensors, path, {_METADATA_KEY: json.dumps(stored)})


def load_file(path: pathlib.Path, tensors: parameters.Tensors, with_params: bool) -> Model:
    """The network of a file of `save_safetensors`; with its parameters if `with_params`. Raises: PretrainedError."""
    stored: dict[str, Any] = json.loads(tensors.metadata[_METADATA_KEY])
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (models.UNet, models.MLP, models.Classifier)}
    diffusion = stored["diffusion"]
    fields: dict[str, Any] = {name: stored[name] for name in _STORED_FIELDS}
    fields |= {name: tuple(stored[name]) for name in ("limits", "class_names")}
    net = make_model(
        "diffusion_jax, one file",
        models.from_config(stored["model"], kinds[stored["kind"]]),
        diffusion={name: value for name, value in diffusion.items() if name not in ("betas", "timesteps")},
        clip=make_clip(stored["clip"]),
        normalizations={n: data.Normalization.from_json(value) for n, value in stored["normalizations"].items()},
        **fields,
    )
    if "betas" in diffusion:
        table = schedules.from_betas(diffusion["betas"], diffusion["timesteps"])
        net = dataclasses.replace(net, schedule=table, diffusion=None)
    if not with_params:
        return net
    shapes = parameters.parameter_shapes(net.model, net.example_shape)
    params = parameters.build_params(path, shapes, tensors, ".".join, parameters.keep_layout)
    return net.with_params(params)

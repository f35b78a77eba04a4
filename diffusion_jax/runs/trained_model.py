"""The model of a run with its newest weights, and the weights of another model that a run starts from."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import models, pretrained
from diffusion_jax.config import is_classifier
from diffusion_jax.console import log
from diffusion_jax.data import Normalizations
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.pretrained.model import format_normalization
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs.workdir import check_identity, read_class_names
from diffusion_jax.training import TrainState, stored_normalizations
from diffusion_jax.training.ema import raw_weights_note

__all__ = ["load_initial_weights", "load_weights", "normalization_differences", "open_model", "set_params"]

# Fields of a network that its weights do not depend on.
_FIELDS_IGNORED = {"dropout", "dtype", "precision", "remat", "initializer"}


def open_model(config: ConfigDict, workdir: RunDir | os.PathLike, mesh: Mesh | None = None) -> pretrained.Model:
    """The diffusion model of a run, without its parameters, so that settings are checked before a long read.

    mesh: by default that of `config.mesh`.
    Raises: UserError for a wrong config or a directory that holds another run; CheckpointError, PretrainedError.
    """
    workdir = open_run_dir(workdir)
    check_identity(config, workdir)
    if is_classifier(config):
        raise UserError("diffusion.loss=classify is the config of a classifier; use the config of a diffusion model")
    with as_user_error("config"):
        net = pretrained.from_config(config, mesh=mesh or sharding.make_mesh(config.mesh))
    if _starts_from_other_weights(config, workdir):
        normalizations = _load(pretrained.describe, config, True).normalizations
    else:
        normalizations = stored_normalizations(config, workdir)
    return dataclasses.replace(net, normalizations=normalizations, class_names=read_class_names(config, workdir))


def _starts_from_other_weights(config: Mapping, workdir: RunDir) -> bool:
    return bool(config["init_from"]) and not committed_steps(workdir / "checkpoints")


def load_weights(
    net: pretrained.Model, config: ConfigDict, workdir: RunDir | os.PathLike, use_ema: bool
) -> pretrained.Model:
    """The model with the newest intact weights of its run, or those of `config.init_from` if there is no checkpoint.

    Every process calls this. A note is logged if the raw weights replace the EMA that `use_ema` requests
    (`training.ema.weights_kind`).
    Raises: UserError if `init_from` was trained for another diffusion; PretrainedError if there are no weights.
    """
    workdir = open_run_dir(workdir)
    if not _starts_from_other_weights(config, workdir):
        net = pretrained.restore(net, config, workdir, use_ema)
        if use_ema and net.weights == "raw":
            log(f"Note: {raw_weights_note(config, net.step or 0)}.")
        return net
    other, differences = load_initial_weights(config, net.model, use_ema)
    if differences:
        raise UserError(
            f"init_from={config.init_from} was trained for another diffusion ({'; '.join(differences)}); use "
            "these values, or train first"
        )
    kind = "ema" if use_ema else "raw"
    name, settings = f"{pathlib.Path(config.init_from).stem}_{kind}", {"step": 0, "weights": kind}
    provenance = Provenance(name, settings, {"init_from": config.init_from})
    assert net.mesh is not None
    return dataclasses.replace(net.with_params(other.params).on_mesh(net.mesh), provenance=provenance)


def load_initial_weights(
    config: Mapping, model: models.UNet | models.MLP | models.Classifier, use_ema: bool = True
) -> tuple[pretrained.Model, list[str]]:
    """(the model that `config.init_from` names, a phrase for each difference of its diffusion from the config).

    Raises: UserError if it is another network; PretrainedError.
    """
    net = _load(pretrained.load, config, use_ema)
    _check_same_network(config, net, model)
    return net, pretrained.from_config(config).find_differences(net)


def _load(read: Callable[..., Any], config: Mapping, use_ema: bool) -> Any:
    """`pretrained.load` or `pretrained.describe` of `config.init_from`. Raises: PretrainedError."""
    path = config["init_from"]
    try:
        return read(path, config["init_flags"] or None, use_ema)
    except pretrained.PretrainedError as error:
        raise pretrained.PretrainedError(f"init_from={path}: {error}") from error


def normalization_differences(old: Normalizations, normalizations: Normalizations) -> str | None:
    """How the data of a run are scaled otherwise than those of its initial weights; None if they are scaled alike."""
    differences = []
    for name in sorted(old.keys() | normalizations.keys()):
        if old.get(name) != normalizations.get(name):
            there, here = (
                format_normalization(each[name]) if name in each else "none" for each in (old, normalizations)
            )
            differences.append(f"{name}: {there} there, {here} here")
    return "; ".join(differences) or None


def _check_same_network(config: Mapping, net, model: models.UNet | models.MLP | models.Classifier) -> None:
    path = config["init_from"]
    if type(net.model) is not type(model):
        raise UserError(
            f"init_from={path} holds weights of models.{type(net.model).__name__}, and the config describes "
            f"models.{type(model).__name__}"
        )
    loaded = net.model
    if not isinstance(loaded, models.Classifier) and not isinstance(model, models.Classifier):
        # An output with the channels of the data is written as None or as a number.
        loaded = loaded.clone(out_channels=loaded.out_channels or net.channels)
        model = model.clone(out_channels=model.out_channels or config["data"]["channels"])
    differences = [
        f"model.{name}: {getattr(loaded, name)!r} there, {getattr(model, name)!r} here"
        for name in sorted(set(models.fields_of(model)) - _FIELDS_IGNORED)
        if getattr(loaded, name) != getattr(model, name)
    ]
    channels = config["data"]["channels"]
    if net.channels != channels:
        differences.append(f"input channels: {net.channels} there, {channels} here")
    if differences:
        raise UserError(
            f"init_from={path} is another network ({'; '.join(differences)}); --pretrained={path} uses its config"
        )


def set_params(state: TrainState, abstract_state: TrainState, params) -> TrainState:
    """A state with these parameters, and their EMA equal to them. abstract_state: shardings of the state."""

    def place(shapes):
        return jax.tree.map(lambda leaf, shape: jax.device_put(jnp.copy(leaf), shape.sharding), params, shapes)

    return dataclasses.replace(state, params=place(abstract_state.params), ema_params=place(abstract_state.ema_params))

"""The newest weights of a work directory, and the weights of another model that a run starts from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import models, pretrained, schedules
from diffusion_jax.config import is_continuous
from diffusion_jax.data import Normalizations, example_shape
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.pretrained.description import format_normalization
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs.console import log
from diffusion_jax.runs.sampling_setup import SamplingSetup
from diffusion_jax.runs.workdir import check_identity, read_class_names
from diffusion_jax.training import TrainState, model_from_config, schedule_from_config, stored_normalizations
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.ema import raw_weights_note, weights_kind
from diffusion_jax.training.state import abstract_params

__all__ = [
    "TrainedModel",
    "load_initial_weights",
    "load_weights",
    "normalization_differences",
    "params_digest",
    "set_params",
]

# Fields of a network that its weights do not depend on.
_FIELDS_IGNORED = {"dropout", "dtype", "precision", "remat", "initializer"}


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The model, schedule and newest weights of a run. use_ema: whether the EMA is requested (see `weights_kind`).

    The weights are loaded at their first access, which every process must make: a wrong config then fails before a long read.
    """

    config: ConfigDict
    workdir: RunDir
    use_ema: bool
    mesh: Mesh
    model: models.UNet | models.MLP
    schedule: schedules.Schedule
    class_names: tuple[str, ...]

    @classmethod
    def open(cls, config: ConfigDict, workdir: RunDir | os.PathLike, use_ema: bool) -> TrainedModel:
        """Builds everything but the weights. Raises: UserError for a wrong config or a directory that holds another run."""
        workdir = open_run_dir(workdir)
        check_identity(config, workdir)
        with as_user_error("config"):
            mesh = sharding.make_mesh(config.mesh)
            model, schedule = model_from_config(config), schedule_from_config(config.diffusion)
        if not isinstance(model, models.Conditional):
            raise UserError(
                "diffusion.loss=classify is the config of a classifier; use the config of a diffusion model"
            )
        return cls(config, workdir, use_ema, mesh, model, schedule, read_class_names(config, workdir))

    @property
    def is_trained_here(self) -> bool:
        """Whether the weights are those of a checkpoint in the work directory, not those of `config.init_from`."""
        return not self.config.init_from or bool(committed_steps(self.workdir / "checkpoints"))

    @functools.cached_property
    def _weights(self) -> tuple[int, Any]:
        return load_weights(self.config, self.workdir, self.model, self.mesh, self.use_ema)

    @functools.cached_property
    def normalizations(self) -> Normalizations:
        """The normalizations of the data that the weights were trained on, {} for images of gray levels.

        Raises: as `training.stored_normalizations`.
        """
        if not self.is_trained_here:
            return _load(pretrained.describe, self.config, self.use_ema).normalizations
        return stored_normalizations(self.config, self.workdir)

    def sampling_setup(self, conditions: np.ndarray | None) -> SamplingSetup:
        """The decisions of `config.sampling`. conditions: [N, ...] in the units of the data. Raises: as `SamplingSetup`."""
        return SamplingSetup(
            self.config,
            self.model,
            self.schedule,
            self.mesh,
            self.class_names,
            conditions=conditions,
            normalizations=self.normalizations,
        )

    @property
    def step(self) -> int:
        """The training step of the weights, 0 for those of `config.init_from`."""
        return self._weights[0]

    @property
    def params(self) -> Any:
        """The parameters, replicated on every device."""
        return self._weights[1]

    @property
    def weights_kind(self) -> str:
        """`ema` or `raw`, which replaces an EMA that still holds much of the random initial weights."""
        return weights_kind(self.config, self.step, self.use_ema)

    @property
    def weights_name(self) -> str:
        """The origin of the weights in file names: step500, or the name of `config.init_from`."""
        is_initial = self.config.init_from and not self.step
        return pathlib.Path(self.config.init_from).stem if is_initial else f"step{self.step}"


def load_weights(config: Mapping, workdir: RunDir | os.PathLike, model, mesh: Mesh, use_ema: bool) -> tuple[int, Any]:
    """(step, parameters) of the newest intact checkpoint, or 0 and those of `config.init_from` if there is no checkpoint.

    The parameters are replicated on every device. A note is logged if the raw weights replace the EMA that `use_ema`
    requests (`training.ema.weights_kind`).
    Raises: UserError if there are no weights, or if `init_from` was trained for another diffusion; PretrainedError.
    """
    replicated, workdir = sharding.replicated(mesh), open_run_dir(workdir)
    if config["init_from"] and not committed_steps(workdir / "checkpoints"):
        net, differences = load_initial_weights(config, model, use_ema)
        if differences:
            raise UserError(
                f"init_from={config['init_from']} was trained for another diffusion ({'; '.join(differences)}); use "
                "these values, or train first"
            )
        return 0, jax.device_put(net.params, replicated)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} holds no checkpoints; train first: python main.py --config=... --workdir={workdir}")
    shapes = abstract_params(model, example_shape(config["data"]))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes)
    with Checkpoints(workdir.subdirectory("checkpoints"), read_only=True) as checkpoints:
        restored = checkpoints.restore_weights(abstract, lambda step: weights_kind(config, step, use_ema))
    if restored is None:
        raise UserError(f"{workdir} holds no finished checkpoint yet; train longer")
    step, params = restored
    if use_ema and weights_kind(config, step) == "raw":
        log(f"Note: {raw_weights_note(config, step)}.")
    return step, params


def params_digest(params) -> str:
    """SHA-256 of every name, shape, dtype and value of a tree of arrays; it does not depend on their devices."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def load_initial_weights(
    config: Mapping, model: models.UNet | models.MLP | models.Classifier, use_ema: bool = True
) -> tuple[Any, list[str]]:
    """(the model that `config.init_from` names, a phrase for each difference of its diffusion from the config).

    Raises: UserError if it is another network; PretrainedError.
    """
    net = _load(pretrained.load, config, use_ema)
    _check_same_network(config, net, model)
    return net, _diffusion_differences(config, net)


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


def _diffusion_differences(config: Mapping, net) -> list[str]:
    schedule, diffusion, differences = schedule_from_config(config["diffusion"]), config["diffusion"], []
    if not isinstance(net.model, models.Classifier):
        names = ["prediction"]
        if any(variance.startswith("learned") for variance in (net.variance, diffusion["variance"])):
            names.append("variance")  # fixed variances are an option of the sampler, not of the network
        differences = [
            f"{name}: {getattr(net, name)!r} there, {diffusion[name]!r} here"
            for name in names
            if getattr(net, name) != diffusion[name]
        ]
    if (net.levels is None) != is_continuous(config):
        differences.append(f"data.levels: {net.levels} there, {config['data']['levels']} here")
    if any(
        not np.array_equal(getattr(net.schedule, name), getattr(schedule, name)) for name in ("timesteps", "alpha_bar")
    ):
        differences.append("another noise schedule")
    return differences


def set_params(state: TrainState, abstract_state: TrainState, params) -> TrainState:
    """A state with these parameters, and their EMA equal to them. abstract_state: shardings of the state."""

    def place(shapes):
        return jax.tree.map(lambda leaf, shape: jax.device_put(jnp.copy(leaf), shape.sharding), params, shapes)

    return dataclasses.replace(state, params=place(abstract_state.params), ema_params=place(abstract_state.ema_params))

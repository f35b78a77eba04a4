"""Reads and writes model weights: every published DDPM, Improved DDPM and ADM, EDM's networks, and the runs of this program.

    from diffusion_jax import pretrained, sampling

    net = pretrained.load("64x64_diffusion.pt")
    images = net.sample(jax.random.key(0), 16, y=207, sampler=sampling.ddim(), steps=50)  # float32 [16, 64, 64, 3] in [-1, 1]

`diffusion-jax weights inspect PATH` prints the description of a file; `... list` prints the published weights
that are known to load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import data, models, schedules, training
from diffusion_jax.config import resolve, resolve_clip, short_name, untrusted_values
from diffusion_jax.console import log
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import (
    CheckpointError,
    DataError,
    PretrainedError,
    UserError,
    describe_exception,
    list_differences,
    list_names,
    shorten,
)
from diffusion_jax.pretrained import catalog, diffusers, edm, ho, openai, parameters
from diffusion_jax.pretrained.catalog import PublishedWeights, available, find_reported, format_available
from diffusion_jax.pretrained.diffusers import save_diffusers
from diffusion_jax.pretrained.model import DIFFUSION_DEFAULTS, Model, format_summary, make_clip, make_model
from diffusion_jax.provenance import Provenance, params_digest, settings_digest
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.storage import hub, objects
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.training import checkpoints
from diffusion_jax.training.optimizer import initial_share, weights_kind
from diffusion_jax.training.state import Network, abstract_params
from diffusion_jax.untrusted import parse_json, read_json

__all__ = [
    "ORIGIN_FILE",
    "Model",
    "PretrainedError",
    "PublishedWeights",
    "available",
    "config_settings",
    "describe",
    "describe_run",
    "find_reported",
    "format_available",
    "format_summary",
    "from_config",
    "is_workdir",
    "load",
    "load_initial_weights",
    "load_weights",
    "origin",
    "read_class_names",
    "save_diffusers",
    "save_safetensors",
    "set_params",
]

_METADATA_KEY, _DIGEST_KEY = "diffusion_jax", "digest"  # metadata keys in files of `save_safetensors`
ORIGIN_FILE, _ORIGIN = "origin.json", ("source", "license", "page")
_STORED_FIELDS = ("image_size", "channels", "low_resolution", "conditioning_noise", "levels", "limits", "class_names")
# Network fields that do not change the weights.
_FIELDS_IGNORED = {"dropout", "dtype", "precision", "remat", "initializer", "function"}
# The settings whose functions are needed to load weights.
_FUNCTIONS = ("model.kind", "diffusion.path", "diffusion.schedule")

Flags = str | Mapping[str, Any] | None
# Whether to import the functions that weights name: True; the network's function itself; or {setting: replacement's name}.
Trust = Callable | bool | Mapping[str, str] | None


def load(path: str | os.PathLike, flags: Flags = None, ema: bool = True, network: Trust = None) -> Model:
    """Loads a trained network with its weights, schedule and settings.

    path: a diffusers folder (DDPMPipeline: UNet2DModel and a scheduler's config); OpenAI's .pt, under its published name or
      with flags; a TensorFlow checkpoint by Ho et al., given as the prefix .../model.ckpt-N, or the PyTorch port's .ckpt;
      EDM's .pkl; a work directory; a file from `save_safetensors`; or one of these on the Hugging Face Hub,
      hf://OWNER/NAME[/FILE][@REVISION], which is downloaded once and verified. `available` lists published weights.
    flags: for OpenAI's files, a preset's name ("adm_imagenet256"), or flags for OpenAI's scripts, as a dict, as text
      ("--num_heads 4 --noise_schedule cosine ...") or as JSON; for unpublished networks from Ho et al.'s code, image_size,
      variance and other settings of `config.diffusion`.
    ema: whether to read the moving average of the weights (TensorFlow checkpoints and work directories only). If a run's
      average still holds more than a tenth of the random initial weights, the raw weights are read, and a note is printed.
    network: for weights of your own network (`config.model.kind`), the function that makes the network; or {setting: name},
      functions that replace functions named in the weights; or True to import the functions named in the weights. Otherwise
      no code is imported.
    Raises: PretrainedError, one line, for tensors that are missing, unexpected, not finite or have a wrong shape; unsupported
    network fields; missing flags; unreadable files. StorageError for a download that fails. UserError for a run without
    checkpoints whose config does not fit the weights of its `init_from`.
    """
    return _read_or_raise(path, flags, ema, network, with_params=True)


def describe(path: str | os.PathLike, flags: Flags = None, ema: bool = True, network: Trust = None) -> Model:
    """Like `load`, but does not read the parameters, which are None. Raises: as `load`, but not for invalid values."""
    return _read_or_raise(path, flags, ema, network, with_params=False)


def _read_or_raise(path, flags: Flags, ema: bool, network: Trust, with_params: bool) -> Model:
    """Like `_read`, but raises a PretrainedError for every error of an invalid file."""
    try:
        flags = json.loads(flags) if isinstance(flags, str) and flags.startswith("{") else flags
        net = _read(local_path(path), flags, ema, network, with_params)
    except (CheckpointError, DataError) as error:
        raise PretrainedError(str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = shorten(" ".join(describe_exception(error, with_type=True).split()), 300)
        raise PretrainedError(
            f"{path} cannot be loaded: its content or the flags are invalid ({reason}); "
            "`diffusion-jax weights inspect PATH` shows the description of the weights"
        ) from error
    provenance = net.provenance
    if not provenance.settings:  # not the weights of a run
        provenance = Provenance(pathlib.Path(path).stem, {"family": net.family}, provenance.details)
    if hub.is_hub(path):
        provenance = dataclasses.replace(provenance, details={**provenance.details, **hub.download(str(path)).origin})
    elif not net.provenance.settings:
        origin_of_name = catalog.find_origin(pathlib.Path(path).name)
        provenance = dataclasses.replace(provenance, details={**provenance.details, **origin_of_name})
    return dataclasses.replace(net, provenance=provenance)


def _read(path: pathlib.Path, flags: Flags, ema: bool, network: Trust, with_params: bool) -> Model:
    tensors, own = None, path / hub.OWN_FILE
    path = own if own.is_file() else path
    if not path.is_dir():
        if not path.exists() and not parameters.is_tensorflow_checkpoint(path):
            known = catalog.find_known(str(path))
            advice = f"; download it from {known.page}" if known else ""
            raise PretrainedError(f"{path}: no such file or folder{advice}")
        tensors = parameters.open_tensors(path, ema)
        if ho.is_ho(tensors.shapes):
            return ho.load_ho(path, tensors, flags, with_params)
        if openai.is_openai(tensors.shapes):
            return openai.load_openai(path, tensors, flags, with_params)
    if flags:
        raise PretrainedError(f"flags={flags!r}: {path} contains its own description; omit the flags")
    if tensors is None and is_workdir(path):
        config, workdir = resolve(parameters.read_json(path / "config.json")), open_run_dir(path, read_only=True)
        checkpoints.check_run_files(workdir)
        if callable(network) and _starts_from_other_weights(config, workdir):
            raise PretrainedError(
                f"{path} has no weights of its own; load those that it starts from: {config['init_from']}"
            )
        config, function = _trusted_functions(path, config, network)
        named = {**config, "sampling": {**config["sampling"]}}
        for settings, name in ((named, "init_from"), (named["sampling"], "classifier")):
            trusted = network.values() if isinstance(network, Mapping) else ()
            if objects.is_url(url := settings[name]) and network is not True and url not in trusted:
                if name == "init_from" and _starts_from_other_weights(config, workdir):
                    raise PretrainedError(
                        f"{path} starts from {url}, and loading opens no URL by itself; give network=True"
                    )
                settings[name] = ""  # also names classes
        net = describe_run(named, workdir, network=function)
        return load_weights(net, config, workdir, ema) if with_params else net
    if tensors is None and (found := diffusers.find_configs(path)):
        return diffusers.load_diffusers(path, *found, with_params)
    if tensors is not None and edm.is_edm(tensors):
        return edm.load_edm(path, tensors, with_params)
    if tensors is not None and _METADATA_KEY in tensors.metadata:
        return _load_file(path, tensors, network, with_params)
    found = f"a file with {len(tensors.shapes)} tensors ({list_names(tensors.shapes, 3)})" if tensors else "a folder"
    raise PretrainedError(
        f"{path} is {found} with an unknown network; known: a diffusers folder (model_index.json, unet/config.json), a work "
        "directory with checkpoints, and files from Ho et al., OpenAI, EDM or this package"
    )


# ---- Runs, and files of this package


def is_workdir(path: str | os.PathLike) -> bool:
    """Returns whether a path is a work directory with a config and checkpoints."""
    path = local_path(path)
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def from_config(
    config: Mapping[str, Any],
    params: Any = None,
    *,
    normalizations: data.Normalizations = types.MappingProxyType({}),
    class_names: Sequence[str] = (),
    mesh: Mesh | None = None,
    network: Callable | Network | None = None,
) -> Model:
    """Builds the model that a config describes. params: for instance the parameters of a `TrainState`.

    config: any mapping that `config.resolve` takes. normalizations, class_names, mesh: fields of the model. network: a
    function that replaces the function of `config.model.kind`, or the network itself, if it is already built.
    Raises: ConfigError for a value that its setting does not allow; ValueError for a config that cannot be built.
    """
    config = resolve(config)
    shape, diffusion = data.example_shape(config["data"]), config["diffusion"]
    net = make_model(
        "diffusion_jax",
        network if isinstance(network, Network) else training.model_from_config(config, network),
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


def _trusted_functions(
    path: pathlib.Path, settings: Mapping[str, Any], network: Trust
) -> tuple[dict[str, Any], Callable | None]:
    """Returns the settings, with replaced functions, and the function that makes the network (None: a built-in network).

    settings: a config, or its groups "model" and "diffusion". network: as for `load`.
    Raises: PretrainedError if a function may not be imported.
    """
    config, kind = {**settings}, settings["model"].get("kind", "")
    named = untrusted_values({group: config[group] for group in ("model", "diffusion")})
    imported = {name: named[name] for name in _FUNCTIONS if name in named}
    for name, function in imported.items():
        group, _, setting = name.partition(".")
        replacement = network.get(name, "") if isinstance(network, Mapping) else ""
        if short_name(replacement) == short_name(function):  # never the file that the weights name
            config[group] = {**config[group], setting: replacement}
        elif network is not True and not (callable(network) and name == "model.kind"):
            raise PretrainedError(
                f"{path} needs the function {function} ({name}), and loading imports no code by itself; give network=True"
                + (" or network=FUNCTION" if [*imported] == ["model.kind"] else "")
                + f" (on the command line --trust_network, or --config.{name}=... with your copy of it)"
            )
    if callable(network):
        if ":" not in kind:
            raise PretrainedError(f"network: {path} holds a network of this package; leave the argument out")
        return config, network
    return config, models.import_network(config["model"]["kind"]) if ":" in kind else None


def describe_run(
    config: Mapping[str, Any], workdir: RunDir, mesh: Mesh | None = None, network: Callable | None = None
) -> Model:
    """Returns the model of a run without its parameters, for `load_weights`. network: as for `from_config`.

    Raises: ValueError for a config that cannot be built; PretrainedError, CheckpointError.
    """
    net = from_config(config, mesh=mesh, network=network)
    if _starts_from_other_weights(config, workdir):
        normalizations = _initial_weights(describe, config).normalizations
    else:
        normalizations = training.stored_normalizations(config, workdir)
    return dataclasses.replace(net, normalizations=normalizations, class_names=read_class_names(config, workdir))


def _starts_from_other_weights(config: Mapping[str, Any], workdir: RunDir) -> bool:
    return bool(config["init_from"]) and not committed_steps(workdir / "checkpoints")


def read_class_names(config: Mapping[str, Any], workdir: RunDir | os.PathLike) -> tuple[str, ...]:
    """Reads the class names of samples; () if unknown.

    The names are read from the run's data.json, from data.json of the run in `init_from`, or, for a model without classes,
    from data.json of the guiding classifier's run.
    """

    def read(directory: str | os.PathLike) -> tuple[str, ...]:
        try:
            stored = read_json(local_path(directory, "data.json") / "data.json")
            return tuple(map(str, stored["classes"]))
        except (OSError, ValueError, KeyError, TypeError):  # published weights have no data.json
            return ()

    has_classes = bool(config["model"]["num_classes"])
    path = config["init_from"]
    if objects.is_url(path) and not _starts_from_other_weights(config, RunDir(workdir)):
        path = ""  # such a run needs no permission to open it
    directories = [workdir, path] if has_classes else [config["sampling"]["classifier"]]
    return next(filter(None, map(read, filter(None, directories))), ())


def load_weights(net: Model, config: Mapping[str, Any], workdir: RunDir, ema: bool) -> Model:
    """Adds the newest intact weights of a run to its model, replicated on the model's mesh or on one device.

    Without a checkpoint, the weights of `config.init_from` are used. Prints a note if raw weights replace the EMA that `ema`
    requests. Every process must call this function. Raises: PretrainedError if there are no weights, or if values are not
    finite; UserError if the weights were trained for another diffusion; CheckpointError.
    """
    if _starts_from_other_weights(config, workdir):
        path, kind = config["init_from"], "ema" if ema else "raw"
        initial = load_initial_weights(config, net.model, ema)
        if differences := net.find_differences(initial):
            raise UserError(
                f"init_from={path} was trained for another diffusion ({'; '.join(differences)}); use these values, or "
                "train first"
            )
        name, settings = f"{pathlib.Path(path).stem}_{kind}", {"step": 0, "weights": kind}
        provenance = Provenance(name, settings, {"init_from": path, **origin(initial)})
        net = dataclasses.replace(net, params=initial.params, provenance=provenance)
        return net if net.mesh is None else net.on_mesh(net.mesh)
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
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise PretrainedError(f"{workdir}: the checkpoint of step {step} contains values that are not finite")
    kind = weights_kind(config, step, ema)
    if ema and kind == "raw":
        log(
            f"Note: at step {step:,} the EMA (ema.decay={config['ema']['decay']:g}) still holds "
            f"{initial_share(config, step):.0%} of the random initial weights, so the raw weights are used."
        )
    source: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # training that starts from published weights writes this file
        source = read_json(workdir / ORIGIN_FILE)
    provenance = Provenance(f"step{step}_{kind}", {"step": step, "weights": kind}, source)
    return dataclasses.replace(net, params=params, provenance=provenance)


def origin(net: Model) -> dict[str, str]:
    """Returns where published weights are from: "source", "license" and "page"; {} if unknown."""
    details = net.provenance.details
    return {name: str(details[name]) for name in _ORIGIN} if details.keys() >= {*_ORIGIN} else {}


def save_safetensors(net: Model, path: str | os.PathLike) -> None:
    """Writes a network's weights, in Flax's layout, to one file with a description as JSON metadata.

    Raises: PretrainedError, OSError.
    """
    path = pathlib.Path(path).expanduser()
    clip = net.clip if isinstance(net.clip, bool) else getattr(net.clip, "keywords", {}).get("max")
    if clip is None:
        raise PretrainedError("clip: a file can store only True, False and a range")
    diffusion = net.diffusion
    if diffusion is None:  # the schedule is a table of betas, which no setting describes
        diffusion = {"prediction": net.prediction, "variance": net.variance}
        diffusion |= {"betas": net.schedule.betas.tolist(), "timesteps": net.schedule.timesteps.tolist()}
    stored = {name: getattr(net, name) for name in _STORED_FIELDS} | {
        "kind": type(net.model).__name__,
        "model": models.to_config(net.model),
        "diffusion": dict(diffusion),
        "clip": clip,
        "normalizations": {name: value.to_json() for name, value in net.normalizations.items()},
        "origin": origin(net),
        "published_sampling": dict(net.published_sampling),
    }
    flat = flax.traverse_util.flatten_dict(net.params, sep=".")
    tensors = {name: np.asarray(value, order="C") for name, value in flat.items()}  # keeps the shape ()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stored)
    parameters.save_tensors(tensors, path, {_METADATA_KEY: text, _DIGEST_KEY: _digest(text, tensors)})


def _digest(text: str, tensors: Mapping[str, Any]) -> str:
    """Returns the hash of a file's description and of its tensors in float32, the dtype that `load` returns."""
    return settings_digest(
        text, params_digest({name: np.asarray(value, np.float32) for name, value in tensors.items()})
    )


def _load_file(path: pathlib.Path, tensors: parameters.Tensors, network: Trust, with_params: bool) -> Model:
    """Loads a file of `save_safetensors`; with the parameters if `with_params`. Raises: PretrainedError."""
    stored: dict[str, Any] = parse_json(tensors.metadata[_METADATA_KEY])
    kind = models.Classifier if stored["kind"] == "Classifier" else None
    if stored["kind"] == "MLP":
        stored["model"].setdefault("kind", "mlp")
    stored, function = _trusted_functions(path, stored, network)
    model = models.from_config(stored["model"], kind, function)
    if kind is None:
        is_learned = stored["diffusion"]["variance"].startswith("learned")
        model = model.clone(out_channels=stored["channels"] * (2 if is_learned else 1))
    diffusion = stored["diffusion"]
    fields: dict[str, Any] = {name: stored[name] for name in _STORED_FIELDS}
    fields |= {name: tuple(stored[name]) for name in ("limits", "class_names")}
    net = make_model(
        "diffusion_jax, one file",
        model,
        diffusion={name: value for name, value in diffusion.items() if name not in ("betas", "timesteps")},
        clip=make_clip(stored["clip"]),
        normalizations={n: data.Normalization.from_json(value) for n, value in stored["normalizations"].items()},
        provenance=Provenance(path.stem, details=dict(stored.get("origin", ()))),
        published_sampling=dict(stored.get("published_sampling", ())),
        **fields,
    )
    text, digest = tensors.metadata[_METADATA_KEY], tensors.metadata.get(_DIGEST_KEY)  # version 0.3 stored no digest
    if "betas" in diffusion:
        table = schedules.from_betas(diffusion["betas"], diffusion["timesteps"])
        net = dataclasses.replace(net, schedule=table, diffusion=None)
    if not with_params:
        return net
    net = net.read_params(path, tensors, lambda path, model: ".".join(path), parameters.keep_layout)
    flat = flax.traverse_util.flatten_dict(net.params, sep=".")
    if digest is not None and digest != _digest(text, flat):
        raise PretrainedError(f"{path} was changed after it was written: its digest differs; get the file again")
    return net


# ---- Configs, and runs that start from other weights


def config_settings(description: Model) -> dict[str, dict[str, Any]]:
    """Returns the config settings for the network, schedule and data shape of a description. Raises: PretrainedError."""
    if description.diffusion is None or not isinstance(description.clip, bool):
        raise PretrainedError(
            "a config cannot describe these weights' beta table or clip range; use pretrained.load in a program"
        )
    is_learned = description.variance.startswith("learned")
    loss = "classify" if isinstance(description.model, models.Classifier) else "hybrid" if is_learned else "simple"
    size, model = description.image_size, models.to_config(description.model)
    model.pop("spatial_dims", None)  # not a setting: follows from the number of sizes
    if description.low_resolution:
        del model["condition_channels"]  # follows from low_resolution
    normalization = "auto"
    if description.levels is None:
        normalization = "limits" if description.limits else "auto" if "x" in description.normalizations else "none"
    is_ncsnpp = isinstance(description.model, models.UNet) and description.model.is_ncsnpp
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
        "sampling": {"clip": description.clip, **description.published_sampling},
        **({"optimizer": {"frozen": ("time_fourier",)}} if is_ncsnpp else {}),
    }


def load_initial_weights(config: Mapping[str, Any], model: Network, use_ema: bool = True) -> Model:
    """Loads the model that `config.init_from` names. Raises: UserError if its network is not `model`; PretrainedError."""
    net = _initial_weights(load, config, use_ema)
    path = config["init_from"]
    if type(net.model) is not type(model):
        raise UserError(
            f"init_from={path} holds weights of models.{type(net.model).__name__}, and the config describes "
            f"models.{type(model).__name__}"
        )
    there, here = _comparable_fields(net.model), _comparable_fields(model)
    there, here = there | {"data.channels": net.channels}, here | {"data.channels": config["data"]["channels"]}
    if differences := list_differences(there, here):
        raise UserError(
            f"init_from={path} is another network ({'; '.join(differences)}); --pretrained={path} uses its config"
        )
    return net


def _comparable_fields(model: Network) -> dict[str, Any]:
    """Returns the fields of a network that determine its parameters, as settings."""
    fields = models.network_fields(model)
    fields |= dict(fields.pop("settings", ()))
    if "kind" in fields:
        fields["kind"] = short_name(fields["kind"])
    return {f"model.{name}": value for name, value in fields.items() if name not in _FIELDS_IGNORED}


def _initial_weights(read: Callable[..., Model], config: Mapping[str, Any], use_ema: bool = True) -> Model:
    """Calls `load` or `describe` with `config.init_from`. Raises: PretrainedError."""
    path = config["init_from"]
    try:
        return read(path, config["init_flags"] or None, use_ema, untrusted_values(config))
    except PretrainedError as error:
        raise PretrainedError(f"init_from={path}: {error}") from error


def set_params(state: training.TrainState, abstract_state: training.TrainState, params) -> training.TrainState:
    """Returns the state with these parameters, and with an equal EMA. abstract_state: gives the shardings of the state."""

    def place(shapes):
        return jax.tree.map(lambda leaf, shape: jax.device_put(jnp.copy(leaf), shape.sharding), params, shapes)

    return dataclasses.replace(state, params=place(abstract_state.params), ema_params=place(abstract_state.ema_params))

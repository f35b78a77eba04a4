"""Reads, writes and checks config.json and data.json, which identify the run and the training data of a work directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import data, models, pretrained
from diffusion_jax.config import identity_settings, is_classifier, resolve
from diffusion_jax.console import log, progress_over
from diffusion_jax.data import Normalizations, Source
from diffusion_jax.data.sources import read_block_lengths
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import ConfigError, DataError, UserError, as_user_error, list_differences, list_names, shorten
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.training import condition_shape, stored_normalizations
from diffusion_jax.training.checkpoints import check_run_files
from diffusion_jax.training.state import Network
from diffusion_jax.untrusted import read_json

# Settings besides config.model that change the shapes of the network's parameters.
_OF_THE_NETWORK = (
    "data.channels",
    "data.low_resolution",
    "diffusion.loss",
    "diffusion.variance",
    "diffusion.conditioning_noise",
)
_NUM_HASHED_EXAMPLES = _NUM_CHECKED_IMAGES = 64


def to_dict(config: ConfigDict) -> dict:
    """Converts a config to plain JSON values."""
    return json.loads(config.to_json())


def load_config(directory: RunDir | str | os.PathLike) -> ConfigDict | None:
    """Reads the complete config of a work directory; None if there is none.

    Raises: UserError for a corrupted config, CheckpointError if config.json is missing and the newest checkpoint has a copy.
    """
    path = local_path(directory, "config.json") / "config.json"
    if not path.exists():
        check_run_files(RunDir(path.parent))  # raises if checkpoints have a copy
        return None
    try:
        return resolve(read_json(path))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a valid config ({error}); correct it, or use another --workdir") from None


def config_from_weights(path: str, flags: str = "", network: bool | Mapping[str, str] = False) -> ConfigDict:
    """Returns a config that starts training from the weights at `path`; for a work directory, its config is the base.

    path, network: as in `pretrained.load`. flags: settings that the weights do not contain.
    Raises: UserError, PretrainedError.
    """
    description = pretrained.describe(path, flags or None, network=network)
    config = load_config(path) if pretrained.is_workdir(path) else None
    if config is None:
        settings = pretrained.config_settings(description)
        dataset = "folder" if description.is_images else "arrays"
        config = resolve(settings | {"data": settings["data"] | {"dataset": dataset, "random_flip": False}})
    config.init_from, config.init_flags = path, flags
    return config


def check_identity(config: ConfigDict, workdir: RunDir) -> None:
    """Raises: UserError with all differing settings if the directory holds another run; the errors of `check_run_files`.

    Without a checkpoint, any config is allowed: an earlier launch failed or stopped before its first checkpoint.
    """
    if not committed_steps(workdir / "checkpoints"):
        return
    check_run_files(workdir)
    stored = load_config(workdir)
    if stored is None:
        raise UserError(f"{workdir} has checkpoints without their config.json; restore it, or use another --workdir")
    old, new = identity_settings(to_dict(stored)), identity_settings(to_dict(config))
    differing = [key for key in new if old.get(key) != new[key]]
    if not differing:
        return
    listed = "; ".join(list_differences(old, new))
    advice = "use another --workdir, or the config of that run"
    if not any(key.startswith("model.") or key in _OF_THE_NETWORK for key in differing):
        changed = " ".join(f"--config.{key}={new[key]}" for key in differing)
        advice += f"; to start a new run from its weights: --pretrained={workdir} --workdir=NEW {changed}"
    raise UserError(f"{workdir} holds another run ({listed}); {advice}")


def check_data(source: Source, workdir: RunDir, normalizations: Normalizations | None = None) -> None:
    """Writes data.json: the number of examples, a digest of 64 examples, the class names, and the normalizations.

    source: not normalized. Raises: UserError if the run has a checkpoint and was trained on other examples.
    """
    names, path = list(data.read_classes(source)[1]), workdir / "data.json"
    new: dict[str, Any] = {"images": len(source), "sha256_of_some": digest_of_some(source), "classes": names}
    if blocks := len(read_block_lengths(source)):
        new["blocks"] = blocks
    if normalizations:
        new["normalization"] = {name: value.to_json() for name, value in normalizations.items()}
    if not (path.exists() and committed_steps(workdir / "checkpoints")):
        return workdir.write_json("data.json", new)
    old = read_json(path)
    if old == new:
        return
    difference = "other values or labels"
    if old.get("classes") != names:
        then, now = (list_names(each.get("classes") or ["none"], 8) for each in (old, new))
        difference = f"classes {then} then, {now} now"
    if old.get("blocks") != new.get("blocks"):
        then, now = (f"in {each['blocks']} files" if "blocks" in each else "as a whole" for each in (old, new))
        difference = f"shuffled {then} then, shuffled {now} now, by data.data_dir and data.disk_mb"
    advice = f"remove {path} and its copy in the newest checkpoint to continue with the new data"
    if normalizations:  # the weights depend on the normalizations in data.json
        advice = f"start a new run from its weights with --pretrained={workdir} --workdir=NEW"
    raise UserError(
        f"the data differ from the training data of {workdir} ({old.get('images')} examples then, {len(source)} now, "
        f"{shorten(difference, 300)}): restore the training data, use another --workdir, or {advice}"
    )


def digest_of_some(source: Source) -> str:
    """Returns the SHA-256 of up to 64 examples with labels (0 without labels), conditions and missing conditions."""
    first_block, *_ = read_block_lengths(source) or (len(source),)  # later blocks may not be on this machine yet
    indices = np.unique(np.linspace(0, first_block - 1, _NUM_HASHED_EXAMPLES).astype(int))
    batch = source.read(indices)
    labels = batch.get("label", np.zeros(len(indices)))
    parts = [batch.get("image", batch.get("x")), np.asarray(labels, np.int32)]
    parts += [batch.get("condition"), batch.get("condition_missing")]
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(part).tobytes() for part in parts if part is not None)
    ).hexdigest()


def check_network_source(network: Network, workdir: RunDir, records: bool = False) -> None:
    """Logs a note if the file that defines a user's network changed since the run began.

    records: whether to record the SHA-256 of the file while the run has no checkpoint.
    """
    file = models.source_file(network)
    if file is None:
        return
    path, digest = workdir / "network.json", hashlib.sha256(file.read_bytes()).hexdigest()
    if path.exists() and committed_steps(workdir / "checkpoints"):
        if (recorded := str(read_json(path).get("sha256"))) != digest:
            log(f"Note: {file} changed since this run began (SHA-256 {recorded[:12]} then, {digest[:12]} now).")
    elif records:
        workdir.write_json("network.json", {"file": str(file), "sha256": digest})


def write_config(config: ConfigDict, workdir: RunDir | os.PathLike) -> None:
    """Writes config.json, and creates a missing directory."""
    workdir = open_run_dir(workdir)
    workdir.path.mkdir(parents=True, exist_ok=True)
    workdir.write_json("config.json", to_dict(config), indent=2)


def write_config_if_untrained(config: ConfigDict, workdir: RunDir) -> None:
    """Writes config.json if the weights come from `init_from` and the directory has no checkpoint.

    Later launches then need only the directory. The config of a trained run does not change.
    """
    if config.init_from and not committed_steps(workdir / "checkpoints"):
        broadcast_from_process_0(lambda: write_config(config, workdir))


# ---- Data


def normalize(config: ConfigDict, source: Source, normalizations: Normalizations) -> Source:
    """Returns the source with standardized floats; images are unchanged."""
    bounded = ("x",) if config.data.normalization == "limits" else ()
    return data.Normalized(source, normalizations, bounded)


def run_normalizations(config: ConfigDict, source: Source, workdir: RunDir) -> Normalizations:
    """Returns the stored normalizations of a run; the first launch computes them from the training data.

    Raises: DataError, CheckpointError.
    """

    def find() -> dict[str, Any]:
        if committed_steps(workdir / "checkpoints"):
            found = stored_normalizations(config, workdir)
        else:
            found = data.find_normalizations(config.data, source, progress_over("Measuring the data"))
        # Classifiers ignore the conditions of the data.
        names = ["x"] if condition_shape(config) is None else ["x", "condition"]
        return {name: found[name].to_json() for name in names if name in found}

    found = broadcast_from_process_0(find)
    return {name: data.Normalization.from_json(value) for name, value in found.items()}


def check_source(config: ConfigDict, source: Source, must_have_all_classes: bool = False) -> None:
    """Raises: UserError or DataError if labels or conditions do not fit the network, or gray levels do not fit the loss.

    must_have_all_classes: whether the source must have every class of the network, for training from scratch.
    """
    levels = config.data.levels if config.diffusion.loss in ("vlb", "hybrid") else None
    batch = source.read(np.arange(min(1 if levels is None else _NUM_CHECKED_IMAGES, len(source))))
    if levels is not None:
        data.check_levels(batch["image"], levels)
    _check_conditions(config, batch)
    num_classes, (source_classes, _) = config.model.num_classes, data.read_classes(source)
    lacks_classes = must_have_all_classes and 0 < source_classes < num_classes
    problem = ""
    if source_classes > num_classes or lacks_classes:
        problem = f"has {source_classes} classes; use --config.model.num_classes={source_classes}, or 0"
    elif "label" not in batch:
        advice = "a classifier needs labeled images" if is_classifier(config) else "use model.num_classes=0"
        problem = f"has no labels (an array 'label', or a subfolder for each class with no file outside); {advice}"
    elif not source_classes:
        problem = "have no number of classes; add the attribute num_classes to their source"
    if num_classes and problem:
        raise UserError(f"model.num_classes={num_classes}, but the data {problem}")


def _check_conditions(config: ConfigDict, batch: Mapping[str, np.ndarray]) -> None:
    """Raises: UserError if the data and the network do not have conditions of the same shape."""
    expected, given = condition_shape(config), batch.get("condition")
    shape = None if given is None else given.shape[1:]
    if shape != expected and not (expected is None and is_classifier(config)):
        has = "no conditions (an array 'condition')" if shape is None else f"conditions of shape {list(shape)}"
        needs = f"need shape {list(expected)}" if expected else "take none"
        names, width = ("condition_features", "condition_channels"), shape[-1] if shape else 0
        wanted = dict(zip(names, (width, 0) if shape and len(shape) == 1 else (0, width), strict=True))
        flags = [f"--config.model.{name}={value}" for name, value in wanted.items() if config.model[name] != value]
        advice = f"use {' '.join(flags)}, or another source" if flags else "use a source with conditions of this shape"
        raise UserError(
            f"the data has {has}, but model.condition_features={config.model.condition_features} and "
            f"condition_channels={config.model.condition_channels} {needs}; {advice}"
        )
    if expected is not None and "condition_missing" in batch and not config.model.condition_dropout:
        raise UserError(
            "the data has examples without a condition (condition_missing), which only a network with "
            "model.condition_dropout above 0 can learn; use --config.model.condition_dropout=0.1, or remove these examples"
        )


def load_examples(title: str, location: dict, renamed: Mapping[str, str], source: Source | None) -> Source:
    """Loads the examples of `location`, a complete `config.data`, or checks the caller's source.

    title: the title of the progress bar. renamed: setting names in errors, such as {"data.split": "evaluation.split"}.
    Raises: DataError.
    """
    if source is not None:
        location = location | {"holdout": 0.0}
    try:
        return data.load(location, progress_over(title), source=source)
    except (ConfigError, DataError) as error:
        message = str(error)
        for old, new in renamed.items():
            message = message.replace(f"{old}=", f"{new}=")
        raise DataError(message) from error


# ---- The model


def open_model(config: ConfigDict, workdir: RunDir | os.PathLike, mesh: Mesh | None = None) -> pretrained.Model:
    """Returns the diffusion model of a run without its parameters, so that settings are checked before a long read.

    mesh: by default from `config.mesh`.
    Raises: UserError for a wrong config or a directory that holds another run; CheckpointError, PretrainedError.
    """
    workdir = open_run_dir(workdir)
    check_identity(config, workdir)
    if is_classifier(config):
        raise UserError("diffusion.loss=classify trains a classifier; use a diffusion model's config")
    with as_user_error("config"):
        net = pretrained.describe_run(config, workdir, mesh or sharding.make_mesh(config.mesh))
    check_network_source(net.model, workdir)
    return net

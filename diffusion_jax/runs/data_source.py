"""The data of a run: loading, normalization and checks, and the names of config leaves in their errors."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import is_classifier
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import DataError, UserError
from diffusion_jax.runs.console import progress_over
from diffusion_jax.storage.locations import committed_steps
from diffusion_jax.training.from_config import condition_shape, stored_normalizations

__all__ = ["check_source", "normalize", "rename_leaves_in_errors", "run_normalizations"]

_NUM_CHECKED_IMAGES = 64


def normalize(config: ConfigDict, source: data.Source, normalizations: data.Normalizations) -> data.Source:
    """The source with its floats standardized; a source of images without conditions is returned as it is."""
    if not {"x", "condition"} & source.read([0]).keys():
        return source
    bounded = ("x",) if config.data.normalization == "limits" else ()
    return data.Normalized(source, normalizations, bounded)


def run_normalizations(config: ConfigDict, source: data.Source, workdir: pathlib.Path) -> data.Normalizations:
    """The normalizations of a run: the stored ones, or those of the training data at its first launch.

    Raises: DataError, CheckpointError.
    """

    def find() -> dict[str, Any]:
        if committed_steps(workdir / "checkpoints"):
            found = stored_normalizations(config, workdir)
        else:
            found = data.find_normalizations(config.data, source, progress_over("Measuring the data"))
        # A classifier does not take the conditions of its data.
        names = ["x"] if condition_shape(config) is None else ["x", "condition"]
        return {name: found[name].to_json() for name in names if name in found}

    found = broadcast_from_process_0(find)
    return {name: data.Normalization.from_json(value) for name, value in found.items()}


def check_source(config: ConfigDict, source: data.Source) -> None:
    """Raises: UserError or DataError for labels or conditions that do not fit the network, or gray levels the bound."""
    levels = config.data.levels if config.diffusion.loss in ("vlb", "hybrid") else None
    batch = source.read(np.arange(min(1 if levels is None else _NUM_CHECKED_IMAGES, len(source))))
    if levels is not None:
        data.check_levels(batch["image"], levels)
    _check_conditions(config, batch)
    num_classes, (source_classes, _) = config.model.num_classes, data.read_classes(source)
    if num_classes and source_classes > num_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but the data has {source_classes} classes; use that number, or 0"
        )
    if num_classes and "label" in batch and not source_classes:
        raise UserError(
            f"model.num_classes={num_classes}, but the source does not tell its number of classes; give it the attribute "
            "num_classes"
        )
    if num_classes and "label" not in batch:
        advice = "a classifier needs labeled images" if is_classifier(config) else "use model.num_classes=0"
        raise UserError(
            f"model.num_classes={num_classes}, but the data has no labels (an array 'label', or a subfolder for each class "
            f"with no file outside); {advice}"
        )


def _check_conditions(config: ConfigDict, batch: Mapping[str, np.ndarray]) -> None:
    """Raises: UserError for conditions that the network does not take, or the reverse."""
    expected, given = condition_shape(config), batch.get("condition")
    shape = None if given is None else given.shape[1:]
    if expected is None and shape is not None and not is_classifier(config):
        leaf = "condition_features" if len(shape) == 1 else "condition_channels"
        raise UserError(
            f"the data has conditions of shape {list(shape)}, but the network takes none; use "
            f"--config.model.{leaf}={shape[-1]}, or a source without conditions"
        )
    if expected is not None and shape != expected:
        has = "no conditions (an array 'condition')" if shape is None else f"conditions of shape {list(shape)}"
        raise UserError(
            f"the data has {has}, but model.condition_features={config.model.condition_features} and "
            f"condition_channels={config.model.condition_channels} need shape {list(expected)}"
        )


@contextlib.contextmanager
def rename_leaves_in_errors(leaves: Mapping[str, str]) -> Iterator[None]:
    """Replaces names of leaves in the message of a DataError, such as {"data.split": "evaluation.split"}."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for old, new in leaves.items():
            message = message.replace(f"{old}=", f"{new}=")
        raise DataError(message) from error

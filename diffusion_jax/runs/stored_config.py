"""The configs that are stored with a run, or that published weights describe."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from diffusion_jax import pretrained
from diffusion_jax.config import resolve
from diffusion_jax.runs.workdir import read_config
from diffusion_jax.storage.downloads import local_path

__all__ = ["from_weights", "from_workdir"]


def from_workdir(directory: pathlib.Path | str) -> ConfigDict | None:
    """The config of a work directory, complete; None if none is stored. Raises: UserError for a config that is damaged."""
    return read_config(local_path(directory))


def from_weights(path: str, flags: str = "") -> ConfigDict:
    """The config with which training starts from published weights, or from those of a run, whose other settings it inherits.

    path: as `pretrained.load` takes it. flags: settings that the weights do not contain. Raises: UserError, PretrainedError.
    """
    description = pretrained.describe(path, pretrained.read_flags(flags))
    config = from_workdir(path) if pretrained.is_workdir(path) else None
    if config is None:
        leaves = pretrained.config_leaves(description)
        dataset = "folder" if description.is_images and description.channels in (1, 3) else "arrays"
        config = resolve(leaves | {"data": leaves["data"] | {"dataset": dataset, "random_flip": False}})
    config.init_from, config.init_flags = path, flags
    return config

"""Configs: every leaf once, with its type, default, allowed values and meaning, and what follows from that table.

    from diffusion_jax import config

    cfg = config.default()                                          # DDPM on CIFAR-10, an ml_collections.ConfigDict
    cfg = config.experiment("digits")                               # an experiment of configs/
    cfg = config.resolve({"data": {"dataset": "digits"}})           # complete and validated, from a partial mapping

docs/reference/configuration.md lists all leaves.
"""

from ml_collections import ConfigDict

from diffusion_jax.config.experiments import experiment, experiment_names, load
from diffusion_jax.config.presets import preset_fields
from diffusion_jax.config.resolution import (
    default,
    default_classifier,
    drop_unknown,
    is_boolean,
    migrate,
    override,
    resolve,
)
from diffusion_jax.config.table import CLASSIFIER_LEAVES, LEAVES, flatten, identity, reference
from diffusion_jax.errors import ConfigError

__all__ = [
    "CLASSIFIER_LEAVES",
    "LEAVES",
    "ConfigDict",
    "ConfigError",
    "default",
    "default_classifier",
    "drop_unknown",
    "experiment",
    "experiment_names",
    "flatten",
    "identity",
    "is_boolean",
    "load",
    "migrate",
    "override",
    "preset_fields",
    "reference",
    "resolve",
]

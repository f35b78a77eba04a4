"""Configs: every leaf once, with its default, allowed values and description, and functions that read this table.

    from diffusion_jax import config

    cfg = config.default()                                          # DDPM on CIFAR-10, an ml_collections.ConfigDict
    cfg = config.experiment("digits")                               # an experiment of configs/
    cfg = config.resolve({"data": {"dataset": "digits"}})           # complete and validated, from a partial mapping

docs/reference/configuration.md lists all leaves.
"""

from ml_collections import ConfigDict

from diffusion_jax.config.presets import preset_fields
from diffusion_jax.config.resolution import (
    default,
    default_classifier,
    experiment,
    experiment_names,
    override,
    resolve,
)
from diffusion_jax.config.table import (
    CLASSIFIER_LEAVES,
    LEAVES,
    clips_by_default,
    flatten,
    identity_leaves,
    is_classifier,
    is_continuous,
    is_upsampler,
    reference,
    resolve_clip,
)
from diffusion_jax.errors import ConfigError

__all__ = [
    "CLASSIFIER_LEAVES",
    "LEAVES",
    "ConfigDict",
    "ConfigError",
    "clips_by_default",
    "default",
    "default_classifier",
    "experiment",
    "experiment_names",
    "flatten",
    "identity_leaves",
    "is_classifier",
    "is_continuous",
    "is_upsampler",
    "override",
    "preset_fields",
    "reference",
    "resolve",
    "resolve_clip",
]

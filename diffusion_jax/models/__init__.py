"""Networks, as Flax Linen modules. They contain no diffusion mathematics, which takes any callable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.encoder import REMAT_NAME
from diffusion_jax.models.layers import timestep_embedding
from diffusion_jax.models.presets import PRESETS, preset, preset_fields
from diffusion_jax.models.time_table import precompute_time_embeddings
from diffusion_jax.models.unet import UNet

__all__ = [
    "PRESETS",
    "REMAT_NAME",
    "Classifier",
    "UNet",
    "apply_network",
    "fields_of",
    "from_config",
    "precompute_time_embeddings",
    "preset",
    "preset_fields",
    "timestep_embedding",
]

_Network = TypeVar("_Network", UNet, Classifier)


def apply_network(model: UNet | Classifier, params, *inputs, **options) -> jax.Array:
    """`model.apply({"params": params}, *inputs, **options)`, for networks that return one array and change no variables."""
    output = model.apply({"params": params}, *inputs, **options)
    assert isinstance(output, jax.Array)
    return output


def _field_names(network: UNet | Classifier | type[UNet] | type[Classifier]) -> list[str]:
    """Fields of a network or its class, without those that Flax adds."""
    return [field.name for field in dataclasses.fields(network) if field.name not in ("parent", "name")]


def fields_of(model: UNet | Classifier) -> dict[str, Any]:
    """The fields of a network, as `config.model` has them."""
    return {name: getattr(model, name) for name in _field_names(model)}


def from_config(config: Mapping[str, Any], kind: type[_Network] = UNet) -> _Network:
    """The network whose fields are the leaves of `config.model`. Raises: ValueError for a leaf that is not a field."""
    fields = set(_field_names(kind))
    unknown = sorted(set(config) - fields)
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is not a field of models.{kind.__name__}; its fields: {', '.join(sorted(fields))}"
        )
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()
    }
    return kind(**options)

"""Networks, as Flax Linen modules. They import no diffusion maths; the maths takes any callable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.presets import PRESETS, preset, preset_fields
from diffusion_jax.models.tabulated import tabulate
from diffusion_jax.models.unet import REMAT_NAME, UNet, timestep_embedding

__all__ = [
    "PRESETS",
    "REMAT_NAME",
    "Classifier",
    "UNet",
    "fields_of",
    "from_config",
    "preset",
    "preset_fields",
    "tabulate",
    "timestep_embedding",
]


def _names(network) -> list[str]:
    """Fields of a network or its class, without those that Flax adds."""
    return [field.name for field in dataclasses.fields(network) if field.name not in ("parent", "name")]


def fields_of(model: UNet | Classifier) -> dict[str, Any]:
    """The fields of a network, as `config.model` has them."""
    return {name: getattr(model, name) for name in _names(model)}


def from_config(config: Mapping, kind: type[UNet] | type[Classifier] = UNet) -> UNet | Classifier:
    """The network whose fields are the leaves of `config.model`. Raises: ValueError for a leaf that is no field."""
    fields = set(_names(kind))
    unknown = sorted(set(config) - fields)
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is not a field of models.{kind.__name__}; its fields: {', '.join(sorted(fields))}"
        )
    return kind(**{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()})

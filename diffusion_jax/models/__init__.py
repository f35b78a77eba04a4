"""Networks, as Flax Linen modules. They import no diffusion maths; the maths takes any callable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.presets import PRESETS, preset, preset_fields
from diffusion_jax.models.unet import UNet, timestep_embedding

__all__ = ["PRESETS", "Classifier", "UNet", "from_config", "preset", "preset_fields", "timestep_embedding"]


def from_config(config: Mapping, kind: type[UNet] | type[Classifier] = UNet) -> UNet | Classifier:
    """The network whose fields are the leaves of `config.model`. Raises: ValueError for a leaf that is no field."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
    unknown = sorted(set(config) - fields)
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is not a field of models.{kind.__name__}; its fields: {', '.join(sorted(fields))}"
        )
    return kind(**{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()})

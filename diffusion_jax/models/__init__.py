"""Networks, as Flax Linen modules. They import no diffusion maths; the maths takes any callable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from diffusion_jax.models.unet import UNet, timestep_embedding

__all__ = ["UNet", "from_config", "timestep_embedding"]


def from_config(config: Mapping) -> UNet:
    """The U-Net whose fields are the leaves of `config.model`. Raises: ValueError for a leaf that is no field."""
    fields = {field.name for field in dataclasses.fields(UNet)} - {"parent", "name"}
    unknown = sorted(set(config) - fields)
    if unknown:
        raise ValueError(f"model.{unknown[0]} is not a field of models.UNet; its fields: {', '.join(sorted(fields))}")
    return UNet(**{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()})

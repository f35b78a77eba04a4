"""A description of pretrained weights as text."""

from __future__ import annotations

import math

from diffusion_jax.models import fields_of
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import Description

__all__ = ["format_summary"]


def format_summary(description: Description) -> str:
    """The description of weights, one line for each setting."""
    shapes = parameters.parameter_shapes(description.model, description.image_size, description.in_channels)
    height, width = description.image_size
    schedule = description.schedule
    rows = {
        "family": description.family,
        "network": type(description.model).__name__,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,} in {len(shapes)} tensors",
        "images": f"{height}x{width}, {description.channels} channels",
        "enlarges": f"images {description.low_resolution} pixels high" if description.low_resolution else None,
        "classes": description.num_classes or None,
        "prediction": description.prediction,
        "variance": description.variance,
        "clip": description.clip,
        "schedule": "a table of betas" if description.diffusion is None else description.diffusion["schedule"],
        "timesteps": f"{schedule.num_timesteps}, network times 0 ... {schedule.timesteps[-1]:g}",
    }
    rows |= {f"model.{name}": value for name, value in fields_of(description.model).items()}
    rows = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())

"""A description of pretrained weights as text."""

from __future__ import annotations

import math

from diffusion_jax.data import Normalization
from diffusion_jax.models import Conditional, fields_of
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import Description

__all__ = ["format_summary"]

_MAX_CHANNELS = 6


def format_summary(description: Description) -> str:
    """The description of weights, one line for each setting."""
    shapes = parameters.parameter_shapes(description.model, description.example_shape)
    size, schedule = " x ".join(map(str, description.image_size)), description.schedule
    rows = {
        "family": description.family,
        "network": type(description.model).__name__,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,} in {len(shapes)} tensors",
        "images": f"{size.replace(' ', '')}, {description.channels} channels" if description.is_images else None,
        "examples": None if description.is_images else f"{size or 'vectors'}, {description.channels} channels",
        "values": None if description.is_images else _values(description),
        "normalization": _shown(description.normalizations.get("x")),
        "conditions": _conditions(description),
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


def _values(description: Description) -> str:
    if description.levels is not None:
        return f"uint8, {description.levels} levels"
    return (
        f"continuous, limits {description.limits[0]:g} ... {description.limits[1]:g}"
        if description.limits
        else "continuous"
    )


def _shown(normalization: Normalization | None) -> str | None:
    """(data - offset) / scale of the first channels."""
    if normalization is None:
        return None
    offset, scale = (
        f"({', '.join([f'{value:.4g}' for value in values[:_MAX_CHANNELS]] + ['...'] * (len(values) > _MAX_CHANNELS))})"
        for values in (normalization.offset, normalization.scale)
    )
    return f"(data - {offset}) / {scale}"


def _conditions(description: Description) -> str | None:
    shape, model = description.condition_shape, description.model
    if shape is None or not isinstance(model, Conditional):
        return None
    normalization = _shown(description.normalizations.get("condition"))
    parts = [f"shape {list(shape)}", "or none" if model.condition_dropout else None, normalization]
    return ", ".join(part for part in parts if part)

"""Networks, as Flax Linen modules, without diffusion mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.config.presets import CLASSIFIER_PRESETS, PRESETS, UNET_PRESETS
from diffusion_jax.models.conditions import Conditional, condition_shape
from diffusion_jax.models.layers import timestep_embedding
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.unet import KEPT_NAMES, Classifier, UNet

__all__ = [
    "KEPT_NAMES",
    "MLP",
    "Classifier",
    "Conditional",
    "UNet",
    "apply_network",
    "condition_shape",
    "from_config",
    "initial_inputs",
    "network_fields",
    "preset",
    "timestep_embedding",
]

_Network = UNet | MLP | Classifier
_KINDS: dict[str, type[UNet] | type[MLP]] = {"unet": UNet, "mlp": MLP}


def preset(name: str) -> UNet | Classifier:
    """Returns a published network by its name in `config.presets`. Raises: ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return UNet(**UNET_PRESETS[name]) if name in UNET_PRESETS else Classifier(**CLASSIFIER_PRESETS[name])


def apply_network(model: _Network, params, *inputs, **options) -> jax.Array:
    """`model.apply({"params": params}, *inputs, **options)`, for networks that return one array and change no variables."""
    output = model.apply({"params": params}, *inputs, **options)
    assert isinstance(output, jax.Array)
    return output


def initial_inputs(model: _Network, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns zeros with the shapes for `model.init(key, **inputs)`: one x_t [*spatial, C], its label and condition."""
    inputs: dict[str, Any] = {"x_t": jnp.zeros((1, *shape)), "time": jnp.zeros(1)}
    if isinstance(model, Conditional):
        if model.num_classes:
            inputs["y"] = jnp.zeros(1, jnp.int32)
        if (condition := model.condition_shape(shape[:-1])) is not None:
            inputs["condition"] = jnp.zeros((1, *condition))
    return inputs


def network_fields(model: _Network | type[_Network]) -> dict[str, Any]:
    """Returns the fields of a network, or a class's defaults, by name, without the fields that Flax adds."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    return {name: getattr(model, name) for name in names}


def from_config(config: Mapping[str, Any], kind: type[Any] | None = None) -> Any:
    """Builds the network whose fields are the settings of `config.model`, and the field `spatial_dims`, which has no setting.

    kind: the class; by default the setting `kind`, or a U-Net without this setting. Settings that only the U-Net has must
    keep their defaults for another network.
    Raises: ValueError for a setting that is not a field.
    """
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()
    }
    named = options.pop("kind", "unet")
    if kind is None:
        if named not in _KINDS:
            raise ValueError(f"model.kind={named!r} must be {' or '.join(_KINDS)}")
        kind = _KINDS[named]
    fields = network_fields(kind)
    unused = {name: default for name, default in network_fields(UNet).items() if name not in fields}
    for name in unused.keys() & options.keys():
        if options.pop(name) != unused[name]:
            network = "an MLP (model.kind='mlp')" if kind is MLP else "a classifier (diffusion.loss='classify')"
            raise ValueError(f"model.{name}={config[name]!r} has no effect on {network}; use {unused[name]!r}")
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is not a field of models.{kind.__name__}; its fields: {', '.join(sorted(fields))}"
        )
    return kind(**options)

"""Networks, as Flax Linen modules, without diffusion mathematics."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax.config.presets import CLASSIFIER_PRESETS, PRESETS, UNET_PRESETS
from diffusion_jax.config.table import NETWORK_SETTINGS
from diffusion_jax.config.values import NamedValues
from diffusion_jax.functions import find_function
from diffusion_jax.models.conditions import Conditional, condition_shape, initial_inputs, mark_missing
from diffusion_jax.models.custom import CustomNetwork, Shapes, read_options
from diffusion_jax.models.layers import timestep_embedding
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.unet import KEPT_NAMES, Classifier, UNet

__all__ = [
    "KEPT_NAMES",
    "MLP",
    "Classifier",
    "Conditional",
    "CustomNetwork",
    "Shapes",
    "UNet",
    "condition_shape",
    "from_config",
    "import_network",
    "initial_inputs",
    "mark_missing",
    "network_fields",
    "preset",
    "source_file",
    "timestep_embedding",
    "to_config",
]

_Network = UNet | MLP | CustomNetwork | Classifier
_KINDS: dict[str, type[UNet] | type[MLP]] = {"unet": UNet, "mlp": MLP}
# For errors: the name of the network's kind, and advice for data that do not fit.
_DESCRIPTIONS: dict[type, tuple[str, str]] = {
    UNet: ("a U-Net (model.kind=unet)", "vectors (data.image_size=()) need model.kind=mlp"),
    MLP: ("an MLP (model.kind=mlp)", "data with spatial axes need model.kind=unet"),
    Classifier: ("a classifier (diffusion.loss=classify)", "use data with spatial axes"),
}


def preset(name: str) -> UNet | Classifier:
    """Returns a published network by its name in `config.presets`. Raises: ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return UNet(**UNET_PRESETS[name]) if name in UNET_PRESETS else Classifier(**CLASSIFIER_PRESETS[name])


def network_fields(model: _Network | type[_Network]) -> dict[str, Any]:
    """Returns {name: value} for the fields of a network, or {name: default} for a class, without the fields of Flax."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    return {name: getattr(model, name) for name in names}


def to_config(model: _Network | type[_Network]) -> dict[str, Any]:
    """Returns a network's settings of `config.model`, as `from_config` takes them, and any field `spatial_dims`."""
    settings = network_fields(model)
    if isinstance(model, CustomNetwork):
        del settings["function"]
        settings |= {**dict(settings.pop("settings")), "options": dict(model.options)}
    elif isinstance(model, MLP):
        settings["kind"] = "mlp"
    settings.pop("out_channels", None)  # follows from the data and the variance
    return settings


def from_config(
    config: Mapping[str, Any],
    kind: type[Any] | None = None,
    function: Callable | None = None,
    shape: tuple[int, ...] | None = None,
) -> Any:
    """Builds a network from the settings of `config.model`; `config` may also give the field `spatial_dims`.

    kind: the network's class; None for the class that the setting `kind` names, by default the U-Net. Settings that only the
    U-Net has must keep their defaults for other networks. function: replaces the function that `config.kind` names. shape:
    the shape of an example, (*spatial, C), to check that the network fits the data.
    Raises: ValueError for a setting that is not a field, and for a U-Net or an MLP that does not fit the shape.
    """
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()
    }
    named, own_options = options.pop("kind", "unet"), NamedValues().check(dict(options.pop("options", {})))
    is_own = ":" in named
    if kind is not None and is_own:
        raise ValueError(f"model.kind={named}: a classifier is not made by a function of yours; leave it out")
    if own_options and not is_own:
        raise ValueError(f"model.options={dict(own_options)} are for model.kind=module:function; leave them out")
    if kind is None:
        if not is_own and named not in _KINDS:
            raise ValueError(f"model.kind={named!r} must be {' or '.join(_KINDS)}")
        kind = CustomNetwork if is_own else _KINDS[named]
    fields, defaults, taken, checked = network_fields(kind), network_fields(UNet), {}, {}
    if is_own:
        function = function or import_network(named)
        taken, checked = read_options(named, function, options, own_options)
        text = f"{named}, whose function has no argument of this name"
        advice = ", or --config.model.options.NAME=VALUE for an argument of the function"
        unused = {name for name in defaults if f"model.{name}" in (*NETWORK_SETTINGS, "model.dropout")} - taken.keys()
        defaults["dropout"] = 0.0
    else:
        (text, fitting), advice, unused = _DESCRIPTIONS[kind], "", defaults.keys() - fields.keys()
        if shape is not None and (len(shape) == 1) != (kind is MLP):
            raise ValueError(f"{text} does not fit data of shape {list(shape)}; {fitting}")
    for name in sorted(unused & options.keys()):
        if options.pop(name) != defaults[name]:
            raise ValueError(f"model.{name}={config[name]!r} has no effect on {text}; use {defaults[name]!r}{advice}")
    if is_own:
        options = {name: value for name, value in options.items() if name in fields}
        options |= {"settings": tuple(sorted(taken.items())), "options": tuple(sorted(checked.items()))}
        options |= {"kind": named, "function": function}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is not a field of models.{kind.__name__}; its fields: {', '.join(sorted(fields))}"
        )
    return kind(**options)


def import_network(name: str) -> Callable:
    """Imports the function that `model.kind` names. Raises: ValueError."""
    return find_function(name, "model.kind")


def source_file(model: _Network) -> pathlib.Path | None:
    """Returns the file that defines the function of a user's network; None for networks of this package."""
    if not isinstance(model, CustomNetwork):
        return None
    name = inspect.getsourcefile(inspect.unwrap(model.function)) if callable(model.function) else None
    return None if name is None else pathlib.Path(name)

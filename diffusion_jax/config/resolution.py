"""Complete, validated configs from any mapping and from command lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from diffusion_jax.config.table import CLASSIFIER_LEAVES, GROUPS, LEAVES, Leaf, flatten
from diffusion_jax.config.values import OneOf
from diffusion_jax.errors import ConfigError, closest_names, shorten

__all__ = ["default", "default_classifier", "override", "resolve"]

_ALIASES = {"sampling.class": "sampling.label"}


def default() -> ConfigDict:
    """The config of DDPM on CIFAR-10 (Ho et al. 2020), from which every experiment differs in some leaves."""
    return resolve({})


def default_classifier() -> ConfigDict:
    """The config of a classifier of noisy images.

    `diffusion.loss` is "classify" and `model` has the fields of `models.Classifier`.
    """
    return resolve({"diffusion": {"loss": "classify"}})


def resolve(config: Mapping[str, Any]) -> ConfigDict:
    """A complete config with the leaves of `config`, which may be partial, and the defaults of all others.

    config: a nested mapping or a ConfigDict; it is not changed. Lists become tuples.
    Raises: ConfigError for an unknown leaf, and for a value of the wrong type or outside the range of its leaf.
    """
    _check_mapping(config)
    return _complete(flatten(config))


def override(config: Mapping[str, Any], texts: Mapping[str, str]) -> ConfigDict:
    """`config`, resolved, with leaves replaced by values of a command line: {"training.num_steps": "1e4"}.

    Fields of a ConfigDict that refer to a replaced one (`get_ref`) follow it.
    Raises: ConfigError as `resolve`, and for text that is no value of its leaf.
    """
    _check_mapping(config)
    texts = {_ALIASES.get(name, name): text for name, text in texts.items()}
    leaves = _leaves_of(flatten(config) | texts)
    if texts.get("diffusion.loss") == "classify" and any(name in LEAVES.keys() - leaves for name in flatten(config)):
        raise ConfigError(
            "diffusion.loss=classify: the network of this config is not a classifier; use the experiment of a classifier, "
            "such as --config=digits_classifier"
        )
    values = {}
    for name, text in texts.items():
        _check_known(name, leaves)
        values[name] = _convert(name, leaves[name], text, leaves[name].kind.parse, text)
    return _complete(flatten(_with_references_set(config, values)) | values)


def _complete(given: Mapping[str, Any]) -> ConfigDict:
    """The config with these values by the full names of their leaves, and the defaults of all others. Raises: ConfigError."""
    leaves = _leaves_of(given)
    for name in given:
        _check_known(name, leaves)
    config = ConfigDict({group: {} for group in GROUPS if group})
    for name, leaf in leaves.items():
        value = given.get(name, leaf.default)
        value = _convert(name, leaf, value, leaf.kind.check, _shown(value))
        if isinstance(leaf.kind, OneOf):  # a ConfigDict would allow only the type of the first value
            value = FieldReference(value, field_type=object)
        group, _, last = name.rpartition(".")
        (config[group] if group else config)[last] = value
    return config


def _convert(name: str, leaf: Leaf, value: Any, convert: Callable[[Any], Any], shown: str) -> Any:
    """`convert(value)`. Raises: ConfigError if the leaf does not allow the value, which the message has as `shown`."""
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError) as error:
        advice = str(error) if isinstance(error, ValueError) else ""
        advice = advice or f"description: {leaf.description.split('. ')[0].rstrip('.')}"
        raise ConfigError(f"{name}={shown} must be {leaf.kind.allowed}; {advice}") from None


def _with_references_set(config: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of a ConfigDict in which fields that refer to those of `values` have their new values.

    If `values` has several fields with one reference, the others follow the first.
    """
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        return config
    changed = copy.deepcopy(config)
    for name, value in reversed(list(values.items())):
        group, _, leaf = name.rpartition(".")
        fields = changed.get(group) if group else changed
        if isinstance(fields, ConfigDict) and leaf in fields:
            fields.get_ref(leaf).set(value, type_safe=False)
    return changed


def _leaves_of(given: Mapping[str, Any]) -> dict[str, Leaf]:
    """The table of a config, by the values of its leaves: the model of a classifier has other leaves."""
    loss = given.get("diffusion.loss")
    return CLASSIFIER_LEAVES if isinstance(loss, str) and loss == "classify" else LEAVES


def _check_mapping(config: Any) -> None:
    """Raises: ConfigError for anything but a mapping."""
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(
            f"a config must be a nested mapping, such as {{'training': {{'num_steps': 800000}}}}, and not {_shown(config)}"
        )


def _check_known(name: str, leaves: Mapping[str, Leaf]) -> None:
    """Raises: ConfigError for a name that is no leaf."""
    if name in leaves:
        return
    inside = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
    if inside:
        raise ConfigError(f"{name} is a group; set one of its leaves, such as {inside[0]}")
    if name in LEAVES:
        raise ConfigError(
            f"unknown leaf {name}: the model of a classifier (diffusion.loss=classify) has none; remove it"
        )
    near = closest_names(name, [*leaves, *filter(None, GROUPS)])
    advice = f"did you mean {near[0]}?" if near else "docs/reference/configuration.md lists all leaves"
    raise ConfigError(f"unknown leaf {name}; {advice}")


def _shown(value: Any) -> str:
    return shorten(" ".join(repr(value).split()), 80)  # the repr of an array has several lines

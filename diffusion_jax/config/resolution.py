"""Complete, validated configs from any mapping, from command lines and from the files of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from diffusion_jax.config.leaf import Leaf
from diffusion_jax.config.table import CLASSIFIER_LEAVES, GROUPS, LEAVES, flatten, nearest
from diffusion_jax.config.values import Boolean, OneOf
from diffusion_jax.errors import ConfigError

__all__ = ["default", "default_classifier", "is_boolean", "migrate", "override", "resolve"]

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
    given, leaves = flatten(config), _leaves_of(config)
    _check_groups(config)
    for name in given:
        _check_known(name, leaves)
    values = {name: given.get(name, leaf.default) for name, leaf in leaves.items()}
    return _nested({name: _field(name, leaves[name], value) for name, value in values.items()})


def override(config: Mapping[str, Any], texts: Mapping[str, str]) -> ConfigDict:
    """`config`, resolved, with leaves replaced by values of a command line: {"training.num_steps": "1e4"}.

    Raises: ConfigError as `resolve`, and for text that is no value of its leaf.
    """
    texts = {_ALIASES.get(name, name): text for name, text in texts.items()}
    changed = _plain(config)
    if "diffusion.loss" in texts:
        changed.setdefault("diffusion", {})["loss"] = texts["diffusion.loss"]
    leaves = _leaves_of(changed)
    for name, text in texts.items():
        _check_known(name, leaves)
        group, _, leaf = name.rpartition(".")
        (changed.setdefault(group, {}) if group else changed)[leaf] = _parse(name, leaves[name], text)
    return resolve(changed)


def is_boolean(name: str) -> bool:
    """Whether a leaf is True or False, so that its name alone stands for True on a command line."""
    name = _ALIASES.get(name, name)
    return name in LEAVES and isinstance(LEAVES[name].kind, Boolean)


def migrate(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config in the names and values of this version; one that has them already is unchanged.

    Translates British spelling (of version 0.1) and the strings that `sampling.steps` once took.
    """
    migrated = _plain(stored)
    evaluation, editing, sampling = (
        group if isinstance(group := migrated.get(name), dict) else {} for name in ("evaluation", "editing", "sampling")
    )
    if "ode_dequantisation" in evaluation:
        evaluation["ode_dequantization"] = evaluation.pop("ode_dequantisation")
    if isinstance(evaluation.get("metrics"), list | tuple):
        translated = {"memorisation": "memorization"}
        evaluation["metrics"] = [translated.get(metric, metric) for metric in evaluation["metrics"]]
    if editing.get("task") == "colourise":
        editing["task"] = "colorize"
    steps = sampling.get("steps")
    if isinstance(steps, str):
        counts = [int(count) for count in steps.removeprefix("ddim").split(",") if count.strip().isdecimal()]
        if counts:
            sampling["steps"] = counts[0] if len(counts) == 1 else tuple(counts)
            sampling["spacing"] = "openai_ddim" if steps.startswith("ddim") else "openai"
    return migrated


def _leaves_of(config: Mapping[str, Any]) -> dict[str, Leaf]:
    """The table of a config: a classifier's model has leaves of its own."""
    return CLASSIFIER_LEAVES if flatten(config).get("diffusion.loss") == "classify" else LEAVES


def _check_groups(config: Mapping[str, Any]) -> None:
    for group, (_, leaves) in GROUPS.items():
        if group and group in config and not isinstance(config[group], Mapping | ConfigDict):
            leaf, example = next(iter(leaves.items()))
            raise ConfigError(
                f"{group}={config[group]!r} must be a group of leaves, such as {{{leaf!r}: {example.default!r}}}"
            )


def _check_known(name: str, leaves: Mapping[str, Leaf]) -> None:
    if name in leaves:
        return
    inside = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
    if inside:
        raise ConfigError(f"{name} is a group; set one of its leaves, such as {inside[0]}")
    parent = name.rpartition(".")[0]
    if parent in leaves:
        raise ConfigError(f"unknown leaf {name}; {parent} is a leaf itself, not a group")
    if name in LEAVES:
        raise ConfigError(
            f"unknown leaf {name}: the model of a classifier (diffusion.loss=classify) has none; remove it"
        )
    raise ConfigError(f"unknown leaf {name}; did you mean {nearest(name, leaves)}?")


def _field(name: str, leaf: Leaf, value: Any) -> Any:
    """The value of a leaf as a ConfigDict holds it. Raises: ConfigError."""
    try:
        value = leaf.kind.check(value)
    except (ValueError, TypeError, OverflowError):
        hint = leaf.kind.hint(value) or _first_sentence(leaf.meaning)
        raise ConfigError(f"{name}={_shown(value)} must be {leaf.kind.allowed}; {hint}") from None
    # A ConfigDict holds each leaf to the type of its first value, which is too narrow where several types are allowed.
    return FieldReference(value, field_type=object) if isinstance(leaf.kind, OneOf) else value


def _parse(name: str, leaf: Leaf, text: str) -> Any:
    try:
        return leaf.kind.parse(text)
    except (ValueError, TypeError, OverflowError):
        example = f", {leaf.kind.example}" if leaf.kind.example else ""
        hint = leaf.kind.hint(text) or _first_sentence(leaf.meaning)
        raise ConfigError(f"{name}={text} must be {leaf.kind.allowed}{example}; {hint}") from None


def _first_sentence(meaning: str) -> str:
    """The beginning of a meaning, for the end of an error's line."""
    return f"meaning: {meaning.split('. ')[0].rstrip('.')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of a config's own, which may be changed."""
    return {key: _plain(value) if isinstance(value, Mapping | ConfigDict) else value for key, value in config.items()}


def _nested(flat: Mapping[str, Any]) -> ConfigDict:
    config = ConfigDict()
    for name, value in flat.items():
        group, _, leaf = name.rpartition(".")
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[leaf] = value
    return config

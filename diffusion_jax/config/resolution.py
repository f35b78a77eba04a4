"""Complete, validated configs from any mapping, from command lines and from the files of earlier versions."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from diffusion_jax.config.leaf import Leaf
from diffusion_jax.config.table import CLASSIFIER_LEAVES, GROUPS, LEAVES, flatten, nearest_name
from diffusion_jax.config.values import Boolean, OneOf
from diffusion_jax.errors import ConfigError, closest_names, shorten

__all__ = [
    "RENAMED_METRICS",
    "default",
    "default_classifier",
    "drop_unknown_leaves",
    "is_boolean_leaf",
    "migrate",
    "override",
    "resolve",
]

RENAMED_METRICS = {"memorisation": "memorization"}  # the name in version 0.1: the name now
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
    _check_structure(config)
    given, leaves = _flatten_given(config), _leaves_of(config)
    for name in given:
        _check_known(name, leaves)
    values = {name: given.get(name, leaf.default) for name, leaf in leaves.items()}
    return _nested({name: _field(name, leaves[name], value) for name, value in values.items()})


def override(config: Mapping[str, Any], texts: Mapping[str, str]) -> ConfigDict:
    """`config`, resolved, with leaves replaced by values of a command line: {"training.num_steps": "1e4"}.

    Fields of a ConfigDict that refer to a replaced one (`get_ref`) follow it.
    Raises: ConfigError as `resolve`, and for text that is no value of its leaf.
    """
    _check_structure(config)
    texts = {_ALIASES.get(name, name): text for name, text in texts.items()}
    loss = texts.get("diffusion.loss", flatten(config).get("diffusion.loss"))
    leaves = _leaves_of({"diffusion": {"loss": loss}})
    if texts.get("diffusion.loss") == "classify" and any(name in LEAVES.keys() - leaves for name in flatten(config)):
        raise ConfigError(
            "diffusion.loss=classify: the network of this config is not a classifier; use the experiment of a classifier, "
            "such as --config=digits_classifier"
        )
    values = {}
    for name, text in texts.items():
        _check_known(name, leaves)
        values[name] = _check(name, leaves[name], _parse(name, leaves[name], text))
    return resolve(_replace(_with_references_set(config, values), values))


def _with_references_set(config: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of a ConfigDict in which fields that refer to those of `values` have their new values.

    If `values` has several fields with one reference, the others follow the first.
    """
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        return config
    changed, already_set = copy.deepcopy(config), set()
    for name, value in values.items():
        group, _, leaf = name.rpartition(".")
        fields = changed.get(group) if group else changed
        if isinstance(fields, ConfigDict) and leaf in fields:
            reference = fields.get_ref(leaf)
            if id(reference) not in already_set:
                reference.set(value, type_safe=False)
                already_set.add(id(reference))
    return changed


def _replace(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    replaced = _plain(config)
    for name, value in values.items():
        group, _, leaf = name.rpartition(".")
        (replaced.setdefault(group, {}) if group else replaced)[leaf] = value
    return replaced


def drop_unknown_leaves(stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A stored config without the leaves that this version does not have, and their names.

    Raises: ConfigError for a name that is likely a misspelled leaf, and for a mapping that is not a config.
    """
    _check_structure(stored)
    given, leaves = _flatten_given(stored), _leaves_of(stored)
    unknown = [name for name in given if name not in leaves]
    for name in unknown:
        if _is_misspelled(name, leaves):
            _check_known(name, leaves)
    known: dict[str, Any] = {name: value for name, value in given.items() if name in leaves}
    return _replace({}, known), unknown


def _is_misspelled(name: str, leaves: Mapping[str, Leaf]) -> bool:
    """Whether an unknown name is most likely one of `leaves`: its group and its last part are much like those."""
    if name.rpartition(".")[0] in leaves:
        return True
    near = nearest_name(name, leaves, cutoff=0.85)
    return near is not None and all(
        difflib.SequenceMatcher(None, one, other).ratio() >= 0.85
        for one, other in zip(name.rpartition(".")[::2], near.rpartition(".")[::2], strict=True)
    )


def is_boolean_leaf(name: str) -> bool:
    """Whether a leaf is True or False, so that its name alone stands for True on a command line."""
    name = _ALIASES.get(name, name)
    return name in LEAVES and isinstance(LEAVES[name].kind, Boolean)


def migrate(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config in the names and values of this version; one that has them already is unchanged.

    Translates British spelling (of version 0.1), the strings that `sampling.steps` once took, and the weighting None.
    """
    migrated = _plain(stored)
    evaluation, editing, sampling, diffusion = (
        group if isinstance(group := migrated.get(name), dict) else {}
        for name in ("evaluation", "editing", "sampling", "diffusion")
    )
    if "ode_dequantisation" in evaluation:
        evaluation["ode_dequantization"] = evaluation.pop("ode_dequantisation")
    if isinstance(evaluation.get("metrics"), list | tuple):
        evaluation["metrics"] = [RENAMED_METRICS.get(metric, metric) for metric in evaluation["metrics"]]
    if editing.get("task") == "colourise":
        editing["task"] = "colorize"
    if diffusion.get("weighting", "") is None:
        diffusion["weighting"] = "none"
    steps = sampling.get("steps")
    if isinstance(steps, str):
        counts = [count.strip() for count in steps.removeprefix("ddim").split(",")]
        if all(count.isdecimal() for count in counts):
            sampling["steps"] = int(counts[0]) if len(counts) == 1 else tuple(map(int, counts))
            sampling["spacing"] = "openai_ddim" if steps.startswith("ddim") else "openai"
    return migrated


def _leaves_of(config: Mapping[str, Any]) -> dict[str, Leaf]:
    """The table of a config: the model of a classifier has other leaves."""
    loss = flatten(config).get("diffusion.loss")
    return CLASSIFIER_LEAVES if isinstance(loss, str) and loss == "classify" else LEAVES


def _flatten_given(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """As `flatten`, with empty mappings as values, except for the groups of a config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | ConfigDict) and value:
            flat |= _flatten_given(value, f"{name}.")
        elif not isinstance(value, Mapping | ConfigDict) or name not in GROUPS:
            flat[name] = value
    return flat


def _check_structure(config: Any) -> None:
    """Raises: ConfigError for anything but a nested mapping of groups."""
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(
            f"a config must be a nested mapping, such as {{'training': {{'num_steps': 800000}}}}, and not {_shown(config)}"
        )
    _check_keys(config)
    for group, (_, leaves) in GROUPS.items():
        if group and group in config and not isinstance(config[group], Mapping | ConfigDict):
            leaf, example = next(iter(leaves.items()))
            raise ConfigError(
                f"{group}={_shown(config[group])} must be a group of leaves, such as {{{leaf!r}: {example.default!r}}}"
            )


def _check_keys(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if "." in str(key):
            group, _, leaf = str(key).partition(".")
            raise ConfigError(f"the key {key!r} has a dot; nest it: {{{group!r}: {{{leaf!r}: ...}}}}")
        if isinstance(value, Mapping | ConfigDict):
            _check_keys(value)


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
    near = nearest_name(name, leaves)
    if "." not in name:  # perhaps a misspelled group
        near = next(iter(closest_names(name, filter(None, GROUPS))), near)
    advice = f"did you mean {near}?" if near else "docs/reference/configuration.md lists all leaves"
    raise ConfigError(f"unknown leaf {name}; {advice}")


def _field(name: str, leaf: Leaf, value: Any) -> Any:
    """The value of a leaf as a ConfigDict holds it. Raises: ConfigError."""
    value = _check(name, leaf, value)
    # A ConfigDict holds each leaf to the type of its first value, which is too narrow if several types are allowed.
    return FieldReference(value, field_type=object) if isinstance(leaf.kind, OneOf) else value


def _check(name: str, leaf: Leaf, value: Any) -> Any:
    """The value of a leaf in its own type. Raises: ConfigError."""
    try:
        return leaf.kind.check(value)
    except (ValueError, TypeError, OverflowError):
        hint = leaf.kind.hint(value) or _first_sentence(leaf.description)
        raise ConfigError(f"{name}={_shown(value)} must be {leaf.kind.allowed}; {hint}") from None


def _parse(name: str, leaf: Leaf, text: str) -> Any:
    try:
        return leaf.kind.parse(text)
    except (ValueError, TypeError, OverflowError):
        example = f", {leaf.kind.example}" if leaf.kind.example else ""
        hint = leaf.kind.hint(text) or _first_sentence(leaf.description)
        raise ConfigError(f"{name}={text} must be {leaf.kind.allowed}{example}; {hint}") from None


def _first_sentence(description: str) -> str:
    """The first sentence of a description, for the end of an error's line."""
    return f"description: {description.split('. ')[0].rstrip('.')}"


def _shown(value: Any) -> str:
    return shorten(" ".join(repr(value).split()), 80)  # the repr of an array has several lines


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

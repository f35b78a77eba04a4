"""Configs: the table of all settings, with defaults, allowed values and descriptions, and functions that read the table.

    from diffusion_jax import config

    cfg = config.default()                                          # DDPM on CIFAR-10, an ml_collections.ConfigDict
    cfg = config.experiment("digits")                               # an experiment in configs/
    cfg = config.resolve({"data": {"dataset": "digits"}})           # a complete, valid config from a partial mapping

docs/reference/configuration.md lists all settings.
"""

from __future__ import annotations

import copy
import functools
import pathlib
import re
import runpy
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from diffusion_jax.config.rules import check, find_broken
from diffusion_jax.config.table import (
    GROUPS,
    NETWORK_SETTINGS,
    SETTINGS,
    Setting,
    clips_by_default,
    defaults,
    flatten,
    identity_settings,
    is_classifier,
    is_continuous,
    is_identity,
    is_upsampler,
    resolve_clip,
    sampler_setting,
    short_name,
)
from diffusion_jax.config.values import OneOf, parse, read_value
from diffusion_jax.errors import ConfigError, closest_names, shorten

__all__ = [
    "SETTINGS",
    "ConfigDict",
    "ConfigError",
    "check",
    "clips_by_default",
    "default",
    "default_classifier",
    "defaults",
    "experiment",
    "experiment_names",
    "find_broken",
    "flatten",
    "identity_settings",
    "is_classifier",
    "is_continuous",
    "is_identity",
    "is_upsampler",
    "override",
    "resolve",
    "resolve_clip",
    "sampler_setting",
    "short_name",
    "untrusted_values",
]

_ALIASES = {"sampling.class": "sampling.label"}
_SYNTHETIC = ("series", "field", "volume", "moons", "conditional")
_OWN_DATA = {f"diffusion_jax.data.synthetic:{name}" for name in _SYNTHETIC}
_PACKAGE = pathlib.Path(__file__).parents[1]


def default() -> ConfigDict:
    """Returns the config of DDPM on CIFAR-10 (Ho et al. 2020), the base of the experiments."""
    return resolve({})


def default_classifier() -> ConfigDict:
    """Returns a config for a noise-aware classifier: `diffusion.loss` is "classify", and `model` has other defaults."""
    return resolve({"diffusion": {"loss": "classify"}})


def resolve(config: Mapping[str, Any]) -> ConfigDict:
    """Completes a config, which may be partial, with the defaults.

    config: a nested mapping or a ConfigDict; it is not changed. Lists become tuples.
    Raises: ConfigError for an unknown setting, a value with a wrong type or out of range, or if the number of
    `data.channel_names` or `data.channel_units` is not `data.channels`.
    """
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(
            f"a config must be a nested mapping, such as {{'training': {{'num_steps': 800000}}}}, and not {_shown(config)}"
        )
    return _complete(flatten(config))


def override(config: Mapping[str, Any], texts: Mapping[str, str]) -> ConfigDict:
    """Returns `config`, resolved, with settings replaced by command-line values: {"training.num_steps": "1e4"}.

    ConfigDict fields that refer to a replaced field (`get_ref`) get the field's new value. If `model.kind` changes from or
    to a function, the settings of the previous network are reset to the defaults.
    Raises: ConfigError as `resolve`, and for text that is not a value of the setting.
    """
    given, values, options = flatten(config), {}, {}
    for name, text in texts.items():
        name = _ALIASES.get(name, name)
        if name.startswith("model.options."):
            options[name.removeprefix("model.options.")] = read_value(text)
            continue
        values[name] = _convert(name, text, functools.partial(parse, _find_setting(name).kind), text)
    before, kind = given.get("model.kind", ""), values.get("model.kind", given.get("model.kind", ""))
    if f"{before}{kind}".count(":") and short_name(before) != short_name(kind):
        # The settings of the previous network do not apply to the new network.
        values = {name: SETTINGS[name].default for name in NETWORK_SETTINGS} | values
    if options:
        values["model.options"] = {**values.get("model.options", given.get("model.options", {})), **options}
    changed = copy.deepcopy(ConfigDict(config))
    with changed.ignore_type():  # in reverse, so that the first of several fields with one reference decides
        changed.update_from_flattened_dict(
            {name: values[name] for name in reversed(values) if name in given and name != "model.options"}
        )
    return _complete(flatten(changed) | values)


def untrusted_values(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings of a run, or of a partial config, that need permission: {"model.kind": "module:function"}.

    These are functions, which are imported, and URLs, which are opened with the reader's credentials.

    The synthetic data of this package's experiments are not listed, because importing them runs only this package's code.
    """
    found = {}
    for name, value in flatten(config).items():
        texts = [text for text in (value if isinstance(value, tuple | list) else [value]) if isinstance(text, str)]
        texts = [text for text in texts if text not in _OWN_DATA]
        setting, text = SETTINGS.get(name), ",".join(texts)
        if setting and ((setting.imports and ":" in text) or (setting.is_path and "://" in text)):
            found[name] = text
    return found


def experiment(name: str) -> ConfigDict:
    """Returns an experiment's config, by name ("digits", "imagenet_adm:128") or file ("mine.py", "mine.py:ARGUMENT").

    Raises: ConfigError, starting with `name`: no such experiment or file, or an error in the file, with its line number.
    """
    # A colon before .py is part of the path, as in C:/runs/mine.py.
    match = re.fullmatch(r"(?s)(.*?\.py|[^:]*)(?::(.*))?", name)
    assert match is not None
    file, argument = match.groups()
    if file in experiment_names():
        file = str(_folder() / f"{file}.py")
    elif not pathlib.Path(file).is_file():
        near = closest_names(pathlib.PurePath(file).stem, experiment_names()) or ["digits"]
        raise ConfigError(f"{name}: no such file or experiment; give a Python file, or a name such as {near[0]}")
    elif pathlib.Path(file).suffix not in ("", ".py"):
        raise ConfigError(
            f"{name}: {file} is not a Python file; give FILE.py with get_config(), or a name such as digits (arrays are "
            "--config.data.data_dir=FILE, and --workdir=DIR alone uses the config.json of a run)"
        )
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise ConfigError(f"{file} defines no function get_config(), which must return the ConfigDict")
        config = get_config() if argument is None else get_config(argument)
        _find_beside(config, pathlib.Path(file).parent)
        resolved = resolve(config)
        return config if isinstance(config, ConfigDict) else resolved  # a ConfigDict keeps its references
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"line {lines[-1]} of {file}" if lines else file
        text = shorten(str(error), 300)  # some errors list a whole config
        raise ConfigError(f"{name}: {where} raises {type(error).__name__}: {text}") from error


def _find_beside(config: Any, folder: pathlib.Path) -> None:
    """Makes the path in each setting FILE.py:function absolute, if the file is in the config's folder."""

    def absolute(text: Any) -> Any:
        is_beside = isinstance(text, str) and ".py:" in text and (folder / text.rpartition(":")[0]).is_file()
        return str(folder.resolve() / text) if is_beside else text

    groups = config.values() if isinstance(config, Mapping | ConfigDict) else ()
    for settings in [group for group in groups if isinstance(group, dict | ConfigDict)]:
        for name, value in settings.items():
            found = type(value)(map(absolute, value)) if isinstance(value, tuple | list) else absolute(value)
            if found is not value and found != value:
                settings[name] = found


def experiment_names() -> list[str]:
    """Lists the names of this project's experiments, sorted."""
    return sorted(path.stem for path in _folder().glob("*.py") if not path.stem.startswith("_"))


def _folder() -> pathlib.Path:
    """Returns the folder of experiments: diffusion_jax/configs in an installed package, configs in a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _complete(given: Mapping[str, Any]) -> ConfigDict:
    """Builds a config from {full setting name: value}, with defaults for all other settings. Raises: ConfigError."""
    config = ConfigDict({group: {} for group in GROUPS if group})
    for name, value in {**defaults(given), **given}.items():
        setting = _find_setting(name)
        value = _convert(name, value, setting.kind.check, _shown(value))
        if isinstance(setting.kind, OneOf):  # a ConfigDict would allow only the type of the first value
            value = FieldReference(value, field_type=object)
        group, _, last = name.rpartition(".")
        (config[group] if group else config)[last] = value
    check(config, "config")
    return config


def _convert(name: str, value: Any, convert: Callable[[Any], Any], shown: str) -> Any:
    """Returns `convert(value)`. Raises: ConfigError, with the text `shown`, if the setting does not allow the value."""
    setting = SETTINGS[name]
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError) as error:
        advice = str(error) if isinstance(error, ValueError) else ""
        advice = advice or f"description: {setting.description.split('. ')[0].rstrip('.')}"
        raise ConfigError(f"{name}={shown} must be {setting.kind.allowed}; {advice}") from None


def _find_setting(name: str) -> Setting:
    """Returns the entry in the table of settings. Raises: ConfigError for an unknown name."""
    if name in SETTINGS:
        return SETTINGS[name]
    problem, advice = f"unknown setting {name}", "docs/reference/configuration.md lists all settings"
    if inside := [setting for setting in SETTINGS if setting.startswith(f"{name}.")]:
        problem, advice = f"{name} is a group", f"set one of its settings, such as {inside[0]}"
    elif name in _ALIASES:
        advice = f"use {_ALIASES[name]}"
    elif near := closest_names(name, [*SETTINGS, *filter(None, GROUPS)]):
        advice = f"did you mean {near[0]}?"
    raise ConfigError(f"{problem}; {advice}")


def _shown(value: Any) -> str:
    return shorten(" ".join(repr(value).split()), 80)  # an array's repr has several lines

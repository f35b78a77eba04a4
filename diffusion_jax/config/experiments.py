"""Experiments: Python files, of this project or of a user, whose `get_config()` returns a config."""

from __future__ import annotations

import inspect
import pathlib
import re
import runpy
import traceback
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config.resolution import resolve
from diffusion_jax.errors import ConfigError, closest_names, shorten

__all__ = ["experiment", "experiment_names", "load_experiment"]

_PACKAGE = pathlib.Path(__file__).parents[1]


def experiment(name: str) -> ConfigDict:
    """The config of an experiment of this project: "digits", or with an argument "imagenet_adm:128".

    Raises: ConfigError for an unknown name or argument.
    """
    stem, colon, argument = name.partition(":")
    if stem not in experiment_names():
        near = closest_names(stem, experiment_names())
        advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(experiment_names())}"
        raise ConfigError(f"unknown experiment {stem!r}; {advice}")
    return _load_file(f"{_folder() / stem}.py", argument if colon else None, name)


def experiment_names() -> list[str]:
    """The names of this project's experiments, sorted."""
    return sorted(path.stem for path in _folder().glob("*.py") if not path.stem.startswith("_"))


def _folder() -> pathlib.Path:
    """The folder of experiments: diffusion_jax/configs of an installed package, configs of a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def load_experiment(path: str) -> ConfigDict:
    """The config of FILE.py or FILE.py:ARGUMENT, or of an experiment's name, as `--config` takes them.

    Raises: ConfigError with the file and the line of the error.
    """
    # A colon before .py belongs to the file, as in C:/runs/mine.py.
    match = re.match(r"^(.*?\.py)(?::(.*))?$", path) or re.match(r"^([^:]*)(?::(.*))?$", path)
    file, argument = match.groups() if match else (path, None)
    if pathlib.Path(file).is_file():
        if pathlib.Path(file).suffix not in ("", ".py"):
            raise ConfigError(
                f"--config={path}: {file} is not a Python file; give FILE.py with get_config(), or a name such as digits "
                "(arrays are --config.data.data_dir=FILE, and --workdir=DIR alone uses the config.json of a run)"
            )
        return _load_file(file, argument, path)
    if file in experiment_names():
        return experiment(path)
    near = next(iter(closest_names(pathlib.PurePath(file).stem, experiment_names())), "digits")
    raise ConfigError(f"--config={path}: no such file or experiment; give a Python file, or a name such as {near}")


def _load_file(file: str, argument: str | None, shown: str) -> ConfigDict:
    """The config that `get_config()` of a file returns. shown: the value of --config, for messages. Raises: ConfigError."""
    arguments = () if argument is None else (argument,)
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise ConfigError(f"{file} defines no function get_config(), which must return the ConfigDict")
        _check_argument(shown.removesuffix(f":{argument}"), get_config, arguments)
        config = get_config(*arguments)
        if isinstance(config, dict | ConfigDict):
            resolved = resolve(config)
            return config if isinstance(config, ConfigDict) else resolved  # a ConfigDict keeps its references
    except ConfigError as error:
        raise ConfigError(f"--config={shown}: {str(error).removeprefix(f'--config={shown}: ')}") from None
    except Exception as error:
        raise ConfigError(f"--config={shown}: {_explain(file, error)}") from error
    kind = "None (is its return statement missing?)" if config is None else f"a {type(config).__name__}"
    raise ConfigError(
        f"--config={shown}: get_config() of {file} returns {kind}, and must return a ml_collections.ConfigDict"
    )


def _check_argument(name: str, get_config: Any, arguments: tuple[str, ...]) -> None:
    """Raises: ConfigError if `get_config` takes no argument but one is given, or the reverse."""
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise ConfigError(f"{name} takes no argument; use --config={name}") from None
        raise ConfigError(f"{name} needs an argument: --config={name}:ARGUMENT") from None


def _explain(file: str, error: Exception) -> str:
    """What a config file does wrong, with the line of the file."""
    if isinstance(error, SyntaxError) and pathlib.Path(error.filename or "").name == pathlib.Path(file).name:
        return f"line {error.lineno} of {file} is not valid Python ({error.msg}): {(error.text or '').strip()}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"line {lines[-1]} of {file}" if lines else file
    if isinstance(error, ImportError):
        return f"{where} cannot import what it needs ({error}); install it, or correct the import"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{where} raises {type(error).__name__}: {shorten(text, 300)}"  # some list a whole config

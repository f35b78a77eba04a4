"""Experiments: Python files, of this project or of a user, whose `get_config()` returns a config."""

from __future__ import annotations

import inspect
import pathlib
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config.resolution import resolve
from diffusion_jax.errors import ConfigError, closest_names

__all__ = ["experiment", "experiment_names", "load_experiment"]

_PACKAGE = pathlib.Path(__file__).parents[1]
# Config files of version 0.1 that were removed, and the replacement of each.
_REPLACEMENTS = {
    "workdir": "omit --config: --workdir=DIR alone uses the config of the run",
    "pretrained": "use --pretrained=PATH without --config",
    "default": "use --config=cifar10, or config.default() of diffusion_jax in a file of your own",
}


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
    file, argument = _split(path)
    if pathlib.Path(file).is_file():
        if pathlib.Path(file).suffix not in ("", ".py"):
            raise ConfigError(
                f"--config={path}: {file} is not a Python file; give FILE.py with get_config(), or a name such as digits "
                "(arrays are --config.data.data_dir=FILE, and --workdir=DIR alone uses the config.json of a run)"
            )
        return _load_file(file, argument, path)
    if file in experiment_names():
        return experiment(path)
    stem = pathlib.PurePath(file).stem
    if stem in _REPLACEMENTS:
        raise ConfigError(f"--config={path}: there is no {stem}.py since version 0.2; {_REPLACEMENTS[stem]}")
    near = next(iter(closest_names(stem, experiment_names())), "digits")
    raise ConfigError(f"--config={path}: no such file or experiment; give a Python file, or a name such as {near}")


def _split(path: str) -> tuple[str, str | None]:
    """(FILE, ARGUMENT or None). A colon before .py belongs to the file, as in C:/runs/mine.py."""
    if match := re.match(r"^(.*?\.py)(?::(.*))?$", path):
        return match[1], match[2]
    name, colon, argument = path.partition(":")
    return name, argument if colon else None


def _load_file(file: str, argument: str | None, shown: str) -> ConfigDict:
    """The config that `get_config()` of a file returns. shown: the value of --config, for messages. Raises: ConfigError."""
    arguments = () if argument is None else (argument,)
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise ConfigError(
                f"--config={shown}: {file} defines no function get_config(), which must return the ConfigDict"
            )
        _check_argument(shown, shown.removesuffix(f":{argument}"), get_config, arguments)
        config = get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_explain(shown, file, error)) from error
    if isinstance(config, dict):
        try:
            return resolve(config)
        except ConfigError as error:
            raise ConfigError(f"--config={shown}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={shown}: get_config() of {file} returns {_type_name(config)}, and must return a "
            "ml_collections.ConfigDict"
        )
    return config


def _type_name(value: Any) -> str:
    return "None (is its return statement missing?)" if value is None else f"a {type(value).__name__}"


def _check_argument(shown: str, name: str, get_config: Callable, arguments: Sequence[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise ConfigError(f"--config={shown}: {name} takes no argument; use --config={name}") from None
        raise ConfigError(f"--config={shown}: {name} needs an argument: --config={name}:ARGUMENT") from None


def _explain(shown: str, file: str, error: Exception) -> str:
    """The message for an error that a config file raised, with the line of the file."""
    if (
        isinstance(error, SyntaxError)
        and error.filename
        and pathlib.Path(error.filename).name == pathlib.Path(file).name
    ):
        text = (error.text or "").strip()
        return f"--config={shown}: line {error.lineno} of {file} is not valid Python ({error.msg}): {text}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"line {lines[-1]} of {file}" if lines else file
    if isinstance(error, ImportError) and (error.name or "").removeprefix("diffusion_jax.").split(".")[0] == "configs":
        advice = "in version 0.2: from diffusion_jax.config import default"
        return f"--config={shown}: {where} cannot import what it needs ({error}); {advice}, and call default()"
    if isinstance(error, ImportError):
        return f"--config={shown}: {where} cannot import what it needs ({error}); install it, or correct the import"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text if len(text) < 300 else f"{text[:150]} ... {text[-100:]}"  # some list a whole config
    return f"--config={shown}: {where} raises {type(error).__name__}: {text}"

"""Config files and overrides of their leaves: what can be wrong with them, each in one line."""

from __future__ import annotations

import difflib
import inspect
import pathlib
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax.errors import UserError
from diffusion_jax.runs.workdir import flatten, to_dict

# The program names these itself, so that their messages must stand alone.
PRETRAINED = pathlib.Path(__file__).parents[2] / "configs" / "pretrained.py"
_WRAPPERS = (PRETRAINED.with_name("workdir.py"), PRETRAINED)


class _Parser(flags.ArgumentParser):
    """Parses the override of a leaf; None passes, for the leaves that may be None."""

    def __init__(self, parse: Callable[[str], Any], allowed: str):
        super().__init__()
        self._parse, self._allowed = parse, allowed

    def parse(self, argument):
        if argument in (None, "None"):
            return None
        try:
            return self._parse(argument)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"must be {self._allowed}") from None


def _whole_number(argument: str | int) -> int:
    """An int, also from 1e4 or 100.0. Raises: ValueError, OverflowError."""
    try:
        return int(argument)
    except ValueError:
        value = float(argument)
        if int(value) != value or abs(value) > 2**53:  # beyond, a float may stand for another whole number
            raise ValueError from None
        return int(value)


def register_parsers() -> None:
    """Lets overrides of whole numbers be written as 1e4, and gives wrong ones messages that show what is allowed."""
    config_flags.register_flag_parser_for_type(int, _Parser(_whole_number, "a whole number, such as 10000 or 1e4"))
    config_flags.register_flag_parser_for_type(float, _Parser(float, "a number, such as 0.5 or 2e-4"))
    config_flags.register_flag_parser_for_type(bool, _Parser(flags.BooleanParser().parse, "True or False"))


def load(path: str) -> ConfigDict:
    """The config of FILE.py or FILE.py:ARGUMENT. Raises: UserError with the file and the line of what is wrong in it."""
    file, colon, argument = path.partition(":")
    arguments = (argument,) if colon else ()
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise UserError(
                f"--config={path}: {file} defines no function get_config(), which must return the ConfigDict"
            )
        _check_argument(path, get_config, arguments)
        config = get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(path, file, error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={path}: get_config() of {file} returns {_kind(config)}, and must return a ml_collections.ConfigDict"
        )
    return config


def _kind(value) -> str:
    return "None (is its return statement missing?)" if value is None else f"a {type(value).__name__}"


def _check_argument(path: str, get_config: Callable, arguments: Sequence[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        file = path.partition(":")[0]
        if arguments:
            raise UserError(f"--config={path}: {file} takes no argument; use --config={file}") from None
        raise UserError(f"--config={path}: {file} needs an argument: --config={file}:ARGUMENT") from None


def _explain(path: str, file: str, error: Exception) -> str:
    """What was raised while a config file was read, and at which of its lines."""
    if any(pathlib.Path(file).resolve() == wrapper for wrapper in _WRAPPERS):
        return str(error) or type(error).__name__
    if (
        isinstance(error, SyntaxError)
        and error.filename
        and pathlib.Path(error.filename).name == pathlib.Path(file).name
    ):
        text = (error.text or "").strip()
        return f"--config={path}: line {error.lineno} of {file} is no valid Python ({error.msg}): {text}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"line {lines[-1]} of {file}" if lines else file
    if isinstance(error, ImportError):
        return f"--config={path}: {where} cannot import what it needs ({error}); install it, or mend the import"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text if len(text) < 300 else f"{text[:150]} ... {text[-100:]}"  # some list a whole config
    return f"--config={path}: {where} raises {type(error).__name__}: {text}"


def unknown_key(config: ConfigDict, arguments: Sequence[str]) -> str | None:
    """What is wrong with the first override whose key the config does not have; None where there is none."""
    known = flatten(to_dict(config))
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            continue
        key = argument.lstrip("-").split("=")[0].removeprefix("config.")
        leaves = [leaf for leaf in known if leaf.startswith(f"{key}.")]
        if leaves:
            return f"config.{key} is a group; give one of its leaves, such as --config.{leaves[0]}=VALUE"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            return f"unknown config key config.{key}; did you mean config.{near[0]}?"
    return None


def check_none(config: ConfigDict, defaults: Mapping) -> None:
    """Raises: UserError for a leaf that is None where only values are allowed, those whose default is one."""
    usual = flatten(defaults)
    for leaf, value in flatten(config.to_dict()).items():
        if value is None and usual.get(leaf) is not None:
            raise UserError(f"{leaf}=None must be of type {type(usual[leaf]).__name__}, such as {usual[leaf]!r}")

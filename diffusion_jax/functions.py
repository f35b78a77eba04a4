"""Imports the functions that settings name: "module:function" or "FILE.py:function"."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from diffusion_jax.errors import describe_exception, user_files


def import_function(name: str) -> Callable:
    """Imports the function "module:function", also from the current directory, or "FILE.py:function". Raises: ValueError.

    The current directory may be a stranger's, so it is searched only for a module that is not installed. FILE.py may import
    modules of its own directory.
    """
    module_name, _, function_name = name.rpartition(":")
    is_file = module_name.endswith(".py")
    folder = os.path.dirname(os.path.realpath(module_name)) if is_file else os.getcwd()
    try:
        if folder not in sys.path and (is_file or find_spec(module_name.partition(".")[0]) is None):
            sys.path.append(folder)
        module = _import_file(module_name) if is_file else importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # the code of a module may raise any error
        raise ValueError(f"cannot be imported ({describe_exception(error)})") from error
    user_files.add(str(module.__file__))
    if not callable(function):
        raise ValueError(f"must be a function, not a {type(function).__name__}")
    return function


def find_function(name: str, setting: str, registry: Mapping[str, Any] | None = None) -> Any:
    """Imports the function that a setting names, or returns the registry's entry for a name without a colon.

    Raises: ValueError.
    """
    if registry is not None and ":" not in name:
        return registry[name]
    try:
        return import_function(name)
    except ValueError as error:
        raise ValueError(f"{setting}={name} {error}") from error


def _import_file(path: str) -> types.ModuleType:
    """Imports a Python file, once in each process.

    Runs the source text, which a user reads before trusting the file. A compiled __pycache__ copy may differ from the text.
    """
    path = os.path.realpath(path)
    if path not in sys.modules:
        module = sys.modules[path] = types.ModuleType(path)  # added first, because dataclasses look up their module
        module.__file__ = path
        try:
            exec(compile(pathlib.Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
        except BaseException:
            del sys.modules[path]
            raise
    return sys.modules[path]

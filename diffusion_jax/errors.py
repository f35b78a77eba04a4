"""Errors that end a program with one line and an exit code. Imports nothing else from this package."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiffusionJaxError",
    "LeaseLostError",
    "PretrainedError",
    "SaveError",
    "StorageError",
    "UnreadableFilesError",
    "UserError",
    "as_user_error",
    "closest_names",
    "list_differences",
    "list_names",
    "shorten",
]


class DiffusionJaxError(Exception):
    """The base class of this package's errors, whose message is one line: the problem, the allowed values, what to type.

    `exit_code`: 2 for bad input, 1 for a failed run.
    """

    exit_code = 2


class UserError(DiffusionJaxError):
    """An invalid config, command line or work directory."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError, ValueError):
    """A config with an unknown setting or an invalid value."""


class StorageError(UserError):
    """An unusable object store: wrong URL, missing package, no credentials, no such bucket, or no permission."""


class LeaseLostError(UserError):
    """Another launch took over the work directory in an object store, so this launch must stop writing there."""


class DataError(DiffusionJaxError):
    """Missing data, data that cannot be read, or data of the wrong kind."""


class UnreadableFilesError(DataError):
    """Files that cannot be read. failures: (path, reason) for each file."""

    _SHOWN = 5

    def __init__(self, failures: Iterable[tuple[str, str]]):
        self.failures = sorted(failures)
        count, hidden = len(self.failures), len(self.failures) - self._SHOWN
        shown = "; ".join(f"{path}: {reason}" for path, reason in self.failures[: self._SHOWN])
        more = f"; and {hidden:,} more" if hidden > 0 else ""
        if count == 1:
            super().__init__(f"cannot read the image {shown}; repair or remove it")
        else:
            super().__init__(f"cannot read {count:,} images: {shown}{more}; repair or remove them")

    def __reduce__(self):
        return UnreadableFilesError, (self.failures,)  # data workers pickle this error for the main process


class PretrainedError(DiffusionJaxError):
    """Weights that cannot be loaded or saved."""


class CheckpointError(DiffusionJaxError):
    """A checkpoint that cannot be read."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written, usually because the disk is full. Earlier checkpoints are kept."""

    exit_code = 1


def closest_names(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """Returns up to `count` names, most similar to `name` first."""
    names = list(names)
    # Two swapped letters: for difflib, "ddmi" is as similar to ddpm as to ddim.
    swapped = [known for known in names if sorted(known) == sorted(name)]
    near = difflib.get_close_matches(name, names, count)
    return [*swapped, *(known for known in near if known not in swapped)][:count]


def list_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns a phrase such as "prediction: 'eps' there, 'v' here" for each name with different values."""
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return [f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names]


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """Lists the first `limit` names, and the number of further names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shorten(text: str, limit: int) -> str:
    """Returns the text, cut and ended by "..." if it has more than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turns errors from a wrong value while a config is built into a UserError whose message starts with `where`."""
    try:
        yield
    except DiffusionJaxError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UserError(f"{where}: {error}") from error

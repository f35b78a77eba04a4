"""Errors that end a program with one line and an exit code. Imports nothing else from this package."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

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
    "list_names",
    "shorten",
]


class DiffusionJaxError(Exception):
    """The base of this package's errors: the message is one line: the problem, the allowed values, and what to type.

    `exit_code`: 2 for bad input, 1 for a run that failed.
    """

    exit_code = 2


class UserError(DiffusionJaxError):
    """A config, a command line or a work directory that cannot be used."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError, ValueError):
    """A config with an unknown setting, or with a value that its setting does not allow."""


class StorageError(UserError):
    """An object store that cannot be used: wrong URL, missing package, no credentials, no such bucket, or no permission."""


class LeaseLostError(UserError):
    """Another launch has taken over the work directory in an object store, so this one must not write there any more."""


class DataError(DiffusionJaxError):
    """Data that is missing, unreadable or of the wrong kind."""


class UnreadableFilesError(DataError):
    """Files that cannot be read. failures: (path, reason) of each."""

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
        return UnreadableFilesError, (self.failures,)  # data workers send it to the main process


class PretrainedError(DiffusionJaxError):
    """Weights that cannot be loaded or saved."""


class CheckpointError(DiffusionJaxError):
    """A checkpoint that cannot be read."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written, usually because the disk is full. Earlier checkpoints are kept."""

    exit_code = 1


def closest_names(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """Returns up to `count` names, the most similar to `name` first."""
    names = list(names)
    # Two swapped letters: for difflib, "ddmi" is as similar to ddpm as to ddim.
    swapped = [known for known in names if sorted(known) == sorted(name)]
    near = difflib.get_close_matches(name, names, count)
    return [*swapped, *(known for known in near if known not in swapped)][:count]


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shorten(text: str, limit: int) -> str:
    """The text, or its beginning and "..." if it has more than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turns the errors that a wrong value raises while a config is built into a UserError that starts with `where`."""
    try:
        yield
    except DiffusionJaxError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UserError(f"{where}: {error}") from error

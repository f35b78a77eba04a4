"""Errors that end a program with one line and an exit code, and printed texts. Imports nothing else from this package."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import textwrap
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np

# Files with the functions that settings name; `functions.import_function` adds each file.
user_files: set[str] = set()
_LIBRARIES = ("<", os.path.dirname(__file__) + os.sep, os.path.dirname(os.__file__) + os.sep)
# Control characters, line separators, characters that change the direction of text, and bytes that are not UTF-8.
_NOT_SHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class DiffusionJaxError(Exception):
    """The base class of this package's errors, whose message is one line: the problem, the allowed values, what to type.

    `exit_code`: 2 for bad input, 1 for a failed run.
    """

    exit_code = 2

    def __str__(self) -> str:
        return visible(super().__str__(), "\n\t")


class UserError(DiffusionJaxError):
    """An invalid config, command line or work directory."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError, ValueError):
    """A config with an unknown setting or an invalid value."""


class StorageError(UserError):
    """An unusable bucket or Hub repository: wrong URL, missing package, no permission; or a disk that is too small."""


class LeaseLostError(UserError):
    """Another launch took over a bucket's work directory, or a local directory was moved: this launch must stop writing."""


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
    # Names with swapped letters come first, because for difflib "ddmi" is as similar to ddpm as to ddim.
    swapped = [known for known in names if sorted(known) == sorted(name)]
    near = difflib.get_close_matches(name, names, count)
    return [*swapped, *(known for known in near if known not in swapped)][:count]


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text, at most 200 characters; the type's name if the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def list_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns a phrase such as "prediction: 'eps' there, 'v' here" for each name with different values."""
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return [f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names]


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """Lists the first `limit` names, and the number of further names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def visible(text: str, keep: str = "") -> str:
    """Returns the text with visible escapes for characters that control a terminal. keep: characters that are not escaped."""
    return _NOT_SHOWN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def print_text(text: str, file: TextIO | None = None, lines: bool = False) -> None:
    """Prints one line, which may contain a stranger's names, or several `lines`. No other function of the package prints."""
    print(visible(text, "\n\t" if lines else ""), file=file, flush=True)


def shorten(text: str, limit: int) -> str:
    """Returns the text, with "..." in place of its end if it has more than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shorten_middle(text: str, limit: int) -> str:
    """Returns the text, with "..." in place of its middle if it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - limit // 2 - 3]}...{text[-(limit // 2) :]}"


def wrap(text: str, width: int) -> str:
    """Wraps each line at spaces. Continuation lines start at the column after the line's first gap of two or more spaces."""

    def wrap_line(line: str) -> str:
        found = re.match(r" *\S.*? {2,}| *", line)
        indent = " " * min(len(found[0]) if found else 0, width // 2)
        return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return "\n".join(map(wrap_line, text.splitlines()))


def require_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError for a name that is not known. what: the noun in the message, such as "variance"."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def require_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False, whole: bool = False
) -> None:
    """Raises: ValueError for a value outside [low, high]. above: excludes low itself. whole: allows only whole numbers."""
    is_kind = not whole or (isinstance(value, int | np.integer) and not isinstance(value, bool))
    if is_kind and (low < value if above else low <= value) and value <= high and value < math.inf:
        return
    limits = f"in {'(' if above else '['}{low:g}, {high:g}]"
    if high == math.inf:
        limits = f"{'above' if above else 'of at least'} {low:g}"
    raise ValueError(f"{name} must be a {'whole ' * whole}number {limits}, got {value!r}")


def find_user_frame(error: BaseException) -> tuple[types.CodeType, int] | None:
    """Returns the code and the line where a user's function raised an exception; None if no user code was running.

    The result is the innermost call in a file of `user_files`; without such a call, the innermost call in a file that
    belongs neither to this package nor to Python and its installed packages.
    """
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, is_named = frame.f_code.co_filename, found is not None and found[0].co_filename in user_files
        is_library = file.startswith(_LIBRARIES) or "site-packages" in file or "dist-packages" in file
        if file in user_files or not (is_named or is_library):
            found = frame.f_code, line
    return found


def describe_exception(error: BaseException, with_type: bool = False) -> str:
    """Returns an exception's text; if a user's function raised it, function, line, file and type come before the text.

    with_type: puts the type before the text of other exceptions, too.
    """
    typed = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if (frame := find_user_frame(error)) is None:
        return typed if with_type else str(error)
    code, line = frame
    return f"{code.co_qualname}, line {line} of {code.co_filename}, raises {typed}"


@contextlib.contextmanager
def needs_extra(what: str, extra: str, kind: type[DiffusionJaxError] = UserError) -> Iterator[None]:
    """Turns an ImportError in the block into an error of type `kind` that names the extra to install.

    what: the start of the message, such as "gs:// needs gcsfs". extra: the extra's name in pyproject.toml.
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{what} ({error}): pip install '.[{extra}]'") from error


@contextlib.contextmanager
def as_user_error(where: str, *also: type[Exception]) -> Iterator[None]:
    """Turns errors from a wrong value into a UserError whose message starts with `where`.

    also: further types to turn into UserError, such as OSError; this package's own errors stay unchanged unless listed.
    """
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, LookupError, *also) as error:
        if isinstance(error, DiffusionJaxError) and not isinstance(error, also):
            raise
        raise UserError(f"{where}: {describe_exception(error)}") from error

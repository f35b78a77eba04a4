"""SHA-256 of a checkpoint's files: written before the checkpoint is committed, compared before it is read.

Orbax itself restores a flipped bit as another number and says nothing. The table names every file of a step's directory but
itself and the two that Orbax writes while it commits, which hold no numbers:

    {"<item>/<file>": [bytes, "<hexadecimal SHA-256>"], ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

NAME = "digests.json"
COMMITTED = "_CHECKPOINT_METADATA"
_NOT_LISTED = {NAME, COMMITTED, "commit_success.txt"}


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a committed checkpoint below `directory`, oldest first; Orbax itself would count an empty `7/` as one."""
    found = directory.glob(f"*/{COMMITTED}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())


def _digest(path: pathlib.Path) -> list:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def write(directory: pathlib.Path) -> None:
    """Writes the table of all files below `directory` into it, down to the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    table = {name: _digest(path) for name, path in names.items() if name not in _NOT_LISTED}
    with (directory / NAME).open("w") as file:
        json.dump(table, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(directory: pathlib.Path, items: Iterable[str]) -> str | None:
    """What is wrong with the files of `items` in a step's directory: a phrase that names the first such file; None where
    nothing is. Raises: FileNotFoundError where the step was committed before there were digests.
    """
    try:
        marked = NAME in json.loads((directory / COMMITTED).read_bytes())["custom_metadata"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{COMMITTED} cannot be read: {type(error).__name__}"
    if not (directory / NAME).exists():
        if marked:
            return f"{NAME} is missing"
        raise FileNotFoundError(f"{directory / NAME}")
    try:
        table = json.loads((directory / NAME).read_bytes())
        listed = {name: (size, digest) for name, (size, digest) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{NAME} cannot be read: {type(error).__name__}"
    for item in items:
        names = [name for name in listed if name.startswith(f"{item}/")]
        if not names:
            return f"{NAME} lists no files of {item}"
        for name in names:
            path, (size, digest) = directory / name, listed[name]
            try:
                found = _digest(path)
            except OSError as error:
                return f"{name} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
            if found[0] != size:
                return f"{name} has {found[0]} bytes, not {size}"
            if found[1] != digest:
                return f"{name} was changed: its SHA-256 is not the one that was stored"
    return None

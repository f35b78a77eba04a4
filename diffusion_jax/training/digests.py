"""SHA-256 of a checkpoint's files: written before the checkpoint is committed, compared before it is read.

Orbax itself restores a flipped bit as another number, without an error. The table lists every file of a step's directory
except itself and the two that Orbax writes during the commit, which hold no numbers:

    {"<item>/<file>": [bytes, "<hexadecimal SHA-256>"], ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

from diffusion_jax.storage.locations import find_mirror
from diffusion_jax.storage.mirror import COMMITTED
from diffusion_jax.storage.mirror import MANIFEST as NAME

__all__ = ["COMMITTED", "NAME", "committed_steps", "find_corruption", "local_steps", "write"]

_NOT_LISTED = {NAME, COMMITTED, "commit_success.txt"}


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a committed checkpoint, in increasing order; in a mirror, those that are committed in the bucket."""
    mirror = find_mirror(directory)
    steps = local_steps(directory)
    return [step for step in steps if step in mirror.known_steps] if mirror else steps


def local_steps(directory: pathlib.Path) -> list[int]:
    """Steps that Orbax has committed in a local directory, in increasing order; Orbax would count an empty `7/`, too."""
    paths = directory.glob(f"*/{COMMITTED}")
    return sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())


def _digest(path: pathlib.Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: pathlib.Path) -> None:
    """Writes the table of all files in `directory` into it, and syncs it to the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    table = {name: _digest(path) for name, path in names.items() if name not in _NOT_LISTED}
    with (directory / NAME).open("w") as file:
        json.dump(table, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(directory: pathlib.Path, items: Iterable[str]) -> str | None:
    """The first corrupted file of `items` in a step's directory and its fault, as a phrase; None if all files are intact.

    Raises: FileNotFoundError for a step that was saved without digests, by an earlier version.
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
            expected_size, expected_digest = listed[name]
            try:
                size, digest = _digest(directory / name)
            except OSError as error:
                return f"{name} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
            if size != expected_size:
                return f"{name} has {size} bytes, not {expected_size}"
            if digest != expected_digest:
                return f"{name} was changed: its SHA-256 differs from the stored one"
    return None

"""SHA-256 of a checkpoint's files: written before the checkpoint is committed, compared before it is read.

Orbax itself restores a flipped bit as another number, without an error. The table lists every file of a step's directory
except itself:

    {"<item>/<file>": [bytes, "<hexadecimal SHA-256>"], ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

from diffusion_jax.storage.locations import MANIFEST as NAME
from diffusion_jax.storage.locations import find_mirror

__all__ = ["NAME", "Table", "committed_steps", "compute", "find_corruption", "write"]

Table = dict[str, tuple[int, str]]  # {file: (bytes, SHA-256)}


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a committed checkpoint, in increasing order; in a mirror, those that are committed in the bucket."""
    paths = directory.glob(f"*/{NAME}")
    steps = sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())
    mirror = find_mirror(directory)
    return [step for step in steps if step in mirror.known_steps] if mirror else steps


def _digest(path: pathlib.Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def compute(directory: pathlib.Path) -> Table:
    """The table of all files in `directory`."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): _digest(path) for path in files}


def write(directory: pathlib.Path, table: Table) -> None:
    """Writes the table of the files in `directory` into it, and syncs it to the disk."""
    with (directory / NAME).open("w") as file:
        json.dump(dict(sorted(table.items())), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(directory: pathlib.Path, items: Iterable[str]) -> str | None:
    """The first corrupted file of `items` and its fault, as a phrase; None if their files are intact."""
    try:
        table = json.loads((directory / NAME).read_bytes())
        listed = {name: (size, digest) for name, (size, digest) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{NAME} cannot be read: {type(error).__name__}"
    items = set(items)
    missing = sorted(items - {name.split("/")[0] for name in listed})
    if missing:
        return f"{NAME} lists no files of {missing[0]}"
    for name, (expected_size, expected_digest) in listed.items():
        if "/" in name and name.split("/")[0] not in items:
            continue
        try:
            size, digest = _digest(directory / name)
        except OSError as error:
            return f"{name} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
        if size != expected_size:
            return f"{name} has {size} bytes, not {expected_size}"
        if digest != expected_digest:
            return f"{name} was changed: its SHA-256 differs from the stored one"
    return None

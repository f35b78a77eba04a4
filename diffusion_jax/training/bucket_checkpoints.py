"""Checkpoints of a work directory in a bucket: written in its mirror, then uploaded, the manifest last.

A step exists when its manifest does, the digests of its other files. So a launch that is killed at any object leaves either
the step or objects that no reader counts, which the next launch deletes. Every function but `commit` does nothing for a
directory that is only local.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence

import jax

from diffusion_jax.storage.locations import find_mirror
from diffusion_jax.storage.mirror import Mirror
from diffusion_jax.training import digests

__all__ = ["check_lease", "commit", "delete_step", "fetch_items", "remove_uncommitted", "upload_part"]


def fetch_items(directory: pathlib.Path, step: int, items: Iterable[str]) -> None:
    """Downloads the files of some items of a step that are not here yet. Raises: OSError."""
    mirror = find_mirror(directory)
    if mirror is None:
        return
    for item in items:
        path = directory / str(step) / item
        if not path.exists():
            mirror.fetch_directory(path)


def upload_part(part: pathlib.Path, table: digests.Table, directory: pathlib.Path) -> None:
    """Uploads the files of this process of a step, which do not make it exist.

    A launch that was suspended in an upload overwrites nothing when it goes on, if another launch has taken over the bucket.
    Raises: OSError, LeaseLostError.
    """
    mirror = find_mirror(directory)
    if mirror:
        names: dict[str | os.PathLike, str] = {part / name: f"{mirror.name_of(directory)}/{name}" for name in table}
        mirror.store.upload_all(names, before_overwriting=mirror.before_commit)
        if jax.process_index() > 0:
            shutil.rmtree(part, ignore_errors=True)  # without files there is none


def check_lease(directory: pathlib.Path) -> None:
    """Raises: LeaseLostError if another launch has taken over the bucket."""
    mirror = find_mirror(directory)
    if mirror:
        mirror.before_commit()


def commit(part: pathlib.Path, tables: Sequence[digests.Table], directory: pathlib.Path) -> None:
    """Uploads the manifest of a step, whose other files are uploaded, and keeps its small files in the mirror.

    part: of process 0. Raises: OSError; LeaseLostError if another launch has taken over the bucket.
    """
    mirror = find_mirror(directory)
    assert mirror
    name, table = mirror.name_of(directory), digests.join(tables)
    digests.write(part, table)
    mirror.before_commit()
    known = {f"{name}/{file}" for file in table}
    mirror.store.delete(mirror.store.list(f"{name}/").keys() - known)  # of a failed save of the same step
    mirror.store.upload(part / digests.NAME, f"{name}/{digests.NAME}")
    mirror.known_steps.add(int(directory.name))
    for path in filter(pathlib.Path.is_dir, part.iterdir()):
        shutil.rmtree(path)
    part.rename(directory)


def delete_step(directory: pathlib.Path) -> None:
    """Deletes the objects of a step, the manifest first."""
    mirror = find_mirror(directory)
    if mirror:
        _delete_step(mirror, mirror.name_of(directory))


def remove_uncommitted(directory: pathlib.Path) -> None:
    """Deletes the objects of steps without a manifest. Only the holder of the lease may call this."""
    mirror = find_mirror(directory)
    if mirror is None:
        return
    prefix = f"{mirror.name_of(directory)}/"
    steps = {name.removeprefix(prefix).split("/")[0] for name in mirror.store.list(prefix)}
    for step in filter(str.isdecimal, steps):
        if mirror.store.find(f"{prefix}{step}/{digests.NAME}") is None:
            _delete_step(mirror, f"{prefix}{step}")


def _delete_step(mirror: Mirror, name: str) -> None:
    mirror.store.delete([f"{name}/{digests.NAME}"])
    mirror.store.delete(mirror.store.list(f"{name}/"))

"""Checkpoints of a work directory in a bucket: written in its mirror, then uploaded, the manifest last.

A step exists when its manifest does, the digests of its other files. So a launch that is killed at any object leaves either
the step or objects that no reader counts, which the next launch deletes. Every function does nothing for a local directory.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from diffusion_jax.storage.locations import find_mirror
from diffusion_jax.storage.mirror import MANIFEST, Mirror
from diffusion_jax.training.digests import local_steps

__all__ = ["fetch_items", "publish", "remove_uncommitted"]


def fetch_items(directory: pathlib.Path, step: int, items: Iterable[str]) -> None:
    """Downloads the files of some items of a step that are not here yet. Raises: OSError."""
    mirror = find_mirror(directory)
    if mirror is None:
        return
    for item in items:
        path = directory / str(step) / item
        if not path.exists():
            mirror.fetch_directory(path)


def publish(directory: pathlib.Path, step: int) -> None:
    """Uploads a step and then its manifest; then deletes the steps that the local directory has no more.

    Raises: OSError; LeaseLostError if another launch has taken over the bucket.
    """
    mirror = find_mirror(directory)
    if mirror is None:
        return
    path = directory / str(step)
    manifest, name = path / MANIFEST, mirror.name_of(path / MANIFEST)
    files: dict[str | os.PathLike, str] = {
        file: mirror.name_of(file) for file in path.rglob("*") if file.is_file() and file != manifest
    }
    mirror.store.delete([name])  # of the same step, saved before an earlier one was restored
    mirror.store.upload_all(files)
    mirror.before_commit()
    mirror.store.delete(mirror.store.list(f"{mirror.name_of(path)}/").keys() - files.values())  # of a failed upload
    mirror.store.upload(manifest, name)
    mirror.known_steps.add(step)
    dropped = mirror.known_steps - set(local_steps(directory))
    for old in dropped:  # by Orbax; steps that this launch has never seen stay
        _delete_step(mirror, mirror.name_of(directory / str(old)))
    mirror.known_steps -= dropped


def remove_uncommitted(directory: pathlib.Path) -> None:
    """Deletes the objects of steps without a manifest. Only the holder of the lease may call this."""
    mirror = find_mirror(directory)
    if mirror is None:
        return
    prefix = f"{mirror.name_of(directory)}/"
    steps = {name.removeprefix(prefix).split("/")[0] for name in mirror.store.list(prefix)}
    for step in filter(str.isdecimal, steps):
        if mirror.store.find(f"{prefix}{step}/{MANIFEST}") is None:
            _delete_step(mirror, f"{prefix}{step}")


def _delete_step(mirror: Mirror, name: str) -> None:
    mirror.store.delete([f"{name}/{MANIFEST}"])
    mirror.store.delete(mirror.store.list(f"{name}/"))

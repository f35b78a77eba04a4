"""Work directories in buckets, opened as local mirrors that are removed when the process ends."""

from __future__ import annotations

import atexit
import getpass
import os
import pathlib
import shutil
import tempfile
from typing import IO

from diffusion_jax.distributed.file_lock import try_lock
from diffusion_jax.errors import StorageError
from diffusion_jax.storage.locations import add_mirror
from diffusion_jax.storage.mirror import Mirror
from diffusion_jax.storage.objects import open_store

__all__ = ["mirror_workdir"]

_LOCKS: dict[pathlib.Path, IO] = {}  # of the directories of this process


def mirror_workdir(url: str, with_samples: bool = True, read_only: bool = False) -> pathlib.Path:
    """A new local mirror of a work directory in a bucket, which need not exist yet; removed when the process ends.

    Raises: StorageError if the bucket cannot be used, OSError.
    """
    store = open_store(url, write=not read_only)
    mirror = Mirror(_temporary_directory(), store, with_samples, read_only)
    mirror.refresh()
    add_mirror(mirror)
    return mirror.root


def _temporary_directory() -> pathlib.Path:
    """A directory that is removed at exit; those of processes that were killed are removed now."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    parent = pathlib.Path(tempfile.gettempdir()) / f"diffusion_jax_{user}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and parent.stat().st_uid != os.getuid():
        raise StorageError(f"{parent} belongs to another user; set TMPDIR to a directory of your own")
    for path in set(parent.glob("*.lock")) - _LOCKS.keys():  # opening one's own would release its lock
        lock = try_lock(path)
        if lock:
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
            lock.close()
    while True:
        directory = pathlib.Path(tempfile.mkdtemp(dir=parent))
        lock = try_lock(directory.with_suffix(".lock"))
        if lock and directory.exists():  # otherwise another process has just removed it
            break
    _LOCKS[directory.with_suffix(".lock")] = lock
    atexit.register(_remove, directory)
    return directory


def _remove(directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.with_suffix(".lock").unlink(missing_ok=True)

"""Local copies of data and weights in buckets: files and folders in the user's cache, work directories in a mirror."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil

from diffusion_jax.errors import StorageError, UserError
from diffusion_jax.files import user_cache, write_text
from diffusion_jax.storage.locations import add_url, find_mirror, is_safe, mirror_workdir
from diffusion_jax.storage.objects import ObjectInfo, ObjectStore, is_url, open_store

__all__ = ["local_path"]

_FILES_AT_ONCE = 256
_WORKDIRS: dict[str, pathlib.Path] = {}  # read-only mirrors by URL


def local_path(location: str | os.PathLike, below: str = "") -> pathlib.Path:
    """The local path of what a person named: a path as it is, with "~" expanded, or a copy of what a URL names.

    Files that have not changed since the last call are not downloaded again. below: only the part of a folder whose names
    begin with this is needed. The path of a URL that names nothing does not exist. Raises: StorageError, OSError; UserError
    if the disk is too small.
    """
    text = os.fspath(location)
    if not is_url(text):
        return pathlib.Path(text).expanduser()
    parent, _, name = text.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise StorageError(f"{text} is a whole bucket; name a folder or a file in it")
    store = open_store(parent)
    if store.find(f"{name}/config.json"):
        if text not in _WORKDIRS:
            _WORKDIRS[text] = mirror_workdir(f"{parent}/{name}", read_only=True)
        elif mirror := find_mirror(_WORKDIRS[text]):
            mirror.refresh()
        return _WORKDIRS[text]
    info = store.find(name)
    found = {name: info} if info else store.list(f"{name}/{below}")
    return _download(store, name, below, {key: info for key, info in found.items() if is_safe(key) and key[-1] != "/"})


def _download(store: ObjectStore, name: str, below: str, found: dict[str, ObjectInfo]) -> pathlib.Path:
    """Downloads what has changed into the user's cache, and removes what has been deleted in the bucket."""
    import filelock  # not installed with the core

    root = user_cache() / "downloads" / hashlib.sha256(f"{store.url}/{name}".encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    add_url(root, store.url)
    with filelock.FileLock(root / ".lock"):  # waits for other processes of this machine
        tags: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            tags = json.loads((root / ".tags").read_text())
        for key in [key for key in tags if key.startswith(f"{name}/{below}") and key not in found]:
            (root / key).unlink(missing_ok=True)
            del tags[key]
        missing = [key for key, info in found.items() if tags.get(key) != info.tag or not (root / key).is_file()]
        size, free = sum(found[key].size for key in missing), shutil.disk_usage(root).free
        if size > free:
            raise UserError(
                f"{store.url}/{name} has {size / 1e9:.1f} GB, and {root} has {free / 1e9:.1f} GB left; set XDG_CACHE_HOME to "
                "a directory of a larger disk, or mount the bucket"
            )
        if missing:
            print(f"Downloading {store.url}/{name}: {len(missing):,} files, {size / 1e6:,.1f} MB ...", flush=True)
        for start in range(0, len(missing), _FILES_AT_ONCE):  # after an interruption the finished ones are not repeated
            names = missing[start : start + _FILES_AT_ONCE]
            for key in names:
                (root / key).parent.mkdir(parents=True, exist_ok=True)
            store.download_all({key: root / key for key in names})
            tags |= {key: found[key].tag for key in names}
            write_text(root / ".tags", json.dumps(tags))
    return root / name

"""Local copies of bucket objects, which are downloaded once, and again when the objects change."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping

from diffusion_jax.errors import StorageError, print_text
from diffusion_jax.files import downloads_root, require_space, user_cache, write_text
from diffusion_jax.storage.hub import download, is_hub
from diffusion_jax.storage.objects import PROBE, ObjectInfo, ObjectStore, is_url, open_store

MANIFEST = "digests.json"
EVENTS = "events.out.tfevents."
LOCK = ".lock"
_FILES_AT_ONCE = 256
_ATTEMPTS = 5
_ANNOUNCED_BYTES = 1e6
_MIN_SECONDS = 60.0  # how long an unused copy is kept, because another process may be about to open it
_LOCKS, _LARGER_DISK = "locks", "set XDG_CACHE_HOME to a directory on a larger disk"

Objects = Mapping[str, ObjectInfo]


def local_path(location: str | os.PathLike, below: str = "", suffixes: tuple[str, ...] = ("",)) -> pathlib.Path:
    """Returns a local path: `location` with "~" expanded, or for a URL, the path of a downloaded copy.

    Files that have not changed since the last call are not downloaded again. From a work directory, only samples and the
    objects that `is_small` selects are downloaded. hf:// names weights on the Hugging Face Hub (`hub.download`). below,
    suffixes: only objects whose names in the folder begin with `below` and end with a suffix are needed; both
    arguments are ignored for hf://. If the URL names no object, the returned path does not exist.
    Raises: StorageError, OSError; UserError if the disk is too small.
    """
    text = os.fspath(location)
    if is_hub(text):
        return download(text).path
    if not is_url(text):
        return pathlib.Path(text).expanduser()
    parent, _, name = text.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise StorageError(f"{text} is a whole bucket; name a folder or a file in it")

    def is_needed(key: str, found: Objects) -> bool:
        of_run = "config.json" not in found or key.startswith("samples/") or is_small(key, found)
        return of_run and key.endswith(suffixes)

    store, root = open_store(parent), downloads_root()
    if store.find(name):
        copy_objects(store, root, name, lambda key, _: key == name)
    else:
        copy_objects(store.folder(name), root, below, is_needed)
    return copy_path(root, f"{parent}/{name}")


def copy_path(root: pathlib.Path, url: str) -> pathlib.Path:
    """Returns the path below `root` of a URL's copy; `files.with_urls` converts the path back to the URL."""
    return root / url.replace("://", "/", 1)


def is_small(name: str, found: Objects) -> bool:
    """Returns whether an object in a work directory is copied at once, instead of when it is read.

    Samples and single images are not copied at once. From checkpoints, only the manifest, Orbax metadata, config.json and
    data.json of each committed step are copied, so that the steps are known. TensorBoard events and traces (plugins/) are
    never read again.
    found: all objects in the work directory.
    """
    first, *others = parts = pathlib.PurePosixPath(name).parts
    if first in ("samples", "images", "plugins") or parts[-1].startswith((EVENTS, LOCK, PROBE)):
        return False
    return first != "checkpoints" or (len(others) == 2 and f"{first}/{others[0]}/{MANIFEST}" in found)


def copy_objects(
    store: ObjectStore,
    root: pathlib.Path,
    prefix: str = "",
    is_needed: Callable[[str, Objects], bool] = lambda name, found: True,
) -> None:
    """Downloads objects that have changed since the last call, and removes the copies of deleted objects.

    An object is copied to `copy_path(root, URL)`; a file for each store, below `root`, has the tags of the copies.
    prefix: only objects whose names start with this prefix are listed. is_needed: (name, listed objects) -> bool.
    Raises: OSError; UserError if the disk is too small.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _copy_objects(store, root, prefix, is_needed)
        except FileNotFoundError:  # deleted after it was listed
            if attempt + 1 == _ATTEMPTS:
                raise


def _copy_objects(store: ObjectStore, root: pathlib.Path, prefix: str, is_needed: Callable[[str, Objects], bool]):
    import filelock  # not installed with the core

    root.mkdir(parents=True, exist_ok=True)
    directory, stem = copy_path(root, store.url), f".{hashlib.sha256(store.url.encode()).hexdigest()[:16]}"
    with filelock.FileLock(root / f"{stem}.lock", fallback_to_soft=False):  # waits for other processes of this machine
        tags: dict[str, str] = {}  # {URL: tag}
        with contextlib.suppress(OSError, ValueError):
            tags = json.loads((root / f"{stem}.json").read_text())
        listed, url = store.list(prefix), f"{store.url}/{prefix}"
        urls = {name: f"{store.url}/{name}" for name in listed}
        deleted = {key for key in tags.keys() - set(urls.values()) if key.startswith(url)}
        for path in [copy_path(root, key) for key in deleted]:
            path.unlink(missing_ok=True)
            with contextlib.suppress(
                OSError
            ):  # a directory that is not empty; empty directories would count as splits or classes
                for parent in itertools.takewhile(lambda parent: parent != directory, path.parents):
                    parent.rmdir()
        tags = {key: tag for key, tag in tags.items() if key not in deleted}
        needed = {name: info for name, info in listed.items() if is_safe(name) and is_needed(name, listed)}
        missing = [
            name for name in needed if tags.get(urls[name]) != needed[name].tag or not (directory / name).is_file()
        ]
        size = sum(needed[name].size for name in missing)
        advice = f"{_LARGER_DISK}, reduce data.disk_mb for a data set in array_record format, or mount the bucket"
        require_space(root, url, size, advice)
        if size > _ANNOUNCED_BYTES:
            print_text(f"Downloading {url}: {len(missing):,} files, {size / 1e6:,.1f} MB ...")
        # After an interruption, finished groups are not repeated. Without files, one empty group records the deletions.
        for first in range(0, max(len(missing), bool(deleted)), _FILES_AT_ONCE):
            names = missing[first : first + _FILES_AT_ONCE]
            store.download_all({name: directory / name for name in names})
            for name in names:
                os.utime(directory / name, (needed[name].modified, needed[name].modified))
            tags |= {urls[name]: needed[name].tag for name in names}
            write_text(root / f"{stem}.json", json.dumps(tags))


def cached_files(store: ObjectStore, objects: Objects, max_bytes: float) -> list[pathlib.Path]:
    """Returns the paths of objects' local copies, which are downloaded if they are missing.

    Before a download, the least recently used copies, from all calls on this machine, are deleted until at most max_bytes
    will be stored and the disk has room. Copies used in the last minute are kept. objects: a part of `store.list()`.
    Raises: OSError; UserError if the disk is too small; StorageError for an object that changed after it was listed.
    """
    import filelock  # not installed with the core

    root = user_cache() / "objects"
    keys = {name: f"{store.url}/{name} {info.tag}".encode() for name, info in objects.items()}
    paths = {name: root / hashlib.sha256(key).hexdigest() for name, key in keys.items()}
    (root / _LOCKS).mkdir(parents=True, exist_ok=True)
    # Another process may delete a copy during a download.
    while missing := [name for name in objects if not _touch(paths[name])]:
        with contextlib.ExitStack() as locks:  # other processes of this machine wait for the same download
            for name in sorted(missing, key=paths.__getitem__):
                locks.enter_context(filelock.FileLock(root / _LOCKS / paths[name].name, fallback_to_soft=False))
            missing = [name for name in missing if not _touch(paths[name])]
            _make_room(root, sum(objects[name].size for name in missing), max_bytes)
            store.download_all({name: paths[name] for name in missing})
            for name in missing:
                if getattr(store.find(name), "tag", "") != objects[name].tag:
                    paths[name].unlink(missing_ok=True)
                    raise StorageError(f"{store.url}/{name} changed while it was in use; rerun the same command")
    return list(paths.values())


def _touch(path: pathlib.Path) -> bool:
    """Marks a copy as used now; returns whether the copy exists."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _make_room(root: pathlib.Path, size: int, max_bytes: float) -> None:
    """Deletes the least recently used copies to make room for `size` bytes. Raises: UserError if the disk is too small."""
    found = []
    for path in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            status = path.stat()
            if path.is_file():
                found.append((status.st_mtime, status.st_size, path))
    stored = sum(length for _, length, _ in found)
    excess = max(stored + size - max_bytes, size - shutil.disk_usage(root).free)
    for used, length, path in sorted(found):
        if excess <= 0 or used > time.time() - _MIN_SECONDS:
            break
        path.unlink(missing_ok=True)
        excess -= length
    require_space(root, "a batch", size, f"{_LARGER_DISK}, or mount the bucket")


def is_safe(name: str) -> bool:
    """Returns whether an object's name is a path inside a directory."""
    path = pathlib.PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name

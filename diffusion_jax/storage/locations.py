"""The local mirrors of work directories in buckets, and what is done to files that may lie in one.

A run works on local files. A mirror holds those that it needs of the bucket, and uploads each file that is finished:
`diffusion_jax.files` calls `written`. An object appears completely or not at all, as a file that is renamed does. For files
that are only local, the functions of this module do nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from diffusion_jax.errors import StorageError
from diffusion_jax.storage.objects import PROBE, ObjectInfo, ObjectStore, open_store

__all__ = [
    "EVENTS",
    "MANIFEST",
    "Mirror",
    "add_url",
    "committed_steps",
    "fetch",
    "find_mirror",
    "is_safe",
    "mirror_workdir",
    "moved",
    "removed",
    "with_urls",
    "written",
]

CHECKPOINTS = "checkpoints"
MANIFEST = "digests.json"
EVENTS = "events.out.tfevents."
LOCK = ".lock"
_ATTEMPTS = 5
_MIRRORS: list[Mirror] = []
_URLS: dict[str, str] = {}  # by local path
_LOCKS: list[Any] = []  # on the directories of this process


class Mirror:
    """A local directory with the small files of a work directory in a bucket.

    Of checkpoints it has the manifest and Orbax's metadata of every committed step, so that their steps are known; their
    arrays are fetched when they are read. TensorBoard events are never read again, so they stay in the bucket.

    root: the local directory. url: of the work directory. with_samples: whether the files below samples/ are needed.
    read_only: raises PermissionError instead of uploading. known_steps: committed steps that were seen in the bucket.
    before_commit: called before a checkpoint is committed; raises if another launch has taken over the lock.
    """

    def __init__(self, root: pathlib.Path, store: ObjectStore, with_samples: bool = True, read_only: bool = False):
        self.root, self.store, self.url = root, store, store.url
        self._with_samples, self._read_only = with_samples, read_only
        self._tags: dict[str, str] = {}
        self.known_steps: set[int] = set()
        self.before_commit: Callable[[], None] = lambda: None

    def name_of(self, path: pathlib.Path) -> str:
        """The name of the object of a file."""
        return path.relative_to(self.root).as_posix()

    def refresh(self) -> None:
        """Fetches what has changed in the bucket since the last call, and removes what has been deleted there."""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):  # deleted after it was listed
                return self._refresh()
        self._refresh()

    def _refresh(self) -> None:
        found = self.store.list()
        needed = {name: info for name, info in found.items() if self._is_needed(name, found)}
        self._download({name: info for name, info in needed.items() if self._tags.get(name) != info.tag})
        for name in self._tags.keys() - needed.keys():
            (self.root / name).unlink(missing_ok=True)
        self._tags = {name: info.tag for name, info in needed.items()}
        manifests = (pathlib.PurePosixPath(name) for name in needed if name.endswith(f"/{MANIFEST}"))
        self.known_steps |= {int(path.parts[1]) for path in manifests if path.parts[1].isdecimal()}

    def _is_needed(self, name: str, found: dict[str, ObjectInfo]) -> bool:
        first, *others = parts = pathlib.PurePosixPath(name).parts
        if not is_safe(name) or parts[-1].startswith((EVENTS, LOCK, PROBE)):
            return False
        if first == CHECKPOINTS:
            return len(others) == 2 and f"{first}/{others[0]}/{MANIFEST}" in found
        return self._with_samples or first != "samples"

    def _download(self, objects: dict[str, ObjectInfo]) -> None:
        paths = {name: self.root / name for name in objects}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self.store.download_all(paths)
        for name, info in objects.items():
            os.utime(paths[name], (info.modified, info.modified))
            if paths[name].name == MANIFEST:
                os.utime(paths[name].parent, (info.modified, info.modified))

    def upload(self, path: pathlib.Path) -> None:
        """Uploads a file, or all files of a directory. Raises: OSError."""
        self._check_writable(path)
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        self.store.upload_all({str(file): self.name_of(file) for file in files})

    def delete(self, path: pathlib.Path) -> None:
        """Deletes the object of a file, or all objects of a directory, the manifest first: then a step does not exist."""
        self._check_writable(path)
        name = self.name_of(path)
        self.store.delete([f"{name}/{MANIFEST}"])
        self.store.delete([name, *self.store.list(f"{name}/")])

    def move(self, path: pathlib.Path, new_path: pathlib.Path) -> None:
        """Moves all objects of a directory, the manifest first, so that a step that is moved does not exist meanwhile."""
        self._check_writable(path)
        old, new = self.name_of(path), self.name_of(new_path)
        names = sorted(self.store.list(f"{old}/"), key=lambda name: not name.endswith(f"/{MANIFEST}"))
        for name in names:
            self.store.move(name, new + name.removeprefix(old))

    def fetch(self, path: pathlib.Path) -> None:
        """Downloads a file, or all files of a directory, unless it is here."""
        name = self.name_of(path)
        if not path.exists():
            found = self.store.list(name)
            self._download({key: found[key] for key in found if is_safe(key) and f"{key}/".startswith(f"{name}/")})

    def _check_writable(self, path: pathlib.Path) -> None:
        if self._read_only:
            raise PermissionError(f"{self.url}/{self.name_of(path)} is only read")


def mirror_workdir(url: str, with_samples: bool = True, read_only: bool = False) -> pathlib.Path:
    """A new local mirror of a work directory in a bucket, which need not exist yet; removed when the process ends.

    Raises: StorageError if the bucket cannot be used, OSError.
    """
    store = open_store(url, write=not read_only)
    mirror = Mirror(_temporary_directory(), store, with_samples, read_only)
    mirror.refresh()
    _MIRRORS.append(mirror)
    add_url(mirror.root, mirror.url)
    return mirror.root


def _temporary_directory() -> pathlib.Path:
    """A directory that is removed at exit; those of processes that were killed are removed now."""
    import filelock  # not installed with the core

    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    parent = pathlib.Path(tempfile.gettempdir()) / f"diffusion_jax_mirrors_{user}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and parent.stat().st_uid != os.getuid():
        raise StorageError(f"{parent} belongs to another user; set TMPDIR to a directory of your own")
    with filelock.FileLock(parent / "lock"):  # no other process makes or removes one meanwhile
        for path in parent.glob("*.lock"):
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(path, blocking=False):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        directory = pathlib.Path(tempfile.mkdtemp(dir=parent))
        lock = filelock.FileLock(directory.with_suffix(".lock"))
        lock.acquire()
    _LOCKS.append(lock)
    atexit.register(directory.with_suffix(".lock").unlink, missing_ok=True)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def add_url(path: pathlib.Path, url: str) -> None:
    """Makes known that a local directory is a copy of what a URL names."""
    _URLS[str(path)] = url


def find_mirror(path: pathlib.Path) -> Mirror | None:
    """The mirror that holds a path; None for a path that is only local."""
    return next((mirror for mirror in _MIRRORS if path.is_relative_to(mirror.root)), None)


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a committed checkpoint, in increasing order; in a mirror, those that are committed in the bucket."""
    paths = directory.glob(f"*/{MANIFEST}")
    steps = sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())
    mirror = find_mirror(directory)
    return [step for step in steps if step in mirror.known_steps] if mirror else steps


def with_urls(text: str) -> str:
    """A text for people: the paths of mirrors and copies in it are replaced by the URLs that people know."""
    for path, url in _URLS.items():
        text = text.replace(path, url)
    return text


def written(path: pathlib.Path) -> None:
    """Uploads a finished file or directory if it lies in a mirror. Raises: OSError."""
    mirror = find_mirror(path)
    if mirror:
        mirror.upload(path)


def removed(path: pathlib.Path) -> None:
    """Deletes the objects of a file or directory that was removed, if it lies in a mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.delete(path)


def moved(path: pathlib.Path, new_path: pathlib.Path) -> None:
    """Moves the objects of a directory that was renamed, if it lies in a mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.move(path, new_path)


def fetch(path: pathlib.Path) -> pathlib.Path:
    """The same path, after a file or directory that another process uploaded has been downloaded into its mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.fetch(path)
    return path


def is_safe(name: str) -> bool:
    """Whether an object's name is a path inside a directory."""
    path = pathlib.PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name

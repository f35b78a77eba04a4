"""The work directory: the paths of its files, its lock, and for a bucket, the uploads.

A run works on local files. A function that writes a file gets the `RunDir` and uploads the finished file; for a local
directory `upload` does nothing. An object appears completely or not at all, like a renamed file.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.console import ProgressBar, log
from diffusion_jax.distributed.processes import Watchdog, broadcast_from_process_0, is_multiprocess
from diffusion_jax.errors import StorageError, UserError
from diffusion_jax.files import check_in_place, downloads_root, mirrors_root, save_npz, with_urls, write_text
from diffusion_jax.provenance import params_digest
from diffusion_jax.storage.downloads import LOCK, MANIFEST, copy_objects, copy_path, is_small
from diffusion_jax.storage.locks import FileLock, Lease, LockHeldError
from diffusion_jax.storage.objects import ObjectStore, is_url, open_store
from diffusion_jax.untrusted import leads_out, open_npz

_MIRROR = "mirror."  # how the names of mirrors start; `tempfile.mkdtemp` adds 8 characters
LINES = "metrics.jsonl"
# The folders that this package writes; W&B writes other folders.
_FOLDERS = ("calibration", "checkpoints", "evaluation", "images", "metrics", "plugins", "samples", ".likelihood")


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Lists the steps with a committed checkpoint in a checkpoint directory, in increasing order."""
    paths = directory.glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())


class RunDir(os.PathLike):
    """The local directory of a run, or a subdirectory of it; the directory need not exist yet.

    path: the local path. `run_dir / name` joins paths; str(run_dir) is the path, or the URL for a bucket.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        self._locks: list[FileLock | Lease] = []  # held by this launch

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def subdirectory(self, name: str) -> RunDir:
        """Returns a subdirectory, which uploads its files if this directory does."""
        directory = copy.copy(self)  # shares the list of locks, so that a lost lock is noticed everywhere
        directory.path = self / name
        return directory

    def upload(self, *paths: pathlib.Path) -> None:
        """Uploads finished files, or all files in directories. Raises: OSError."""

    def write_json(self, name: str, value: Any, indent: int | None = None) -> None:
        """Writes a JSON file into the directory, and uploads it. Raises: OSError."""
        write_text(self / name, json.dumps(value, indent=indent) + "\n")
        self.upload(self / name)

    def fetch(self, path: pathlib.Path) -> pathlib.Path:
        """Downloads a file or directory that another process uploaded. Returns: `path`. Raises: OSError."""
        return path

    def refresh(self) -> None:
        """Downloads the changes by other launches. Raises: OSError."""

    def delete(self, directory: pathlib.Path) -> None:
        """Deletes a directory; a checkpoint step is no longer committed once the deletion begins."""
        removed = directory.with_name(f"{directory.name}.removed")
        RunDir.rename(self, directory, removed.name)
        shutil.rmtree(removed, ignore_errors=True)

    def rename(self, directory: pathlib.Path, name: str) -> None:
        """Renames a directory, replacing any directory with the new name."""
        renamed = directory.with_name(name)
        shutil.rmtree(renamed, ignore_errors=True)  # from an earlier launch
        directory.rename(renamed)

    @contextlib.contextmanager
    def locked(self, activity: str) -> Iterator[None]:
        """Holds the lock on the directory for all processes of this launch.

        Process 0 holds the lock. It waits half a minute if another launch, which may be about to end, holds the lock.
        activity: completes the message "process 1 of HOST ...", for example "is training in DIR".
        Raises: LockHeldError if another launch holds the lock, LeaseLostError if another launch has taken it over, OSError.
        """
        lock = self._make_lock()
        try:
            holder = broadcast_from_process_0(lock.acquire)
            if holder:
                raise LockHeldError(
                    f"{holder} {activity}: a second launch must wait until it ends, or use another --workdir"
                )
            self.refresh()  # gets the files that another launch wrote before it released the lock
            self._locks.append(lock)
            yield
            lock.check()
        finally:
            if lock in self._locks:
                self._locks.remove(lock)
            lock.release()

    def check_locks(self, local: bool = False) -> None:
        """Raises LeaseLostError if another launch has taken over a lock, or if a local directory was moved.

        The train loop checks local locks after each call of the train step; process 0 checks all locks before it commits a
        step in a bucket. local: skips leases, because their check uses the network.
        """
        for lock in self._locks:
            if isinstance(lock, FileLock) or not local:
                lock.check()

    def find_holder(self) -> str | None:
        """Returns the process that holds the directory's lock, such as "process 1 of HOST"; None if the lock is free."""
        return self._make_lock().find_holder()

    def _make_lock(self) -> FileLock | Lease:
        return FileLock(self / LOCK)


class BucketRunDir(RunDir):
    """A work directory or subdirectory in a bucket, with a local copy of its small files; `fetch` downloads large files.

    A launch that writes has a copy of its own, the mirror, which is deleted when the launch ends. A read_only launch shares a
    copy in the user's cache, and raises PermissionError instead of uploading.
    """

    def __init__(self, url: str, read_only: bool = False):
        """Raises: StorageError if the bucket cannot be used, OSError."""
        self.store = open_store(url.rstrip("/"), write=not read_only)
        self._copies = downloads_root() if read_only else self._make_mirror()
        self._root = copy_path(self._copies, self.store.url)
        self._read_only = read_only
        super().__init__(self._root)
        self.path.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __str__(self) -> str:
        return f"{self.store.url}/{self.object_name(self.path)}".removesuffix("/.")

    def object_name(self, path: pathlib.Path) -> str:
        """Returns the object name for a local path."""
        return path.relative_to(self._root).as_posix()

    def upload(self, *paths: pathlib.Path) -> None:
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        self._writable_store().upload_all({str(file): self.object_name(file) for file in files})

    def fetch(self, path: pathlib.Path) -> pathlib.Path:
        name = self.object_name(path)
        if not path.is_file():
            copy_objects(self.store, self._copies, name, lambda found, _: f"{found}/".startswith(f"{name}/"))
        return path

    def refresh(self) -> None:
        if self.path == self._root:
            copy_objects(self.store, self._copies, is_needed=is_small)
        else:
            self.fetch(self.path)

    def delete(self, directory: pathlib.Path) -> None:
        """Deletes a directory and its objects, the manifest first, so that a partly deleted step is not committed."""
        store, name = self._writable_store(), self.object_name(directory)
        store.delete([f"{name}/{MANIFEST}"])
        store.delete(store.list(f"{name}/"))
        if directory.exists():
            super().delete(directory)

    def rename(self, directory: pathlib.Path, name: str) -> None:
        """Renames a directory and its objects, the manifest first, so that the step is not committed meanwhile."""
        store = self._writable_store()
        old, new = self.object_name(directory), self.object_name(directory.with_name(name))
        super().rename(directory, name)
        for found in sorted(store.list(f"{old}/"), key=lambda found: not found.endswith(f"/{MANIFEST}")):
            store.move(found, new + found.removeprefix(old))

    def _writable_store(self) -> ObjectStore:
        if self._read_only:
            raise PermissionError(f"{self} is open for reading only")
        return self.store

    def _make_lock(self) -> FileLock | Lease:
        return Lease(self.store, self.object_name(self / LOCK))

    def _make_mirror(self) -> pathlib.Path:
        """Makes a directory that is deleted at exit, and deletes the mirrors of killed processes."""
        import filelock  # not installed with the core

        parent = mirrors_root()
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o700)
        status, has_users = parent.lstat(), hasattr(os, "getuid")
        if not stat.S_ISDIR(status.st_mode) or (has_users and (status.st_uid != os.getuid() or status.st_mode & 0o077)):
            mend = "chmod 700" if stat.S_ISDIR(status.st_mode) else "rm"
            raise StorageError(
                f"{parent} must be a directory, no link, that only you can use (mode 0700), because programs delete files "
                f"in it; type: {mend} {parent}, or set TMPDIR to a directory of your own"
            )
        with filelock.FileLock(parent / "lock", fallback_to_soft=False):  # no other process makes or deletes mirrors
            for path in parent.glob(f"{_MIRROR}????????/{LOCK}"):
                if path.parent.is_symlink():
                    continue
                with (
                    contextlib.suppress(filelock.Timeout),
                    filelock.FileLock(path, blocking=False, fallback_to_soft=False),
                ):
                    shutil.rmtree(path.parent, ignore_errors=True)
            directory = pathlib.Path(tempfile.mkdtemp(prefix=_MIRROR, dir=parent))
            self._mirror_lock = filelock.FileLock(directory / LOCK, fallback_to_soft=False)
            self._mirror_lock.acquire()
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        return directory


def open_run_dir(location: RunDir | str | os.PathLike, read_only: bool = False, follow_links: bool = False) -> RunDir:
    """Opens a work directory by its path or URL, or read-only by the path of a local copy; returns a RunDir unchanged.

    read_only: as for BucketRunDir; a local directory is not checked. follow_links: allows links that lead out of a directory
    that is written. Raises: UserError for such a link, for a pipe, and for a file that cannot be changed alone
    (`check_in_place`); StorageError if the bucket cannot be used; OSError.
    """
    if isinstance(location, RunDir):
        return location
    text = os.fspath(location)
    url = with_urls(text)
    if is_url(url):
        return BucketRunDir(url, read_only or url != text)
    run = RunDir(text)
    if read_only or follow_links:
        return run
    for path in _find_entries(run):
        if _is_link_out(path, run):
            raise UserError(
                f"{path} is a link out of the run, to {os.path.realpath(path)}, where files would be written or deleted; "
                "remove it, or to use your own link, add --follow_links (in Python open_run_dir(DIR, follow_links=True))"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a pipe, a socket or a device, which could stop the program; type: rm {path}")
    check_in_place(run / LOCK, run / LINES)
    return run


def find_links(directory: RunDir) -> list[pathlib.Path]:
    """Lists the links that lead out of a local run, at its top and in the folders that this package writes."""
    return [path for path in _find_entries(directory) if _is_link_out(path, directory)]


def _find_entries(directory: RunDir) -> list[pathlib.Path]:
    """Lists the entries of a local run and of its folder wandb, and all entries in the folders that this package writes."""
    top = [*directory.path.glob("*"), *directory.path.glob("wandb/*")]
    own = [path for path in top if path.name.startswith(_FOLDERS) and not _is_link_out(path, directory)]
    return sorted([*top, *(each for path in own for each in path.rglob("*"))])


def _is_link_out(path: pathlib.Path, directory: RunDir) -> bool:
    return path.is_symlink() and leads_out(path, directory)


class ChunkStore:
    """Numbered chunks of computed arrays, one .npz each, in a separate directory; a rerun computes only missing chunks.

    Process 0 writes, every process reads. A chunk's digest covers its arrays, its number and the directory's name.
    """

    def __init__(self, directory: RunDir, exclusive: bool = True):
        """exclusive: locks the directory until `delete`, or while this object exists. Raises: LockHeldError, OSError."""
        self.directory, self._lock = directory, contextlib.ExitStack()
        broadcast_from_process_0(lambda: directory.path.mkdir(parents=True, exist_ok=True))
        if exclusive:
            self._lock.enter_context(directory.locked("is already running this command"))
        else:
            directory.refresh()

    def fill(
        self,
        title: str,
        total: int,
        size: int,
        compute: Callable[[int], Mapping[str, np.ndarray]],
        stall_timeout: float = 0.0,
        begin: Callable[[ProgressBar, int, int], None] = lambda bar, done, size: None,
    ) -> int:
        """Computes and saves the missing chunks of `total` examples, `size` per chunk; returns the number of chunks.

        Every process calls this, and can then read the chunks. title: the progress bar's title. compute: chunk i -> arrays.
        begin (`CallCounter.begin`): called before a chunk with the bar, the number of earlier examples and the chunk's size.
        Raises: UserError for a stored chunk that differs from its digest. A chunk without a digest is computed again.
        """
        count = -(-total // size)
        finished = set(broadcast_from_process_0(lambda: self._find_stored(title, count)))
        missing = [i for i in range(count) if i not in finished]
        # A single process has no peer that could be stuck.
        watchdog = Watchdog(stall_timeout if is_multiprocess() else 0)
        with ProgressBar(title, total, min(len(finished) * size, total)) as bar, watchdog:
            if missing:
                log("Compiling the program and computing the first batch ...")
            for i in missing:
                begin(bar, i * size, min(size, total - i * size))
                self.save(i, **compute(i))
                bar.update(min((i + 1) * size, total))
                watchdog.record_step()
        multihost_utils.sync_global_devices(f"{title}: written")
        return count

    def _find_stored(self, title: str, count: int) -> list[int]:
        """Lists the stored chunks that have a digest. Raises: UserError if the arrays of a chunk differ from its digest."""
        found, stored = [], [i for i in range(count) if os.path.lexists(self.directory / f"{i}.npz")]
        for i in stored:
            try:
                arrays, digest = self._read(i)
            except (OSError, ValueError):
                arrays, digest = {}, ""
            if digest is not None and str(digest) != self._digest(i, arrays):
                path = self.directory / f"{i}.npz"
                raise UserError(f"{path} was changed or copied (its digest differs); to compute it again: rm {path}")
            found += [i] * (digest is not None)
        if stored:
            again = f"; {len(stored) - len(found)} without a digest are computed again" * (len(found) < len(stored))
            log(f"{title}: continuing from {len(found)} of {count} batches, stored in {self.directory}{again}.")
        return found

    def _digest(self, i: int, arrays: Mapping[str, np.ndarray]) -> str:
        return params_digest([self.directory.path.name, i, dict(arrays)])

    def save(self, i: int, **arrays: np.ndarray) -> None:
        """Writes chunk i, on process 0 only."""
        if jax.process_index() == 0:
            path = self.directory / f"{i}.npz"
            save_npz(path, {**arrays, "digest": np.array(self._digest(i, arrays))})
            self.directory.upload(path)

    def load(self, i: int) -> dict[str, np.ndarray]:
        """Returns the arrays of chunk i."""
        return self._read(i)[0]

    def _read(self, i: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Returns the arrays of chunk i, and their stored digest, which chunks of version 0.3 lack."""
        with open_npz(self.directory.fetch(self.directory / f"{i}.npz")) as stored:
            arrays = dict(stored)
        return arrays, arrays.pop("digest", None)

    def delete(self) -> None:
        """Deletes all chunks; call this after the result files are written."""
        self._lock.close()
        self.directory.delete(self.directory.path)

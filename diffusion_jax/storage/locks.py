"""Locks for one launch at a time: a lock on a local file, or a lease on a bucket object. Both have the same methods.

The holder of a lease renews the object; another launch takes over a lease that was not renewed for the lease time. Every
change is a compare-and-swap. Each launch measures time with its own clock, so clocks of machines are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable

import filelock

from diffusion_jax.errors import LeaseLostError, UserError, print_text
from diffusion_jax.files import check_in_place
from diffusion_jax.storage.objects import ObjectStore

_WAIT_SECONDS = 30.0  # how long to wait for a held lock, and how long a lease is valid without renewal
_RENEW_SECONDS = 10.0
_COUNTDOWN_SECONDS = 10.0


class LockHeldError(OSError):
    """Another launch holds the lock; the one-line message names the launch."""


def _this_process() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


def _wait(is_free: Callable[[], bool], holder: str, name: str) -> bool:
    """Calls `is_free` until it returns True, for at most half a minute. Returns: the last result."""
    start = shown = time.monotonic()
    print_text(f"Note: {holder} holds {name}; waiting {_WAIT_SECONDS:g} s.")
    while (now := time.monotonic()) - start < _WAIT_SECONDS:
        if now - shown > _COUNTDOWN_SECONDS:
            shown = now
            print_text(f"Note: {_WAIT_SECONDS - (now - start):.0f} s left.")
        if is_free():
            return True
        time.sleep(min(1.0, _WAIT_SECONDS / 30))
    return False


class FileLock:
    """An exclusive lock on a file that contains the holder's name. The holder may acquire the lock again."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lock = filelock.FileLock(path, fallback_to_soft=False, is_singleton=True)
        self._text = ""  # contents of the file, after this process has acquired the lock

    def find_holder(self) -> str | None:
        """Returns the holder, such as "process 1 of HOST", or None. Changes nothing."""
        if not self._path.exists():
            return None
        try:
            with self._lock.acquire(blocking=False):
                return None
        except filelock.Timeout:
            return self._read_holder()
        except (OSError, NotImplementedError):  # the file is not writable, or the file system has no locks
            return None

    def acquire(self) -> str | None:
        """Acquires the lock; waits half a minute for a holder that may be about to end.

        Returns: None, or the holder if another process keeps the lock. Prints a note if the file system has no locks.
        Raises: UserError for a link, a folder, a pipe or a hard link; OSError if the file cannot be written.
        """
        if self._path.is_symlink():
            raise UserError(f"{self._path} is a link, which cannot be locked; type: rm {self._path}")
        check_in_place(self._path)
        try:
            if not self._is_free() and not _wait(self._is_free, self._read_holder(), str(self._path)):
                return self._read_holder()
        except (OSError, NotImplementedError) as error:  # a mounted bucket, or NFS without a lock daemon
            self._path.open("a").close()  # raises if the reason is the file
            directory = self._path.parent
            print_text(f"Note: {directory} does not support locks ({error}): a second launch is not refused.")
            return None
        self._text = _this_process()
        self._path.write_text(self._text)
        return None

    def check(self) -> None:
        """Raises LeaseLostError if the directory was moved: files written to the old path would start another run."""
        with contextlib.suppress(OSError):  # a network file system may not answer at the moment
            if self._text and not (self._path.exists() and self._path.read_text() == self._text):
                raise LeaseLostError(
                    f"{self._path.parent} was moved or deleted while this program wrote to it, so it stops; rerun the "
                    "command with --workdir=NEW, the new place of the directory, to resume from the newest checkpoint",
                    exit_code=1,
                )

    def release(self) -> None:
        """Releases the lock; does nothing in a process that does not hold it."""
        self._lock.release()

    def _is_free(self) -> bool:
        """Acquires the lock if no other process holds it."""
        with contextlib.suppress(filelock.Timeout):
            self._lock.acquire(blocking=False)
        return self._lock.is_locked

    def _read_holder(self) -> str:
        return self._path.read_text().strip() or "another process"


class Lease:
    """A lease on the object `name`. The holder renews the lease in a thread; a free lease names no holder."""

    def __init__(self, store: ObjectStore, name: str):
        self._store, self._name, self._url = store, name, f"{store.url}/{name}"
        self._token = secrets.token_hex(16)
        self._count = 0  # number of written versions; makes the contents of each version unique
        self._tag: str | None = None  # tag of this process's last version; None without a lease
        self._lost: str | None = None  # the error message, once another launch holds the lease
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_end, name="lease", daemon=True)

    def find_holder(self) -> str | None:
        """Returns the holder and the local time of the last renewal, or None.

        A killed holder is still returned until another process takes over the lease. Raises: OSError.
        """
        holder, info = self._read()[0].get("holder"), self._store.find(self._name)
        if holder is None or info is None:
            return None
        return holder + time.strftime(" (lease last renewed at %Y-%m-%d %H:%M:%S)", time.localtime(info.modified))

    def acquire(self) -> str | None:
        """Acquires the lease and starts renewing it. Returns: None, or the holder if another process keeps the lease.

        Raises: StorageError if the service ignores write conditions; OSError.
        """
        content, tag = self._read()
        if "holder" in content:
            _wait(lambda: "holder" not in self._read()[0], str(self.find_holder()), self._url)
            content, new_tag = self._read()
            if "holder" in content and new_tag != tag:  # the holder renewed the lease
                return content["holder"]
            tag = new_tag
        self._tag, holder = self._replace(tag)
        if self._tag is None:  # another launch was faster
            return holder
        self._store.check_conditions(self._name)
        self._thread.start()
        return None

    def check(self) -> None:
        """Renews the lease. Raises: LeaseLostError if another launch holds the lease, OSError if the store is unreachable.

        Process 0 must call this before a write that makes earlier writes visible; on other processes, this does nothing.
        """
        self._renew()
        if self._lost:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Stops renewing the lease, and releases it if this process still holds it."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # without a release, the lease expires
            with self._mutex:
                if self._tag:
                    self._store.replace(self._name, b"{}", self._tag)
        self._tag = None

    def _read(self) -> tuple[dict[str, str], str]:
        """Reads (contents, tag). A free lease has no "holder" in its contents; tag "" means that the object is missing.

        If the object changes meanwhile, the contents are newer than the tag.
        """
        if (info := self._store.find(self._name)) is None:
            return {}, ""
        try:
            return dict(json.loads(self._store.read(self._name))), info.tag
        except FileNotFoundError:
            return {}, ""
        except (ValueError, TypeError):
            return {"holder": "another process"}, info.tag

    def _replace(self, tag: str) -> tuple[str | None, str]:
        """Writes a new version of the lease over version `tag`. Returns: (the new tag, ""), or (None, the other holder)."""
        while True:
            self._count += 1
            content = {"holder": _this_process(), "token": self._token, "count": self._count}
            written = self._store.replace(self._name, json.dumps(content).encode(), tag)
            if written:
                return written, ""
            stored, tag = self._read()
            if stored.get("token") != self._token:  # otherwise an earlier write succeeded, but its answer was lost
                return None, stored.get("holder", "another launch")

    def _renew_until_end(self) -> None:
        while not self._end.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):  # tries again: the lease can be renewed until another launch takes over
                self._renew()
            if self._lost:
                print_text(f"Warning: {self._lost}")
                return

    def _renew(self) -> None:
        """Replaces the object by a new version, or records which process has taken over the lease."""
        with self._mutex:
            if not self._tag:
                return
            self._tag, holder = self._replace(self._tag)
            if self._tag is None:
                self._lost = (
                    f"{holder} has taken over {self._store.url}, because this process did not renew the lease in time: this "
                    "launch must stop; let the other launch continue, or end the other launch and rerun this command"
                )

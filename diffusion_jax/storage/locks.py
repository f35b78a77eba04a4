"""Locks for one launch at a time: on a local file, or a lease on an object in a bucket. Both have the same methods.

The holder of a lease renews an object; another launch takes it over once it has not been renewed for the time of the lease.
Every change is a compare-and-swap, and each launch measures time with its own clock, so clocks of different machines are
never compared.
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

from diffusion_jax.errors import LeaseLostError
from diffusion_jax.storage.objects import ObjectStore

__all__ = ["FileLock", "Lease", "LockHeldError"]

_WAIT_SECONDS = 30.0  # for a lock that another launch holds, and how long a lease is valid without a renewal
_RENEW_SECONDS = 10.0
_COUNTDOWN_SECONDS = 10.0


class LockHeldError(OSError):
    """Another launch holds the lock; the message names it in one line."""


def _this_process() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


def _wait(is_free: Callable[[], bool], holder: str, name: str) -> bool:
    """Asks `is_free` for half a minute until it is true. Returns: whether it was."""
    start = shown = time.monotonic()
    print(f"Note: {holder} holds {name}; waiting {_WAIT_SECONDS:g} s.", flush=True)
    while (now := time.monotonic()) - start < _WAIT_SECONDS:
        if now - shown > _COUNTDOWN_SECONDS:
            shown = now
            print(f"Note: {_WAIT_SECONDS - (now - start):.0f} s left.", flush=True)
        if is_free():
            return True
        time.sleep(min(1.0, _WAIT_SECONDS / 30))
    return False


class FileLock:
    """An exclusive lock on a file, which contains its holder. The process that holds the lock may take it again."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lock = filelock.FileLock(path, fallback_to_soft=False, is_singleton=True)
        self._is_held = False

    def find_holder(self) -> str | None:
        """The process that holds the lock, such as "process 1 of HOST"; None if none does. Changes nothing."""
        if not self._path.exists():
            return None
        try:
            with self._lock.acquire(blocking=False):
                return None
        except filelock.Timeout:
            return self._read_holder()
        except (OSError, NotImplementedError):  # it cannot be written, or without locks
            return None

    def acquire(self) -> str | None:
        """Takes the lock; waits half a minute for its holder, which may be about to end.

        Returns: the process that holds it, None if it is this one. A file system without locks is used with a note.
        """
        try:
            if not self._is_free() and not _wait(self._is_free, self._read_holder(), str(self._path)):
                return self._read_holder()
        except (OSError, NotImplementedError) as error:  # a mounted bucket, or NFS without a lock daemon
            directory = self._path.parent
            print(f"Note: {directory} does not support locks ({error}): a second launch is not refused.", flush=True)
            return None
        self._path.write_text(_this_process())
        return None

    def check(self) -> None:
        """Does nothing: a file stays locked until its process ends."""

    def release(self) -> None:
        """Frees the lock, if this object holds it."""
        if self._is_held:
            self._lock.release()
        self._is_held = False

    def _is_free(self) -> bool:
        """Takes the lock if no other process holds it."""
        with contextlib.suppress(filelock.Timeout):
            self._lock.acquire(blocking=False)
            self._is_held = True
        return self._is_held

    def _read_holder(self) -> str:
        return self._path.read_text().strip() or "another process"


class Lease:
    """A lease on the object `name`. Its holder renews it in a thread; the contents of a free lease name no holder."""

    def __init__(self, store: ObjectStore, name: str):
        self._store, self._name, self._url = store, name, f"{store.url}/{name}"
        self._token = secrets.token_hex(16)
        self._count = 0  # of written versions, so that no two have the same contents
        self._tag: str | None = None  # of the version that this process wrote; None if it holds no lease
        self._lost: str | None = None  # the message, once another launch holds the lease
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_end, name="lease", daemon=True)

    def find_holder(self) -> str | None:
        """The process that holds the lease, and when it was last renewed, in local time; None if none does.

        A killed process is named until another takes its lease over. Raises: OSError.
        """
        holder, info = self._read()[0].get("holder"), self._store.find(self._name)
        if holder is None or info is None:
            return None
        return holder + time.strftime(" (lease last renewed at %Y-%m-%d %H:%M:%S)", time.localtime(info.modified))

    def acquire(self) -> str | None:
        """Takes the lease, and renews it from then on. Returns: the process that holds it, None if it is this one.

        Raises: StorageError if the service ignores the conditions of writes, OSError.
        """
        content, tag = self._read()
        if "holder" in content:
            _wait(lambda: "holder" not in self._read()[0], str(self.find_holder()), self._url)
            content, new_tag = self._read()
            if "holder" in content and new_tag != tag:  # it was renewed
                return content["holder"]
            tag = new_tag
        self._tag = self._store.replace(self._name, self._next_content(), tag)
        if self._tag is None:  # another launch was faster
            return self._read()[0].get("holder", "another process")
        self._store.check_conditions(self._name)
        self._thread.start()
        return None

    def check(self) -> None:
        """Renews the lease. Raises: LeaseLostError if another launch has taken it over, OSError if the store is out of reach.

        Must be called before a write that makes others visible, on process 0; does nothing on other processes.
        """
        self._renew()
        if self._lost:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Stops renewing the lease and frees it, if it is still this process's."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # otherwise it ends by itself
            self._renew(is_free=True)
        self._tag = None

    def _read(self) -> tuple[dict[str, str], str]:
        """(contents, tag) of the lease; contents without "holder" if it is free, tag "" if there is no object."""
        try:
            data, tag = self._store.read_version(self._name)
        except FileNotFoundError:
            return {}, ""
        try:
            return dict(json.loads(data)), tag
        except (ValueError, TypeError):
            return {"holder": "another process"}, tag

    def _next_content(self) -> bytes:
        """Contents that no other version of the object has."""
        self._count += 1
        return json.dumps({"holder": _this_process(), "token": self._token, "count": self._count}).encode()

    def _renew_until_end(self) -> None:
        while not self._end.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):  # tried again: until another launch takes it over, it can be renewed
                self._renew()
            if self._lost:
                print(f"Warning: {self._lost}", flush=True)
                return

    def _renew(self, is_free: bool = False) -> None:
        """Replaces the object by a new version, or notes which process has taken it over."""
        with self._mutex:
            while self._tag:
                content = b"{}" if is_free else self._next_content()
                renewed = self._store.replace(self._name, content, self._tag)
                if renewed:
                    self._tag = renewed
                    return
                stored, tag = self._read()
                if stored.get("token") == self._token:  # a renewal whose answer was lost
                    self._tag = tag
                    continue
                self._tag = None
                self._lost = (
                    f"{stored.get('holder', 'another launch')} has taken over {self._store.url}, which this process did "
                    "not renew in time: this launch must stop; let the other one go on, or end it and rerun this command"
                )

"""A lease on an object store, for one launch at a time.

The holder renews an object; another launch takes it over once it has not been renewed for the time of the lease. Every change
is a compare-and-swap, and each launch measures time with its own clock, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from diffusion_jax.distributed.file_lock import describe_process, held_error
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import LeaseLostError
from diffusion_jax.storage.objects import ObjectStore

__all__ = ["Lease", "find_holder", "leased"]

_RENEW_SECONDS, _LEASE_SECONDS = 10.0, 30.0


def find_holder(store: ObjectStore, name: str) -> str | None:
    """The process that holds the lease, such as "process 1 of HOST", and when it was last renewed; None if none does.

    A process that was killed is named, too, until another launch takes the lease over. Changes nothing. Raises: OSError.
    """
    try:
        holder = _Holder.from_bytes(store.read(name))
    except FileNotFoundError:
        return None
    return f"{holder or 'another process'}{_last_renewal(store, name)}"


@contextlib.contextmanager
def leased(
    store: ObjectStore,
    name: str,
    activity: str,
    renew_seconds: float = _RENEW_SECONDS,
    lease_seconds: float = _LEASE_SECONDS,
) -> Iterator[Lease]:
    """Holds a lease, the object `name`, for all processes of this launch. Process 0 renews it in a thread.

    If another launch holds it, waits for at most `lease_seconds` to see whether that launch still renews it, and takes it
    over if not. activity: as for `file_lock.locked`. Raises: LockHeldError if another launch holds the lease, OSError.
    """
    lease = Lease(store, name, renew_seconds, lease_seconds)
    try:
        holder = broadcast_from_process_0(lease.acquire)
        if holder:
            raise held_error(holder, activity)
        yield lease
    finally:
        lease.release()


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The contents of the object. token: random. pid_space: of which processes `pid` is the number. counter: of renewals."""

    token: str
    host: str
    pid: int
    pid_space: str
    counter: int

    @classmethod
    def this_process(cls) -> _Holder:
        return cls(secrets.token_hex(16), socket.gethostname(), os.getpid(), _pid_space(), 0)

    @classmethod
    def from_bytes(cls, data: bytes) -> _Holder | None:
        """None for contents that no lease has."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    def __str__(self) -> str:
        return describe_process(self.pid, self.host)

    def has_ended(self) -> bool:
        """Whether this was a process of this machine that does not exist any more; False if that is not known."""
        if not self.pid_space or (self.host, self.pid_space) != (socket.gethostname(), _pid_space()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # a process of another user
            pass
        return False


def _pid_space() -> str:
    """Identifies the running system and its namespace of process numbers, since containers may share a host name."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: a holder that has ended is found after the time of the lease
        return ""


def _last_renewal(store: ObjectStore, name: str) -> str:
    """When the lease was last renewed, in parentheses and in local time; "" if there is no lease any more."""
    info = store.find(name)
    return time.strftime(" (lease last renewed at %Y-%m-%d %H:%M:%S)", time.localtime(info.modified)) if info else ""


class Lease:
    """The lease that `leased` holds."""

    def __init__(self, store: ObjectStore, name: str, renew_seconds: float, lease_seconds: float):
        self._store, self._name = store, name
        self._impatient_store = store.with_limits(renew_seconds, attempt_seconds=renew_seconds)
        self._renew_seconds, self._lease_seconds = renew_seconds, lease_seconds
        self._content = _Holder.this_process()
        self._tag: str | None = None  # of the version that this process wrote; None if it holds no lease
        self._lost: str | None = None  # the message, once another launch holds the lease
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_end, name="lease", daemon=True)

    def check(self) -> None:
        """Renews the lease. Raises: LeaseLostError if another launch has taken it over, OSError if the store is out of reach.

        Must be called before a write that makes others visible, on process 0; does nothing on other processes.
        """
        self._renew(self._store)
        if self._lost:
            raise LeaseLostError(self._lost)

    def acquire(self) -> str | None:
        """Takes the lease, and renews it from then on; returns the name of the holder, None if it is this process."""
        while self._tag is None:
            self._tag = self._store.create(self._name, self._next_content())
            holder = None if self._tag else self._take_over()
            if holder:
                return holder
        self._thread.start()
        return None

    def release(self) -> None:
        """Stops renewing the lease and deletes its object, if it is still this process's."""
        self._end.set()
        if not self._thread.is_alive():
            return
        self._thread.join()
        with contextlib.suppress(OSError):  # otherwise it ends by itself
            self._renew(self._impatient_store)
            if self._tag:
                self._impatient_store.delete_version(self._name, self._tag)
        self._tag = None

    def _take_over(self) -> str | None:
        """Takes over a lease that is not renewed any more; returns the name of a holder that renews it, None otherwise."""
        try:
            data, tag = self._store.read_version(self._name)
        except FileNotFoundError:  # released meanwhile
            return None
        holder = _Holder.from_bytes(data)
        if not (holder and holder.has_ended()):
            print(
                f"Note: {holder or 'another process'} holds {self._store.url}/{self._name}"
                f"{_last_renewal(self._store, self._name)}; waiting {self._lease_seconds:g} s to see whether it is alive.",
                flush=True,
            )
            if not self._is_unchanged(tag):
                return self._current_holder()
        self._tag = self._store.replace(self._name, self._next_content(), tag)
        return None if self._tag else self._current_holder()

    def _is_unchanged(self, tag: str) -> bool:
        """Whether the object stays the version `tag` for the time of the lease."""
        end = time.monotonic() + self._lease_seconds
        while time.monotonic() < end:
            time.sleep(min(2.0, self._lease_seconds / 10))
            info = self._store.find(self._name)
            if info is None or info.tag != tag:
                return False
        return True

    def _current_holder(self) -> str | None:
        """The name of the process that has just changed the object; None if it has deleted it."""
        try:
            return str(_Holder.from_bytes(self._store.read(self._name)) or "another process")
        except FileNotFoundError:
            return None

    def _next_content(self) -> bytes:
        """Contents that no other version of the object has."""
        self._content = dataclasses.replace(self._content, counter=self._content.counter + 1)
        return self._content.to_bytes()

    def _renew_until_end(self) -> None:
        while not self._end.wait(self._renew_seconds):
            with contextlib.suppress(
                OSError
            ):  # tried again: until another launch takes it over, the lease can be renewed
                self._renew(self._impatient_store)
            if self._lost:
                print(f"Warning: {self._lost}", flush=True)
                return

    def _renew(self, store: ObjectStore) -> None:
        """Replaces the object by a new version, or notes which process has taken it over."""
        with self._mutex:
            while self._tag:
                renewed = store.replace(self._name, self._next_content(), self._tag)
                if renewed:
                    self._tag = renewed
                    return
                try:
                    data, self._tag = store.read_version(self._name)
                except FileNotFoundError:
                    self._lose(f"{self._store.url}/{self._name} was deleted, so another launch may write there")
                    return
                holder = _Holder.from_bytes(data)
                if holder is None or holder.token != self._content.token:  # otherwise a renewal whose answer was lost
                    name = holder or "another process"
                    self._lose(f"{name} has taken over {self._store.url}, which this process did not renew in time")

    def _lose(self, reason: str) -> None:
        self._tag = None
        self._lost = f"{reason}: this launch must stop; let the other one go on, or end it and rerun this command"

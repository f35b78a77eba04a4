"""A lock on a directory for one launch at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import IO

from diffusion_jax.distributed.processes import broadcast_from_process_0

__all__ = ["LockHeldError", "describe_process", "find_holder", "held_error", "locked"]

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO) -> None:
        """Locks one byte behind the text: locks are mandatory here, and others read the text."""
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: IO) -> None:
        """Takes a POSIX record lock, which a data worker that outlives its parent does not inherit, unlike `flock`'s."""
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def find_holder(path: pathlib.Path) -> str | None:
    """The process that holds the lock on a file, such as "process 1 of HOST"; None if none does, or without locks."""
    with contextlib.ExitStack() as files:
        try:
            file = files.enter_context(path.open("r+"))
        except OSError:  # there is none, or it cannot be written
            return None
        try:
            _lock(file)  # released when the file is closed
        except OSError as error:
            is_held = error.errno in (errno.EACCES, errno.EAGAIN)
            return (file.read().strip() or "another process") if is_held else None
    return None


def describe_process(pid: int, host: str) -> str:
    """The name of a process in messages."""
    return f"process {pid} of {host}"


class LockHeldError(OSError):
    """Another launch holds the lock; the message names it in one line."""


def held_error(holder: str, activity: str) -> LockHeldError:
    """The error that refuses a second launch. activity: as for `locked`."""
    return LockHeldError(f"{holder} {activity}: a second launch must wait until it ends, or use another --workdir")


@contextlib.contextmanager
def locked(path: pathlib.Path, activity: str) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which is created if missing, for all processes of this launch.

    Process 0 holds the lock, and it ends with that process, however that ends. activity: completes the message "process 1 of
    HOST ...", for example "is training in DIR". Raises: LockHeldError if another launch holds the lock, OSError.
    """
    with contextlib.ExitStack() as files:

        def acquire() -> str | None:
            """Takes the lock; returns the name of the process that holds it, None if it is this one."""
            file = files.enter_context(path.open("a+"))
            try:
                _lock(file)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # a mounted bucket, or NFS without a lock daemon
                    print(
                        f"Note: {path.parent} does not support locks ({error.strerror}): a second launch is not refused.",
                        flush=True,
                    )
                    return None
                file.seek(0)
                return file.read().strip() or "another process"
            file.truncate(0)
            file.write(describe_process(os.getpid(), socket.gethostname()))
            file.flush()
            return None

        holder = broadcast_from_process_0(acquire)
        if holder:
            raise held_error(holder, activity)
        yield

"""A lock on a directory that a second launch does not get."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from diffusion_jax.distributed.processes import broadcast_from_process_0


class HeldError(OSError):
    """Another launch holds the lock: one line that says which."""


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds a lock on a file, made where it is missing, that no second launch gets; it ends with the process, however that
    ends. Process 0 holds it for all. Raises: HeldError where another launch holds it, OSError.

    POSIX record locks, because a data worker that outlives its parent does not inherit them.
    """
    files = []

    def acquire() -> str | None:
        file = path.open("a+")
        files.append(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a mounted bucket, NFS without its lock daemon
                note = f"Note: no locks below {path.parent} ({error.strerror}): a second launch there would not be refused."
                print(note, flush=True)
                return None
            file.seek(0)
            return file.read().strip() or "another process"
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        return None

    try:
        holder = broadcast_from_process_0(acquire)
        if holder:
            raise HeldError(f"{holder} {what}: a second launch must wait for its end, or use another --workdir")
        yield
    finally:
        for file in files:
            file.close()

"""The lock on a work directory: on a local file, or, in a bucket, a lease."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from diffusion_jax.distributed import file_lock
from diffusion_jax.storage import lease
from diffusion_jax.storage.locations import find_mirror

__all__ = ["find_holder", "locked"]


@contextlib.contextmanager
def locked(path: pathlib.Path, activity: str) -> Iterator[None]:
    """Holds an exclusive lock on `path` for all processes of this launch; in a mirror, the lease of its object.

    activity: completes the message "process 1 of HOST ...", for example "is training in DIR".
    Raises: LockHeldError if another launch holds it, OSError.
    """
    mirror = find_mirror(path)
    if mirror is None:
        with file_lock.locked(path, activity):
            yield
        return
    with lease.leased(mirror.store, mirror.name_of(path), activity) as held:
        mirror.refresh()  # another launch may have written until now
        mirror.before_commit = held.check
        yield
        held.check()
        mirror.store.delete_old_probes(mirror.name_of(path))


def find_holder(path: pathlib.Path) -> str | None:
    """The process that holds the lock on a path, such as "process 1 of HOST"; None if none does. Changes nothing."""
    mirror = find_mirror(path)
    return lease.find_holder(mirror.store, mirror.name_of(path)) if mirror else file_lock.find_holder(path)

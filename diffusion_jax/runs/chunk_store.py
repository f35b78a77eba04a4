"""Finished chunks of a long command, stored on disk so that a rerun of the command continues after them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.files import save_npz
from diffusion_jax.storage import locations
from diffusion_jax.storage.locks import locked

__all__ = ["ChunkStore", "options_digest"]

_LOCKS = contextlib.ExitStack()  # held until the program ends: chunks outlive the object that wrote them


def options_digest(options: Mapping[str, Any], *more: Any) -> str:
    """12 hexadecimal digits of a hash of JSON values: commands with different options get different digests."""
    return hashlib.sha256(json.dumps([dict(options), *more], sort_keys=True).encode()).hexdigest()[:12]


class ChunkStore:
    """Numbered chunks of arrays, one .npz each, in a separate directory. Process 0 writes, every process reads.

    finished: the numbers of the chunks that existed when the store was opened.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
        self._lock = _LOCKS.enter_context(contextlib.ExitStack())
        self._lock.enter_context(locked(directory / ".lock", "is already running this command"))
        self.finished = set(broadcast_from_process_0(self._numbers))

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in self._directory.glob("*.npz") if path.stem.isdecimal()]

    def save(self, i: int, **arrays: np.ndarray) -> None:
        """Writes chunk i, on process 0 only."""
        if jax.process_index() == 0:
            save_npz(self._directory / f"{i}.npz", arrays)

    def load(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of chunk i."""
        with np.load(locations.fetch(self._directory / f"{i}.npz")) as arrays:
            return dict(arrays)

    def delete(self) -> None:
        """Deletes all chunks; call it when the result files are written."""
        self._lock.close()
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()
        locations.removed(self._directory)

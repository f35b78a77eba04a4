"""The finished parts of a long command, kept so that a relaunch goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from diffusion_jax.distributed.file_lock import locked
from diffusion_jax.distributed.processes import broadcast_from_process_0

_LOCKS = contextlib.ExitStack()  # until the program ends: parts outlive the object that made them


def digest(options: Mapping, *more) -> str:
    """Tells apart the parts of commands that would compute different things."""
    return hashlib.sha256(json.dumps([dict(options), *more], sort_keys=True).encode()).hexdigest()[:12]


class Parts:
    """Numbered parts, one .npz each, in a directory of their own that process 0 writes and every process reads."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
        _LOCKS.enter_context(locked(directory / ".lock", "is doing just this"))
        self.done = set(broadcast_from_process_0(self._numbers))

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in self._directory.glob("*.npz") if path.stem.isdecimal()]

    def save(self, i: int, **arrays: np.ndarray) -> None:
        """Part i, whole or not at all; from process 0 only."""
        if jax.process_index() == 0:
            temporary = self._directory / f"{i}.partial.npz"
            np.savez(temporary, **arrays)
            temporary.replace(self._directory / f"{i}.npz")

    def load(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of part i."""
        with np.load(self._directory / f"{i}.npz") as arrays:
            return dict(arrays)

    def remove(self) -> None:
        """When what they were for is written."""
        for part in self._directory.iterdir():
            part.unlink()
        self._directory.rmdir()

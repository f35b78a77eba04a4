"""Finished batches of a long command, stored on disk so that a rerun of the command continues after them."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.distributed.watchdog import watch_batches
from diffusion_jax.files import save_npz
from diffusion_jax.runs.console import ProgressBar, log
from diffusion_jax.storage import locations
from diffusion_jax.storage.locks import locked

__all__ = ["ChunkStore"]

_LOCKS = contextlib.ExitStack()  # held until the program ends: chunks outlive the object that wrote them


class ChunkStore:
    """Numbered chunks of arrays, one .npz each, in a separate directory. Process 0 writes, every process reads.

    finished: the numbers of the chunks that existed when the store was opened.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
        self._lock = _LOCKS.enter_context(contextlib.ExitStack())
        self._lock.enter_context(locked(directory / ".lock", "is already running this command"))
        stems = broadcast_from_process_0(lambda: [path.stem for path in directory.glob("*.npz")])
        self.finished = {int(stem) for stem in stems if stem.isdecimal()}

    def fill(
        self,
        title: str,
        total: int,
        batch_size: int,
        compute: Callable[[int], Mapping[str, np.ndarray]],
        stall_timeout: float,
    ) -> int:
        """Computes and saves the batches of `total` examples that are missing; every process calls this.

        title: of the progress bar. compute: returns the arrays of batch i. Returns: the number of batches.
        """
        num_batches = -(-total // batch_size)
        with ProgressBar(title, total, min(len(self.finished) * batch_size, total)) as bar:
            missing = [i for i in range(num_batches) if i not in self.finished]
            if missing:
                log("Compiling the program and computing the first batch ...")
            for i in watch_batches(missing, stall_timeout):
                self.save(i, **compute(i))
                bar.update(min((i + 1) * batch_size, total))
        return num_batches

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

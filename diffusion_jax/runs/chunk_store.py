"""Finished batches of a long command, stored on disk so that a rerun of the command continues after them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from diffusion_jax.distributed.processes import broadcast_from_process_0, watch_batches
from diffusion_jax.files import save_npz
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs.console import ProgressBar, log

__all__ = ["ChunkStore"]


class ChunkStore:
    """Numbered chunks of arrays, one .npz each, in a separate directory. Process 0 writes, every process reads.

    The directory is locked until `delete`, or as long as the object exists.

    finished: the numbers of the chunks that existed when the store was opened.
    """

    def __init__(self, directory: RunDir):
        self._directory, self._lock = directory, contextlib.ExitStack()
        broadcast_from_process_0(lambda: directory.path.mkdir(parents=True, exist_ok=True))
        self._lock.enter_context(directory.locked("is already running this command"))
        stems = broadcast_from_process_0(lambda: [path.stem for path in directory.path.glob("*.npz")])
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
            path = self._directory / f"{i}.npz"
            save_npz(path, arrays)
            self._directory.upload(path)

    def load(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of chunk i."""
        with np.load(self._directory.fetch(self._directory / f"{i}.npz")) as arrays:
            return dict(arrays)

    def delete(self) -> None:
        """Deletes all chunks; call it when the result files are written."""
        self._lock.close()
        self._directory.delete(self._directory.path)

"""Batches of a training run on the devices, one or several steps at a time."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.termination import EXIT_PEER_LOST
from diffusion_jax.errors import UserError
from diffusion_jax.runs.console import log

__all__ = ["BatchLoader"]


class BatchLoader:
    """Loads the batches from `step` on and places them on the devices.

    If the images are not in memory, other processes read ahead; leaving the context ends them.
    """

    def __init__(self, config: ConfigDict, program: training.TrainingProgram, source: data.Source, step: int):
        self._options, self._mesh = config.training, program.mesh
        rows = sharding.process_rows(self._options.batch_size, program.mesh)
        batches = data.Batches(source, config.seed, self._options.batch_size, self._options.num_steps, rows)
        self._workers = 0 if data.is_in_memory(source) else config.data.workers
        self._stream = data.stream(batches, step, self._workers)
        self._can_scan = program.train_steps is not None
        if self._options.steps_per_call > 1 and not self._can_scan:
            steps = self._options.steps_per_call
            log(f"On the CPU, the {steps} steps of a call run one at a time, which is faster there.")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_) -> None:
        if self._workers:  # otherwise their shared memory is reported as leaked
            self._stream.close()

    def next(self, step: int) -> tuple[Any, int]:
        """The next batch and the number of steps it is for.

        Several steps make one call if they end at a multiple of `steps_per_call`, so that a rerun with another
        `steps_per_call` skips no interval; the steps up to the first multiple, and those left at the end, are single.
        """
        count = self._options.steps_per_call
        if not self._can_scan or step % count or step + count > self._options.num_steps:
            return self._place(self._read(), 0), 1
        batches = [self._read() for _ in range(count)]
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), 1), count

    def _read(self):
        """One batch of this process. Raises: UserError if a process that decodes images was killed."""
        try:
            return next(self._stream)
        except RuntimeError as error:  # Grain's
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                "a process that reads the data was killed, possibly for lack of memory: reduce data.workers and rerun the "
                "same command to resume from the last checkpoint",
                EXIT_PEER_LOST,
            ) from error

    def _place(self, batch, leading_axes: int):
        by_rows = sharding.batch_sharding(self._mesh, leading_axes)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(by_rows, leaf), batch)

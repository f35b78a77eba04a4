"""The metrics of a training run: to its work directory and, if its config says so, to experiment trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.config import flatten
from diffusion_jax.errors import UserError
from diffusion_jax.runs.console import log
from diffusion_jax.runs.metrics_files import MetricsWriter, TensorBoardWriter, open_lines
from diffusion_jax.runs.trackers import TRACKERS, open_tracker
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.storage.locations import find_mirror

__all__ = ["RunMetrics", "check_writers"]

_SECONDS_BETWEEN_UPLOADS = 60.0  # of lines and events to a bucket


def check_writers(config: ConfigDict) -> None:
    """Raises: UserError for a tracker of `logging.writers` whose package is not installed."""
    for name in config.logging.writers:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.writers has {name!r}, which is not installed: pip install '.[trackers]', or leave it out"
            )


class RunMetrics:
    """Writes metrics to metrics.jsonl and to the writers of `logging.writers`.

    The files are first truncated to the step that a launch starts from. Raises: UserError with exit code 1 if a file cannot
    be written; trackers never raise.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, step: int):
        self._workdir, self._is_mirrored, self._last_flush = workdir, find_mirror(workdir) is not None, time.monotonic()
        self._writers: list[MetricsWriter] = []
        leaves = flatten(to_dict(config))
        with self._write_errors():
            self._writers.append(open_lines(workdir, step))
            if "tensorboard" in config.logging.writers:
                self._writers.append(TensorBoardWriter(workdir, step, leaves))
        for name in config.logging.writers:
            if name in TRACKERS:
                self._writers.append(open_tracker(name, workdir, config.logging.project, leaves, log))

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the first error is the one to report
                raise

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the logs in {self._workdir} ({error}); is the disk full? The checkpoints are kept: free some "
                "space and rerun the same command to resume from the newest",
                exit_code=1,
            ) from error

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers by name."""
        with self._write_errors():
            for writer in self._writers:
                writer.write_scalars(step, scalars)
        if self._is_mirrored and time.monotonic() - self._last_flush > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        """Writes a uint8 image [H, W, C]. caption: what it shows."""
        with self._write_errors():
            for writer in self._writers:
                writer.write_images(step, {name: image[None]}, caption)

    def flush(self) -> None:
        """Flushes the files to disk: call it before the checkpoint from which a rerun would continue."""
        self._last_flush = time.monotonic()
        with self._write_errors():
            for writer in self._writers:
                writer.flush()

    def close(self) -> None:
        """Flushes and closes all writers."""
        with self._write_errors(), contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            self.flush()

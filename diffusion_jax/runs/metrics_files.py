"""The metrics of a run in its work directory: metrics.jsonl, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.files import atomic_write, write_text

__all__ = ["MetricsLines", "TensorBoardWriter", "read_metrics"]

_LINES = "metrics.jsonl"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: dictionaries with "step" and the means since the line before; [] without the file.

    A last line that a killed run did not finish is left out.
    """
    path, lines = workdir / _LINES, []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class MetricsLines:
    """Appends to metrics.jsonl, after its lines beyond `step`, from which a launch starts, are removed."""

    def __init__(self, workdir: pathlib.Path, step: int):
        path = workdir / _LINES
        if path.exists():
            kept = [line for line in read_metrics(workdir) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Does nothing: pictures are files of their own."""

    def flush(self) -> None:
        """Flushes the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard events, after those beyond `step`, from which a launch starts, are removed."""

    def __init__(self, workdir: pathlib.Path, step: int):
        import tensorflow as tf  # clu's writer needs it; imported here because it takes seconds

        tf.config.set_visible_devices([], "GPU")  # TensorFlow must not take the accelerator's memory
        from clu import metric_writers

        self._library_error = tf.errors.OpError
        with self._as_os_errors():
            _truncate_events(tf, workdir, step)
            self._events = metric_writers.SummaryWriter(str(workdir))

    @contextlib.contextmanager
    def _as_os_errors(self):
        """Raises TensorFlow's errors of file systems as OSError."""
        try:
            yield
        except self._library_error as error:
            raise OSError(str(error).strip().splitlines()[-1].strip()) from error

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point for each value."""
        with self._as_os_errors():
            self._events.write_scalars(step, dict(scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images uint8 [N, H, W, C]."""
        with self._as_os_errors():
            self._events.write_images(step, dict(images))

    def flush(self) -> None:
        """Flushes the events to disk."""
        with self._as_os_errors():
            self._events.flush()

    def close(self) -> None:
        """Closes the file of events."""
        with self._as_os_errors():
            self._events.close()


def _truncate_events(tf, workdir: pathlib.Path, step: int) -> None:
    for leftover in workdir.glob("events.out.tfevents.*.partial.*"):  # of a launch that was killed in this function
        leftover.unlink()
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        records = []
        try:
            for record in tf.compat.v1.io.tf_record_iterator(str(path)):
                if tf.compat.v1.Event.FromString(record).step <= step:
                    records.append(record)
        except tf.errors.DataLossError:  # the last record of a killed run may be incomplete
            pass
        with atomic_write(path) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for record in records:
                writer.write(record)

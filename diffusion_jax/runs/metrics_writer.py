"""metrics.jsonl and TensorBoard events of a training run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, write_text

__all__ = ["MetricsWriter", "import_writers"]


def import_writers() -> None:
    """Starts a thread that imports the libraries of `MetricsWriter`, on process 0 only.

    That takes seconds, which overlap with a compilation.
    """
    if jax.process_index() != 0:
        return

    def import_library():
        with contextlib.suppress(ImportError):  # raised again when the writers are used
            importlib.import_module("clu.metric_writers")

    threading.Thread(target=import_library, daemon=True).start()


class MetricsWriter:
    """Appends to metrics.jsonl and to TensorBoard events. Both are first truncated to the step that a launch starts from.

    Raises: UserError with exit code 1 if a file cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        import tensorflow as tf  # clu's writers need it; imported here because it takes seconds

        tf.config.set_visible_devices([], "GPU")  # TensorFlow must not take the accelerator's memory
        from clu import metric_writers

        self._path, self._library_error = workdir / "metrics.jsonl", tf.errors.OpError
        with self._write_errors():
            self._truncate_lines(step)
            self._truncate_events(tf, workdir, step)
            self._events = metric_writers.SummaryWriter(str(workdir))
            self._lines = self._path.open("a")

    def _truncate_lines(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # the last line of a killed run may be incomplete
                continue
        write_text(self._path, "".join(kept))

    @staticmethod
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

    def __enter__(self) -> MetricsWriter:
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
        except (OSError, self._library_error) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"cannot write the logs in {self._path.parent} ({reason}); is the disk full? The checkpoints are kept: free "
                "some space and rerun the same command to resume from the newest",
                exit_code=1,
            ) from error

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl and one TensorBoard point for each value."""
        with self._write_errors():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
            self._events.write_scalars(step, dict(values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 image [H, W, C] to TensorBoard."""
        with self._write_errors():
            self._events.write_images(step, {name: image[None]})

    def flush(self) -> None:
        """Flushes both files to disk: call it before the checkpoint from which a rerun would continue."""
        with self._write_errors():
            self._events.flush()
            self._lines.flush()
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes both files."""
        with self._write_errors():
            try:
                self.flush()
            finally:
                self._events.close()
                self._lines.close()

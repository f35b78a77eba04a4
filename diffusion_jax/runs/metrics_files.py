"""The metrics of a run: lines of JSON and TensorBoard events in its work directory, and trackers that its config names.

A local directory has metrics.jsonl, which grows. Objects of a bucket cannot grow, so each flush writes the new lines to
metrics/<last step>.jsonl, and begins a new file of events.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.files import write_text
from diffusion_jax.runs.trackers import TRACKERS, Trackers
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.storage import locations
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.storage.locations import EVENTS, find_mirror

__all__ = ["RunMetrics", "check_writers", "read_metrics"]

_LINES, _PARTS = "metrics.jsonl", "metrics"
_SECONDS_BETWEEN_UPLOADS = 60.0  # of lines and events to a bucket
_TENSORBOARD_GROUPS = {
    **dict.fromkeys(("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "mse", "vlb", "accuracy"), "loss"),
    **dict.fromkeys(("images_per_second", "seconds_left", "step_seconds", "goodput"), "time"),
    **dict.fromkeys(("compute", "data_wait", "logging"), "time"),
    **dict.fromkeys(("grad_norm", "param_norm", "learning_rate"), "optimizer"),
}  # the others are metrics of samples


def check_writers(config: ConfigDict) -> None:
    """Raises: UserError for a tracker of `logging.writers` whose package is not installed."""
    for name in config.logging.writers:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.writers has {name!r}, which is not installed: pip install '.[trackers]', or leave it out"
            )


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """Returns the metrics of a run: dictionaries with "step" and the means since the line before; [] if nothing is logged.

    workdir: a path, or the URL of a work directory in a bucket. A last line that a killed run did not finish is left out.
    """
    lines = [line for path in _files(local_path(workdir)) for line in _read_lines(path)]
    return sorted(lines, key=lambda line: line["step"])


def _files(workdir: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in (workdir / _LINES, *sorted((workdir / _PARTS).glob("*.jsonl"))) if path.exists()]


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _as_text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


class RunMetrics:
    """Writes the metrics of a launch to metrics.jsonl and to the writers of `logging.writers`.

    step: where the launch starts: later lines are removed first, so that each step has its lines once. Raises: UserError
    with exit code 1 if a file cannot be written; trackers never raise.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, step: int):
        self._workdir, self._is_mirrored, self._last_flush = workdir, find_mirror(workdir) is not None, time.monotonic()
        self._waiting: list[dict[str, Any]] = []  # lines that are not written yet
        stored, names = to_dict(config), config.logging.writers
        self._writers: list[_TensorBoardEvents | Trackers] = []
        with self._write_errors():
            for path in _files(workdir):
                text = _as_text([line for line in _read_lines(path) if line["step"] <= step])
                if text != path.read_text():
                    write_text(path, text)
            if "tensorboard" in names:
                self._writers.append(_TensorBoardEvents(workdir, step, stored))
        trackers = [name for name in names if name in TRACKERS]
        self._writers.append(Trackers(trackers, workdir, config.logging.project, stored))

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(*[UserError] if kind else []):  # the first error is the one to report
            self.close()

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
            self._waiting.append({"step": step, **scalars})
            if not self._is_mirrored:
                self._append(self._workdir / _LINES)
            for writer in self._writers:
                writer.write_scalars(step, scalars)
        if self._is_mirrored and time.monotonic() - self._last_flush > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def _append(self, path: pathlib.Path) -> None:
        with path.open("a") as file:
            file.write(_as_text(self._waiting))
            self._waiting = []

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        """Writes a uint8 image [H, W, C]. caption: what it shows."""
        with self._write_errors():
            for writer in self._writers:
                writer.write_image(step, name, image, caption)

    def flush(self) -> None:
        """Makes sure that what was written survives a kill: call it before the checkpoint from which a rerun continues."""
        self._last_flush = time.monotonic()
        with self._write_errors():
            if not self._is_mirrored:
                with (self._workdir / _LINES).open("a") as file:
                    os.fsync(file.fileno())
            elif self._waiting:
                path = self._workdir / _PARTS / f"{self._waiting[-1]['step']:08d}.jsonl"
                path.parent.mkdir(exist_ok=True)
                self._append(path)
                locations.written(path)
            for writer in self._writers:
                writer.flush()

    def close(self) -> None:
        """Flushes and closes all writers."""
        with self._write_errors(), contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            self.flush()


class _TensorBoardEvents:
    """Writes event files with TensorBoard alone: the import of TensorFlow takes seconds.

    The first event of a launch makes TensorBoard ignore the events of earlier launches beyond `step`.
    """

    def __init__(self, workdir: pathlib.Path, step: int, config: Mapping[str, Any]):
        from tensorboard.compat.proto import event_pb2, summary_pb2  # imported here because other modes do not need it
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._workdir, self._is_mirrored = workdir, find_mirror(workdir) is not None
        self._open()
        self._write(step + 1, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
        self._write(step, summary=text_pb("config", f"```json\n{json.dumps(config, indent=2)}\n```"))

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = self._workdir / f"{EVENTS}{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(self._path.open("wb"))
        self._write(0, file_version="brain.Event:2")
        self._is_empty = True

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._is_empty = False

    def _write_values(self, step: int, values: list[dict[str, Any]]) -> None:
        summary = self._summary.Summary
        self._write(step, summary=summary(value=[summary.Value(**value) for value in values]))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        tags = {name: f"{_TENSORBOARD_GROUPS.get(name, 'metrics')}/{name}" for name in scalars}
        self._write_values(step, [{"tag": tags[name], "simple_value": value} for name, value in scalars.items()])

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if channels == 1 else image).save(png, "PNG")
        size = {"height": height, "width": width, "colorspace": channels}
        self._write_values(step, [{"tag": name, "image": size | {"encoded_image_string": png.getvalue()}}])

    def flush(self) -> None:
        self._records.flush()
        if self._is_mirrored and not self._is_empty:
            self.close()
            self._open()

    def close(self) -> None:
        self._records.close()
        if self._is_mirrored:
            if not self._is_empty:
                locations.written(self._path)
            self._path.unlink()

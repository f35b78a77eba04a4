"""The metrics of a run in its work directory: lines of JSON, and TensorBoard events.

A local directory has metrics.jsonl, which grows. Objects of a bucket cannot grow, so there each flush writes a new one:
metrics/<last step>.jsonl, and a file of events whose name ends with the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from diffusion_jax.files import write_text
from diffusion_jax.storage import locations
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.storage.locations import EVENTS, Mirror, find_mirror

__all__ = ["MetricsLines", "MetricsWriter", "TensorBoardWriter", "open_lines", "read_metrics", "tensorboard_tag"]

_LINES, _PARTS = "metrics.jsonl", "metrics"
_TENSORBOARD_GROUPS = {
    **dict.fromkeys(("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "mse", "vlb", "accuracy"), "loss"),
    **dict.fromkeys(("images_per_second", "seconds_left", "step_seconds", "goodput"), "time"),
    **dict.fromkeys(("compute", "data_wait", "logging"), "time"),
    **dict.fromkeys(("grad_norm", "param_norm", "learning_rate"), "optimizer"),
}  # the others are metrics of samples


class MetricsWriter(Protocol):
    """One destination of metrics."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers."""
        ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Writes images uint8 [N, H, W, C]. caption: what they show."""
        ...

    def flush(self) -> None:
        """Makes sure that what was written survives a kill."""
        ...

    def close(self) -> None:
        """Ends the writer."""
        ...


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """The metrics of a run: dictionaries with "step" and the means since the line before; [] if it has logged nothing.

    workdir: a path, or the URL of a work directory in a bucket. A last line that a killed run did not finish is left out.
    """
    directory = local_path(workdir)
    return [line for path in [directory / _LINES, *_parts(directory)] for line in _read_lines(path)]


def _parts(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted((workdir / _PARTS).glob("*.jsonl"))


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _as_text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def open_lines(workdir: pathlib.Path, step: int) -> MetricsWriter:
    """The writer of lines of JSON for a directory, after lines beyond `step`, from which a launch starts, are removed."""
    return _MetricsParts(workdir, step) if find_mirror(workdir) else MetricsLines(workdir, step)


class MetricsLines:
    """Appends to metrics.jsonl, after its lines beyond `step`, from which a launch starts, are removed."""

    def __init__(self, workdir: pathlib.Path, step: int):
        path = workdir / _LINES
        if path.exists():
            write_text(path, _as_text([line for line in _read_lines(path) if line["step"] <= step]))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Does nothing: pictures are files of their own."""

    def flush(self) -> None:
        """Flushes the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _MetricsParts:
    """Writes the lines since the last flush to a new file of metrics/, named by their last step."""

    def __init__(self, workdir: pathlib.Path, step: int):
        self._directory, self._lines = workdir / _PARTS, []
        self._directory.mkdir(exist_ok=True)
        for path in _parts(workdir):
            lines = _read_lines(path)
            if any(line["step"] > step for line in lines):
                self._lines += [line for line in lines if line["step"] <= step]
                path.unlink()
                locations.removed(path)
        self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keeps one line for the next flush."""
        self._lines.append({"step": step, **scalars})

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Does nothing: pictures are files of their own."""

    def flush(self) -> None:
        """Writes and uploads the lines since the last flush."""
        if not self._lines:
            return
        name = f"{self._lines[-1]['step']:08d}"
        count = len(list(self._directory.glob(f"{name}*.jsonl")))  # other lines of this step
        write_text(self._directory / (f"{name}_{count}.jsonl" if count else f"{name}.jsonl"), _as_text(self._lines))
        self._lines = []

    def close(self) -> None:
        """Writes what is left."""
        self.flush()


def tensorboard_tag(name: str) -> str:
    """The tag of a number of the log, in the groups of TensorBoard: loss/, time/, optimizer/ and metrics/."""
    return f"{_TENSORBOARD_GROUPS.get(name, 'metrics')}/{name}"


class TensorBoardWriter:
    """Writes TensorBoard events, after those beyond `step`, from which a launch starts, are removed.

    leaves: the config by full name, which becomes a text, and, in a run that starts at step 0, the hyperparameters.
    """

    def __init__(self, workdir: pathlib.Path, step: int, leaves: Mapping[str, Any] | None = None):
        from diffusion_jax.runs import event_files  # imported here because tensorboard is needed for this writer only

        self._workdir, self._mirror = workdir, find_mirror(workdir)
        self._open = lambda: event_files.EventFile(workdir)
        self._last_step: int | None = None  # of the events that are not uploaded yet
        if self._mirror:
            _delete_events(self._mirror, step)
        else:
            event_files.truncate_events(workdir, step)
        self._events = self._open()
        if leaves:
            self._write_config(step, leaves)

    def _write_config(self, step: int, leaves: Mapping[str, Any]) -> None:
        """Writes the config as a table in Markdown, and as hyperparameters, which have few types."""
        rows = [f"| {name} | {_in_markdown(value)} |" for name, value in leaves.items()]
        self._events.text("config", "\n".join(["| leaf | value |", "|---|---|", *rows]), step)
        if step == 0:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in leaves.items()}
            self._events.hyperparameters(plain)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point for each value."""
        self._last_step = step
        for name, value in scalars.items():
            self._events.scalar(tensorboard_tag(name), value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Writes images uint8 [N, H, W, C]. caption: what they show."""
        self._last_step = step
        for name, batch in images.items():
            self._events.images(name, batch, step, caption)

    def flush(self) -> None:
        """Flushes the events to disk; to a bucket, uploads them and begins a new file."""
        self._events.flush()
        if self._mirror and self._last_step is not None:
            self._events.close()
            self._upload(self._mirror)
            self._events = self._open()

    def close(self) -> None:
        """Closes the file of events."""
        self._events.close()
        if self._mirror and self._last_step is not None:
            self._upload(self._mirror)

    def _upload(self, mirror: Mirror) -> None:
        for path in self._workdir.glob(f"{EVENTS}*"):
            path = path.rename(path.with_name(f"{path.name}.{self._last_step:08d}"))
            mirror.upload(path)
            path.unlink()
        self._last_step = None


def _in_markdown(value: Any) -> str:
    """A value as code in a cell of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return f"`{text}`" if text else ""


def _delete_events(mirror: Mirror, step: int) -> None:
    """Deletes the events of a bucket beyond a step."""
    steps = {name: name.rpartition(".")[2] for name in mirror.store.list(EVENTS)}
    mirror.store.delete([name for name, last in steps.items() if last.isdecimal() and int(last) > step])

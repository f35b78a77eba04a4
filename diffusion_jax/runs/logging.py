"""Logging of a run: JSON lines, TensorBoard events, experiment trackers, and goodput (how launches spend their wall time).

In a local directory, new lines are appended to metrics.jsonl. Bucket objects cannot be appended to, so each flush writes the
new lines to metrics/<last step>.jsonl and starts a new event file. goodput.json has one entry for each launch; the launch
rewrites its entry once a minute.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.config import flatten
from diffusion_jax.console import log
from diffusion_jax.distributed.devices import describe_environment
from diffusion_jax.errors import (
    DiffusionJaxError,
    LeaseLostError,
    StorageError,
    UserError,
    as_user_error,
    describe_exception,
    shorten,
)
from diffusion_jax.files import atomic_write, check_in_place, with_urls
from diffusion_jax.functions import find_function
from diffusion_jax.run_dir import LINES, BucketRunDir, RunDir
from diffusion_jax.runs.workdir import to_dict
from diffusion_jax.storage.downloads import EVENTS, local_path
from diffusion_jax.untrusted import check_regular, parse_json, read_json

_PARTS = "metrics"
_LINE_BYTES, _LINES_BYTES = 2**16, 2**30  # the largest line, and the most memory of all lines
_SECONDS_BETWEEN_UPLOADS = 60.0  # between uploads of lines and events to a bucket


class Scalar(NamedTuple):
    """How a number of the log is shown.

    group: the section in TensorBoard. chart, unit: title and unit of the chart in the report, "" for no chart. label: the
    name of the line in the chart. is_log: whether the chart first shows a logarithmic axis.
    """

    group: str
    chart: str
    unit: str
    label: str
    is_log: bool = False


_BY_LEVEL, _TIME_SPENT = (
    ("loss", "Loss by noise level", "loss"),
    ("time", "Where the time goes", "fraction of the time"),
)
SCALARS: dict[str, Scalar] = {
    "loss": Scalar("loss", "Loss", "loss", "loss", True),
    "loss_q1": Scalar(*_BY_LEVEL, "least noise", True),
    "loss_q2": Scalar(*_BY_LEVEL, "less noise", True),
    "loss_q3": Scalar(*_BY_LEVEL, "more noise", True),
    "loss_q4": Scalar(*_BY_LEVEL, "most noise", True),
    "mse": Scalar("loss", "Squared error of the prediction", "mse", "mse", True),
    "vlb": Scalar("loss", "Terms of the variational bound", "bits per dimension", "vlb", True),
    "accuracy": Scalar("loss", "Accuracy of the classifier", "fraction", "accuracy"),
    "learning_rate": Scalar("optimizer", "Learning rate", "learning rate", "learning rate"),
    "grad_norm": Scalar("optimizer", "Gradient norm", "L2 norm", "gradient", True),
    "param_norm": Scalar("optimizer", "Parameter norm", "L2 norm", "parameters"),
    "images_per_second": Scalar("time", "Speed", "images (examples) per second", "images per second"),
    "step_seconds": Scalar("time", "Seconds per step", "seconds", "seconds per step"),
    "seconds_left": Scalar("time", "", "seconds", "time left"),
    "compute": Scalar(*_TIME_SPENT, "train steps"),
    "data_wait": Scalar(*_TIME_SPENT, "waiting for data"),
    "logging": Scalar(*_TIME_SPENT, "lines, pictures and checkpoints"),
    "goodput": Scalar("time", "Goodput", "fraction of the wall time", "steps that count, since the first launch"),
}


def describe_scalar(name: str) -> Scalar:
    """Returns the entry in `SCALARS`; for other names, such as a sample metric or loss/NAME, an entry with its own chart."""
    return SCALARS.get(name) or Scalar("metrics", name.replace("_", " "), name, name)


def check_writers(config: ConfigDict) -> None:
    """Raises: UserError for a writer in `logging.writers` that cannot be imported."""
    for name in config.logging.writers:
        if ":" in name:
            with as_user_error("config"):
                find_function(name, "logging.writers")
        elif importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.writers has {name!r}, which is not installed: pip install '.[trackers]', or leave it out"
            )


def read_metrics(workdir: RunDir | str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the metrics of a run: dictionaries with "step" and means since the previous line; [] if nothing is logged.

    workdir: a path, or the URL of a work directory in a bucket. An incomplete last line of a killed run is skipped.
    Lines above 64 KiB are skipped with a note. Above about 1 GiB, evenly spread lines are returned, with a note.
    """
    lines: list[dict[str, Any]] = []
    every, size = 1, 0
    pairs = itertools.chain.from_iterable(map(_read_lines, _files(local_path(workdir, _PARTS))))
    for i, (text, line) in enumerate(pairs):
        if line is not None and i % every == 0:
            lines.append(line)
            size += len(text) + 250 + 150 * len(line)  # about the line's memory
        if size > _LINES_BYTES:
            lines, every, size = lines[::2], 2 * every, size // 2
    if every > 1:
        log(f"Note: the log of {workdir} is large, so about one of {every} lines is used.")
    return sorted(lines, key=lambda line: line["step"])


def _files(workdir: RunDir | pathlib.Path) -> list[pathlib.Path]:
    return [path for path in (workdir / LINES, *sorted((workdir / _PARTS).glob("*.jsonl"))) if path.exists()]


def _read_lines(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields (bytes, dictionary) of each line; (bytes, None) for pieces of a long line, and for lines that are no metrics."""
    check_regular(path)
    long_pieces, is_start = 0, True
    with path.open("rb") as file:
        while text := file.readline(_LINE_BYTES):
            is_end, line = text.endswith(b"\n"), None
            if is_start and (is_end or len(text) < _LINE_BYTES) and not text.isspace():
                with contextlib.suppress(ValueError):
                    found = parse_json(text.decode(errors="replace"))
                    is_flat = not any(isinstance(value, list | dict) for value in found.values())
                    if is_flat and isinstance(found.get("step"), int) and abs(found["step"]) < 2**53:
                        line = found
            elif not text.isspace():
                long_pieces += is_start
            is_start = is_end
            yield text, line
    if long_pieces:
        log(f"Note: {path} has {long_pieces} lines above {_LINE_BYTES:,} bytes, which are left out.")


def _as_text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


class RunMetrics:
    """Writes the metrics of a launch to metrics.jsonl and to each writer in `logging.writers`; on process 0 only.

    step: the first step of the launch; lines after this step are removed first, so that no step is logged twice. A writer
    that fails is dropped, and one line is logged. Raises: UserError with exit code 1 if a line cannot be written.
    """

    def __init__(self, config: ConfigDict, workdir: RunDir, step: int):
        self._workdir, self._last_flush = workdir, time.monotonic()
        self._in_bucket, self._is_writer = isinstance(workdir, BucketRunDir), jax.process_index() == 0
        self._waiting: list[dict[str, Any]] = []  # lines that are not written yet
        with self._write_errors():
            for path in _files(workdir) if self._is_writer else ():
                check_in_place(path)
                pairs = _read_lines(path)
                if any(
                    line is None or line["step"] > step or _as_text([line]).encode() != text for text, line in pairs
                ):
                    with atomic_write(path) as file:
                        kept = (line for _, line in _read_lines(path) if line is not None and line["step"] <= step)
                        file.writelines(_as_text([line]).encode() for line in kept)
                    workdir.upload(path)
        names = config.logging.writers if self._is_writer else ()
        self._writers = _Writers(config, dict.fromkeys(names, workdir), step)

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(*[UserError] if kind else []):  # only the first error is reported
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
        """Writes {name: number} of a step."""
        if not self._is_writer:
            return
        self._waiting.append({"step": step, **scalars})
        if not self._in_bucket:
            self._append(self._workdir / LINES)
        self._writers.call("write_scalars", step, scalars)
        if self._in_bucket and time.monotonic() - self._last_flush > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def _append(self, path: pathlib.Path) -> None:
        with self._write_errors(), path.open("a") as file:
            file.write(_as_text(self._waiting))
            self._waiting = []

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        """Writes a uint8 image [H, W, C]. caption: a title for the image."""
        self._writers.call("write_image", step, name, pictures.to_pillow(image), caption)

    def flush(self) -> None:
        """Makes the written lines survive a kill. Call this method before saving a checkpoint."""
        if not self._is_writer:
            return
        self._last_flush = time.monotonic()
        with self._write_errors():
            if not self._in_bucket:
                with (self._workdir / LINES).open("a") as file:
                    os.fsync(file.fileno())
            elif self._waiting:
                path = self._workdir / _PARTS / f"{self._waiting[-1]['step']:08d}.jsonl"
                path.parent.mkdir(exist_ok=True)
                self._append(path)
                self._workdir.upload(path)
        self._writers.call("flush")

    def close(self) -> None:
        """Flushes, and closes all writers."""
        try:
            self.flush()
        finally:
            self._writers.call("close")


def write_evaluation(config: ConfigDict, workdir: RunDir, step: int | None, scalars: Mapping[str, float]) -> None:
    """Writes results of `--mode=evaluate` to each writer in `logging.writers`, as evaluation/NAME at the checkpoint's step.

    TensorBoard's events are in the subdirectory evaluation/, so that TensorBoard still reads new events of a training launch.
    """
    own = {"tensorboard": workdir.subdirectory("evaluation")}
    writers = _Writers(config, {name: own.get(name, workdir) for name in config.logging.writers}, step or 0)
    writers.call("write_evaluation", step or 0, {f"evaluation/{name}": value for name, value in scalars.items()})
    writers.call("close")


class _Writers:
    """The writers of a launch. A writer that fails is dropped, and one line is logged."""

    def __init__(self, config: ConfigDict, directories: Mapping[str, RunDir], step: int):
        self._writers: dict[str, Any] = {}
        for name, directory in directories.items():
            with self._drop_if_it_fails(name):
                directory.path.mkdir(parents=True, exist_ok=True)
                make = find_function(name, "logging.writers", WRITERS)
                self._writers[name] = make(directory, to_dict(config), step)

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writers.pop(name, None)
            reason = shorten(" ".join(describe_exception(error, with_type=True).split()), 300)
            log(f"Note: {name} failed ({reason}): the run continues without it.")

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of each writer. A user's tracker needs only the method `write_scalars`."""
        for name, writer in list(self._writers.items()):
            with self._drop_if_it_fails(name):
                if method == "write_evaluation" and not hasattr(writer, method):
                    writer.write_scalars(*arguments)
                elif hasattr(writer, method) or method == "write_scalars":
                    getattr(writer, method)(*arguments)


# ---- Writers. Arguments: the work directory, the config as JSON values, and the first step of the launch.


class _TensorBoard:
    """Writes event files with TensorBoard alone, because importing TensorFlow takes seconds.

    A launch's first event makes TensorBoard ignore earlier launches' events beyond `step`.
    """

    def __init__(self, workdir: RunDir, config: Mapping[str, Any], step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2  # imported here because other modes do not need it
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._workdir, self._in_bucket = workdir, isinstance(workdir, BucketRunDir)
        self._open()
        self._write(step + 1, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
        self._write(step, summary=text_pb("config", f"```json\n{json.dumps(config, indent=2)}\n```"))

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = self._workdir / f"{EVENTS}{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(self._path.open("xb"))
        self._write(0, file_version="brain.Event:2")
        self._is_empty = True

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._is_empty = False

    def _write_values(self, step: int, values: list[dict[str, Any]]) -> None:
        summary = self._summary.Summary
        self._write(step, summary=summary(value=[summary.Value(**value) for value in values]))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        tags = {name: name if "/" in name else f"{describe_scalar(name).group}/{name}" for name in scalars}
        self._write_values(step, [{"tag": tags[name], "simple_value": value} for name, value in scalars.items()])

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        png = io.BytesIO()
        image.save(png, "PNG")
        size = {"height": image.height, "width": image.width, "colorspace": len(image.getbands())}
        self._write_values(step, [{"tag": name, "image": size | {"encoded_image_string": png.getvalue()}}])

    def flush(self) -> None:
        self._records.flush()
        if self._in_bucket and not self._is_empty:
            self.close()
            self._open()

    def close(self) -> None:
        self._records.close()
        if self._in_bucket:
            if not self._is_empty:
                self._workdir.upload(self._path)
            self._path.unlink()


_OPEN_SECONDS = 25.0  # for W&B to connect
_MLFLOW_LIMITS = {"MAX_RETRIES": "2", "TIMEOUT": "20"}  # by default, an unreachable server delays the start for minutes


def _tracked_run(workdir: RunDir, tracker: str, create: Callable[[], str]) -> str:
    """Returns the tracker's run id in trackers.json, so that a rerun continues the same run; stores a new id if missing."""
    path = workdir / "trackers.json"
    stored = read_json(path) if path.exists() else {}
    if tracker not in stored:
        stored[tracker] = create()
        workdir.write_json("trackers.json", stored)
    return stored[tracker]


class _WandB:
    """Weights & Biases. WANDB_API_KEY is the key. WANDB_MODE=offline writes to the work directory (bucket: to WANDB_DIR)."""

    _package = "wandb"

    def __init__(self, workdir: RunDir, config: Mapping[str, Any], step: int):
        self._module: Any = importlib.import_module(self._package)
        run_id = _tracked_run(workdir, self._package, lambda: uuid.uuid4().hex[:8])
        options = self._options(workdir, workdir.path.absolute().name, run_id)
        project = config["logging"]["project"]
        self._run = self._module.init(project=project, config=flatten(config), resume="allow", **options)

    def _options(self, workdir: RunDir, title: str, run_id: str) -> dict[str, Any]:
        settings = self._module.Settings(silent=True, console="off", disable_git=True, init_timeout=_OPEN_SECONDS)
        directory = None if isinstance(workdir, BucketRunDir) else workdir.path  # mirrors of buckets are temporary
        return {"id": run_id, "name": title, "dir": directory, "settings": settings}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        # W&B drops values of a step that is not after the newest step, so the results have an axis of their own.
        self._run.define_metric("evaluation/*", step_metric="evaluation/step")
        self._run.log({**scalars, "evaluation/step": step})

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._module.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_WandB):
    """trackio, which has W&B's API. TRACKIO_DIR is its directory; TRACKIO_SPACE_ID names a Space to send metrics to."""

    _package = "trackio"

    def _options(self, workdir: RunDir, title: str, run_id: str) -> dict[str, Any]:
        options = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        return options | {"name": f"{title}-{run_id}", "space_id": os.environ.get("TRACKIO_SPACE_ID")}

    def write_evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        self.write_scalars(step, scalars)


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI names the server."""

    def __init__(self, workdir: RunDir, config: Mapping[str, Any], step: int):
        for name, value in _MLFLOW_LIMITS.items():
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()

        def create_run() -> str:
            project, title = config["logging"]["project"], workdir.path.absolute().name
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            run_id = self._client.create_run(experiment_id, run_name=title).info.run_id
            parameters = [
                self._mlflow.entities.Param(name, shorten(str(value), 500)) for name, value in flatten(config).items()
            ]
            for start in range(0, len(parameters), 100):  # a request holds at most 100
                self._client.log_batch(run_id, params=parameters[start : start + 100], synchronous=False)
            return run_id

        self._id = _tracked_run(workdir, "mlflow", create_run)
        self._client.update_run(self._id, status="RUNNING")
        self._has_image = False

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics, synchronous=False)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        if not self._has_image:  # logging an image makes MLflow read all metric files, and an empty file is an error
            self._mlflow.flush_async_logging()
            self._has_image = True
        self._client.log_image(self._id, image, f"{name}/{step:08d}.png")

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id)


WRITERS: dict[str, Callable[[RunDir, Mapping[str, Any], int], Any]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


# ---- Goodput

_GOODPUT = "goodput.json"
_SECONDS_BETWEEN_WRITES = 60.0
# How a launch spends its time. start: reading and checking. input: the loop waits for data. output: lines and pictures.
PARTS: tuple[str, ...] = ("train", "start", "compile", "restore", "save", "input", "output")


class LaunchTimes:
    """Measures how one launch spends its time, and writes goodput.json. clock: returns seconds since 1970.

    Time inside `measure(part)` counts for `part`. Other time counts for `start`, and after `begin` for `train`.
    """

    def __init__(self, workdir: RunDir, clock: Callable[[], float] = time.time):
        self._workdir, self._clock, self._start = workdir, clock, clock()
        self._seconds, self._part, self._since = dict.fromkeys(PARTS, 0.0), "start", self._start
        self._last_lap, self._written = dict(self._seconds), -math.inf
        self._launches: list[dict[str, Any]] = [{}]  # the last entry is this launch

    def begin(self, step: int, parameters: int = 0) -> None:
        """Sets the first step of the launch and the size of the network; from now on, unmeasured time counts for `train`."""
        this = {"start": self._start, "first_step": step, "last_step": step, "parameters": parameters}
        self._launches = [*read_launches(self._workdir), this | {"environment": describe_environment()}]
        self._count_as("train")

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts the time inside the block for `part`, except nested `measure` blocks."""
        outer = self._count_as(part)
        try:
            yield
        finally:
            self._count_as(outer)

    def _count_as(self, part: str) -> str:
        """Counts the time from now on for `part`. Returns: the previous part."""
        now, before = self._clock(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part up to now."""
        self._count_as(self._part)
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Returns the seconds of each part since the last call."""
        before, self._last_lap = self._last_lap, self.seconds()
        return {part: seconds - before[part] for part, seconds in self._last_lap.items()}

    def record(self, step: int, is_last: bool = False) -> None:
        """Records a finished step. Process 0 writes the file at most once a minute, and always if `is_last`."""
        if jax.process_index() != 0:
            return
        self._launches[-1]["last_step"] = step
        now = self._clock()
        if is_last or now - self._written > _SECONDS_BETWEEN_WRITES:
            self._launches[-1] |= {"end": now, "seconds": {part: round(s, 3) for part, s in self.seconds().items()}}
            self._workdir.write_json(_GOODPUT, self._launches)
            self._written = now

    def goodput(self) -> float:
        """Returns the goodput of the run up to now."""
        this = self._launches[-1] | {"end": self._clock(), "seconds": self.seconds()}
        return compute_goodput([*self._launches[:-1], this])[0]["train"]

    def stop(self, error: BaseException) -> None:
        """Records the error that ends the launch, except a StorageError or LeaseLostError. Write errors are ignored."""
        if isinstance(error, StorageError | LeaseLostError):
            return
        is_message = isinstance(error, DiffusionJaxError) or not isinstance(error, Exception)
        text = str(error) if is_message else f"{type(error).__name__}: {error}"
        self._launches[-1]["stopped_by"] = shorten(" ".join(with_urls(text).split()) or type(error).__name__, 300)
        with contextlib.suppress(Exception):
            self.record(self._launches[-1]["last_step"], is_last=True)


def read_launches(workdir: RunDir | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the entries of goodput.json: launches that finished a step or failed; [] if there are none."""

    def is_complete(launch: Any) -> bool:
        try:
            numbers = [launch[name] for name in ("start", "end", "first_step", "last_step")]
            return all(abs(number) < 2**53 for number in [*numbers, *(launch["seconds"][part] for part in PARTS)])
        except (LookupError, TypeError):  # an untrusted file may hold any values
            return False

    with contextlib.suppress(OSError, ValueError):
        return list(filter(is_complete, read_json(workdir / _GOODPUT, list)))
    return []


def compute_goodput(launches: list[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Returns ({part: fraction of the wall time}, wall seconds from the first launch to the end of the last launch).

    launches: the result of `read_launches`. The fractions sum to 1. train is the goodput: time in training steps that were
    kept. repeated: time in steps that a kill lost and a rerun computed again. idle: time between launches.
    """
    totals = {part: sum(launch["seconds"][part] for launch in launches) for part in PARTS}
    totals |= {"repeated": 0.0, "idle": 0.0}
    for launch, following in itertools.pairwise(launches):
        totals["idle"] += max(following["start"] - launch["end"], 0.0)
        if steps := launch["last_step"] - launch["first_step"]:
            lost = min(max(launch["last_step"] - following["first_step"], 0), steps)
            totals["repeated"] += launch["seconds"]["train"] * lost / steps
    totals["train"] -= totals["repeated"]
    wall = max(sum(totals.values()), 1e-9)
    return {part: seconds / wall for part, seconds in totals.items()}, wall

"""Experiment trackers: Weights & Biases, MLflow and trackio, each optional and never in the way of training.

A tracker writes in a thread of its own. One that fails, or does not keep up, is dropped with one line. Each names its run in
trackers.json of the work directory, so that a relaunch continues it, and skips the steps that it already has.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffusion_jax.errors import shorten
from diffusion_jax.files import write_text
from diffusion_jax.storage.locations import find_mirror

__all__ = ["TRACKERS", "BackgroundTracker", "Tracker", "TrackerRun", "open_tracker"]

_MAX_WAITING = 1000  # items in the queue of a tracker
_OPEN_SECONDS = 25.0  # for W&B to connect
_CLOSE_SECONDS = 30.0
_FILE_LOCK = threading.Lock()  # of trackers.json
# The packages share dependencies, and two threads that import the same packages in another order may get unfinished modules.
_IMPORT_LOCK = threading.Lock()


def _title(workdir: pathlib.Path) -> str:
    """The name of a work directory."""
    mirror = find_mirror(workdir)
    return mirror.url.rpartition("/")[2] if mirror else workdir.absolute().name


class TrackerRun:
    """The run of a tracker, as trackers.json stores it: an id, and the last step that it has.

    project: of the tracker. title: of the run in the tracker, the name of the work directory.
    """

    def __init__(self, workdir: pathlib.Path, tracker: str, project: str, config: Mapping[str, Any]):
        self.project, self.title, self.config = project, _title(workdir), dict(config)
        self._path, self._tracker = workdir / "trackers.json", tracker
        stored = self._read().get(tracker, {})
        self.is_new = not stored
        self.id, self.last_step = stored.get("id", uuid.uuid4().hex[:8]), stored.get("step", -1)

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._path.read_text())
        return {}

    def store(self, **changes: Any) -> None:
        """Stores the id and the last step, after they have changed."""
        with _FILE_LOCK:  # the threads of several trackers write it
            stored = self._read() | {self._tracker: {"id": self.id, "step": self.last_step} | changes}
            write_text(self._path, json.dumps(stored) + "\n")


class Tracker(Protocol):
    """What is needed of a tracker; its methods are those of `metrics_files.MetricsWriter`.

    last_step: the last step that the tracker's run has, -1 for a new one.
    """

    last_step: int

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs numbers."""
        ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Logs images uint8 [N, H, W, C]."""
        ...

    def close(self) -> None:
        """Ends the run and waits for what is left to be sent."""
        ...


def _import(name: str) -> Any:
    with _IMPORT_LOCK:
        return importlib.import_module(name)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


class _WandB:
    """Weights & Biases. WANDB_API_KEY logs in; WANDB_MODE=offline writes to the work directory, for a bucket to WANDB_DIR."""

    def __init__(self, run: TrackerRun, workdir: pathlib.Path):
        wandb = _import("wandb")

        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=_OPEN_SECONDS)
        options: dict[str, Any] = {"project": run.project, "id": run.id, "name": run.title, "resume": "allow"}
        directory = None if find_mirror(workdir) else workdir  # a mirror is removed at the end
        self._run = wandb.init(**options, config=run.config, dir=directory, settings=settings)
        self.last_step = max(run.last_step, self._run.step - 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        logged = {
            name: [self._wandb.Image(_picture(i), caption=caption) for i in batch] for name, batch in images.items()
        }
        self._run.log(logged, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI names the server."""

    def __init__(self, run: TrackerRun, workdir: pathlib.Path):
        mlflow = _import("mlflow")

        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        if run.is_new:
            run.id = self._client.create_run(experiment_id, run_name=run.title).info.run_id
            parameters = [mlflow.entities.Param(name, shorten(str(value), 500)) for name, value in run.config.items()]
            for start in range(0, len(parameters), 100):  # a request holds at most 100
                self._client.log_batch(run.id, params=parameters[start : start + 100])
        else:
            self._client.update_run(run.id, status="RUNNING")
        self._id = run.id
        history = self._client.get_metric_history(run.id, "loss")
        self.last_step = max([run.last_step, *(point.step for point in history)])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        for name, batch in images.items():
            for i, image in enumerate(batch):
                self._client.log_image(self._id, _picture(image), f"{name}/{step:08d}_{i}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    """trackio. TRACKIO_DIR is its directory, TRACKIO_SPACE_ID a Space to send to."""

    def __init__(self, run: TrackerRun, workdir: pathlib.Path):
        trackio = _import("trackio")

        self._trackio = trackio
        name, space = f"{run.title}-{run.id}", os.environ.get("TRACKIO_SPACE_ID")
        options: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False, "space_id": space}
        self._run = trackio.init(project=run.project, name=name, config=run.config, resume="allow", **options)
        self.last_step = max(run.last_step, trackio.SQLiteStorage.get_max_step_for_run(run.project, name) or -1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        logged = {
            name: self._trackio.Image(np.concatenate(list(batch), axis=1), caption=caption)
            for name, batch in images.items()
        }
        self._run.log(logged, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackerRun, pathlib.Path], Tracker]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class BackgroundTracker:
    """Passes points to a tracker from a thread, and drops the tracker with one line if it fails or does not keep up.

    open_tracker: called in the thread, because a tracker may connect to a server. log: called with the line.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], run: TrackerRun, log: Callable[[str], None]):
        self._name, self._open, self._run, self._log = name, open_tracker, run, log
        self._queue: queue.Queue[tuple[Any, ...] | None] = queue.Queue(_MAX_WAITING)  # a method and its arguments
        self.is_dropped = False
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def _drop(self, reason: str) -> None:
        if not self.is_dropped:
            self.is_dropped = True
            self._log(f"Note: {self._name} {shorten(' '.join(reason.split()), 200)}: the run continues without it.")

    def _write_all(self) -> None:
        try:
            tracker = self._open()
            known = tracker.last_step
            self._run.store()
            while (item := self._queue.get()) is not None:
                method, step, *values = item
                if step <= known:  # written before the run was interrupted
                    continue
                getattr(tracker, method)(step, *values)
                if method == "write_scalars":
                    self._run.last_step = step
                    self._run.store()
            tracker.close()
        except Exception as error:
            self._drop(f"failed ({type(error).__name__}: {error})")

    def _put(self, item: tuple[Any, ...] | None) -> None:
        if not self.is_dropped:
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._drop("does not keep up")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Passes numbers on."""
        self._put(("write_scalars", step, dict(scalars)))

    def write_images(self, step: int, images: Mapping[str, np.ndarray], caption: str) -> None:
        """Passes images uint8 [N, H, W, C] on. caption: what they show."""
        self._put(("write_images", step, dict(images), caption))

    def flush(self) -> None:
        """Does nothing: a tracker sends in the background."""

    def close(self) -> None:
        """Waits for what is left to be sent, for at most half a minute."""
        self._put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(f"has not ended after {_CLOSE_SECONDS:.0f} s")


def open_tracker(
    name: str, workdir: pathlib.Path, project: str, config: Mapping[str, Any], log: Callable[[str], None]
) -> BackgroundTracker:
    """The tracker of this name, one of `TRACKERS`, for the run of a work directory. config: its leaves by full name."""
    run = TrackerRun(workdir, name, project, config)
    return BackgroundTracker(name, lambda: TRACKERS[name](run, workdir), run, log)

"""Experiment trackers: Weights & Biases, MLflow and trackio, each optional; a tracker that fails never ends a run.

The packages send in the background. A relaunch continues the runs whose ids trackers.json of the work directory has.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.config import flatten
from diffusion_jax.errors import shorten
from diffusion_jax.files import write_text
from diffusion_jax.runs.console import log
from diffusion_jax.storage.locations import find_mirror

__all__ = ["TRACKERS", "Trackers"]

_OPEN_SECONDS = 25.0  # for W&B to connect
_MLFLOW_LIMITS = {"MAX_RETRIES": "2", "TIMEOUT": "20"}  # by default a server that is gone holds the start for minutes


class _WandB:
    """Weights & Biases. WANDB_API_KEY logs in; WANDB_MODE=offline writes to the work directory, for a bucket to WANDB_DIR."""

    def __init__(self, workdir: pathlib.Path, project: str, title: str, config: Mapping[str, Any]):
        self._wandb: Any = importlib.import_module("wandb")
        run_id = _stored_id(workdir, "wandb") or _store_id(workdir, "wandb", uuid.uuid4().hex[:8])
        settings = self._wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=_OPEN_SECONDS)
        options: dict[str, Any] = {"project": project, "id": run_id, "name": title, "resume": "allow"}
        directory = None if find_mirror(workdir) else workdir  # a mirror is removed at the end
        self._run = self._wandb.init(**options, config=dict(config), dir=directory, settings=settings)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._wandb.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI names the server."""

    def __init__(self, workdir: pathlib.Path, project: str, title: str, config: Mapping[str, Any]):
        for name, value in _MLFLOW_LIMITS.items():
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client, stored = self._mlflow.MlflowClient(), _stored_id(workdir, "mlflow")
        if stored:
            self._client.update_run(stored, status="RUNNING")
            self._id = stored
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._id = self._client.create_run(experiment_id, run_name=title).info.run_id
        _store_id(workdir, "mlflow", self._id)
        parameters = [self._mlflow.entities.Param(name, shorten(str(value), 500)) for name, value in config.items()]
        for start in range(0, len(parameters), 100):  # a request holds at most 100
            self._client.log_batch(self._id, params=parameters[start : start + 100], synchronous=False)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics, synchronous=False)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._client.log_image(self._id, image, f"{name}/{step:08d}.png", synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id)


class _Trackio:
    """trackio. TRACKIO_DIR is its directory, TRACKIO_SPACE_ID a Space to send to."""

    def __init__(self, workdir: pathlib.Path, project: str, title: str, config: Mapping[str, Any]):
        self._trackio: Any = importlib.import_module("trackio")
        run_id = _stored_id(workdir, "trackio") or _store_id(workdir, "trackio", uuid.uuid4().hex[:8])
        options: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        options |= {"space_id": os.environ.get("TRACKIO_SPACE_ID"), "resume": "allow"}
        self._run = self._trackio.init(project=project, name=f"{title}-{run_id}", config=dict(config), **options)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._trackio.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[pathlib.Path, str, str, Mapping[str, Any]], Any]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _stored_id(workdir: pathlib.Path, tracker: str) -> str | None:
    """The id of the run of a tracker, None if the tracker has none yet."""
    path = workdir / "trackers.json"
    return json.loads(path.read_text()).get(tracker) if path.exists() else None


def _store_id(workdir: pathlib.Path, tracker: str, run_id: str) -> str:
    path = workdir / "trackers.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    write_text(path, json.dumps(stored | {tracker: run_id}) + "\n")
    return run_id


class Trackers:
    """Writes to the trackers of these names; one that fails is dropped with one line.

    config: nested, as JSON values; trackers get it by full names.
    """

    def __init__(self, names: Sequence[str], workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        self._trackers: dict[str, Any] = {}
        mirror = find_mirror(workdir)
        title = mirror.url.rpartition("/")[2] if mirror else workdir.absolute().name
        for name in names:
            with self._drop_if_it_fails(name):
                self._trackers[name] = TRACKERS[name](workdir, project, title, flatten(config))

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            log(f"Note: {name} failed ({reason}): the run continues without it.")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs numbers."""
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_it_fails(name):
                tracker.write_scalars(step, scalars)

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        """Logs a uint8 image [H, W, C]. caption: what it shows."""
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        for tracker_name, tracker in list(self._trackers.items()):
            with self._drop_if_it_fails(tracker_name):
                tracker.write_image(step, name, picture, caption)

    def flush(self) -> None:
        """Does nothing: trackers send in the background."""

    def close(self) -> None:
        """Ends the runs, which waits for what is left to be sent."""
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_it_fails(name):
                tracker.close()

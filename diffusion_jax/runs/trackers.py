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

    _package = "wandb"

    def __init__(self, workdir: pathlib.Path, project: str, title: str, config: Mapping[str, Any]):
        self._module: Any = importlib.import_module(self._package)
        run_id = _run_id(workdir, self._package, lambda: uuid.uuid4().hex[:8])
        options = self._options(workdir, title, run_id)
        self._run = self._module.init(project=project, config=dict(config), resume="allow", **options)

    def _options(self, workdir: pathlib.Path, title: str, run_id: str) -> dict[str, Any]:
        settings = self._module.Settings(silent=True, console="off", disable_git=True, init_timeout=_OPEN_SECONDS)
        directory = None if find_mirror(workdir) else workdir  # a mirror is removed at the end
        return {"id": run_id, "name": title, "dir": directory, "settings": settings}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._module.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_WandB):
    """trackio, which has W&B's functions. TRACKIO_DIR is its directory, TRACKIO_SPACE_ID a Space to send to."""

    _package = "trackio"

    def _options(self, workdir: pathlib.Path, title: str, run_id: str) -> dict[str, Any]:
        options = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        return options | {"name": f"{title}-{run_id}", "space_id": os.environ.get("TRACKIO_SPACE_ID")}


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI names the server."""

    def __init__(self, workdir: pathlib.Path, project: str, title: str, config: Mapping[str, Any]):
        for name, value in _MLFLOW_LIMITS.items():
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()

        def create_run() -> str:
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            run_id = self._client.create_run(experiment_id, run_name=title).info.run_id
            parameters = [self._mlflow.entities.Param(name, shorten(str(value), 500)) for name, value in config.items()]
            for start in range(0, len(parameters), 100):  # a request holds at most 100
                self._client.log_batch(run_id, params=parameters[start : start + 100], synchronous=False)
            return run_id

        self._id = _run_id(workdir, "mlflow", create_run)
        self._client.update_run(self._id, status="RUNNING")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics, synchronous=False)

    def write_image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._client.log_image(self._id, image, f"{name}/{step:08d}.png", synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[pathlib.Path, str, str, Mapping[str, Any]], Any]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _run_id(workdir: pathlib.Path, tracker: str, create: Callable[[], str]) -> str:
    """The id of the run of a tracker: that of trackers.json, or a new one, which is stored there."""
    path = workdir / "trackers.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if tracker not in stored:
        stored[tracker] = create()
        write_text(path, json.dumps(stored) + "\n")
    return stored[tracker]


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
        self._call("write_scalars", step, scalars)

    def write_image(self, step: int, name: str, image: np.ndarray, caption: str) -> None:
        """Logs a uint8 image [H, W, C]. caption: what it shows."""
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        self._call("write_image", step, name, picture, caption)

    def flush(self) -> None:
        """Does nothing: trackers send in the background."""

    def close(self) -> None:
        """Ends the runs, which waits for what is left to be sent."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_it_fails(name):
                getattr(tracker, method)(*arguments)

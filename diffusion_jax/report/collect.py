"""What a work directory holds, as plain values for the page. Every part may be missing, also while the run is working."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.errors import DiffusionJaxError, shorten
from diffusion_jax.evaluation.image_sets import is_of_samples
from diffusion_jax.report.events import Event, checkpoint_events, launch_events
from diffusion_jax.runs import status, stored_config
from diffusion_jax.runs.goodput import read_launches
from diffusion_jax.runs.metric_records import read_records
from diffusion_jax.runs.metrics_files import read_metrics
from diffusion_jax.runs.workdir import read_class_names
from diffusion_jax.storage.locations import with_urls
from diffusion_jax.storage.locks import find_holder

__all__ = ["RunFiles", "collect", "modified_time", "sample_files"]


@dataclasses.dataclass
class RunFiles:
    """The contents of a work directory.

    config: None if none is stored. status: its state in words. lines: of the log. likelihood: likelihood.json; terms: the
    arrays of likelihood.npz. notes: what could not be read.
    """

    directory: pathlib.Path
    name: str
    config: ConfigDict | None
    status: dict[str, str]
    lines: list[dict[str, Any]]
    launches: list[dict[str, Any]]
    events: list[Event]
    data: dict[str, Any]
    class_names: tuple[str, ...]
    records: list[dict[str, Any]]
    likelihood: dict[str, Any]
    terms: dict[str, np.ndarray]
    notes: list[str]


def collect(workdir: pathlib.Path, config: ConfigDict | None = None) -> RunFiles:
    """Reads a work directory; nothing is loaded that is large. config: the run's, if the directory stores none."""
    notes: list[str] = []

    def read(what: str, function: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return function()
        except (DiffusionJaxError, OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
            notes.append(f"{what} could not be read: {shorten(with_urls(' '.join(str(error).split())), 300)}")
            return otherwise

    config = read("config.json", lambda: stored_config.from_workdir(workdir), None) or config
    lines = read("The log", lambda: read_metrics(workdir), [])
    launches = read("goodput.json", lambda: _checked_launches(workdir), [])
    holder = read("The lock", lambda: find_holder(workdir / ".lock"), None)
    state = {} if config is None else read("The status", lambda: status.describe(config, workdir, lines), {})
    num_steps = None if config is None else config.training.num_steps
    events = launch_events(launches, num_steps, holder is not None)
    events += read("The checkpoints", lambda: checkpoint_events(workdir / "checkpoints"), [])
    if state:
        state = {name: with_urls(value) for name, value in state.items()}
    return RunFiles(
        directory=workdir,
        name=with_urls(str(workdir.absolute())).rstrip("/").rpartition("/")[2],
        config=config,
        status=state,
        lines=lines,
        launches=launches,
        events=sorted(events, key=lambda event: event.when),
        data=read("data.json", lambda: _read_object(workdir / "data.json"), {}),
        class_names=() if config is None else read("The class names", lambda: read_class_names(config, workdir), ()),
        records=read("metrics.json", lambda: read_records(workdir / "metrics.json"), []),
        likelihood=read("likelihood.json", lambda: _read_object(workdir / "likelihood.json"), {}),
        terms=read("likelihood.npz", lambda: _read_terms(workdir / "likelihood.npz"), {}),
        notes=notes,
    )


def _checked_launches(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Launches with all entries that the page needs. Raises: LookupError."""
    launches = read_launches(workdir)
    for launch in launches:
        for key in ("start", "end", "first_step", "last_step", "seconds"):
            launch[key]
    return launches


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none. Raises: OSError, ValueError."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _read_terms(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays over timesteps of likelihood.npz; {} if there is none."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if not name.startswith("example_")}


def sample_files(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """The .npz files of samples, the newest first, without edits and trajectories."""
    paths = [path for path in (workdir / "samples").glob("*.npz") if is_of_samples(path)]
    yield from sorted(paths, key=modified_time, reverse=True)


def modified_time(path: pathlib.Path) -> float:
    """When a file was last written, 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0

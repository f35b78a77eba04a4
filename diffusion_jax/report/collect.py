"""What a work directory holds, as plain values for the page. Everything may be missing, also while the run is working."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.errors import DiffusionJaxError, shorten
from diffusion_jax.files import with_urls
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import status
from diffusion_jax.runs.logging import read_launches, read_metrics
from diffusion_jax.runs.metric_records import read_records
from diffusion_jax.runs.workdir import load_config, read_class_names

__all__ = ["RunFiles", "collect"]


@dataclasses.dataclass
class RunFiles:
    """The contents of a work directory.

    config: None if none is stored. status: its state in words. lines: of the log. likelihood: likelihood.json. notes: what
    could not be read.
    """

    directory: pathlib.Path
    name: str
    config: ConfigDict | None
    status: dict[str, str]
    lines: list[dict[str, Any]]
    launches: list[dict[str, Any]]
    data: dict[str, Any]
    class_names: tuple[str, ...]
    records: list[dict[str, Any]]
    likelihood: dict[str, Any]
    notes: list[str]


def collect(workdir: RunDir, config: ConfigDict | None = None) -> RunFiles:
    """Reads a work directory; nothing is loaded that is large. config: the run's, if the directory stores none."""
    notes: list[str] = []
    workdir.fetch(workdir / "samples")

    def read(what: str, function: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return function()
        except (DiffusionJaxError, OSError, ValueError, LookupError, TypeError) as error:
            notes.append(f"{what} could not be read: {shorten(with_urls(' '.join(str(error).split())), 300)}")
            return otherwise

    config = read("config.json", lambda: load_config(workdir), None) or config
    lines = read("The log", lambda: read_metrics(workdir), [])
    state = {} if config is None else read("The status", lambda: status.describe(config, workdir, lines), {})
    return RunFiles(
        directory=workdir.path,
        name=workdir.path.absolute().name,
        config=config,
        status=state,
        lines=lines,
        launches=read_launches(workdir),
        data=read("data.json", lambda: _read_object(workdir / "data.json"), {}),
        class_names=() if config is None else read("The class names", lambda: read_class_names(config, workdir), ()),
        records=read("metrics.json", lambda: read_records(workdir / "metrics.json"), []),
        likelihood=read("likelihood.json", lambda: _read_object(workdir / "likelihood.json"), {}),
        notes=notes,
    )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none. Raises: OSError, ValueError."""
    value = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value

"""What a work directory holds, as plain values for the page. Everything may be missing, also while the run is working.

A measurement is a record of metrics.json with the bits per dimension of likelihood.json; `table_cells` makes a table of them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.errors import DiffusionJaxError, shorten
from diffusion_jax.files import with_urls
from diffusion_jax.pretrained import read_class_names
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import status
from diffusion_jax.runs.evaluate import read_records
from diffusion_jax.runs.logging import read_launches, read_metrics
from diffusion_jax.runs.workdir import load_config

__all__ = ["RunFiles", "collect", "format_value", "table_cells"]

# Endings of entries that describe a metric, and are no metrics.
_NOT_METRICS = ("_std", "_standard_error", "_same_law", "_limit", "_frequency")
_FIRST_SETTINGS = ("step", "weights", "sampler", "steps", "features", "num_samples")
_Record = dict[str, Any]


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

    def measurements(self) -> list[_Record]:
        """The records with the bits per dimension of the likelihood: of the same weights, or in a record of their own."""
        if not self.likelihood:
            return self.records
        bits = {key: value for key, value in self.likelihood.items() if "_per_dim" in key}
        same = [
            all(record.get(key) == self.likelihood.get(key) for key in ("step", "weights")) for record in self.records
        ]
        if not any(same):
            return [*self.records, self.likelihood]
        return [record | bits if is_same else record for record, is_same in zip(self.records, same, strict=True)]


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


# ---- Tables


def table_cells(runs: list[tuple[pathlib.Path, _Record]]) -> tuple[list[str], list[dict[str, str]]]:
    """(the columns of a table, for each record its texts by column): its metrics, and settings in which records differ."""
    values = [_record_settings(record) for _, record in runs]
    keys = dict.fromkeys(key for each in values for key in each if not key.endswith("_digest"))
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in values}) > 1]
    settings = list(dict.fromkeys([*_FIRST_SETTINGS, *differing]))
    rows = [_format_row(directory, record, settings) for directory, record in runs]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    order = ["run", *settings]
    columns.sort(key=lambda key: order.index(key) if key in order else len(order))
    return columns, rows


def format_value(value: float, error: float | None = None) -> str:
    """A number with its standard error."""
    return f"{value:.4g}" + (f" ± {error:.1g}" if error is not None else "")


def _format_row(directory: pathlib.Path, record: _Record, settings: list[str]) -> dict[str, str]:
    values = _record_settings(record)
    row = {"run": str(directory)} | {key: str(values[key]) for key in settings if values.get(key) is not None}
    if "samples" in row:
        row["samples"] = pathlib.Path(row["samples"]).name
    for key, value in record.items():
        if isinstance(value, float) and not key.endswith(_NOT_METRICS):
            row[key] = format_value(value, record.get(f"{key}_standard_error"))
    if "memorization" in record:
        row["close_share"] = f"{record['memorization']['close_share']:.4g}"
    return row


def _record_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the metrics of a record depend on, including the options of its sampler, as a flat dictionary."""
    sampling = {key: value for key, value in record.get("sampling", {}).items() if key not in record}
    keys = ("dataset", "init_from", "weights", "step", "steps", "features", "features_digest", "resize")
    keys += ("reference", "samples", "num_reference", "num_samples")
    return {key: record[key] for key in keys if record.get(key) is not None} | sampling

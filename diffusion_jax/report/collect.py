"""Reads the contents of a work directory as plain values for the page. Any file may be missing, and a launch may be running.

A measurement is a record from metrics.json, or the bits per dimension from likelihood.json; `table_cells` makes a table of
measurements. `train_command` and `sample_command` return the commands that repeat a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import config as configs
from diffusion_jax.errors import list_names, shorten
from diffusion_jax.evaluation.compare import read_records
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.files import with_urls
from diffusion_jax.metrics import MEANINGS, format_value, heading, reported_values
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import RunDir, find_links
from diffusion_jax.runs import status
from diffusion_jax.runs.logging import read_launches, read_metrics
from diffusion_jax.runs.workdir import load_config
from diffusion_jax.training.checkpoints import check_run_files
from diffusion_jax.untrusted import read_json

_FIRST_SETTINGS = ("run", "step", "weights", "sampler", "steps", "features", "num_samples", "reference")
# Entries of a record that change its metrics, besides the options of the sampler.
_SETTINGS = ("run", "dataset", "init_from", "weights", "step", "steps", "features", "features_digest", "resize")
_SETTINGS += ("reference", "samples", "num_reference", "num_samples")
_Record = dict[str, Any]


@dataclasses.dataclass
class RunFiles:
    """The contents of a work directory.

    config: None if not stored. status: the state in words. lines: lines of the log. likelihood: contents of likelihood.json.
    calibrations: contents of calibration/*.json, oldest first, each with its file's "name". notes: problems while reading.
    """

    directory: pathlib.Path
    name: str
    config: ConfigDict | None
    status: dict[str, str]
    lines: list[dict[str, Any]]
    launches: list[dict[str, Any]]
    data: dict[str, Any]
    records: list[dict[str, Any]]
    likelihood: dict[str, Any]
    calibrations: list[_Record]
    notes: list[str]

    def measurements(self) -> list[_Record]:
        """Returns the records of metrics.json, and a record with the terms of likelihood.json, ordered by step.

        Within a step, the likelihood comes last. Records without a step come first.
        """
        found = self.likelihood
        terms = {key: value for key, value in found.items() if key.removesuffix("_standard_error") in MEANINGS}
        terms |= {key: found[key] for key in ("step", "weights", "dataset") if key in found}
        examples = {
            "reference": f"{found.get('dataset')}:{found.get('split')}",
            "num_reference": found.get("num_examples"),
        }
        records = [*self.records, terms | examples] if terms else self.records
        return sorted(records, key=lambda record: step if isinstance(step := record.get("step"), int) else -1)


def collect(workdir: RunDir, config: ConfigDict | None = None) -> RunFiles:
    """Reads a work directory without its large files. config: used if the directory stores no config."""
    links = {path.relative_to(workdir.path).as_posix() for path in find_links(workdir)}
    notes = [f"Left out, because these links lead outside the run: {list_names(sorted(links), 5)}"] * bool(links)
    for folder in ("samples", "calibration"):
        workdir.fetch(workdir / folder)

    def read(what: str, function: Callable[[], Any], otherwise: Any, files: Sequence[str] = ()) -> Any:
        if links.intersection(files or [what]):
            return otherwise
        try:
            return function()
        except FileNotFoundError:
            return otherwise
        except Exception as error:  # an untrusted file may hold any values
            notes.append(f"{what} could not be read: {shorten(with_urls(' '.join(str(error).split())), 300)}")
            return otherwise

    config = read("config.json", lambda: load_config(workdir), None) or config
    read("The checkpoint's config", lambda: check_run_files(workdir), None, [*links])  # never shows a linked file
    lines = read("The log", lambda: read_metrics(workdir), [], ("metrics.jsonl", "metrics"))
    launches = read("goodput.json", lambda: read_launches(workdir), [])
    calibrations = sample_files(workdir.path, "calibration/*.json")
    files = ("config.json", "goodput.json", "metrics.jsonl", "metrics", "checkpoints")
    state = {} if config is None else read("The status", lambda: status.describe(config, workdir, lines), {}, files)
    return RunFiles(
        directory=workdir.path,
        name=workdir.path.absolute().name,
        config=config,
        status=state,
        lines=lines,
        launches=launches,
        data=read("data.json", lambda: read_json(workdir / "data.json"), {}),
        records=read("metrics.json", lambda: read_records(workdir / "metrics.json"), []),
        likelihood=read("likelihood.json", lambda: read_json(workdir / "likelihood.json"), {}),
        calibrations=read(
            "calibration", lambda: [{**read_json(path), "name": path.stem} for path in calibrations[::-1]], []
        ),
        notes=notes,
    )


# ---- Tables


def table_cells(records: Sequence[_Record]) -> tuple[list[str], list[str], list[list[str]]]:
    """Returns (columns, headings, rows of text) for measurements: main settings, other settings that differ, and metrics.

    records: measurements, with a key "run" if they come from several runs.
    """
    settings = [
        record.get("sampling", {}) | {key: record[key] for key in _SETTINGS if key in record} for record in records
    ]
    keys = dict.fromkeys(key for each in settings for key in each if not key.endswith("_digest"))
    differing = [key for key in keys if len({json.dumps(each[key]) for each in settings if key in each}) > 1]
    names, rows = dict.fromkeys([*_FIRST_SETTINGS, *differing]), []
    for record, values in zip(records, settings, strict=True):
        row = {key: str(values[key]) for key in names if values.get(key) is not None}
        if "samples" in row:
            row["samples"] = pathlib.Path(row["samples"]).name
        for key, value in reported_values(record).items():
            row[key] = format_value(value, record.get(f"{key}_standard_error"))
        rows.append(row)
    found = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in names | found if key in found]
    return columns, list(map(heading, columns)), [[row.get(key, "") for key in columns] for row in rows]


# ---- Settings and commands


def train_command(config: ConfigDict) -> str:
    """Returns a command that trains the config in a new directory, from the most similar experiment and changed settings."""
    wanted, is_classifier = configs.flatten(config), configs.is_classifier(config)
    changes: dict[str, dict[str, Any]] = {}  # {experiment: settings that differ}
    for name in configs.experiment_names():
        for variant in (name, f"{name}:{config.data.image_size}"):
            with contextlib.suppress(configs.ConfigError):  # the experiment does not take this argument
                experiment = configs.resolve(configs.experiment(variant))
                values = configs.flatten(experiment)
                if values.keys() == wanted.keys() and configs.is_classifier(experiment) == is_classifier:
                    changes[variant] = {key: value for key, value in wanted.items() if value != values[key]}
    name = min(changes, key=lambda variant: len(changes[variant]))
    mode = ["--mode=train_classifier"] if is_classifier else []
    changed = [f"--config.{key}={value}" for key, value in changes[name].items()]
    return shlex.join(["diffusion-jax", f"--config={name}", "--workdir=DIR", *mode, *changed])


def sample_command(config: ConfigDict, provenance: Provenance) -> str:
    """Returns the command that draws a record's samples again, with the newest weights in DIR. config: the run's config."""
    stored = {**config.sampling, "clip": configs.resolve_clip(config)}
    files = {name: path for name, path in provenance.details.items() if name in stored}
    wanted = {**provenance.settings["sampling"], **files}
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in wanted.items()}  # from JSON
    changed = [f"--config.sampling.{name}={value}" for name, value in wanted.items() if value != stored[name]]
    return shlex.join(["diffusion-jax", "--workdir=DIR", "--mode=sample", *changed])

"""Records of metrics in metrics.json, the likelihood.json beside it, and a Markdown table of both."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_jax.files import write_text
from diffusion_jax.storage.downloads import local_path

__all__ = [
    "add_likelihood",
    "add_record",
    "differing_settings",
    "format_table",
    "format_value",
    "read_likelihood",
    "read_records",
    "read_runs",
    "record_settings",
    "table_cells",
]

# Two records with equal values of these keys are of the same comparison.
_COMPARISON = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")
# Endings of entries that describe a metric, and are no metrics.
_NOT_METRICS = ("_std", "_standard_error", "_same_law", "_limit", "_frequency")
_FIRST_SETTINGS = ("step", "weights", "sampler", "steps", "features", "num_samples")
_Record = dict[str, Any]


def read_likelihood(path: pathlib.Path) -> dict[str, Any] | None:
    """The bits (and nats) per dimension of a likelihood.json and the weights they are of; None if there is no file.

    Raises: ValueError for another file.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        kept = {key: report[key] for key in ("dataset", "weights", "step", "bits_per_dim")}
    except (ValueError, OSError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not a valid likelihood.json ({error!r}); run --mode=evaluate again, or move the file away"
        ) from None
    return kept | {key: value for key, value in report.items() if "_per_dim" in key and value is not None}


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends to a JSON list. The record replaces an earlier one of the same comparison, whose other metrics it keeps."""
    records, earlier = [], {}
    for old in read_records(path):
        if all(old.get(key) == record.get(key) for key in _COMPARISON):
            earlier |= old
        else:
            records.append(old)
    merged = earlier | dict(record)
    if "files" in earlier and "files" in record:
        merged["files"] = earlier["files"] | record["files"]
    write_text(path, json.dumps([*records, merged], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.json, [] if there is no file. Raises: ValueError for another file."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if isinstance(records, list) and all(isinstance(record, dict) for record in records):
            return records
        problem = "not a list of records"
    except (ValueError, OSError) as error:
        problem = str(error)
    raise ValueError(f"{path} is not a valid metrics.json ({problem}); name another file, or move this one away")


def record_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the metrics of a record depend on, including the options of its sampler, as a flat dictionary."""
    sampling = {key: value for key, value in record.get("sampling", {}).items() if key not in record}
    keys = ("dataset", "init_from", "weights", "step", "steps", "features", "features_digest", "resize")
    keys += ("reference", "samples", "num_reference", "num_samples")
    return {key: record[key] for key in keys if record.get(key) is not None} | sampling


def differing_settings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which records differ."""
    settings = [record_settings(record) for record in records]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]


def read_runs(paths: Iterable[str]) -> tuple[list[tuple[pathlib.Path, _Record]], list[str]]:
    """((directory, record) of every record, a note for every path without records).

    paths: directories with a metrics.json, or such files. Bits per dimension from the likelihood.json beside it are added to
    the records of the same weights, or form a separate record. Raises: ValueError.
    """
    rows: list[tuple[pathlib.Path, _Record]] = []
    notes = []
    for name in paths:
        path = local_path(name)
        path = path / "metrics.json" if path.is_dir() else path
        records, likelihood = read_records(path), read_likelihood(path.with_name("likelihood.json"))
        if likelihood:
            records = add_likelihood(records, likelihood)
        if not records:
            notes.append(f"{path}: nothing has been measured there; run --mode=evaluate")
        rows += [(path.parent, record) for record in records]
    return rows, notes


def add_likelihood(records: list[_Record], likelihood: Mapping[str, Any]) -> list[_Record]:
    """Records with the bits per dimension of a likelihood.json: of the same weights, or in a record of their own."""
    bits = {key: value for key, value in likelihood.items() if "_per_dim" in key}
    has_same_weights = [
        all(record.get(key) == likelihood.get(key) for key in ("step", "weights")) for record in records
    ]
    if not any(has_same_weights):
        return [*records, dict(likelihood)]
    return [record | bits if same else record for record, same in zip(records, has_same_weights, strict=True)]


def format_table(runs: list[tuple[pathlib.Path, _Record]]) -> str:
    """A row for each record, with its metrics and the settings in which any two records differ."""
    columns, rows = table_cells(runs)
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def table_cells(runs: list[tuple[pathlib.Path, _Record]]) -> tuple[list[str], list[dict[str, str]]]:
    """(the columns of `format_table`, for each record its texts by column)."""
    differing = differing_settings([record for _, record in runs])
    settings = [key for key in differing if not key.endswith("_digest")]
    settings = list(dict.fromkeys([*_FIRST_SETTINGS, *settings]))
    rows = [_format_row(directory, record, settings) for directory, record in runs]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    order = ["run", *settings]
    columns.sort(key=lambda key: order.index(key) if key in order else len(order))
    return columns, rows


def format_value(value: float, error: float | None = None) -> str:
    """A number with its standard error."""
    return f"{value:.4g}" + (f" ± {error:.1g}" if error is not None else "")


def _format_row(directory: pathlib.Path, record: _Record, settings: list[str]) -> dict[str, str]:
    values = record_settings(record)
    row = {"run": str(directory)} | {key: str(values[key]) for key in settings if values.get(key) is not None}
    if "samples" in row:
        row["samples"] = pathlib.Path(row["samples"]).name
    for key, value in record.items():
        if isinstance(value, float) and not key.endswith(_NOT_METRICS):
            row[key] = format_value(value, record.get(f"{key}_standard_error"))
    if "memorization" in record:
        row["close_share"] = f"{record['memorization']['close_share']:.4g}"
    return row

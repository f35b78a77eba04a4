"""Records of metrics in metrics.json, and a table of them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_jax.files import write_text

__all__ = ["add_likelihood", "add_record", "format_value", "read_records", "table_cells"]

# Two records with equal values of these keys are of the same comparison.
_COMPARISON = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")
# Endings of entries that describe a metric, and are no metrics.
_NOT_METRICS = ("_std", "_standard_error", "_same_law", "_limit", "_frequency")
_FIRST_SETTINGS = ("step", "weights", "sampler", "steps", "features", "num_samples")
_Record = dict[str, Any]


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSON list, or merges it into the record of the same comparison: new metrics replace old ones."""
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
    problem = "not a list of records"
    try:
        records = json.loads(path.read_text())
        if isinstance(records, list) and all(isinstance(record, dict) for record in records):
            return records
    except (ValueError, OSError) as error:
        problem = str(error)
    raise ValueError(f"{path} is not a valid metrics.json ({problem}); name another file, or move this one away")


def _record_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the metrics of a record depend on, including the options of its sampler, as a flat dictionary."""
    sampling = {key: value for key, value in record.get("sampling", {}).items() if key not in record}
    keys = ("dataset", "init_from", "weights", "step", "steps", "features", "features_digest", "resize")
    keys += ("reference", "samples", "num_reference", "num_samples")
    return {key: record[key] for key in keys if record.get(key) is not None} | sampling


def add_likelihood(records: list[_Record], likelihood: Mapping[str, Any]) -> list[_Record]:
    """Records with the bits per dimension of a likelihood.json: of the same weights, or in a record of their own."""
    bits = {key: value for key, value in likelihood.items() if "_per_dim" in key}
    same = [all(record.get(key) == likelihood.get(key) for key in ("step", "weights")) for record in records]
    if not any(same):
        return [*records, dict(likelihood)]
    return [record | bits if is_same else record for record, is_same in zip(records, same, strict=True)]


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

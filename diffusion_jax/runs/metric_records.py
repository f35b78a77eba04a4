"""metrics.json, a list of records of metrics with their settings, and the likelihood.json beside it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.files import write_text

__all__ = ["add_record", "differing_settings", "read_likelihood", "read_records", "record_settings"]

# Two records with equal values of these keys are of the same comparison.
_COMPARISON = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")
# Dictionaries with an entry for each metric of arrays.
_OF_EACH_METRIC = ("definitions", "files")


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
    for key in _OF_EACH_METRIC:
        if isinstance(earlier.get(key), dict) and isinstance(record.get(key), dict):
            merged[key] = earlier[key] | record[key]
    write_text(path, json.dumps([*records, merged], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.json, [] if there is no file.

    Raises: ValueError for another file.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a valid metrics.json ({error}); name another file, or move this one away"
        ) from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(
            f"{path} is not a valid metrics.json (a list of records); name another file, or move this one away"
        )
    return records


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

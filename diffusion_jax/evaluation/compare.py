"""Compares two sets of images or other arrays: metrics, pictures, and a record in metrics.json."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax import data, pictures
from diffusion_jax.distributed.processes import log
from diffusion_jax.evaluation.features import (
    ExampleSet,
    FeatureExtractor,
    FeaturePipeline,
    read_all,
    read_examples,
    value_digest,
)
from diffusion_jax.files import save_npz, write_text
from diffusion_jax.metrics import (
    MAX_EXAMPLES,
    Meaning,
    Options,
    Result,
    find_meaning,
    find_metric,
    format_value,
    needs_features,
    reported_name,
    reported_values,
)
from diffusion_jax.metrics.of_arrays import subset_indices
from diffusion_jax.provenance import Provenance, code_version
from diffusion_jax.untrusted import open_npz, read_json

_EXPECTED_CLOSE_SHARE = 0.01  # expected for held-out examples
_Z_LIMITS = {name: "mean_and_covariance_z_limit" for name in ("mean_z", "covariance_z")}  # others: NAME_limit
# Entries of a record besides metrics; a user's metric must not have these names.
_RECORD_KEYS = {"files", "notes", "num_reference", "num_samples", "reference", "reference_sha256", "samples"}
_RECORD_KEYS |= {"samples_sha256", "features", "features_digest", "resize", "steps", "step", "weights", "sampling"}
_RECORD_KEYS |= {"dataset", "conditions", "versions", "backend", "drawn_with", "init_from", "run"}
_RECORD_KEYS |= {"weights_digest", "classifier_digest", "reported"}
# Records with equal values for these keys describe the same comparison.
_COMPARISON = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")


def compare(
    reference: ExampleSet,
    samples: ExampleSet,
    metric_names: Sequence[str],
    output: pathlib.Path,
    pipeline: FeaturePipeline | None,
    options: Options,
    settings: Mapping[str, Any],
    channels: pictures.Channels = pictures.UNKNOWN,
) -> list[pathlib.Path]:
    """Compares the samples with the reference, and adds a record with the metrics and settings to `output`.

    Pictures, and for arrays an .npz with statistics, are written beside `output`. The record includes the provenance that the
    sample file stores. pipeline: None for metrics without features. Every process must call this; process 0 writes the files.
    Returns: the files that this process has written.
    Raises: ValueError for sets that cannot be compared, and for statistics of other features.
    """
    read_records(output)
    extractor, of_images = pipeline.extractor if pipeline else None, samples.is_of_images
    names = _possible_metrics(reference, samples, extractor, metric_names)
    if not of_images:
        reference, samples = reference.limit(MAX_EXAMPLES), samples.limit(MAX_EXAMPLES)
    conditions: dict[str, dict[str, Any]] = {name: {} for name in names}
    if own := [name for name in names if find_metric(name).conditions]:
        one, other = (each.limit(MAX_EXAMPLES).conditions for each in (reference, samples))
        arrays = {"reference": one, "samples": other}
        conditions |= {name: find_conditions(name, arrays) for name in own}  # errors before features are computed
    sets = []
    if pipeline and needs_features(names, of_images):
        sets = [pipeline.extract_set(reference), pipeline.extract_set(samples, "samples")]
    if jax.process_index() != 0:
        return []
    log("Comparing ...")

    @functools.cache
    def inputs(needs: str) -> tuple[Any, Any]:
        """Returns the metrics' inputs for the reference and for the samples."""
        if needs == "data" and options.normalization is None:
            return inputs("examples")
        if needs in ("examples", "data"):
            read = functools.partial(read_all, normalization=options.normalization, in_data_units=needs == "data")
            return read(reference.source), read(samples.source)
        if needs == "vectors":
            return inputs("pool" if of_images else "examples")
        if needs == "logits":
            assert extractor is not None and extractor.head is not None and sets[1].pool is not None
            return None, sets[1].pool @ extractor.head
        return getattr(sets[0], needs), getattr(sets[1], needs)

    results, values, notes = {}, {}, {}
    for name in names:
        metric = find_metric(name)
        result = metric.compute(*inputs(metric.needs), options._replace(conditions=conditions[name]))
        results[name] = result
        prefix = reported_name(name, extractor.published, extractor.resize) if metric.names and extractor else ""
        found = {f"{prefix}{key}": value for key, value in result.values.items()}
        if taken := sorted(found.keys() & (values.keys() | _RECORD_KEYS)) if ":" in name else []:
            raise ValueError(f"{name} returned {taken[0]}, which the record already has; choose another name")
        values |= found
        if result.note:
            notes[prefix or name] = result.note
    digests = [each.digest for each in sets] or [value_digest(each.source) for each in (reference, samples)]
    used = (extractor.name, extractor.digest, extractor.resize) if extractor else (None, None, None)
    used = dict(zip(("features", "features_digest", "resize"), used, strict=True))
    suffix = hashlib.sha256(json.dumps([*digests, *used.values()]).encode()).hexdigest()[:6]
    suffix = f"{pathlib.Path(samples.name).stem}_{suffix}"
    files: dict[str, str] = {}
    for name, result in results.items():
        picture = None
        if result.curves is not None:
            name, title = result.curves.name, f"Samples of {pathlib.Path(samples.name).stem} and "
            picture = pictures.draw_curves(result.curves, title + pathlib.Path(reference.name).name, channels)
        elif result.neighbors is not None and samples.first.ndim > 2:  # vectors have no picture
            space = f"{extractor.name} features" if extractor and of_images else "standardized examples"
            picture = _draw_neighbors(reference, samples, result, space, channels)
        if picture is not None:
            files[name] = f"{name}_{suffix}.png"
            pictures.save(output.with_name(files[name]), picture)
    if arrays := {name: array for result in results.values() for name, array in result.arrays.items()}:
        files["statistics"] = f"statistics_{suffix}.npz"
        path = output.with_name(files["statistics"])
        if path.exists():  # earlier statistics of the same two sets
            with open_npz(path) as stored:
                arrays = dict(stored) | arrays
        save_npz(path, arrays)
    record = {
        **values,
        "notes": notes,
        "files": files,
        "num_reference": None if reference.statistics else len(reference.source),
        "num_samples": None if samples.statistics else len(samples.source),
        "reference": reference.name,
        "reference_sha256": digests[0],
        "samples": samples.name,
        "samples_sha256": digests[1],
        **used,
        **settings,
        **_drawing_settings(pathlib.Path(samples.name)),
        "versions": {"diffusion_jax": code_version(), "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    add_record(output, record)
    if sets and sets[1].chunks:  # the same samples are rarely compared again
        sets[1].chunks.delete()
    counts = ["statistics" if record[key] is None else f"{record[key]:,}" for key in ("num_samples", "num_reference")]
    log(f"Metrics of {counts[0]} samples, compared with {counts[1]} of {record['reference']}:")
    log_values(record)
    for name, note in notes.items():
        log(f"Note: {name}: {note}.")
    log(f"Written to {output}" + (f", and beside it: {', '.join(files.values())}" if files else ""))
    return [output, *(output.with_name(name) for name in files.values())]


def _drawing_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the settings with which the samples in a file were drawn, for a record; {} if the file stores no settings."""
    stored = Provenance.read(path)
    if stored is None:
        return {}
    if stored.arrays_sha256 and not stored.describes(path):
        log(f"Note: {path} was changed after it was written, so the record omits how its samples were drawn.")
        return {}
    settings, details = stored.settings, stored.details
    sampling = {key: value for key, value in settings["sampling"].items() if key != "steps"}
    return {
        **{key: settings[key] for key in ("weights", "step", "weights_digest", "classifier_digest")},
        "steps": settings["num_steps"],
        "sampling": sampling | {"classifier": details.get("classifier", ""), "batch_size": settings.get("batch_size")},
        "init_from": details.get("init_from"),
        "drawn_with": details,
    }


# ---- Checks


def check_count(name: str, count: int, metric_names: Sequence[str]) -> None:
    """Raises: ValueError if a metric needs more than `count` examples. name: the set or setting, for the message."""
    for metric in metric_names:
        minimum = find_metric(metric).minimum
        if count < minimum:
            raise ValueError(f"{name}: {count} examples are too few for {metric}, which needs {minimum}")


def find_conditions(metric: str, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {parameter: array}, the labels and conditions that a user's metric takes; NaN for a missing condition.

    sets: {"reference" or "samples": {name: array}}, where the names are "label", "condition" and "condition_missing".
    Raises: ValueError if a set lacks the array for a parameter without a default value.
    """
    found = {}
    for parameter, is_required in find_metric(metric).conditions.items():
        side, name = parameter.split("_")
        if sets[side].get(name) is not None:
            found[parameter] = array = np.asarray(sets[side][name])
            if name == "condition" and "condition_missing" in sets[side]:
                missing = sets[side]["condition_missing"]
                found[parameter] = np.where(missing.reshape(-1, *[1] * (array.ndim - 1)), np.nan, array)
        elif is_required:
            raise ValueError(
                f"metrics: {metric} takes {parameter}, but there is no {name} with the {side}; name a set that has one, "
                "or give the parameter a default value"
            )
    return found


def _possible_metrics(
    reference: ExampleSet, samples: ExampleSet, extractor: FeatureExtractor | None, metric_names: Sequence[str]
) -> list[str]:
    """Returns the metrics that these sets allow; logs all other metrics. Raises: ValueError if no metric is possible."""
    if samples.examples is None:
        raise ValueError(f"{samples.name} has only statistics, but samples must be images; swap the two arguments?")
    check_comparable(reference, samples)
    reasons = {name: _why_not(find_metric(name).needs, reference, extractor) for name in metric_names}
    missing = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if missing:
        log(f"Not measured: {'; '.join(missing)}.")
    names = [name for name, reason in reasons.items() if not reason]
    if not names:
        raise ValueError("none of the metrics can be computed; choose other metrics")
    if extractor and extractor.name == "inception" and not extractor.published:
        log("Note: these weights are not the published Inception weights for FID, so no metric is called FID.")
    for each in (reference, samples):
        if each.examples is not None:
            check_count(each.name, len(each.examples), names)
    return names


def _why_not(needs: str, reference: ExampleSet, extractor: FeatureExtractor | None) -> str:
    """Returns why a metric with these needs cannot be computed, or ""."""
    if needs == "spatial" and extractor and extractor.name != "inception":
        return "only Inception has spatial features"
    if needs == "spatial" and reference.statistics and reference.statistics.spatial is None:
        return "the reference has no spatial statistics (mu_s, sigma_s)"
    if needs == "logits" and extractor and not extractor.published:
        return "it needs the classes of the published Inception"
    if needs in ("pool", "vectors", "examples", "data") and reference.examples is None:
        return "the reference has statistics only"
    return ""


def check_comparable(reference: ExampleSet, samples: ExampleSet) -> None:
    """Raises: ValueError if the two sets have examples of different shapes; gray and color images are comparable."""
    if reference.examples is None or samples.examples is None:
        return
    if reference.is_of_images != samples.is_of_images:
        images, others = (reference, samples) if reference.is_of_images else (samples, reference)
        raise ValueError(
            f"{others.name} has the type {others.first.dtype} {[len(others.source), *others.first.shape[1:]]}, but "
            f"{images.name} has images, uint8 [N, H, W, 1 or 3]; save floats x in [-1, 1] as round((x + 1) * 127.5)"
        )
    of_images = reference.is_of_images
    one, other = (each.first.shape[1:3] if of_images else each.first.shape[1:] for each in (reference, samples))
    if one != other:
        noun, advice = ("images", "; --image_size=N resizes folders and data sets") if of_images else ("examples", "")
        one, other = ("x".join(map(str, shape)) for shape in (one, other))
        raise ValueError(
            f"{reference.name} has {one} {noun} and {samples.name} has {other} {noun}, which are not comparable{advice}"
        )


# ---- Outputs


def _draw_neighbors(
    reference: ExampleSet, samples: ExampleSet, result: Result, space: str, channels: pictures.Channels
) -> pictures.Picture:
    """Draws the samples closest to the reference, each before its nearest examples. space: the features in the title."""
    assert result.neighbors is not None and result.rows is not None
    rows, (indices, distances) = result.rows, result.neighbors
    if samples.is_of_images:  # rows of the pools become numbers of examples
        indices = subset_indices(len(reference.source), MAX_EXAMPLES)[indices]
        rows = subset_indices(len(samples.source), MAX_EXAMPLES)[rows]
    one, other = (pathlib.Path(each.name).name for each in (reference, samples))
    title = f"Samples of {other} and their nearest examples in {one}; Euclidean distances of {space}; at most "
    title += f"{result.values['memorization']['close_distance']:.3g} is close"
    count, nearest = (10, indices.shape[1]) if samples.is_of_images else (4, 1)
    suspects = np.argsort(distances[:, 0], kind="stable")[:count]
    examples = np.stack([read_examples(reference.source, indices[i, :nearest]) for i in suspects])
    shown = read_examples(samples.source, rows[suspects])
    if shown.shape[-1] != examples.shape[-1]:  # gray and color images
        depth = max(shown.shape[-1], examples.shape[-1])
        shown, examples = (np.broadcast_to(x, (*x.shape[:-1], depth)) for x in (shown, examples))
    numbers = rows[suspects]
    if isinstance(samples.source, data.SelectedExamples):
        numbers = samples.source.indices[numbers]
    return pictures.draw_neighbors(shown, numbers.tolist(), examples, distances[suspects, :nearest], title, channels)


def log_values(record: Mapping[str, Any]) -> None:
    """Logs each metric with its standard error, its better direction, and its value for equal distributions."""
    values = reported_values(record)
    names = [(find_meaning(key) or Meaning(key, "", "")).name for key in values]
    texts = [format_value(value, record.get(f"{key}_standard_error")) for key, value in values.items()]
    widths = [max(map(len, column), default=0) for column in (names, texts)]
    for key, name, text in zip(values, names, texts, strict=True):
        log(f"  {name:{widths[0]}}  {text:{widths[1]}}  {'; '.join(remarks(key, record))}".rstrip())


def remarks(key: str, record: Mapping[str, Any]) -> list[str]:
    """Returns a metric's better direction and its value for equal distributions, if known."""
    meaning = find_meaning(key)
    found = [f"{meaning.better} is better"] if meaning and meaning.better else []
    expected = _EXPECTED_CLOSE_SHARE if key == "close_share" else record.get(f"{key}_same_distribution")
    if expected is not None:
        found.append(f"equal distributions: {expected:.4g}")
    limits = [record[end] for end in (f"{key}_limit", _Z_LIMITS.get(key, "")) if end in record]
    return found + [f"equal distributions: |z| below {limit:.3g}" for limit in limits]


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSON list, or updates the record of the same comparison with the new metrics."""
    records, earlier = [], {}
    for old in read_records(path):
        if all(old.get(key) == record.get(key) for key in _COMPARISON):
            earlier |= old
        else:
            records.append(old)
    merged = earlier | dict(record)
    for name in ("files", "notes"):
        merged[name] = earlier.get(name, {}) | record.get(name, {})
    write_text(path, json.dumps([*records, merged], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.json, [] if the file does not exist. Raises: ValueError for other contents."""
    if not path.exists():
        return []
    problem = "not a list of records"
    try:
        records = read_json(path, list)
        if all(isinstance(record, dict) for record in records):
            return records
    except (ValueError, OSError) as error:
        problem = str(error)
    raise ValueError(f"{path} is not a valid metrics.json ({problem}); name another file, or move this file away")

"""Measuring samples: one comparison of two sets of images, with all that is needed to repeat it, into metrics.json."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.evaluation import metric_suite
from diffusion_jax.evaluation import feature_extractors
from diffusion_jax.evaluation.feature_extraction import FeaturePipeline, SetFeatures, cache_directory
from diffusion_jax.evaluation.feature_extractors import FeatureExtractor
from diffusion_jax.evaluation.image_sets import ImageSet
from diffusion_jax.runs import pictures
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.console import Bar, say

_SHOWN = 10  # samples in the picture of neighbors
_NEIGHBORS = 5


def measure(
    reference: ImageSet,
    samples: ImageSet,
    extractor: FeatureExtractor,
    wanted: Sequence[str],
    mesh,
    batch_size: int,
    output: pathlib.Path,
    about: Mapping[str, Any],
    cache: pathlib.Path | None = None,
) -> None:
    """Compares two sets and adds the record to `output`, a JSON list; beside it the picture of memorization.

    about: what else to say in the record. cache: of the features, the user's cache directory unless given. All processes call
    this, and the first writes. Raises: ValueError, before anything is computed, for sets that cannot be compared.
    """
    wanted = _measurable(reference, samples, extractor, wanted)
    read_records(output)
    extraction, cache = FeaturePipeline(extractor, mesh, batch_size, Bar), cache or cache_directory()
    known = _features(extraction, reference, cache / "references")
    # Samples are rarely asked for again: their parts are kept only until the record is written.
    judged = _features(extraction, samples, cache / "samples")
    if jax.process_index() != 0:
        return
    say("Comparing ...")
    found = metric_suite.compute_metrics(known, judged, extractor, wanted, say)
    if "memorization" in wanted:
        found["memorization"], near = metric_suite.memorization_report(known.pool, judged.pool, _NEIGHBORS)
        kind = (known.digest, judged.digest, extractor.digest, extractor.resize)
        tag = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:6]  # of another measurement, another picture
        picture = output.with_name(f"memorization_{pathlib.Path(samples.name).stem}_{tag}.png")
        found["memorization"]["picture"] = picture.name
        _draw_neighbors(picture, reference, samples, near, f"distances of {extractor.name} features")
        say(f"The samples nearest to reference images, each before its {near.indices.shape[1]} nearest: {picture}")
    settings = {
        "reference": reference.name,
        "reference_sha256": known.digest,
        "num_reference": known.moments.count or None,
        "samples": samples.name,
        "samples_sha256": judged.digest,
        "num_samples": judged.moments.count,
        "features": extractor.name,
        "features_digest": extractor.digest,
        "resize": extractor.resize,
        **about,
        "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    add_record(output, found | settings)
    judged.delete_cache()
    for name, value in found.items():
        if isinstance(value, float) and not name.endswith(("_std", "_standard_error")):
            error = found.get(f"{name}_standard_error")
            say(f"{name:28} {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))
    if "memorization" in found:
        say(f"{'closer than the reference':28} {found['memorization']['close_share']:.4f} (0.01 of fresh images)")
    say(f"Written to {output}")


def _measurable(reference: ImageSet, samples: ImageSet, extractor: FeatureExtractor, wanted: Sequence[str]) -> list[str]:
    """The wanted metrics that there can be; the others are told of. Raises: ValueError for sets that no metric is of."""
    if samples.images is None:
        raise ValueError(f"{samples.name} holds statistics alone, and samples are images; swap the two?")
    check_comparable(reference, samples)
    statistics = reference.statistics
    spatial = statistics.spatial is not None if statistics else extractor.name == "inception"
    missing = metric_suite.unavailable_metrics(reference.images is None, spatial, extractor, wanted)
    if missing:
        say(f"Left out: {'; '.join(f'{metric} ({why})' for metric, why in missing.items())}.")
    wanted = [metric for metric in wanted if metric not in missing]
    if not wanted:
        raise ValueError("nothing is left to measure; name other metrics")
    if extractor.name == "inception" and not extractor.published:
        say("Note: these are not the published weights of FID's Inception; no figure of theirs is called FID.")
    for images in (reference, samples):
        for metric in wanted:
            if images.images is not None and len(images.images) < metric_suite.MIN_IMAGES[metric]:
                few = f"{images.name}: {len(images.images)} images are too few"
                raise ValueError(f"{few} for {metric}, which needs {metric_suite.MIN_IMAGES[metric]}")
    dimensions = feature_extractors.feature_dimension(extractor, samples.images.read(np.arange(1))[0].shape[1:])
    if statistics and dimensions and len(statistics.moments.mean) != dimensions:
        raise ValueError(
            f"{reference.name} has statistics of {len(statistics.moments.mean)} dimensions, and features of "
            f"{extractor.name} have {dimensions}"
        )
    return wanted


def check_comparable(reference: ImageSet, samples: ImageSet) -> None:
    """Raises: ValueError for images of another size or number of channels than the others'."""
    if reference.images is None or samples.images is None:
        return
    shapes = [images.read(np.arange(1))[0].shape[1:] for images in (reference.images, samples.images)]
    if shapes[0] != shapes[1]:
        kinds = ["x".join(map(str, shape[:2])) + (" gray" if shape[2] == 1 else " color") for shape in shapes]
        remedies = ["--channels=1 or 3 makes both gray or both color"] if shapes[0][2] != shapes[1][2] else []
        if shapes[0][:2] != shapes[1][:2]:
            remedies.append("--image_size=N resizes folders and data sets")
        raise ValueError(
            f"{reference.name} holds {kinds[0]} images and {samples.name} {kinds[1]} ones: they are not comparable; "
            + " and ".join(remedies)
        )


def _features(extraction: FeaturePipeline, images: ImageSet, cache: pathlib.Path) -> SetFeatures:
    """Statistics that a file has go before those of the images beside them, which may be fewer."""
    found = None
    if images.images is not None:
        found = extraction.extract_set(pathlib.Path(images.name).name, images.images, cache)
    if not images.statistics:
        return found
    moments, spatial = images.statistics
    content = hashlib.sha256()
    for part in (moments, spatial):
        if part is not None:
            content.update(part.mean.tobytes() + part.covariance.tobytes())
    return SetFeatures(found and found.pool, moments, spatial, content.hexdigest(), found and found.parts)


def _draw_neighbors(path: pathlib.Path, reference: ImageSet, samples: ImageSet, near, unit: str) -> None:
    """Rows: the samples that stand nearest to reference images, and these, with their distances. near: `Neighbors`."""
    suspects = np.argsort(near.distances[:, 0], kind="stable")[:_SHOWN]
    rows = [
        (f"sample {i}", samples.images.read(np.array([i]))[0][0], reference.images.read(near.indices[i])[0])
        for i in suspects
    ]
    names = (pathlib.Path(images.name).name for images in (samples, reference))
    title = "Samples of {}\nand their nearest images in {}\n".format(*names) + unit
    pictures.plot_neighbors(path, rows, near.distances[suspects], title)


_SAME = ("reference_sha256", "samples_sha256", "features_digest", "resize", "steps")


def read_likelihood(path: pathlib.Path) -> dict[str, Any] | None:
    """Of a likelihood.json, its bits per dimension and the weights they are of; None where there is no such file.

    Raises: ValueError for one that is none.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        kept = {key: report[key] for key in ("dataset", "weights", "step", "bits_per_dim")}
    except (ValueError, OSError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no likelihood.json ({error!r}); run --mode=evaluate again, or move it away"
        ) from None
    return kept | {key: value for key, value in report.items() if "bits_per_dim" in key and value is not None}


def add_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends to a JSON list. An earlier record of the same comparison gives way, but for metrics that this one has not."""
    records, earlier = [], {}
    for old in read_records(path):
        if all(old.get(key) == record.get(key) for key in _SAME):
            earlier |= old
        else:
            records.append(old)
    work.write_text(path, json.dumps([*records, earlier | dict(record)], indent=2, allow_nan=False) + "\n")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.json; none where there is no such file. Raises: ValueError for one that is none."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no metrics.json ({error}); name another file, or move it away") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is no metrics.json (a list of records); name another file, or move it away")
    return records


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's figures depend on, flat: those of its sampler, too."""
    sampling = {key: value for key, value in record.get("sampling", {}).items() if key not in record}
    mine = ("dataset", "init_from", "weights", "step", "steps", "features", "features_digest", "resize")
    mine += ("reference", "samples", "num_reference", "num_samples")
    return {key: record[key] for key in mine if record.get(key) is not None} | sampling


def differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which records differ."""
    settings = [settings_of(record) for record in records]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]

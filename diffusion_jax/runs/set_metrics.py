"""Metrics of one set of images against another, added with their settings to a metrics.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import diffusion_jax
from diffusion_jax import pictures
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, closest_names
from diffusion_jax.evaluation import feature_extractors, named_metrics
from diffusion_jax.evaluation.feature_extraction import FeaturePipeline, SetFeatures, cache_directory
from diffusion_jax.evaluation.feature_extractors import FeatureExtractor
from diffusion_jax.evaluation.image_sets import ImageSet, open_image_set
from diffusion_jax.evaluation.metrics import Neighbors
from diffusion_jax.evaluation.named_metrics import METRICS
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs import devices
from diffusion_jax.runs.console import ProgressBar, log
from diffusion_jax.runs.metric_records import add_record, read_records

__all__ = ["Comparison", "compare_sets", "record_metrics"]

_PICTURED_SAMPLES = 10
_NEIGHBORS = 5
_EXPECTED_CLOSE_SHARE = 0.01  # of images that the model was not trained on


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The options of a comparison, as `python -m diffusion_jax.evaluation` describes them."""

    reference: str
    samples: str
    inception: str = ""
    features: str | None = None
    metrics: str | None = None
    resize: str = "tf1"
    batch_size: int = 64
    data_dir: str = ""
    image_size: int | None = None
    channels: int | None = None
    output: str = "metrics.json"


def compare_sets(options: Comparison) -> None:
    """Measures the samples against the reference and adds a record to the output file.

    Raises: DiffusionJaxError, ValueError, OSError: one line.
    """
    metric_names = [name.strip() for name in options.metrics.split(",")] if options.metrics else METRICS
    unknown = sorted(set(metric_names) - set(METRICS))
    if unknown:
        near = closest_names(unknown[0], METRICS)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--metrics: {unknown[0]!r} is unknown; known: {', '.join(METRICS)}{hint}")
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size} must be at least 1")
    output = _output_file(options.output)
    reference, samples = (
        open_image_set(location, options.data_dir, options.image_size, options.channels)
        for location in (options.reference, options.samples)
    )
    _check_comparable(reference, samples)
    features = options.features or ("digits" if reference.name.startswith("digits:") else "inception")
    if features == "inception" and not options.inception:
        raise UserError(
            f"--inception=PATH is needed: the weights of FID's network ({DOWNLOAD_SOURCES}); or --features=digits, or "
            "module:function"
        )
    extractor = feature_extractors.from_name(features, options.inception, options.resize)
    output.parent.mkdir(parents=True, exist_ok=True)
    devices.start()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
    record_metrics(reference, samples, extractor, metric_names, mesh, options.batch_size, output, {})


def record_metrics(
    reference: ImageSet,
    samples: ImageSet,
    extractor: FeatureExtractor,
    metric_names: Sequence[str],
    mesh: Mesh,
    batch_size: int,
    output: pathlib.Path,
    settings: Mapping[str, Any],
    cache: pathlib.Path | None = None,
) -> None:
    """Compares two sets and adds a record to `output`; writes the picture of memorization beside it.

    settings: more entries of the record. cache: directory of the features, by default the user's cache. Every process calls
    this, and process 0 writes. Raises: ValueError, before anything is computed, for sets that cannot be compared.
    """
    metric_names = _possible_metrics(reference, samples, extractor, metric_names)
    read_records(output)
    extraction, cache = FeaturePipeline(extractor, mesh, batch_size, ProgressBar), cache or cache_directory()
    reference_features = _features(extraction, reference, cache / "references")
    # Samples are rarely measured again: their features are kept only until the record is written.
    sample_features = _features(extraction, samples, cache / "samples")
    if jax.process_index() != 0:
        return
    log("Comparing ...")
    results: dict[str, Any] = named_metrics.compute_metrics(
        reference_features, sample_features, extractor, metric_names, log
    )
    if "memorization" in metric_names:
        assert reference_features.pool is not None and sample_features.pool is not None
        report, neighbors = named_metrics.memorization_report(reference_features.pool, sample_features.pool, _NEIGHBORS)
        picture = _neighbors_path(output, samples, extractor, reference_features, sample_features)
        results["memorization"] = {**report, "picture": picture.name}
        close = f"{report['close_distance']:.3g}"
        unit = f"Euclidean distances of {extractor.name} features; at most {close} is close"
        _draw_neighbors(picture, reference, samples, neighbors, unit)
        log(f"The samples nearest to reference images, each before its {neighbors.indices.shape[1]} nearest: {picture}")
    record = results | {
        "reference": reference.name,
        "reference_sha256": reference_features.digest,
        "num_reference": reference_features.moments.count or None,
        "samples": samples.name,
        "samples_sha256": sample_features.digest,
        "num_samples": sample_features.moments.count,
        "features": extractor.name,
        "features_digest": extractor.digest,
        "resize": extractor.resize,
        **settings,
        "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    add_record(output, record)
    sample_features.delete_cache()
    _log_results(results)
    log(f"Written to {output}")


def _log_results(results: Mapping[str, Any]) -> None:
    for name, value in results.items():
        if isinstance(value, float) and not name.endswith(("_std", "_standard_error")):
            error = results.get(f"{name}_standard_error")
            log(f"{name:28} {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))
    if "memorization" in results:
        share = results["memorization"]["close_share"]
        log(f"{'closer than the reference':28} {share:.4f} ({_EXPECTED_CLOSE_SHARE} of fresh images)")


def _possible_metrics(
    reference: ImageSet, samples: ImageSet, extractor: FeatureExtractor, metric_names: Sequence[str]
) -> list[str]:
    """The metrics that these sets allow; the others are logged. Raises: ValueError for sets that allow none."""
    if samples.images is None:
        raise ValueError(f"{samples.name} holds only statistics, but samples must be images; swap the two arguments?")
    _check_comparable(reference, samples)
    statistics = reference.statistics
    has_spatial = statistics.spatial is not None if statistics else extractor.name == "inception"
    missing = named_metrics.unavailable_metrics(reference.images is None, has_spatial, extractor, metric_names)
    if missing:
        log(f"Not measured: {'; '.join(f'{metric} ({reason})' for metric, reason in missing.items())}.")
    metric_names = [metric for metric in metric_names if metric not in missing]
    if not metric_names:
        raise ValueError("nothing is left to measure; name other metrics")
    if extractor.name == "inception" and not extractor.published:
        log("Note: these are not the published weights of FID's Inception, so none of these metrics is called FID.")
    for images in (reference, samples):
        for metric in metric_names:
            if images.images is not None and len(images.images) < named_metrics.MIN_IMAGES[metric]:
                message = f"{images.name}: {len(images.images)} images are too few for {metric}"
                raise ValueError(f"{message}, which needs {named_metrics.MIN_IMAGES[metric]}")
    dimensions = feature_extractors.feature_dimension(extractor, samples.images.read(np.arange(1))["image"].shape[1:])
    if statistics and dimensions and len(statistics.moments.mean) != dimensions:
        raise ValueError(
            f"{reference.name} has statistics of {len(statistics.moments.mean)} dimensions, and features of "
            f"{extractor.name} have {dimensions}; use the features of the statistics"
        )
    return metric_names


def _check_comparable(reference: ImageSet, samples: ImageSet) -> None:
    """Raises: ValueError if the images of the two sets differ in size or number of channels."""
    if reference.images is None or samples.images is None:
        return
    shapes = [images.read(np.arange(1))["image"].shape[1:] for images in (reference.images, samples.images)]
    if shapes[0] != shapes[1]:
        kinds = ["x".join(map(str, shape[:2])) + (" gray" if shape[2] == 1 else " color") for shape in shapes]
        advice = ["--channels=1 or 3 makes both gray or both color"] if shapes[0][2] != shapes[1][2] else []
        if shapes[0][:2] != shapes[1][:2]:
            advice.append("--image_size=N resizes folders and data sets")
        raise ValueError(
            f"{reference.name} holds {kinds[0]} images and {samples.name} holds {kinds[1]} images, which are not comparable; "
            + " and ".join(advice)
        )


def _features(extraction: FeaturePipeline, images: ImageSet, cache: pathlib.Path) -> SetFeatures:
    """Features of a set. Statistics that its file holds replace those of its images, which may be fewer."""
    features = None
    if images.images is not None:
        features = extraction.extract_set(pathlib.Path(images.name).name, images.images, cache)
    if not images.statistics:
        assert features is not None
        return features
    moments, spatial = images.statistics
    digest = hashlib.sha256()
    for part in (moments, spatial):
        if part is not None:
            digest.update(part.mean.tobytes() + part.covariance.tobytes())
    pool, parts = (None, None) if features is None else (features.pool, features.cache)
    return SetFeatures(pool, moments, spatial, digest.hexdigest(), parts)


def _neighbors_path(
    output: pathlib.Path,
    samples: ImageSet,
    extractor: FeatureExtractor,
    reference_features: SetFeatures,
    sample_features: SetFeatures,
) -> pathlib.Path:
    """The path of the picture, different for each comparison."""
    key = (reference_features.digest, sample_features.digest, extractor.digest, extractor.resize)
    tag = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:6]
    return output.with_name(f"memorization_{pathlib.Path(samples.name).stem}_{tag}.png")


def _draw_neighbors(
    path: pathlib.Path, reference: ImageSet, samples: ImageSet, neighbors: Neighbors, unit: str
) -> None:
    """Draws a row for each of the samples nearest to reference images: the sample, and these images with their distances."""
    assert samples.images is not None and reference.images is not None
    suspects = np.argsort(neighbors.distances[:, 0], kind="stable")[:_PICTURED_SAMPLES]
    nearest = np.stack([reference.images.read(neighbors.indices[i])["image"] for i in suspects])
    names = (pathlib.Path(images.name).name for images in (samples, reference))
    title = "Samples of {} and their nearest images in {}; ".format(*names) + unit
    shown = samples.images.read(suspects)["image"]
    pictures.save(
        path, pictures.draw_neighbors(shown, suspects.tolist(), nearest, neighbors.distances[suspects], title)
    )


def _output_file(output: str) -> pathlib.Path:
    """The JSON file of --output, a file or its folder. Raises: UserError if a file has the folder's name."""
    path = pathlib.Path(output).expanduser()
    if output.endswith("/") or path.suffix != ".json" or path.is_dir():
        path = path / "metrics.json"
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={output}: {folder} is a file; name a folder, or a file that ends in .json")
    return path

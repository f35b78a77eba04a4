"""Metrics of one set of images or arrays against another, added with their settings to a metrics.json, and their pictures."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import diffusion_jax
from diffusion_jax import data, pictures
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import example_sets, features, named_metrics
from diffusion_jax.evaluation.example_sets import ExampleSet, open_image_set, read_examples
from diffusion_jax.evaluation.features import FeatureExtractor, FeaturePipeline, SetFeatures
from diffusion_jax.evaluation.metrics import Neighbors
from diffusion_jax.evaluation.named_metrics import ARRAY_METRICS_OF_FEATURES, METRICS, ArrayComparison
from diffusion_jax.files import save_npz
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs.console import ProgressBar, log
from diffusion_jax.runs.metric_records import add_record, read_records

__all__ = ["ArrayOptions", "compare_sets", "record_metrics"]

_PICTURED_IMAGES, _NEIGHBORS = 10, 5
_PICTURED_ARRAYS = 4
_EXPECTED_CLOSE_SHARE = 0.01  # of images that the model was not trained on
_WIDTH = 28  # of names in the log


def compare_sets(options: argparse.Namespace) -> None:
    """Measures the samples against the reference and adds a record to the output file.

    options: the arguments of `python -m diffusion_jax.evaluation`.
    Raises: DiffusionJaxError, ValueError, OSError: one line.
    """
    metric_names = [name.strip() for name in options.metrics.split(",")] if options.metrics else METRICS
    unknown = sorted(set(metric_names) - set(METRICS))
    if unknown:
        raise UserError(f"--metrics: {unknown[0]!r} is unknown; known: {', '.join(METRICS)}")
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size} must be at least 1")
    output = pathlib.Path(options.output).expanduser()
    output = output if output.suffix == ".json" else output / "metrics.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    reference, samples = (
        open_image_set(location, options.data_dir, options.image_size)
        for location in (options.reference, options.samples)
    )
    _check_comparable(reference, samples)
    name = options.features or ("digits" if reference.name.startswith("digits:") else "inception")
    if name == "inception" and not options.inception:
        raise UserError(
            f"--inception=PATH is needed: the weights of FID's network ({DOWNLOAD_SOURCES}); or --features=digits, or "
            "module:function"
        )
    extractor = features.from_name(name, options.inception, options.resize)
    devices.start()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
    pipeline = FeaturePipeline(extractor, mesh, options.batch_size, ProgressBar)
    record_metrics(reference, samples, metric_names, output, {}, pipeline, RunDir(features.cache_directory()))


class ArrayOptions(NamedTuple):
    """Options of `named_metrics.compare_arrays`. seed: of the directions of the sliced Wasserstein distance."""

    seed: int
    normalization: data.Normalization | None
    periodic: bool


def record_metrics(
    reference: ExampleSet,
    samples: ExampleSet,
    metric_names: Sequence[str],
    output: pathlib.Path,
    settings: Mapping[str, Any],
    pipeline: FeaturePipeline | None,
    cache: RunDir,
    arrays: ArrayOptions | None = None,
) -> list[pathlib.Path]:
    """Compares two sets and adds a record to `output`; writes pictures, and an .npz of the statistics of arrays, beside it.

    settings: more entries of the record. pipeline: None for metrics without features. cache: of features, a directory that
    every process sees. arrays: None for images. Every process calls this, and process 0 writes.
    Returns: the files that this process has written.
    Raises: ValueError, before anything is computed, for sets that cannot be compared.
    """
    read_records(output)
    of_features = list(metric_names)
    if arrays is not None:
        of_features = [name for name in metric_names if name in ARRAY_METRICS_OF_FEATURES]
    elif pipeline is not None:
        of_features = _possible_metrics(reference, samples, pipeline.extractor, metric_names)
    extractor = pipeline.extractor if pipeline else None
    values: dict[str, Any] = {}
    sets: list[SetFeatures] = []
    if pipeline and of_features:
        # Samples are rarely measured again: their features are kept only until the record is written.
        folders = ((reference, "references"), (samples, "samples"))
        sets = [_set_features(pipeline, each, cache.subdirectory(folder)) for each, folder in folders]
    if jax.process_index() != 0:
        return []
    log("Comparing ...")
    if extractor and sets:
        values = named_metrics.compute_metrics(sets[0], sets[1], extractor, of_features, log)
    stem, written, paths = pathlib.Path(samples.name).stem, "", [output]
    if arrays is None:
        assert extractor is not None
        digests = [each.digest for each in sets]
        values |= {"num_reference": sets[0].moments.count or None, "num_samples": sets[1].moments.count}
        if "memorization" in of_features:
            picture = output.with_name(f"memorization_{stem}_{_tag(*digests, extractor.digest, extractor.resize)}.png")
            values["memorization"] = _image_memorization(reference, samples, sets, extractor.name, picture)
            paths.append(picture)
    else:
        assert reference.examples is not None and samples.examples is not None
        pair, normalization = (reference.examples, samples.examples), arrays.normalization
        one, other = (example_sets.standardize(each, normalization) for each in pair)
        key = jax.random.key(arrays.seed)
        comparison = named_metrics.compare_arrays(key, one, other, metric_names, normalization, arrays.periodic, log)
        values |= comparison.values
        digests = [example_sets.value_digest(each) for each in pair]
        files = _write_files(output.parent, f"{stem}_{_tag(*digests)}", reference, samples, comparison)
        if "memorization" in values and "memorization" in files:
            values["memorization"]["picture"] = files["memorization"]
        values |= {"files": files, "num_reference": len(pair[0]), "num_samples": len(pair[1]), "seed": arrays.seed}
        written = f", and beside it: {', '.join(files.values())}"
        paths += [output.with_name(name) for name in files.values()]
    record = {
        **values,
        "reference": reference.name,
        "reference_sha256": digests[0],
        "samples": samples.name,
        "samples_sha256": digests[1],
        "features": extractor.name if extractor else None,
        "features_digest": extractor.digest if extractor else None,
        "resize": extractor.resize if extractor else None,
        **settings,
        "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "backend": jax.default_backend(),
    }
    add_record(output, record)
    for each in sets[1:]:
        each.delete_cache()
    _log_values(values)
    log(f"Written to {output}{written}")
    return paths


def _tag(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:6]


def _log_values(values: Mapping[str, Any]) -> None:
    """Logs a line for each metric, with its standard error, and its value for equal laws if that is not 0 or 1."""
    for name, value in values.items():
        if isinstance(value, float) and not name.endswith(("_std", "_standard_error", "_same_law")):
            error, same_law = (values.get(f"{name}_{of}") for of in ("standard_error", "same_law"))
            line = f"{name:{_WIDTH}} {value:.6g}" + (f" ± {error:.2g}" if error is not None else "")
            log(line + (f" (equal laws: {same_law:.4g})" if same_law is not None else ""))
    if "memorization" in values:
        share = values["memorization"]["close_share"]
        log(f"{'closer than the reference':{_WIDTH}} {share:.4f} ({_EXPECTED_CLOSE_SHARE} of fresh examples)")


# ---- Images


def _possible_metrics(
    reference: ExampleSet, samples: ExampleSet, extractor: FeatureExtractor, metric_names: Sequence[str]
) -> list[str]:
    """The metrics that these sets allow; the others are logged. Raises: ValueError for sets that allow none."""
    if samples.examples is None:
        raise ValueError(f"{samples.name} holds only statistics, but samples must be images; swap the two arguments?")
    _check_comparable(reference, samples)
    statistics = reference.statistics
    has_spatial = statistics.spatial is not None if statistics else extractor.name == "inception"
    missing = named_metrics.unavailable_metrics(reference.examples is None, has_spatial, extractor, metric_names)
    if missing:
        log(f"Not measured: {'; '.join(f'{metric} ({reason})' for metric, reason in missing.items())}.")
    metric_names = [metric for metric in metric_names if metric not in missing]
    if not metric_names:
        raise ValueError("nothing is left to measure; name other metrics")
    if extractor.name == "inception" and not extractor.published:
        log("Note: these are not the published weights of FID's Inception, so none of these metrics is called FID.")
    for each in (reference, samples):
        for metric in metric_names:
            minimum = named_metrics.MIN_EXAMPLES[metric]
            if each.examples is not None and len(each.examples) < minimum:
                raise ValueError(
                    f"{each.name}: {len(each.examples)} images are too few for {metric}, which needs {minimum}"
                )
    dimensions = features.feature_dimension(extractor, read_examples(samples.examples, np.arange(1)).shape[1:])
    if statistics and dimensions and len(statistics.moments.mean) != dimensions:
        raise ValueError(
            f"{reference.name} has statistics of {len(statistics.moments.mean)} dimensions, and features of "
            f"{extractor.name} have {dimensions}; use the features of the statistics"
        )
    return metric_names


def _check_comparable(reference: ExampleSet, samples: ExampleSet) -> None:
    """Raises: ValueError if the images of the two sets differ in size."""
    if reference.examples is None or samples.examples is None:
        return
    sizes = [images.read(np.arange(1))["image"].shape[1:3] for images in (reference.examples, samples.examples)]
    if sizes[0] != sizes[1]:
        one, other = ("x".join(map(str, size)) for size in sizes)
        raise ValueError(
            f"{reference.name} holds {one} images and {samples.name} holds {other} images, which are not comparable; "
            "--image_size=N resizes folders and data sets"
        )


def _set_features(pipeline: FeaturePipeline, images: ExampleSet, cache: RunDir) -> SetFeatures:
    """Features of a set. Statistics that its file holds replace those of its images, which may be fewer."""
    found = None
    if images.examples is not None:
        found = pipeline.extract_set(pathlib.Path(images.name).name, images.examples, cache)
    if not images.statistics:
        assert found is not None
        return found
    moments, spatial = images.statistics
    digest = hashlib.sha256()
    for part in (moments, spatial):
        if part is not None:
            digest.update(part.mean.tobytes() + part.covariance.tobytes())
    pool, parts = (None, None) if found is None else (found.pool, found.cache)
    return SetFeatures(pool, moments, spatial, digest.hexdigest(), parts)


def _image_memorization(
    reference: ExampleSet, samples: ExampleSet, sets: Sequence[SetFeatures], name: str, picture: pathlib.Path
) -> dict[str, Any]:
    """The report of memorization; draws its picture. name: of the features."""
    reference_pool, samples_pool = (each.pool for each in sets)
    assert reference_pool is not None and samples_pool is not None
    report, neighbors = named_metrics.memorization_report(reference_pool, samples_pool, _NEIGHBORS)
    unit = f"Euclidean distances of {name} features; at most {report['close_distance']:.3g} is close"
    _draw_neighbors(picture, reference, samples, np.arange(len(samples_pool)), neighbors, _PICTURED_IMAGES, unit)
    log(f"The samples nearest to reference images, each before its {neighbors.indices.shape[1]} nearest: {picture}")
    return {**report, "picture": picture.name}


def _draw_neighbors(
    path: pathlib.Path,
    reference: ExampleSet,
    samples: ExampleSet,
    rows: np.ndarray,
    neighbors: Neighbors,
    count: int,
    unit: str,
) -> None:
    """Draws a row for each of the samples nearest to reference examples: the sample, and these examples with their distances.

    rows: the indices of the samples that have neighbors. count: how many samples are drawn.
    """
    assert samples.examples is not None and reference.examples is not None
    suspects = np.argsort(neighbors.distances[:, 0], kind="stable")[:count]
    nearest = np.stack([read_examples(reference.examples, neighbors.indices[i]) for i in suspects])
    names = (pathlib.Path(each.name).name for each in (samples, reference))
    title = "Samples of {} and their nearest examples in {}; ".format(*names) + unit
    shown, distances = read_examples(samples.examples, rows[suspects]), neighbors.distances[suspects]
    if shown.shape[-1] != nearest.shape[-1]:  # gray and color images
        channels = max(shown.shape[-1], nearest.shape[-1])
        shown, nearest = (np.broadcast_to(images, (*images.shape[:-1], channels)) for images in (shown, nearest))
    pictures.save(path, pictures.draw_neighbors(shown, rows[suspects].tolist(), nearest, distances, title))


# ---- Arrays


def _write_files(
    folder: pathlib.Path, suffix: str, reference: ExampleSet, samples: ExampleSet, comparison: ArrayComparison
) -> dict[str, str]:
    """Writes the pictures, and the statistics as an .npz. Returns: their names by what they show."""
    files: dict[str, str] = {}
    title = f"Samples of {pathlib.Path(samples.name).stem} and {pathlib.Path(reference.name).name}"
    histograms, neighbors = comparison.histograms, comparison.neighbors
    figures = {
        "histograms": (pictures.draw_histograms, None if histograms is None else (histograms,)),
        "spectrum": (pictures.draw_spectra, comparison.spectra),
        "autocorrelation": (pictures.draw_autocorrelation, comparison.autocorrelations),
    }
    for name, (draw, statistics) in figures.items():
        if statistics is not None:
            files[name] = f"{name}_{suffix}.png"
            pictures.save(folder / files[name], draw(*statistics, title=title))
    assert samples.examples is not None
    if neighbors is not None and len(read_examples(samples.examples, np.arange(1)).shape) > 2:
        files["memorization"] = f"memorization_{suffix}.png"
        assert comparison.neighbor_samples is not None
        nearest = Neighbors(neighbors.indices[:, :1], neighbors.distances[:, :1])
        path, rows = folder / files["memorization"], comparison.neighbor_samples
        _draw_neighbors(path, reference, samples, rows, nearest, _PICTURED_ARRAYS, "Euclidean, standardized")
    arrays = _statistics_arrays(comparison)
    if arrays:
        files["statistics"] = f"statistics_{suffix}.npz"
        path = folder / files["statistics"]
        if path.exists():  # other statistics of the same two sets
            with np.load(path) as stored:
                arrays = dict(stored) | arrays
        save_npz(path, arrays)
    return files


def _statistics_arrays(comparison: ArrayComparison) -> dict[str, np.ndarray]:
    """The statistics of both sets in the units of the data, with their standard errors, as an .npz holds them."""
    arrays: dict[str, np.ndarray] = {}
    pairs: dict[str, Sequence[Any]] = {}
    histograms, moments, spectra = comparison.histograms, comparison.moments, comparison.spectra
    if histograms is not None:
        arrays["histogram_edges"], arrays["histogram_distance_same_law"] = histograms.edges, histograms.same_law
        arrays["histogram_distance"], arrays["histogram_distance_standard_error"] = map(np.asarray, histograms.distance)
        pairs["histogram"] = (histograms.reference, histograms.samples)
    if moments is not None:
        pairs |= {"mean": [each.mean for each in moments], "covariance": [each.covariance for each in moments]}
    if spectra is not None:
        arrays["spectrum_frequencies"], pairs["spectrum"] = spectra[0].frequencies, spectra
    if comparison.autocorrelations is not None:
        arrays["autocorrelation_lags"] = comparison.autocorrelations[0].lags
        pairs["autocorrelation"] = comparison.autocorrelations
    for name, pair in pairs.items():
        for side, measurement in zip(("reference", "samples"), pair, strict=True):
            arrays[f"{name}_{side}"] = np.asarray(measurement.value)
            arrays[f"{name}_{side}_standard_error"] = np.asarray(measurement.standard_error)
    return arrays

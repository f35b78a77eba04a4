"""Metrics of one set of arrays against another, added with their settings to a metrics.json, and their pictures."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import diffusion_jax
from diffusion_jax import data, pictures
from diffusion_jax.evaluation import array_sets, named_array_metrics, named_metrics
from diffusion_jax.evaluation.feature_extraction import FeaturePipeline
from diffusion_jax.evaluation.feature_extractors import FeatureExtractor
from diffusion_jax.evaluation.image_sets import pixel_digest, read_examples
from diffusion_jax.evaluation.named_array_metrics import DEFINITIONS, FEATURE_METRICS, ArrayComparison
from diffusion_jax.files import save_npz
from diffusion_jax.runs.console import ProgressBar, log
from diffusion_jax.runs.metric_records import add_record, read_records

__all__ = ["ArraySets", "FeatureOptions", "record_array_metrics"]

_CHUNK = 1024
_PICTURED_SAMPLES = 4
_WIDTH = 22  # of names in the log


class ArraySets(NamedTuple):
    """The two sets, in the units of the data, and their names. normalization: None if they are not standardized."""

    reference_name: str
    reference: data.Source
    samples_name: str
    samples: data.Source
    normalization: data.Normalization | None = None


class FeatureOptions(NamedTuple):
    """The user's features, and how they are computed. cache: a directory that every process sees."""

    extractor: FeatureExtractor
    mesh: Mesh
    batch_size: int
    cache: pathlib.Path


def record_array_metrics(
    sets: ArraySets,
    metric_names: Sequence[str],
    seed: int,
    output: pathlib.Path,
    settings: Mapping[str, Any],
    features: FeatureOptions | None = None,
    periodic: bool = False,
) -> None:
    """Compares two sets and adds a record to `output`; writes the pictures and an .npz of the statistics beside it.

    seed: of the directions of the sliced Wasserstein distance. settings: more entries of the record. Every process calls
    this, and process 0 writes. Raises: ValueError for sets that cannot be compared.
    """
    read_records(output)
    values = {} if features is None else _feature_metrics(sets, features, metric_names)
    if jax.process_index() != 0:
        return
    log("Comparing ...")
    reference, samples = (array_sets.standardize(x, sets.normalization) for x in (sets.reference, sets.samples))
    digests = [pixel_digest(x, _CHUNK, lambda done: None) for x in (sets.reference, sets.samples)]
    comparison = named_array_metrics.compare_arrays(
        jax.random.key(seed), reference, samples, metric_names, sets.normalization, periodic, log
    )
    values |= comparison.values
    tag = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:6]
    files = _write_files(output.parent, f"{pathlib.Path(sets.samples_name).stem}_{tag}", sets, comparison)
    if "memorization" in values and "memorization" in files:
        values["memorization"]["picture"] = files["memorization"]
    add_record(
        output,
        values
        | {
            "definitions": {name: DEFINITIONS[name] for name in metric_names if name in DEFINITIONS},
            "unit_of_standardized": named_array_metrics.unit_of_standardized(sets.normalization),
            "files": files,
            "reference": sets.reference_name,
            "reference_sha256": digests[0],
            "num_reference": len(sets.reference),
            "samples": sets.samples_name,
            "samples_sha256": digests[1],
            "num_samples": len(sets.samples),
            "features": features.extractor.name if features else None,
            "features_digest": features.extractor.digest if features else None,
            "resize": None,
            "seed": seed,
            **settings,
            "versions": {"diffusion_jax": diffusion_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
            "backend": jax.default_backend(),
        },
    )
    for line in _lines(values, FEATURE_METRICS if features else ()):
        log(line)
    log(f"Written to {output}, and beside it: {', '.join(files.values())}")


def _feature_metrics(sets: ArraySets, options: FeatureOptions, metric_names: Sequence[str]) -> dict[str, Any]:
    """The metrics of the user's features."""
    wanted = [name for name in metric_names if name in FEATURE_METRICS]
    if not wanted:
        return {}
    extraction = FeaturePipeline(options.extractor, options.mesh, options.batch_size, ProgressBar)
    reference = extraction.extract_set(sets.reference_name, sets.reference, options.cache / "references")
    name = pathlib.Path(sets.samples_name).name
    samples = extraction.extract_set(name, sets.samples, options.cache / "samples")
    if jax.process_index() != 0:
        return {}
    values = named_metrics.compute_metrics(reference, samples, options.extractor, wanted, log)
    samples.delete_cache()
    return values


def _write_files(folder: pathlib.Path, suffix: str, sets: ArraySets, comparison: ArrayComparison) -> dict[str, str]:
    """Writes the pictures, and the statistics as an .npz. Returns: their names by what they show."""
    files: dict[str, str] = {}
    title = f"Samples of {pathlib.Path(sets.samples_name).stem} and {pathlib.Path(sets.reference_name).name}"
    figures = {
        "histograms": (pictures.draw_histograms, _one(comparison.histograms)),
        "spectrum": (pictures.draw_spectra, comparison.spectra),
        "autocorrelation": (pictures.draw_autocorrelation, comparison.autocorrelations),
    }
    for name, (draw, statistics) in figures.items():
        if statistics is not None:
            files[name] = f"{name}_{suffix}.png"
            pictures.save(folder / files[name], draw(*statistics, title=title))
    if comparison.neighbors is not None and len(read_examples(sets.samples, np.arange(1)).shape) > 2:
        files["memorization"] = f"memorization_{suffix}.png"
        _draw_neighbors(folder / files["memorization"], sets, comparison)
    arrays = _statistics_arrays(comparison)
    if arrays:
        files["statistics"] = f"statistics_{suffix}.npz"
        path = folder / files["statistics"]
        if path.exists():  # other statistics of the same two sets
            with np.load(path) as stored:
                arrays = dict(stored) | arrays
        save_npz(path, arrays)
    return files


def _one(value: Any) -> tuple | None:
    return None if value is None else (value,)


def _draw_neighbors(path: pathlib.Path, sets: ArraySets, comparison: ArrayComparison) -> None:
    """Draws the samples that are nearest to examples of the reference, each before its nearest example."""
    neighbors, rows = comparison.neighbors, comparison.neighbor_samples
    assert neighbors is not None and rows is not None
    suspects = np.argsort(neighbors.distances[:, 0], kind="stable")[:_PICTURED_SAMPLES]
    nearest = neighbors.indices[suspects, 0]
    title = f"Samples of {pathlib.Path(sets.samples_name).stem} and their nearest examples of the data"
    picture = pictures.draw_neighbors(
        read_examples(sets.samples, rows[suspects]),
        rows[suspects].tolist(),
        read_examples(sets.reference, nearest)[:, None],
        neighbors.distances[suspects, :1],
        title,
    )
    pictures.save(path, picture)


def _statistics_arrays(comparison: ArrayComparison) -> dict[str, np.ndarray]:
    """The statistics of both sets in the units of the data, with their standard errors, as an .npz holds them."""
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, measurement: Any) -> None:
        arrays[name] = np.asarray(measurement.value)
        arrays[f"{name}_standard_error"] = np.asarray(measurement.standard_error)

    if comparison.histograms is not None:
        arrays["histogram_edges"] = comparison.histograms.edges
        add("histogram_distance", comparison.histograms.distance)
        arrays["histogram_distance_same_law"] = comparison.histograms.same_law
        add("histogram_reference", comparison.histograms.reference)
        add("histogram_samples", comparison.histograms.samples)
    for which in (0, 1):
        side = ("reference", "samples")[which]
        if comparison.moments is not None:
            add(f"mean_{side}", comparison.moments[which].mean)
            add(f"covariance_{side}", comparison.moments[which].covariance)
        if comparison.spectra is not None:
            arrays["spectrum_frequencies"] = comparison.spectra[which].frequencies
            add(f"spectrum_{side}", comparison.spectra[which])
        if comparison.autocorrelations is not None:
            arrays["autocorrelation_lags"] = comparison.autocorrelations[which].lags
            add(f"autocorrelation_{side}", comparison.autocorrelations[which])
    return arrays


def _lines(values: Mapping[str, Any], feature_metrics: Sequence[str]) -> list[str]:
    """A line for each metric."""

    def estimate(name: str) -> str:
        value, error = values[name], values.get(f"{name}_standard_error")
        if value is None:
            return "not a number"
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")

    lines = []
    if "energy_distance" in values:
        text = f"{estimate('energy_distance')} (equal laws: 0 ± {values['energy_distance_same_law_std']:.2g})"
        lines.append(("energy distance", text))
    for name, title in (("sliced_wasserstein", "sliced Wasserstein"), ("histogram_distance", "histograms")):
        if name in values:
            text = f"{estimate(name)} ({values[f'{name}_same_law']:.4g} for equal laws)"
            place = f"total variation, channel {values[f'{name}_channel']}: " if f"{name}_channel" in values else ""
            lines.append((title, place + text))
    places = {
        "mean": ("channel {mean_channel}", "mean_and_covariance"),
        "covariance": ("channels {covariance_channels}", "mean_and_covariance"),
        "power_spectrum": (
            "frequency {power_spectrum_frequency:.4g}, channel {power_spectrum_channel}",
            "power_spectrum",
        ),
        "autocorrelation": ("lag {autocorrelation_lag}, channel {autocorrelation_channel}", "autocorrelation"),
    }
    for name, (place, metric) in places.items():
        if f"{name}_deviation" in values:
            z, limit = values[f"{name}_z"], values[f"{metric}_z_limit"]
            shown = "infinite" if z is None else f"{z:.1f}"
            kind = "relative deviation" if name == "power_spectrum" else "deviation"
            text = f"{kind} {estimate(f'{name}_deviation')} at {place.format(**values)}: z {shown}"
            lines.append((name.replace("_", " "), f"{text} (equal laws: |z| below {limit:.1f})"))
    if "memorization" in values:
        share = values["memorization"]["close_share"]
        lines.append(("memorization", f"share of samples as close to examples as the closest 1% of these: {share:.4f}"))
    if feature_metrics:
        names = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
        lines += [(name.replace("_", " "), estimate(name)) for name in names if name in values]
    return [f"{title:{_WIDTH}} {text}" for title, text in lines]

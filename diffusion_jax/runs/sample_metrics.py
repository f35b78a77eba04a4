"""`--mode=evaluate`, second part: FID and other metrics of samples, written to metrics.json.

Samples that are no images have metrics without features (`evaluation.array_metrics`).
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, pictures
from diffusion_jax.config import is_upsampler, resolve
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import features, named_metrics
from diffusion_jax.evaluation.example_sets import MAX_EXAMPLES, EvenRows, ExampleSet, NpzExamples
from diffusion_jax.runs.console import log
from diffusion_jax.runs.metric_options import (
    HOW_TO_GET_INCEPTION,
    check_evaluation_options,
    features_cache,
    has_array_metrics,
    lacks_inception,
    load_extractor,
    load_reference,
    resolve_metrics,
)
from diffusion_jax.runs.metric_records import differing_settings, read_records, record_settings
from diffusion_jax.runs.sample import SampleFile, read_settings
from diffusion_jax.runs.set_metrics import FeatureOptions, record_array_metrics, record_metrics
from diffusion_jax.runs.workdir import to_dict, write_config_if_untrained
from diffusion_jax.storage import locations
from diffusion_jax.training.from_config import condition_shape

__all__ = ["run"]

_BLOCK = 1024


def run(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None = None) -> None:
    """Measures `evaluation.num_samples` samples against the reference; draws them unless they exist already.

    source: takes the place of the reference, in the units of the data.
    Raises: UserError, DataError, PretrainedError.
    """
    config = resolve(config)
    check_evaluation_options(config)
    if not config.evaluation.num_samples or _is_skipped(config):
        return
    if has_array_metrics(config):
        _run_of_arrays(config, workdir, source)
    else:
        _run_of_images(config, workdir, source)
    write_config_if_untrained(config, workdir)


def _run_of_images(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None) -> None:
    options, metric_names = _feature_options(config, workdir), resolve_metrics(config)
    with as_user_error("config.evaluation"):
        features.feature_dimension(options.extractor, data.example_shape(config.data))
    reference = load_reference(config, source)
    _check_number(config, max(named_metrics.MIN_EXAMPLES[metric] for metric in metric_names))
    file = _draw_samples(config, workdir)
    samples, output = ExampleSet(str(file.path), NpzExamples(file.path)), workdir / "metrics.json"
    try:
        record_metrics(reference, samples, options, metric_names, output, _settings(config, file))
    except ValueError as error:
        raise UserError(f"the samples cannot be measured: {error}") from error
    if jax.process_index() == 0:
        _plot_against_steps(workdir, named_metrics.reported_name("fid", options.extractor))


def _run_of_arrays(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None) -> None:
    metric_names = resolve_metrics(config)
    options = _feature_options(config, workdir) if config.evaluation.features else None
    name, loaded, _ = load_reference(config, source)
    assert loaded is not None  # a data set, not a file of statistics
    minimum = max(named_metrics.MIN_EXAMPLES[metric] for metric in metric_names)
    if len(loaded) < minimum:
        raise UserError(
            f"{name} has {len(loaded)} examples: these metrics need at least {minimum} (evaluation.metrics)"
        )
    _check_number(config, minimum)
    reference = EvenRows(loaded, MAX_EXAMPLES)
    file = _draw_samples(config, workdir, _reference_conditions(config, reference))
    settings = _settings(config, file)
    if condition_shape(config) is not None:
        settings["conditions"] = config.sampling.conditions or f"those of the examples of {name}"
    try:
        record_array_metrics(
            ExampleSet(name, reference),
            ExampleSet(str(file.path), EvenRows(NpzExamples(file.path), MAX_EXAMPLES)),
            options,
            metric_names,
            workdir / "metrics.json",
            settings,
            seed=config.evaluation.seed,
            normalization=file.trained.normalizations.get("x"),
            periodic=config.model.get("padding") == "periodic",
        )
    except ValueError as error:
        raise UserError(f"the samples cannot be measured: {error}") from error
    if jax.process_index() == 0:
        _plot_against_steps(workdir, "energy_distance")


def _feature_options(config: ConfigDict, workdir: pathlib.Path) -> FeatureOptions:
    mesh = sharding.make_mesh(config.mesh)
    return FeatureOptions(load_extractor(config), mesh, config.evaluation.batch_size, features_cache(workdir))


def _check_number(config: ConfigDict, minimum: int) -> None:
    """Raises: UserError for too few samples."""
    if config.evaluation.num_samples < minimum:
        raise UserError(
            f"evaluation.num_samples={config.evaluation.num_samples} is too few: these metrics need at least {minimum}"
        )


def _reference_conditions(config: ConfigDict, reference: data.Source) -> np.ndarray | None:
    """The conditions of samples without `sampling.conditions`: those of the reference, in the units of the data.

    Sample i gets the condition of example i; fewer samples than examples get the conditions of evenly spread examples.
    """
    if condition_shape(config) is None or config.sampling.conditions:
        return None
    rows = EvenRows(reference, config.evaluation.num_samples)
    starts = range(0, len(rows), _BLOCK)
    return np.concatenate([rows.read(np.arange(i, min(i + _BLOCK, len(rows))))["condition"] for i in starts])


def _is_skipped(config: ConfigDict) -> bool:
    """Whether there can be no metrics of samples, which is logged. Raises: UserError if nothing else was measured."""
    if lacks_inception(config):
        advice = f"set {HOW_TO_GET_INCEPTION}; or evaluation.num_samples=0 to leave them out"
        if not config.evaluation.likelihood:
            raise UserError(f"metrics of samples need features: {advice}")
        log(f"No metrics of samples: {advice}.")
        return True
    if is_upsampler(config):
        log("No metrics of samples: this model enlarges given images.")
        return True
    return False


def _draw_samples(config: ConfigDict, workdir: pathlib.Path, conditions: np.ndarray | None = None) -> SampleFile:
    """The samples of `evaluation.num_samples`, drawn by all processes unless the file exists."""
    sampling_config = ConfigDict(to_dict(config))
    options = config.evaluation
    sampling_config.sampling.update(num_samples=options.num_samples, use_ema=options.use_ema, trajectory=0)
    file = SampleFile(sampling_config, workdir, conditions)
    file.draw(reuse=True)
    multihost_utils.sync_global_devices("samples drawn")  # process 0 alone writes them
    locations.fetch(file.path)
    return file


def _settings(config: ConfigDict, file: SampleFile) -> dict[str, Any]:
    """The settings that the metrics depend on besides the two sets and the features, as the record stores them."""
    stored = broadcast_from_process_0(lambda: read_settings(file.path))
    assert stored is not None  # the file has just been written or found to hold these settings
    settings, options = stored["settings"], config.evaluation
    sampling = {key: value for key, value in settings["sampling"].items() if key != "steps"}
    sampling |= {"classifier": config.sampling.classifier, "use_ema": options.use_ema}
    return {
        "dataset": config.data.dataset,
        "init_from": config.init_from or None,
        "weights": file.trained.weights_kind,
        "step": file.trained.step,
        "steps": file.num_steps,
        "sampling": sampling | {"batch_size": settings["batch_size"]},
        "weights_digest": settings["weights_digest"],
        "classifier_digest": settings["classifier_digest"],
        "drawn_with": stored["drawn_with"],
    }


def _plot_against_steps(workdir: pathlib.Path, name: str) -> None:
    """Plots a metric against the number of sampling steps, once there are records of two numbers of steps.

    The records of a line differ in nothing else; its label lists how it differs from the other lines.
    """
    records = [record for record in read_records(workdir / "metrics.json") if name in record and "steps" in record]
    labeled = [key for key in differing_settings(records) if key not in ("steps", "samples", "timesteps")]
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        settings = record_settings(record)
        parts = [f"{key} {settings.get(key)}" for key in labeled if key not in ("sampler", "features_digest")]
        label = ", ".join([settings["sampler"], *parts, f"{record['num_samples']:,} samples"])
        curves.setdefault(label, {})[record["steps"]] = record[name]
    if len({record["steps"] for record in records}) > 1:
        path = workdir / f"{name}_against_steps.png"
        pictures.save(path, pictures.draw_against_steps(curves, name.replace("_", " ")))
        log(f"Against the number of sampling steps: {path}")

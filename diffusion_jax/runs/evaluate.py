"""`--mode=evaluate`: measures the likelihood of held-out examples, compares samples with a reference, and tests calibration.

`runs.likelihood` and `runs.calibration` describe their files. The metrics of samples are added to metrics.json.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data, pretrained
from diffusion_jax.config import check, resolve
from diffusion_jax.config.table import flatten
from diffusion_jax.console import log
from diffusion_jax.data.sources import read_conditions
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.compare import check_count, compare, find_conditions, read_records
from diffusion_jax.evaluation.features import ExampleSet, FeaturePipeline, open_file
from diffusion_jax.metrics import MAX_EXAMPLES, Options, choose_metrics, needs_features, reported_values
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs.calibration import measure_calibration
from diffusion_jax.runs.examples import read_channels
from diffusion_jax.runs.likelihood import measure_likelihood
from diffusion_jax.runs.logging import write_evaluation
from diffusion_jax.runs.sample import SampleFile
from diffusion_jax.runs.sampling_setup import check_sampling
from diffusion_jax.runs.workdir import load_examples, open_model, to_dict, write_config_if_untrained
from diffusion_jax.training import condition_shape


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike) -> None:
    """Runs the measurements that the config selects: calibration, likelihood of `evaluation.split`, metrics of samples.

    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    options = config.evaluation
    check(config, "evaluation")
    if "calibration" in (options.metrics or ()):
        measure_calibration(config, workdir)
        options.metrics = tuple(name for name in options.metrics if name != "calibration") or None
        if options.metrics is None:
            options.num_samples = 0
    if options.num_samples:  # raises errors before the likelihood, which may take hours
        _metric_names(config)
        check_sampling(config, open_model(config, workdir))
        if (reported := _find_reported(config, workdir)) and reported["other_settings"]:
            flags = " ".join(f"--config.{setting}" for setting in reported["other_settings"])
            log(f"Note: {_text(reported)} with other settings; for the paper's settings, add {flags}")
    if options.likelihood:
        measure_likelihood(config, workdir)
    if options.num_samples:
        measure_samples(config, workdir)


def measure_samples(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Compares `evaluation.num_samples` samples with the reference; draws the samples unless they exist already.

    source: examples in data units that replace the reference.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    options, names, of_images = config.evaluation, _metric_names(config), data.is_of_images(config.data)
    reported, pipeline = _find_reported(config, workdir), None
    if needs_features(names, of_images):
        if of_images and options.likelihood and _features_name(config) == "inception" and not options.inception:
            return log(
                f"No metrics of samples: {features.NEEDS_INCEPTION}; evaluation.metrics=energy_distance needs no features, "
                "and evaluation.num_samples=0 leaves the metrics out."
            )
        pipeline = load_pipeline(config, workdir)
    reference = load_reference(config, source)
    with as_user_error("config.evaluation"):
        check_count(reference.name, len(reference.source), names)
        check_count("evaluation.num_samples", options.num_samples, names)
    if not of_images:
        reference = reference.limit(MAX_EXAMPLES)
    sampling_config = ConfigDict(to_dict(config))
    sampling_config.sampling.update(num_samples=options.num_samples, use_ema=options.use_ema, trajectory=0)
    conditions, settings = None, {"dataset": config.data.dataset, "reported": reported}
    if condition_shape(config) is not None:
        settings["conditions"] = config.sampling.conditions or f"conditions of {reference.name}"
        if not config.sampling.conditions:  # a condition for each sample, from evenly spread examples
            conditions = read_conditions(reference.limit(options.num_samples).conditions)
    file = SampleFile(sampling_config, workdir, conditions)
    drawn_with = file.setup.rows(np.arange(1))
    sets = {
        "reference": reference.source.read([0]),
        "samples": {"label": drawn_with["y"], **read_conditions(drawn_with)},
    }
    with as_user_error("config.evaluation"):
        for name in names:
            find_conditions(name, sets)
    setup = file.setup
    sampler, steps = setup.sampler, setup.schedule.num_timesteps
    log(
        f"Protocol: {options.num_samples:,} samples of {setup.net.provenance.name}, "
        f"sampling.seed={config.sampling.seed}, {config.sampling.sampler} with {steps:,} steps and "
        f"{sampler.num_calls(steps):,} network calls for each sample; {', '.join(names)} against {len(reference.source):,} "
        f"examples of {reference.name}."
    )
    write_config_if_untrained(config, workdir)
    file.write(reuse=True)
    multihost_utils.sync_global_devices("samples drawn")  # process 0 alone writes them
    is_periodic = config.model.get("padding") == "periodic"
    metric_options = Options(options.seed, setup.net.normalizations.get("x"), is_periodic)
    with as_user_error("the samples cannot be measured"):
        samples = open_file(workdir.fetch(file.path), str(file.path))
        output, channels = workdir / "metrics.json", read_channels(config, workdir)
        written = compare(reference, samples, names, output, pipeline, metric_options, settings, channels)
    workdir.upload(*written)
    if jax.process_index() == 0:
        record = read_records(workdir / "metrics.json")[-1]
        write_evaluation(config, workdir, setup.net.step, reported_values(record))
        if reported and "fid" in record:
            others = ", ".join(reported["other_settings"])
            differs = f" with {others}" if others else ", with no known difference in settings"
            log(f"{_text(reported)}{differs}; FID {record['fid']:.4g} was measured here.")


def _find_reported(config: ConfigDict, workdir: RunDir) -> dict[str, Any] | None:
    """Returns a paper's FID for `init_from`, and the settings that differ; None if unknown, or after further training."""
    found = pretrained.find_reported(config.init_from)
    if found is None or committed_steps(workdir / "checkpoints"):
        return None
    values = flatten(config) | {"sampling.classifier": pathlib.PurePath(config.sampling.classifier).name}
    if values["sampling.steps"] == config.diffusion.num_timesteps:
        values["sampling.steps"] = None  # all steps
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in found.settings.items()}
    other = [f"{name}={text}" for name, text in texts.items() if values[name] != found.settings[name]]
    unknown = "" if "sampling.steps" in found.settings else "; its number of sampling steps is unknown"
    return {"fid": found.fid, "paper": found.paper + unknown, "other_settings": other}


def _text(reported: Mapping[str, Any]) -> str:
    return f"FID {reported['fid']:g} was reported for these weights ({reported['paper']})"


def _metric_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns `evaluation.metrics`, or the default. Raises: UserError for metrics that do not suit the data."""
    spatial_axes, of_images = len(data.example_shape(config.data)) - 1, data.is_of_images(config.data)
    with as_user_error("config.evaluation"):
        return choose_metrics(config.evaluation.metrics, spatial_axes, of_images, bool(_features_name(config)))


def _features_name(config: ConfigDict) -> str:
    """Returns `evaluation.features`, or the data set's default; "" if there is no extractor for the data."""
    return config.evaluation.features or features.default_name(config.data.dataset, data.is_of_images(config.data))


def load_pipeline(config: ConfigDict, workdir: RunDir) -> FeaturePipeline:
    """Builds the feature pipeline of a run. Raises: UserError, also if the data have no features; PretrainedError."""
    options, name = config.evaluation, _features_name(config)
    if not name:
        raise UserError("these data have no features: set evaluation.features=module:function")
    with as_user_error("config.evaluation"):
        extractor = features.from_name(name, options.inception, of_images=data.is_of_images(config.data))
        if extractor.params is not None:  # checks the image size before samples are drawn
            image = jax.ShapeDtypeStruct((1, *data.example_shape(config.data)), np.uint8)
            jax.eval_shape(extractor.function, extractor.params, image)
    return FeaturePipeline(extractor, sharding.make_mesh(config.mesh), options.batch_size, workdir)


def load_reference(config: ConfigDict, source: data.Source | None = None) -> ExampleSet:
    """Loads the examples of `evaluation.reference_split`, by default the training split, in data units.

    source: examples that replace the split. Raises: DataError.
    """
    own_split = config.evaluation.reference_split
    location = {**config.data, "split": own_split or config.data.split}
    renamed = {"data.split": "evaluation.reference_split"} if own_split else {}
    loaded = load_examples("Reading the reference", location, renamed, source)
    return ExampleSet(data.origin(location) if source is None else type(source).__name__, loaded)

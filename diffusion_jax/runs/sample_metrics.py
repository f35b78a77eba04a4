"""`--mode=evaluate`, second part: FID and other metrics of samples, written to metrics.json.

Samples that are no images have metrics without features (`evaluation.array_metrics`).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import is_upsampler, resolve
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import features, named_metrics
from diffusion_jax.evaluation.example_sets import MAX_EXAMPLES, EvenRows, ExampleSet, NpzExamples
from diffusion_jax.evaluation.features import FeaturePipeline
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.run_dir import RunDir, open_run_dir
from diffusion_jax.runs.console import ProgressBar, log, progress_over
from diffusion_jax.runs.sample import SampleFile, read_settings
from diffusion_jax.runs.set_metrics import ArrayOptions, record_metrics
from diffusion_jax.runs.workdir import rename_leaves_in_errors, to_dict, write_config_if_untrained
from diffusion_jax.training.from_config import condition_shape

__all__ = ["check_options", "features_cache", "load_pipeline", "load_reference", "run"]

_BLOCK = 1024
_HOW_TO_GET_INCEPTION = f"evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Measures `evaluation.num_samples` samples against the reference; draws them unless they exist already.

    source: takes the place of the reference, in the units of the data.
    Raises: UserError, DataError, PretrainedError.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    check_options(config)
    options = config.evaluation
    if not options.num_samples:
        return
    is_array, metric_names = not data.is_of_images(config.data), _metric_names(config)
    if _features_name(config) == "inception" and not options.inception:
        advice = f"set {_HOW_TO_GET_INCEPTION}; or evaluation.num_samples=0 to leave them out"
        if not options.likelihood:
            raise UserError(f"metrics of samples need features: {advice}")
        return log(f"No metrics of samples: {advice}.")
    if is_upsampler(config):
        return log("No metrics of samples: this model enlarges given images.")
    pipeline = load_pipeline(config) if options.features or not is_array else None
    if pipeline and not is_array:
        with as_user_error("config.evaluation"):
            features.feature_dimension(pipeline.extractor, data.example_shape(config.data))
    reference = load_reference(config, source)
    assert reference.examples is not None  # a data set, not a file of statistics
    minimum = max(named_metrics.MIN_EXAMPLES[metric] for metric in metric_names)
    if len(reference.examples) < minimum:
        raise UserError(
            f"{reference.name} has {len(reference.examples)} examples: these metrics need at least {minimum} "
            "(evaluation.metrics)"
        )
    if options.num_samples < minimum:
        raise UserError(
            f"evaluation.num_samples={options.num_samples} is too few: these metrics need at least {minimum}"
        )
    examples: data.Source = reference.examples
    if is_array:
        examples = EvenRows(examples, MAX_EXAMPLES)
        reference = reference._replace(examples=examples)
    sampling_config = ConfigDict(to_dict(config))
    sampling_config.sampling.update(num_samples=options.num_samples, use_ema=options.use_ema, trajectory=0)
    file = SampleFile(sampling_config, workdir, _reference_conditions(config, examples))
    file.draw(reuse=True)
    multihost_utils.sync_global_devices("samples drawn")  # process 0 alone writes them
    samples: data.Source = NpzExamples(workdir.fetch(file.path))
    settings, arrays = _settings(config, file), None
    if condition_shape(config) is not None:
        settings["conditions"] = config.sampling.conditions or f"those of the examples of {reference.name}"
    if is_array:
        samples = EvenRows(samples, MAX_EXAMPLES)
        is_periodic = config.model.get("padding") == "periodic"
        arrays = ArrayOptions(options.seed, file.trained.normalizations.get("x"), is_periodic)
    output, cache = workdir / "metrics.json", features_cache(workdir)
    try:
        sets = (reference, ExampleSet(str(file.path), samples))
        workdir.upload(*record_metrics(*sets, metric_names, output, settings, pipeline, cache, arrays))
    except ValueError as error:
        raise UserError(f"the samples cannot be measured: {error}") from error
    write_config_if_untrained(config, workdir)


# ---- Options


def check_options(config: ConfigDict) -> None:
    """Raises: UserError if --mode=evaluate has nothing to measure, or metrics or features do not suit the data."""
    options = config.evaluation
    if not (options.likelihood or options.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0: nothing is enabled to measure; set either of them"
        )
    if options.num_samples:
        _features_name(config)
        _metric_names(config)


def _metric_names(config: ConfigDict) -> tuple[str, ...]:
    """`evaluation.metrics`, or all that suit the data. Raises: UserError for metrics that do not."""
    given, suitable, what = config.evaluation.metrics, named_metrics.METRICS, "images"
    if not data.is_of_images(config.data):
        spatial_axes = len(data.example_shape(config.data)) - 1
        suitable = named_metrics.suitable_metrics(spatial_axes, bool(config.evaluation.features))
        what = f"data with {spatial_axes} spatial axes"
    for name in given or ():
        if name not in suitable:
            if what != "images" and name in named_metrics.ARRAY_METRICS_OF_FEATURES:
                what += " and without evaluation.features=module:function"
            raise UserError(
                f"evaluation.metrics: {name} is not for {what}; use None, or names from {', '.join(suitable)}"
            )
    return given or suitable


def _features_name(config: ConfigDict) -> str:
    """`evaluation.features`, or the default of the data set: "" for metrics without features.

    Raises: UserError for features of images with other data.
    """
    name = config.evaluation.features
    if data.is_of_images(config.data):
        return name or ("digits" if config.data.dataset == "digits" else "inception")
    if name and ":" not in name:
        shape = ", ".join(map(str, ("N", *data.example_shape(config.data))))
        raise UserError(
            f"evaluation.features={name!r} are features of images; use module:function, a function of arrays [{shape}], "
            'or "" for the metrics that need none'
        )
    return name


def load_pipeline(config: ConfigDict) -> FeaturePipeline:
    """The features of `config.evaluation`. Raises: UserError, also if the data have none; PretrainedError."""
    options, name = config.evaluation, _features_name(config)
    if not name:
        raise UserError("these data have no features: set evaluation.features=module:function")
    if name == "inception" and not options.inception:
        raise UserError(f"metrics of features need {_HOW_TO_GET_INCEPTION}")
    with as_user_error("config.evaluation"):
        extractor = features.from_name(name, options.inception)
    return FeaturePipeline(extractor, sharding.make_mesh(config.mesh), options.batch_size, ProgressBar)


def load_reference(config: ConfigDict, source: data.Source | None = None) -> ExampleSet:
    """The examples of `evaluation.reference_split`, those of the training split by default, in the units of the data.

    source: takes their place. Raises: DataError.
    """
    progress = progress_over("Reading the reference")
    if source is not None:
        given = data.load(ConfigDict({**config.data, "holdout": 0.0}), progress, source=source)
        return ExampleSet(type(source).__name__, given)
    own_split = config.evaluation.reference_split
    split = own_split or config.data.split
    with rename_leaves_in_errors({"data.split": "evaluation.reference_split"} if own_split else {}):
        loaded = data.load(ConfigDict({**config.data, "split": split}), progress)
    dataset, data_dir = config.data.dataset, config.data.data_dir
    names = {"folder": f"{data_dir}:{split}" if config.data.holdout else data_dir, "arrays": f"{data_dir}:{split}"}
    return ExampleSet(names.get(dataset, f"{dataset}:{split}"), loaded)


def features_cache(workdir: RunDir) -> RunDir:
    """Where features are kept. Every process must see it, so several processes use the work directory."""
    return RunDir(features.cache_directory()) if jax.process_count() == 1 else workdir.subdirectory(".features")


# ---- Samples


def _reference_conditions(config: ConfigDict, reference: data.Source) -> np.ndarray | None:
    """The conditions of samples without `sampling.conditions`: those of the reference, in the units of the data.

    Sample i gets the condition of example i; fewer samples than examples get the conditions of evenly spread examples.
    """
    if condition_shape(config) is None or config.sampling.conditions:
        return None
    rows = EvenRows(reference, config.evaluation.num_samples)
    starts = range(0, len(rows), _BLOCK)
    return np.concatenate([rows.read(np.arange(i, min(i + _BLOCK, len(rows))))["condition"] for i in starts])


def _settings(config: ConfigDict, file: SampleFile) -> dict[str, Any]:
    """The settings that the metrics depend on besides the two sets and the features, as the record stores them."""
    stored = broadcast_from_process_0(lambda: read_settings(file.path))
    assert stored is not None  # the file has just been written or found to hold these settings
    settings = stored["settings"]
    sampling = {key: value for key, value in settings["sampling"].items() if key != "steps"}
    sampling |= {"classifier": config.sampling.classifier, "use_ema": config.evaluation.use_ema}
    return {
        "dataset": config.data.dataset,
        "init_from": config.init_from or None,
        "weights": file.trained.weights_kind,
        "step": file.trained.step,
        "steps": file.setup.schedule.num_timesteps,
        "sampling": sampling | {"batch_size": settings["batch_size"]},
        "weights_digest": settings["weights_digest"],
        "classifier_digest": settings["classifier_digest"],
        "drawn_with": stored["drawn_with"],
    }

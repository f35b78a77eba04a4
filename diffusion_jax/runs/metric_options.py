"""Options of `config.evaluation` for metrics of samples: their checks, the feature extractor and the reference images."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import feature_extractors, image_sets, metric_suite
from diffusion_jax.evaluation.feature_extraction import cache_directory
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs.console import progress_over
from diffusion_jax.runs.data_source import rename_leaves_in_errors

__all__ = [
    "HOW_TO_GET_INCEPTION",
    "check_evaluation_options",
    "check_metric_options",
    "features_cache",
    "lacks_inception",
    "load_extractor",
    "load_reference",
]

HOW_TO_GET_INCEPTION = f"evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"


def check_metric_options(config: ConfigDict) -> None:
    """Raises: UserError for options of the sample metrics that cannot be used, before anything is drawn."""
    options = config.evaluation
    for leaf in ("num_samples", "every", "every_samples"):
        if options[leaf] < 0:
            raise UserError(f"evaluation.{leaf}={options[leaf]} must be at least 0")
    if options.batch_size < 1:
        raise UserError(f"evaluation.batch_size={options.batch_size} must be at least 1")
    unknown = sorted(set(options.metrics) - set(metric_suite.METRICS))
    if unknown:
        raise UserError(f"evaluation.metrics: {unknown[0]!r} is unknown; known: {', '.join(metric_suite.METRICS)}")
    if not options.metrics:
        raise UserError(
            f"evaluation.metrics={tuple(options.metrics)} is empty; use some of {', '.join(metric_suite.METRICS)}, or "
            "evaluation.num_samples=0"
        )
    if options.resize not in feature_extractors.RESIZES:
        raise UserError(
            f"evaluation.resize={options.resize!r} is unknown; known: {', '.join(feature_extractors.RESIZES)}"
        )


def check_evaluation_options(config: ConfigDict) -> None:
    """`check_metric_options`, and that --mode=evaluate has something to measure. Raises: UserError."""
    check_metric_options(config)
    if not (config.evaluation.likelihood or config.evaluation.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0 leave nothing to measure; set either of them"
        )


def _features_name(config: ConfigDict) -> str:
    """`evaluation.features`, or the default of the data set."""
    return config.evaluation.features or ("digits" if config.data.dataset == "digits" else "inception")


def lacks_inception(config: ConfigDict) -> bool:
    """Whether the features are Inception's and `evaluation.inception` is not set."""
    return _features_name(config) == "inception" and not config.evaluation.inception


def load_extractor(config: ConfigDict) -> feature_extractors.FeatureExtractor:
    """The feature extractor. Raises: UserError, PretrainedError."""
    options = config.evaluation
    with as_user_error("config.evaluation"):
        return feature_extractors.from_name(_features_name(config), options.inception, options.resize)


def load_reference(config: ConfigDict) -> image_sets.ImageSet:
    """The images of `evaluation.reference_split`, those of the training split by default. Raises: DataError."""
    own_split = config.evaluation.reference_split
    split = own_split or config.data.split
    with rename_leaves_in_errors({"data.split": "evaluation.reference_split"} if own_split else {}):
        source = data.load(ConfigDict({**config.data, "split": split}), progress_over("Reading the images"))
    name = config.data.data_dir if config.data.dataset == "folder" else f"{config.data.dataset}:{split}"
    return image_sets.ImageSet(name, source)


def features_cache(workdir: pathlib.Path) -> pathlib.Path:
    """Where features are kept. Every process must see it, so several processes use the work directory."""
    return cache_directory() if jax.process_count() == 1 else workdir / ".features"

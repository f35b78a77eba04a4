"""Options of `config.evaluation` for metrics of samples: their checks, the feature extractor and the reference."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import features, named_metrics
from diffusion_jax.evaluation.example_sets import ExampleSet
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs.console import progress_over
from diffusion_jax.runs.data_source import rename_leaves_in_errors

__all__ = [
    "HOW_TO_GET_INCEPTION",
    "check_evaluation_options",
    "features_cache",
    "has_array_metrics",
    "lacks_inception",
    "load_extractor",
    "load_reference",
    "resolve_metrics",
]

HOW_TO_GET_INCEPTION = f"evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"


def check_evaluation_options(config: ConfigDict) -> None:
    """Raises: UserError if --mode=evaluate has nothing to measure, or metrics or features do not suit the data."""
    if not (config.evaluation.likelihood or config.evaluation.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0: nothing is enabled to measure; set either of them"
        )
    if config.evaluation.num_samples:
        _check_features(config)
        resolve_metrics(config)


def has_array_metrics(config: ConfigDict) -> bool:
    """Whether samples have the metrics of arrays: those of data that are continuous, or no images of 1 or 3 channels."""
    return not data.is_of_images(config.data)


def resolve_metrics(config: ConfigDict) -> tuple[str, ...]:
    """`evaluation.metrics`, or all that suit the data. Raises: UserError for metrics that do not."""
    given, is_array = config.evaluation.metrics, has_array_metrics(config)
    spatial_axes = len(data.example_shape(config.data)) - 1
    suitable = named_metrics.METRICS
    if is_array:
        suitable = named_metrics.suitable_metrics(spatial_axes, bool(config.evaluation.features))
    for name in given or ():
        if name not in suitable:
            what = f"data with {spatial_axes} spatial axes" if is_array else "images"
            if is_array and name in named_metrics.ARRAY_METRICS_OF_FEATURES:
                what += " and without evaluation.features=module:function"
            raise UserError(
                f"evaluation.metrics: {name} is not for {what}; use None, or names from {', '.join(suitable)}"
            )
    return given or suitable


def _check_features(config: ConfigDict) -> None:
    """Raises: UserError for features of images with other data."""
    name = config.evaluation.features
    if has_array_metrics(config) and name and ":" not in name:
        shape = ", ".join(map(str, ("N", *data.example_shape(config.data))))
        raise UserError(
            f"evaluation.features={name!r} are features of images; use module:function, a function of arrays [{shape}], "
            'or "" for the metrics that need none'
        )


def _features_name(config: ConfigDict) -> str:
    """`evaluation.features`, or the default of the data set: "" for metrics without features."""
    if config.evaluation.features or has_array_metrics(config):
        return config.evaluation.features
    return "digits" if config.data.dataset == "digits" else "inception"


def lacks_inception(config: ConfigDict) -> bool:
    """Whether the features are Inception's and `evaluation.inception` is not set."""
    return _features_name(config) == "inception" and not config.evaluation.inception


def load_extractor(config: ConfigDict) -> features.FeatureExtractor:
    """The feature extractor. Raises: UserError, also if the data have none; PretrainedError."""
    options = config.evaluation
    _check_features(config)
    if not _features_name(config):
        raise UserError("these data have no default features: set evaluation.features=module:function")
    with as_user_error("config.evaluation"):
        return features.from_name(_features_name(config), options.inception)


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


def features_cache(workdir: pathlib.Path) -> pathlib.Path:
    """Where features are kept. Every process must see it, so several processes use the work directory."""
    return features.cache_directory() if jax.process_count() == 1 else workdir / ".features"

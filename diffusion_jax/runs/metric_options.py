"""Options of `config.evaluation` for metrics of samples: their checks, the feature extractor and the reference images."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation import feature_extractors, image_sets
from diffusion_jax.evaluation.feature_extraction import cache_directory
from diffusion_jax.pretrained.inception import DOWNLOAD_SOURCES
from diffusion_jax.runs.console import progress_over
from diffusion_jax.runs.data_source import rename_leaves_in_errors

__all__ = [
    "HOW_TO_GET_INCEPTION",
    "check_evaluation_options",
    "features_cache",
    "lacks_inception",
    "load_extractor",
    "load_reference",
]

HOW_TO_GET_INCEPTION = f"evaluation.inception=PATH, the weights of FID's Inception ({DOWNLOAD_SOURCES})"


def check_evaluation_options(config: ConfigDict) -> None:
    """Raises: UserError if --mode=evaluate has nothing to measure."""
    if not (config.evaluation.likelihood or config.evaluation.num_samples):
        raise UserError(
            "evaluation.likelihood=False and evaluation.num_samples=0: nothing is enabled to measure; set either of them"
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

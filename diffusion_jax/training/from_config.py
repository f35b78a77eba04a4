"""The schedule, the network, the shape of its condition and the normalizations of its data, from a config and its run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax import data, models, process, schedules
from diffusion_jax.config import is_classifier, is_continuous
from diffusion_jax.errors import CheckpointError
from diffusion_jax.models import upsampling
from diffusion_jax.run_dir import RunDir
from diffusion_jax.training.state import Network

__all__ = [
    "check_loss",
    "condition_shape",
    "model_from_config",
    "schedule_from_config",
    "stored_normalizations",
]


def condition_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of an example's condition: (D,) for a vector, (*spatial, K) for an array; None if the data have none."""
    features, channels = (config["model"].get(f"condition_{kind}", 0) for kind in ("features", "channels"))
    if features:
        return (features,)
    return (*data.example_shape(config["data"])[:-1], channels) if channels else None


def stored_normalizations(config: Mapping[str, Any], workdir: RunDir | pathlib.Path) -> data.Normalizations:
    """The normalizations of the data that a run was trained on, as its data.json stores them.

    Raises: CheckpointError if the file is missing, although the data have a scale, or cannot be read.
    """
    path = workdir / "data.json"
    has_scale = is_continuous(config) or condition_shape(config) is not None
    if not path.exists() and not has_scale:
        return {}
    try:
        stored = json.loads(path.read_text()).get("normalization", {})
        return {name: data.Normalization.from_json(value) for name, value in stored.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        missing = ", which stores the scale of the data, is missing"
        problem = missing if isinstance(error, FileNotFoundError) else f" cannot be read ({error})"
        raise CheckpointError(f"{path}{problem}: restore it") from None


def _small_image_channels(config: Mapping[str, Any]) -> int:
    """Channels of the condition of an upsampler, the small image and its noise; 0 for other models.

    Raises: ValueError for a low resolution or a noise that does not fit the image or the network, and other conditions.
    """
    shape = data.example_shape(config["data"])
    low, noise = config["data"]["low_resolution"], config["diffusion"]["conditioning_noise"]
    if not low:
        if noise:
            raise ValueError(
                f"diffusion.conditioning_noise={noise} is for upsamplers; set data.low_resolution, or use 0"
            )
        return 0
    if len(shape) != 3:
        raise ValueError(f"data.low_resolution={low} is for images; examples of shape {list(shape)} need 0")
    height, width, channels = shape
    if not 1 <= low < height or height % low or width % (height // low):
        raise ValueError(
            f"data.low_resolution={low}: the size of the small images must divide {height}x{width} (0 for no upsampler)"
        )
    if is_classifier(config):
        raise ValueError(f"data.low_resolution={low}: a classifier (diffusion.loss=classify) has none; use 0")
    for leaf in ("condition_features", "condition_channels", "condition_dropout"):
        if config["model"].get(leaf):
            raise ValueError(
                f"model.{leaf}={config['model'][leaf]}: the small image is the condition of an upsampler "
                f"(data.low_resolution={low}); use 0"
            )
    return upsampling.condition_channels(channels, noise)


def schedule_from_config(config: Mapping[str, Any]) -> schedules.Schedule:
    """The Schedule of `config.diffusion`.

    Raises: ValueError for an unknown schedule, prediction or variance, and for values that contradict each other.
    """
    for leaf, known in (("prediction", process.PREDICTIONS), ("variance", process.VARIANCES)):
        if config[leaf] not in known:
            raise ValueError(f"diffusion.{leaf}={config[leaf]!r} is unknown; use {', '.join(known)}")
    betas = schedules.betas(
        config["schedule"], config["num_timesteps"], beta_start=config["beta_start"], beta_end=config["beta_end"]
    )
    network_times = None
    if config["rescale_timesteps"]:
        network_times = np.arange(config["num_timesteps"]) * (1000.0 / config["num_timesteps"])
    schedule = schedules.from_betas(betas, network_times)
    predicts_x_0 = config["loss"] != "classify"
    if predicts_x_0 and schedule.zero_terminal_snr and config["prediction"] in ("eps", "score"):
        raise ValueError(
            f"diffusion.schedule={config['schedule']!r} ends at alpha_bar = 0, where {config['prediction']} does not "
            "determine x_0; use diffusion.prediction=v"
        )
    return schedule


def model_from_config(config: Mapping[str, Any]) -> Network:
    """The network of `config.model`: a U-Net or MLP with the output channels that the variance needs, or a classifier.

    Raises: ValueError if `model.out_channels` contradicts the variance, or for values that the network does not allow.
    """
    spatial_dims = len(data.example_shape(config["data"])) - 1
    _check_kind(config["model"].get("kind", "unet"), spatial_dims)
    small_image_channels = _small_image_channels(config)
    if is_classifier(config):
        return models.from_config(config["model"], models.Classifier).clone(spatial_dims=spatial_dims)
    model = models.from_config(config["model"])
    if isinstance(model, models.UNet):
        condition_channels = small_image_channels or model.condition_channels
        model = model.clone(spatial_dims=spatial_dims, condition_channels=condition_channels)
    channels, variance = config["data"]["channels"], config["diffusion"]["variance"]
    needed = channels * (2 if variance.startswith("learned") else 1)
    if model.out_channels not in (None, needed):
        raise ValueError(
            f"model.out_channels={model.out_channels}, but diffusion.variance={variance!r} and data.channels={channels} "
            f"need {needed}; leave it out"
        )
    return model.clone(out_channels=None if needed == channels else needed)


def _check_kind(kind: str, spatial_dims: int) -> None:
    """Raises: ValueError for a U-Net of vectors, or an MLP of other data."""
    if kind == "mlp" and spatial_dims:
        raise ValueError(
            f"model.kind='mlp' is for vectors (data.image_size=()); data with {spatial_dims} spatial axes need 'unet'"
        )
    if kind != "mlp" and not spatial_dims:
        raise ValueError("data.image_size=(), vectors, need model.kind='mlp'; a U-Net needs spatial axes")


def check_loss(config: Mapping[str, Any]) -> None:
    """Raises: ValueError if the loss of `config.diffusion` contradicts its variance or weighting."""
    loss, variance, weighting = config["loss"], config["variance"], config["weighting"]
    is_learned = variance.startswith("learned")
    if loss == "simple" and is_learned:
        raise ValueError(
            f"diffusion.variance={variance!r}: L_simple leaves a learned variance untrained; use diffusion.loss=hybrid, or a "
            "fixed variance"
        )
    if loss == "hybrid" and not is_learned:
        raise ValueError(
            f"diffusion.loss='hybrid' trains a learned variance, but diffusion.variance={variance!r}; use learned_range"
        )
    if loss == "vlb" and weighting not in (None, "none"):
        raise ValueError(f"diffusion.weighting={weighting!r} is for L_simple; the vlb has its own weights; use none")

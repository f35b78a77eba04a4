"""Folders of diffusers, read and written: a UNet2DModel and a scheduler, each with its config.

Every field of the network's config is used, or raises an error that names it. Of the scheduler's config the fields that
describe weights are used; all others are options of samplers. A missing field has the default of diffusers, because the
values of the published networks would give the right shapes and wrong images.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from diffusion_jax import schedules
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.files import atomic_directory
from diffusion_jax.models import UNet, fields_of
from diffusion_jax.models.blocks import split_heads
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.description import DIFFUSION_DEFAULTS, Description, make_clip, make_description
from diffusion_jax.pretrained.tensors import open_tensors, read_json, save_tensors

__all__ = [
    "SchedulerSettings",
    "find_configs",
    "load_diffusers",
    "scheduler_from_config",
    "scheduler_to_config",
    "unet_from_config",
    "unet_to_config",
    "write_folder",
]

# ---- The network

# The defaults of UNet2DModel, for fields that a config does not name.
_UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of learned time embeddings, which are not supported
}
# Fields of which `models.UNet` supports these values only.
_SUPPORTED_VALUES: dict[str, tuple] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
# (whether a block has attention, whether it resamples with a residual block; None: by downsample_type or upsample_type).
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}


def _read_blocks(field: str, types, known: Mapping[str, tuple], resample_type: str) -> tuple[list[bool], set[bool]]:
    """Whether each block has attention, and whether resampling is residual, in all blocks but the last, which has none."""
    has_attention, is_residual = [], set()
    for i, kind in enumerate(types):
        if kind not in known:
            raise PretrainedError(f"{field} contains {kind!r}; known: {', '.join(known)}")
        attention, residual = known[kind]
        has_attention.append(attention)
        if i < len(types) - 1:
            is_residual.add(resample_type == "resnet" if residual is None else residual)
    return has_attention, is_residual


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a UNet2DModel's config. Raises: PretrainedError for unknown fields and unsupported values."""
    unknown = sorted(name for name in config if name not in _UNET_DEFAULTS and not name.startswith("_"))
    if unknown:
        raise PretrainedError(f"the config has fields that UNet2DModel does not have: {list_names(unknown)}")
    fields = _UNET_DEFAULTS | {name: value for name, value in config.items() if not name.startswith("_")}
    for name, values in _SUPPORTED_VALUES.items():
        if fields[name] not in values:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(map(repr, values))}")
    return fields


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The network of a UNet2DModel's config. Raises: PretrainedError that names the field which is not supported."""
    fields = _read_fields(config)
    widths = fields["block_out_channels"]
    channels = widths[0]
    if fields["time_embedding_dim"] not in (None, 4 * channels):
        raise PretrainedError(
            f"time_embedding_dim={fields['time_embedding_dim']} is not supported, only {4 * channels}"
        )
    down, down_residual = _read_blocks("down_block_types", fields["down_block_types"], _DOWN, fields["downsample_type"])
    up, up_residual = _read_blocks("up_block_types", fields["up_block_types"], _UP, fields["upsample_type"])
    if len(widths) != len(down) or up[::-1] != down:
        raise PretrainedError(
            f"up_block_types={list(fields['up_block_types'])} do not mirror "
            f"down_block_types={list(fields['down_block_types'])}"
        )
    if len(down_residual | up_residual) > 1:
        raise PretrainedError("down_block_types and up_block_types mix residual blocks and convolutions between levels")
    scale_shift = fields["resnet_time_scale_shift"] == "scale_shift"
    groups = fields["norm_num_groups"]
    middle_groups = fields["attn_norm_num_groups"] or (None if scale_shift else groups)
    if middle_groups != groups:
        raise PretrainedError(
            f"attn_norm_num_groups={fields['attn_norm_num_groups']} is not supported, only norm_num_groups={groups}"
        )
    padding = fields["downsample_padding"]
    return UNet(
        channels=channels,
        channel_multipliers=parameters.channel_multipliers(widths, channels),
        num_res_blocks=fields["layers_per_block"],
        attention_levels=tuple(i for i, has_attention in enumerate(down) if has_attention),
        head_channels=fields["attention_head_dim"],
        resample_blocks=True in down_residual,
        scale_shift_norm=scale_shift,
        embedding_cos_first=fields["flip_sin_to_cos"],
        embedding_freq_shift=float(fields["freq_shift"]),
        downsample_padding=(padding, padding) if padding else (0, 1),
        num_groups=groups,
        norm_epsilon=fields["norm_eps"],
        dropout=fields["dropout"],
        num_classes=fields["num_class_embeds"] or 0,
        out_channels=fields["out_channels"],
    )


# Fields that do not change the network's output, or that UNet2DModel stores otherwise.
_FIELDS_STORED_OTHERWISE = {
    "num_heads",
    "head_channels",
    "num_classes",
    "label_dropout",
    "out_channels",
    "initializer",
    "dtype",
    "precision",
    "remat",
    "condition_dropout",
}


def unet_to_config(description: Description) -> dict[str, Any]:
    """The config of UNet2DModel. Raises: PretrainedError that names the fields which UNet2DModel does not support."""
    model = description.model
    if not isinstance(model, UNet):
        raise PretrainedError(f"{type(model).__name__}: diffusers has no such network; use save_safetensors")
    widths = [model.width(level) for level in range(len(model.channel_multipliers))]
    resampling, down_block, up_block = "conv", "DownBlock2D", "UpBlock2D"
    if model.resample_blocks:
        resampling, down_block, up_block = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    levels = range(len(widths))
    size = description.image_size
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": size[0] if len(set(size)) == 1 else list(size),
        "in_channels": description.channels,
        "out_channels": model.out_channels or description.channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if i in model.attention_levels else down_block for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in model.attention_levels else up_block for i in reversed(levels)],
        "attention_head_dim": _head_channels(model, widths),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": model.downsample_padding[0],
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "attn_norm_num_groups": model.num_groups if model.scale_shift_norm else None,
        "flip_sin_to_cos": model.embedding_cos_first,
        "freq_shift": model.embedding_freq_shift,
        "norm_num_groups": model.num_groups,
        "norm_eps": model.norm_epsilon,
        "dropout": model.dropout,
        "num_class_embeds": (model.num_classes + bool(model.label_dropout)) or None,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "act_fn": "silu",
        "mid_block_scale_factor": 1,
        "add_attention": True,
    }
    read = unet_from_config(config)
    lost = [
        f"model.{name}={value!r}"
        for name, value in fields_of(model).items()
        if name not in _FIELDS_STORED_OTHERWISE and value != getattr(read, name)
    ]
    if description.low_resolution:
        lost.append(f"low_resolution={description.low_resolution}")
    if "x" in description.normalizations:
        lost.append("normalizations, the units of the data")
    if any(side % model.divisor for side in size):
        lost.append(f"image_size={size}, no multiple of {model.divisor}")
    if lost:
        raise PretrainedError(f"diffusers' UNet2DModel does not support {'; '.join(lost)}; use save_safetensors")
    return config


def _head_channels(model: UNet, widths: Sequence[int]) -> int | None:
    """attention_head_dim. Raises: PretrainedError if the layers have heads of different widths."""
    if model.head_channels is None and model.num_heads == 1:
        return None
    attention_widths = {widths[level] for level in model.attention_levels} | {widths[-1]}
    head_channels = {c // split_heads(c, model.num_heads, model.head_channels) for c in attention_widths}
    if len(head_channels) > 1:
        raise PretrainedError(
            f"num_heads={model.num_heads}: UNet2DModel has heads of one width, and these are {sorted(head_channels)} wide"
        )
    return head_channels.pop()


# ---- The scheduler

# Schedulers of the DDPM process, and whether each clips x_0 by default.
_SCHEDULERS = {
    "DDPMScheduler": True,
    "DDIMScheduler": True,
    "DDIMInverseScheduler": True,
    "PNDMScheduler": False,
    "DEISMultistepScheduler": False,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "UniPCMultistepScheduler": False,
}
_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


class SchedulerSettings(NamedTuple):
    """leaves: of `config.diffusion`. betas: float64 [T] if the config has a table of them. clip: as the samplers take it."""

    leaves: dict[str, Any]
    betas: np.ndarray | None
    clip: bool | Callable


def scheduler_from_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """The settings in a scheduler's config. Raises: PretrainedError that names the field which is not supported."""
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    variance = config.get("variance_type") or "fixed_small"
    for name, value, known in (
        ("beta_schedule", kind, _SCHEDULES),
        ("prediction_type", prediction, _PREDICTIONS),
        ("variance_type", variance, _VARIANCES),
    ):
        if value not in known:
            raise PretrainedError(f"the scheduler's {name}={value!r} is not supported; known: {', '.join(known)}")
    class_name = config.get("_class_name", "DDPMScheduler")
    if class_name not in _SCHEDULERS:
        raise PretrainedError(
            f"the scheduler's _class_name={class_name!r} is not supported; known: {', '.join(_SCHEDULERS)}"
        )
    table = config.get("trained_betas")
    for name in ("rescale_betas_zero_snr", "thresholding"):
        if config.get(name):
            raise PretrainedError(f"the scheduler's {name}=True is not supported")
    clip: bool | Callable = config.get("clip_sample", _SCHEDULERS[class_name])
    bound = float(config.get("clip_sample_range", 1.0))
    if clip and bound != 1:
        clip = make_clip(bound)
    leaves = {
        "schedule": _SCHEDULES[kind],
        "num_timesteps": len(table) if table is not None else config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "prediction": _PREDICTIONS[prediction],
        "variance": _VARIANCES[variance],
    }
    return SchedulerSettings(leaves, None if table is None else np.asarray(table, np.float64), clip)


def scheduler_to_config(description: Description) -> dict[str, Any]:
    """The config of DDPMScheduler. Raises: PretrainedError that names a field which DDPMScheduler does not support."""
    schedule = description.schedule
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise PretrainedError("rescale_timesteps: the network time of diffusers is the index itself")
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if description.prediction not in predictions:
        raise PretrainedError(f"prediction={description.prediction!r}: DDPMScheduler supports {', '.join(predictions)}")
    if description.variance not in _VARIANCES.values():
        raise PretrainedError(f"variance={description.variance!r}: DDPMScheduler does not support this variance")
    if not isinstance(description.clip, bool):
        raise PretrainedError("clip: DDPMScheduler supports only True and False")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": predictions[description.prediction],
        "variance_type": description.variance,
        "clip_sample": description.clip,
    }
    leaves = description.diffusion or {}
    schedule_names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if leaves.get("schedule") in schedule_names:
        return config | {
            "beta_schedule": schedule_names[leaves["schedule"]],
            "beta_start": leaves.get("beta_start", DIFFUSION_DEFAULTS["beta_start"]),
            "beta_end": leaves.get("beta_end", DIFFUSION_DEFAULTS["beta_end"]),
        }
    return config | {"trained_betas": [float(beta) for beta in schedule.betas]}


# ---- The folder


def find_configs(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """(the network's folder, the scheduler's config) of a pipeline's folder, in the newer or older layout; else None."""
    for network in (folder / "unet", folder):
        config = network / "config.json"
        if config.is_file() and '"_class_name"' in config.read_text(errors="replace"):
            configs = [path / "scheduler_config.json" for path in (folder / "scheduler", folder)]
            return network, next((path for path in configs if path.is_file()), configs[0])
    return None


def load_diffusers(folder: pathlib.Path, with_params: bool) -> tuple[Description, dict | None]:
    """The description of a pipeline's folder, and its parameters if `with_params`, else None. Raises: PretrainedError."""
    paths = find_configs(folder)
    assert paths is not None  # `pretrained.load` has found them
    network, scheduler = paths
    _check_pipeline(folder, network)
    if not scheduler.is_file():
        raise PretrainedError(f"{folder} contains no scheduler_config.json: give the folder of the whole pipeline")
    try:
        description = _describe(read_json(network / "config.json"), read_json(scheduler))
    except (PretrainedError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise PretrainedError(f"{network} or {scheduler}: {error}") from None
    return description, _load_params(network, description) if with_params else None


def _check_pipeline(folder: pathlib.Path, network: pathlib.Path) -> None:
    """Raises: PretrainedError for a pipeline of another kind than DDPMPipeline."""
    index = folder / "model_index.json"
    others = {name for name in (read_json(index) if index.is_file() else {}) if not name.startswith("_")}
    others -= {"unet", "scheduler"}
    if others:
        raise PretrainedError(
            f"{folder}: a pipeline with {list_names(sorted(others))} is not supported, only an unet and a scheduler, whose "
            "output is an image"
        )
    kind = read_json(network / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise PretrainedError(f"{network}: {kind} is not supported, only UNet2DModel")


def _describe(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Description:
    """The description of a UNet2DModel's config and a scheduler's."""
    size, model = config.get("sample_size"), unet_from_config(config)
    settings = scheduler_from_config(scheduler)
    channels = config.get("in_channels", _UNET_DEFAULTS["in_channels"])
    if size is None:
        raise PretrainedError("the config has no sample_size, the image size in pixels: add it")
    family = f"diffusers, {config.get('_diffusers_version', '')}"
    description = make_description(family, model, size, settings.leaves, channels=channels, clip=settings.clip)
    needed = channels * (2 if description.variance.startswith("learned") else 1)
    if model.out_channels != needed:
        raise PretrainedError(
            f"out_channels={model.out_channels} and variance_type={description.variance!r} do not fit "
            f"in_channels={channels}, which would need {needed}"
        )
    if settings.betas is None:
        return description
    return dataclasses.replace(description, schedule=schedules.from_betas(settings.betas), diffusion=None)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _load_params(network: pathlib.Path, description: Description) -> dict:
    files = [f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((network / file for file in files if (network / file).is_file()), None)
    if path is None:
        raise PretrainedError(f"{network} contains no weights: neither {' nor '.join(files)}")
    tensors = open_tensors(path)

    def new_name(name: str) -> str:
        parts = name.split(".")
        return ".".join(_OLD_ATTENTION.get(part, part) for part in parts) if "attentions" in parts else name

    names = {new_name(name): name for name in tensors}
    shapes = parameters.parameter_shapes(description.model, description.example_shape)

    def read(name, parameter, shape):
        return parameters.from_torch(tensors[names[name]], parameter, shape)

    return parameters.build_params(str(path), shapes, names, lambda p: parameters.DIFFUSERS(p, description.model), read)


def write_folder(description: Description, params, folder: pathlib.Path) -> None:
    """Writes the folder of a DDPMPipeline completely or not at all. Raises: PretrainedError, before writing; OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} exists and is not empty: choose another path")
    network, scheduler = unet_to_config(description), scheduler_to_config(description)
    tensors = {
        parameters.DIFFUSERS(path, description.model): parameters.to_torch(np.asarray(value), path)
        for path, value in flax.traverse_util.flatten_dict(params).items()
    }
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    contents = {"unet/config.json": network, "scheduler/scheduler_config.json": scheduler, "model_index.json": index}
    with atomic_directory(folder) as temporary:
        for name in ("unet", "scheduler"):
            (temporary / name).mkdir()
        save_tensors(tensors, temporary / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")

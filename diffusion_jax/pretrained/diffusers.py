"""Reads and writes diffusers folders: a UNet2DModel and a scheduler, each with its config.

Every field of the network's config is used, or raises an error that names the field. From the scheduler's config, the fields
that describe weights are used; all other fields are sampler options. Missing fields get diffusers' defaults. If they got
the values of published networks, the shapes could fit, but the images would be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from diffusion_jax import schedules
from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.files import atomic_directory
from diffusion_jax.models import UNet, network_fields
from diffusion_jax.models.layers import split_heads
from diffusion_jax.pretrained import parameters
from diffusion_jax.pretrained.model import DIFFUSION_DEFAULTS, Model, make_clip, make_model

# ---- The names of parameters


NAMING = parameters.Naming(
    {
        "block": "{direction}_blocks.{order}.resnets.{number}",
        "attn": "{direction}_blocks.{order}.attentions.{number}",
        "downsample": "down_blocks.{order}.downsamplers.0",
        "downsample_conv": "down_blocks.{order}.downsamplers.0.conv",
        "upsample": "up_blocks.{order}.upsamplers.0",
        "upsample_conv": "up_blocks.{order}.upsamplers.0.conv",
        "mid_block_0": "mid_block.resnets.0",
        "mid_attn": "mid_block.attentions.0",
        "mid_block_1": "mid_block.resnets.1",
        "time_0": "time_embedding.linear_1",
        "time_1": "time_embedding.linear_2",
        "class": "class_embedding",
        "norm_out": "conv_norm_out",
        "time_proj": "time_emb_proj",
        "skip": "conv_shortcut",
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj": "to_out.0",
    }
)

# ---- The network

# Fields for which `models.UNet` supports only these values; the first is the default of UNet2DModel.
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
# The defaults of UNet2DModel, for fields that are missing in a config.
_UNET_DEFAULTS: dict[str, Any] = {name: values[0] for name, values in _SUPPORTED_VALUES.items()} | {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # only for learned time embeddings, which are not supported
}
_UP_BLOCKS = {  # {encoder block: decoder block of the same level}
    "DownBlock2D": "UpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
}


# Fields of `models.UNet` that a config stores under other names.
_SAME_FIELDS = {
    "num_res_blocks": "layers_per_block",
    "embedding_cos_first": "flip_sin_to_cos",
    "embedding_freq_shift": "freq_shift",
    "num_groups": "norm_num_groups",
    "norm_epsilon": "norm_eps",
    "dropout": "dropout",
}


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """Builds the network from a UNet2DModel config. Raises: PretrainedError that names the unsupported field."""
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(config.keys() - _UNET_DEFAULTS.keys())
    if unknown:
        raise PretrainedError(f"the config has fields that UNet2DModel does not have: {list_names(unknown)}")
    fields = _UNET_DEFAULTS | config
    widths = fields["block_out_channels"]
    channels = widths[0]
    for name, values in (_SUPPORTED_VALUES | {"time_embedding_dim": (4 * channels, None)}).items():
        if fields[name] not in values:
            raise PretrainedError(f"{name}={fields[name]!r} is not supported, only {' or '.join(map(repr, values))}")
    down, up = list(fields["down_block_types"]), list(fields["up_block_types"])
    unknown = [block for block in down if block not in _UP_BLOCKS]
    if unknown:
        raise PretrainedError(f"down_block_types contains {unknown[0]!r}; known: {', '.join(_UP_BLOCKS)}")
    if len(widths) != len(down) or up[::-1] != [_UP_BLOCKS[block] for block in down]:
        raise PretrainedError(f"up_block_types={up} do not mirror down_block_types={down}, one for each width")
    residual = {
        block.startswith("Resnet") or (block.startswith("Attn") and fields[name] == "resnet")
        for name, blocks in (("downsample_type", down), ("upsample_type", up))
        for block in blocks
    }
    if len(residual) > 1:
        raise PretrainedError("the block types, downsample_type and upsample_type mix residual blocks and convolutions")
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
        attention_levels=tuple(i for i, block in enumerate(down) if block.startswith("Attn")),
        head_channels=fields["attention_head_dim"],
        resample_blocks=True in residual,
        scale_shift_norm=scale_shift,
        downsample_padding=(padding, padding) if padding else (0, 1),
        num_classes=fields["num_class_embeds"] or 0,
        out_channels=fields["out_channels"],
        **{ours: fields[theirs] for ours, theirs in _SAME_FIELDS.items()},
    )


# Fields that do not change the network's output, or that UNet2DModel stores in another form.
_FIELDS_STORED_OTHERWISE = (
    "num_heads head_channels num_classes label_dropout condition_dropout out_channels initializer dtype precision remat"
).split()


def unet_to_config(net: Model) -> dict[str, Any]:
    """Returns the UNet2DModel config. Raises: PretrainedError that names the unsupported fields."""
    model = net.model
    if not isinstance(model, UNet):
        raise PretrainedError(
            f"{type(model).__name__}: diffusers has no such network; use save_safetensors, or convert RUN OUT.safetensors"
        )
    widths = [model.width(level) for level in range(len(model.channel_multipliers))]
    resampling, down_block, up_block = "conv", "DownBlock2D", "UpBlock2D"
    if model.resample_blocks:
        resampling, down_block, up_block = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    levels, size = range(len(widths)), net.image_size
    has_one_head = model.head_channels is None and model.num_heads == 1
    attention_widths = {widths[level] for level in model.attention_levels} | {widths[-1]}
    head_channels = {c // split_heads(c, model.num_heads, model.head_channels) for c in attention_widths}
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": size[0] if len(set(size)) == 1 else list(size),
        "in_channels": net.channels,
        "out_channels": model.out_channels or net.channels,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if i in model.attention_levels else down_block for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in model.attention_levels else up_block for i in reversed(levels)],
        "attention_head_dim": None if has_one_head else min(head_channels),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": model.downsample_padding[0],
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "attn_norm_num_groups": model.num_groups if model.scale_shift_norm else None,
        "num_class_embeds": (model.num_classes + bool(model.label_dropout)) or None,
        **{theirs: getattr(model, ours) for ours, theirs in _SAME_FIELDS.items()},
    }
    read = unet_from_config(config)
    lost = [
        f"model.{name}={value!r}"
        for name, value in network_fields(model).items()
        if name not in _FIELDS_STORED_OTHERWISE and value != getattr(read, name)
    ]
    unsupported = {
        f"num_heads={model.num_heads} in layers of different widths": not has_one_head and len(head_channels) > 1,
        f"low_resolution={net.low_resolution}": net.low_resolution,
        "normalizations (data units)": "x" in net.normalizations,
        f"image_size={size}, no multiple of {model.divisor}": any(side % model.divisor for side in size),
    }
    if lost := lost + [name for name, is_lost in unsupported.items() if is_lost]:
        raise PretrainedError(f"diffusers' UNet2DModel does not support {'; '.join(lost)}; use save_safetensors")
    return config


# ---- The scheduler

# {scheduler for DDPM's forward process: whether the scheduler clips x_0 by default}
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
_VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def scheduler_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None, bool | Callable]:
    """Converts a scheduler config to (settings of `config.diffusion`, betas float64 [T] or None, the clip for samplers).

    Raises: PretrainedError that names the unsupported field.
    """
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    variance = (config.get("variance_type") or "fixed_small").removesuffix("_log")
    class_name = config.get("_class_name", "DDPMScheduler")
    for name, value, known in (
        ("beta_schedule", kind, _SCHEDULES),
        ("prediction_type", prediction, _PREDICTIONS),
        ("variance_type", variance, _VARIANCES),
        ("_class_name", class_name, _SCHEDULERS),
        ("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr") or False, (False,)),
        ("thresholding", config.get("thresholding") or False, (False,)),
    ):
        if value not in known:
            raise PretrainedError(
                f"the scheduler's {name}={value!r} is not supported; known: {list_names(map(str, known), 10)}"
            )
    table = config.get("trained_betas")
    clip: bool | Callable = config.get("clip_sample", _SCHEDULERS[class_name])
    bound = float(config.get("clip_sample_range", 1.0))
    if clip and bound != 1:
        clip = make_clip(bound)
    settings = {
        "schedule": _SCHEDULES[kind],
        "num_timesteps": len(table) if table is not None else config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "prediction": _PREDICTIONS[prediction],
        "variance": variance,
    }
    return settings, None if table is None else np.asarray(table, np.float64), clip


def scheduler_to_config(net: Model) -> dict[str, Any]:
    """Returns the DDPMScheduler config. Raises: PretrainedError that names the unsupported fields."""
    schedule, predictions = net.schedule, {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    settings = net.diffusion or {}
    path, indices = settings.get("path"), np.arange(schedule.num_timesteps)
    unsupported = {
        f"path={path!r}": path,
        "rescale_timesteps": not path and not np.array_equal(schedule.timesteps, indices),
        "preconditioning='edm'": net.sigma_data is not None,
        f"prediction={net.prediction!r}": net.prediction not in predictions,
        f"variance={net.variance!r}": net.variance not in _VARIANCES,
        "a clip other than True and False": not isinstance(net.clip, bool),
    }
    if lost := [name for name, is_lost in unsupported.items() if is_lost]:
        raise PretrainedError(f"diffusers' DDPMScheduler does not support {'; '.join(lost)}; use save_safetensors")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": predictions[net.prediction],
        "variance_type": net.variance,
        "clip_sample": net.clip,
    }
    schedule_names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if settings.get("schedule") in schedule_names:
        betas = {name: settings.get(name, DIFFUSION_DEFAULTS[name]) for name in ("beta_start", "beta_end")}
        return config | {"beta_schedule": schedule_names[settings["schedule"]]} | betas
    return config | {"trained_betas": [float(beta) for beta in schedule.betas]}


# ---- The folder


def find_configs(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Finds (network folder, scheduler config) in a pipeline folder with the newer or older layout; None if not found."""
    for network in (folder / "unet", folder):
        config = network / "config.json"
        if config.is_file() and '"_class_name"' in config.read_text(errors="replace"):
            configs = [path / "scheduler_config.json" for path in (folder / "scheduler", folder)]
            return network, next((path for path in configs if path.is_file()), configs[0])
    return None


def load_diffusers(folder: pathlib.Path, network: pathlib.Path, scheduler: pathlib.Path, with_params: bool) -> Model:
    """Loads the network of a pipeline folder, with its parameters if `with_params`. network, scheduler: from `find_configs`.

    Raises: PretrainedError.
    """
    index = folder / "model_index.json"
    others = {name for name in (parameters.read_json(index) if index.is_file() else {}) if not name.startswith("_")}
    others -= {"unet", "scheduler"}
    if others:
        raise PretrainedError(
            f"{folder}: a pipeline with {list_names(sorted(others))} is not supported, only an unet and a scheduler, whose "
            "output is an image"
        )
    config = parameters.read_json(network / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise PretrainedError(f"{network}: {config.get('_class_name')} is not supported, only UNet2DModel")
    if not scheduler.is_file():
        raise PretrainedError(f"{folder} contains no scheduler_config.json: give the folder of the whole pipeline")
    try:
        net = _describe(config, parameters.read_json(scheduler))
    except PretrainedError as error:
        raise PretrainedError(f"{network} or {scheduler}: {error}") from None
    return net.read_params(*_open_weights(network), NAMING) if with_params else net


def _describe(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Model:
    """Builds the model, without parameters, from a UNet2DModel's config and a scheduler's config."""
    size, model = config.get("sample_size"), unet_from_config(config)
    settings, betas, clip = scheduler_from_config(scheduler)
    channels = config.get("in_channels", _UNET_DEFAULTS["in_channels"])
    if size is None:
        raise PretrainedError("the config has no sample_size, the image size in pixels: add it")
    needed = channels * (2 if settings["variance"].startswith("learned") else 1)
    if model.out_channels != needed:
        raise PretrainedError(
            f"out_channels={model.out_channels} and variance_type={settings['variance']!r} do not fit "
            f"in_channels={channels}, which would need {needed}"
        )
    net = make_model(f"diffusers, {config.get('_diffusers_version', '')}", model, size, settings, channels, clip=clip)
    if betas is None:
        return net
    return dataclasses.replace(net, schedule=schedules.from_betas(betas), diffusion=None)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _open_weights(network: pathlib.Path) -> tuple[pathlib.Path, parameters.Tensors]:
    """Opens the weights file. Returns: (path, tensors under diffusers' current names). Raises: PretrainedError."""
    files = [f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((network / file for file in files if (network / file).is_file()), None)
    if path is None:
        raise PretrainedError(f"{network} contains no weights: neither {' nor '.join(files)}")

    def new_name(name: str) -> str:
        parts = name.split(".")
        return ".".join(_OLD_ATTENTION.get(part, part) for part in parts) if "attentions" in parts else name

    return path, parameters.open_tensors(path).rename(new_name)


def save_diffusers(net: Model, folder: str | os.PathLike) -> None:
    """Writes a folder for `DDPMPipeline.from_pretrained`: safetensors and both configs, completely or not at all.

    Raises: PretrainedError, before anything is written, that names the unsupported fields; OSError.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PretrainedError(f"{folder} exists and is not empty: choose another path")
    network, scheduler = unet_to_config(net), scheduler_to_config(net)
    tensors = {
        NAMING(path, net.model): parameters.to_torch(np.asarray(value), path)
        for path, value in flax.traverse_util.flatten_dict(net.params).items()
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
        parameters.save_tensors(tensors, temporary / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
